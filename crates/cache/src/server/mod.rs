//! The embedded binary cache: Attic's protocol for writing, Nix's HTTP protocol for reading and `nix copy`.
//!
//! One process at a time serves a folder. `Server::open` locks the folder, or joins the process that has locked it;
//! `serve` answers on a listener until `Serving::stop`, and takes the folder over when that process ends. Owns the folder's content, including keys and tokens; never talks to
//! another cache, and never decides who publishes what.

mod attic;
mod body;
mod compress;
mod connection;
mod connection_limit;
mod content_check;
mod durable;
mod error;
mod folder;
mod gc;
mod guest;
mod host;
mod ingest;
mod live_tokens;
mod patience;
mod place;
mod records;
mod sealed;
mod serving;
mod sound;
mod state;
mod store;
mod substituter;
mod terms;
mod token;
mod token_file;
mod upload;
mod upload_info;
mod upload_name;
mod wire;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::{get, post, put};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use connection::listen;
pub use folder::FolderError;
pub use gc::{GcReport, Limits};
pub use token::{Scope, TokenError};
pub use token_file::{ListedToken, TokenFile, TokenFileError};

use crate::server::connection::{BytesMoved, CONNECTIONS, PER_ADDRESS};
use crate::server::connection_limit::ConnectionLimit;
use crate::server::error::{ErrorResponse, LoggedCause};
use crate::server::folder::{Folder, Layout};
use crate::server::place::{CLIENT_WAIT, Ends, Place, Role, STOP_GRACE, Seeker};
use crate::server::state::ServerState;
use crate::server::store::Store;
use crate::server::terms::Terms;
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::progress::Sink;
use flywheel_core::secret::Secret;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::{KeyError, PublicKey};

/// Attic's priority, lower than that of `cache.nixos.org` (40).
pub const DEFAULT_PRIORITY: u32 = 41;
/// zstd's own default level.
pub const DEFAULT_LEVEL: i32 = 3;
/// Paths used within an hour are not removed because of the size limit.
pub(crate) const DEFAULT_GRACE: Duration = Duration::from_secs(3600);
pub(crate) const DEFAULT_GC_INTERVAL: Duration = Duration::from_secs(600);
/// Paths signed with this key need not be uploaded, because everyone can get them from its cache.
pub(crate) const DEFAULT_UPSTREAM_KEY: &str = "cache.nixos.org-1";
/// Maximum length of a request's path in the log.
const LOGGED_PATH: usize = 120;

#[derive(Clone, Debug)]
pub struct Options {
    /// The caches it serves; missing ones are created.
    pub caches: Vec<CacheName>,
    /// Whether reading needs no token.
    pub public: bool,
    /// The file with the tokens; by default `tokens` in the folder, created at the first start.
    pub tokens: Option<PathBuf>,
    /// Whether a client that claims a known NAR must send it. Otherwise anyone with a write token
    /// can read any NAR, of other caches too, by its hash; in return, known NARs are not
    /// transferred again.
    pub require_proof: bool,
    /// Level of zstd for stored NARs, 1 to 19.
    pub level: i32,
    /// `Priority` in `nix-cache-info`: Nix queries lower values first.
    pub priority: u32,
    /// Names of keys; paths signed with them need not be uploaded.
    pub upstream_keys: Vec<String>,
    pub limits: Limits,
    pub gc_interval: Duration,
    pub log: Sink,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            caches: vec![CacheName::default()],
            public: true,
            tokens: None,
            require_proof: true,
            level: DEFAULT_LEVEL,
            priority: DEFAULT_PRIORITY,
            upstream_keys: vec![DEFAULT_UPSTREAM_KEY.to_owned()],
            limits: Limits {
                max_age: None,
                max_size: None,
                grace: DEFAULT_GRACE,
            },
            gc_interval: DEFAULT_GC_INTERVAL,
            log: Sink::silent(),
        }
    }
}

#[derive(Debug, Error)]
pub enum OpenError {
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error(transparent)]
    Tokens(#[from] TokenError),
    /// A signing key could not be read or created.
    #[error("the signing key `{}` could not be read or written", file.display())]
    KeyFile {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The content of a key file is not a key.
    #[error("the signing key `{}` is not a key", file.display())]
    Key {
        file: PathBuf,
        #[source]
        source: KeyError,
    },
}

impl Explain for OpenError {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Folder(error) => error.hint(),
            Self::Tokens(error) => Some(error.hint()),
            Self::KeyFile { .. } => None,
            Self::Key { .. } => {
                Some("Restore the file; its format is that of `nix key generate-secret`.".into())
            }
        }
    }
}

/// A cache server that has its folder, or has joined the process that has it, and does not listen yet.
#[derive(Debug)]
pub struct Server {
    seeker: Seeker,
    place: Place,
    tokens_file: PathBuf,
}

impl Server {
    /// Locks the folder and creates what is missing in it: tokens, keys, subfolders. If another process of this user
    /// has the lock, joins that one.
    ///
    /// # Errors
    /// When the process that holds the folder does not answer, or something in it cannot be read or created.
    pub async fn open(folder: &Path, options: Options) -> Result<Self, OpenError> {
        let root = folder.to_owned();
        let prepare = move || {
            let layout = Layout::open(&root)?;
            folder::prepare_caches(&layout, &options.caches).map_err(|source| {
                FolderError::Unusable {
                    folder: root,
                    source,
                }
            })?;
            let (terms, tokens_file) = Terms::open(&layout, options)?;
            Ok::<_, OpenError>((layout, terms, tokens_file))
        };
        // The disk can block for long.
        let prepared = tokio::task::spawn_blocking(prepare).await;
        let (layout, terms, tokens_file) = prepared
            .unwrap_or_else(|error| Err(unusable(folder, io::Error::other(error)).into()))?;
        let seeker = Seeker {
            layout,
            terms,
            router,
        };
        let place = seeker.start().await?;
        Ok(Self {
            seeker,
            place,
            tokens_file,
        })
    }

    /// Whether another process serves the folder for this one.
    pub fn is_guest(&self) -> bool {
        matches!(self.place, Place::Joined(_))
    }

    /// Starts answering on a listener. While the folder is this process's, also collects garbage, now and at every
    /// interval.
    ///
    /// # Errors
    /// When the listener has no address.
    pub fn serve(self, listener: TcpListener) -> io::Result<Serving> {
        let address = listener.local_addr()?;
        let terms = &self.seeker.terms;
        let public_keys = terms
            .caches
            .iter()
            .map(|(name, cache)| (name.clone(), cache.key.public()))
            .collect();
        let write_token = terms.tokens.current().write_token().cloned();
        let ends = Ends::default();
        let stop = ends.stop.clone();
        let tasks = tokio::spawn(run(self.seeker, self.place, listener, ends));
        Ok(Serving {
            address,
            public_keys,
            write_token,
            tokens_file: self.tokens_file,
            stop,
            tasks,
        })
    }
}

/// A running server. Dropping this value leaves the server running; `stop` ends it.
#[derive(Debug)]
pub struct Serving {
    address: SocketAddr,
    public_keys: Vec<(String, PublicKey)>,
    write_token: Option<Secret>,
    tokens_file: PathBuf,
    stop: CancellationToken,
    tasks: JoinHandle<()>,
}

impl Serving {
    /// `http://<address>`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The caches and their public keys, sorted by name.
    pub fn public_keys(&self) -> &[(String, PublicKey)] {
        &self.public_keys
    }

    pub fn public_key(&self, cache: &str) -> Option<&PublicKey> {
        self.public_keys
            .iter()
            .find(|(name, _)| name == cache)
            .map(|(_, key)| key)
    }

    /// A token that may write to every cache, if there is one.
    pub fn write_token(&self) -> Option<&Secret> {
        self.write_token.as_ref()
    }

    pub fn tokens_file(&self) -> &Path {
        &self.tokens_file
    }

    /// Stops accepting requests, lets open ones finish for at most 3 s, and releases the folder.
    pub async fn stop(self) {
        self.stop.cancel();
        // The task fails only by a panic, which has been reported where it happened.
        let _ = self.tasks.await;
    }
}

async fn run(seeker: Seeker, place: Place, listener: TcpListener, ends: Ends) {
    let (roles, role) = watch::channel(Role::Seeking(tokio::time::Instant::now() + CLIENT_WAIT));
    let holding = tokio::spawn(seeker.hold(place, roles, ends.clone()));
    let stop = ends.stop.clone();
    let answer = move |client, slot| place::answer(client, role.clone(), stop.clone(), slot);
    let limit = ConnectionLimit::new(CONNECTIONS, PER_ADDRESS);
    connection::serve(listener, limit, ends.stop, STOP_GRACE, answer).await;
    ends.drained.cancel();
    let _ = holding.await;
}

fn unusable(folder: &Path, source: io::Error) -> FolderError {
    FolderError::Unusable {
        folder: folder.to_owned(),
        source,
    }
}

/// Collects garbage in a folder that no server uses. Since no client is reading, there is no grace
/// period.
///
/// # Errors
/// When a server holds the folder, or the disk fails.
pub fn collect(folder: &Path, limits: &Limits) -> Result<GcReport, FolderError> {
    let unusable = |source| unusable(folder, source);
    let (store, _) = Store::open(Folder::open(folder, &[])?, Sink::silent()).map_err(unusable)?;
    let collected = gc::collect(&store, limits, false).map_err(unusable)?;
    store.close().map_err(unusable)?;
    Ok(collected)
}

fn router(state: Arc<ServerState>) -> Router {
    // GET serves substituters, PUT serves `nix copy`.
    let narinfo = get(substituter::get_narinfo).put(substituter::put_narinfo);
    let nar = get(substituter::get_nar).put(substituter::put_nar);
    let cache_config = get(attic::cache_config)
        .post(attic::refuse_change)
        .patch(attic::refuse_change)
        .delete(attic::refuse_change);
    Router::new()
        .route("/", get(async || "Flywheel's binary cache\n"))
        .route("/{file}", get(substituter::refuse_without_cache))
        .route("/_api/v1/cache-config/{cache}", cache_config)
        .route("/_api/v1/get-missing-paths", post(attic::get_missing_paths))
        .route("/_api/v1/upload-path", put(attic::upload_path))
        .route("/{cache}/attic-cache-info", get(attic::cache_config))
        .route("/{cache}/nix-cache-info", get(substituter::cache_info))
        .route("/{cache}/{file}", narinfo)
        .route("/{cache}/nar/{file}", nar)
        .fallback(async || ErrorResponse::not_found())
        .method_not_allowed_fallback(async || ErrorResponse::method_not_allowed())
        // Layers run from the last to the first, so the log sees the final response.
        .layer(from_fn(body::announce_close))
        .layer(from_fn_with_state(Arc::clone(&state), log))
        .with_state(state)
}

/// Logs one line for each upload and each failure, without headers or queries.
async fn log(State(state): State<Arc<ServerState>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    // The client chooses the path; it must not break the log's lines.
    let path = flywheel_core::text::one_line(request.uri().path(), LOGGED_PATH);
    let method = request.method().clone();
    let response = next.run(request).await;
    let status = response.status();
    let moved = response.extensions().get::<BytesMoved>().copied();
    // A 404 is not logged: substituters query missing paths all the time.
    if moved.is_some() || (status.as_u16() >= 400 && status.as_u16() != 404) {
        let (size, took) = (
            moved.map_or(0, |moved| moved.0),
            begun.elapsed().as_millis(),
        );
        let cause = response
            .extensions()
            .get::<LoggedCause>()
            .map_or(String::new(), |cause| format!(" ({})", cause.0));
        state.options.log.note(format!(
            "{method} {path} {} {size} B {took} ms{cause}",
            status.as_u16()
        ));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_can_be_embedded_and_gives_its_folder_back() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let mut known = None;
        for _ in 0..2 {
            let server = Server::open(folder.path(), Options::default())
                .await
                .expect("a process that has just ended is waited for");
            assert!(!server.is_guest());
            assert!(matches!(
                Folder::open(folder.path(), &[]),
                Err(FolderError::InUse(_))
            ));
            let serving = server
                .serve(TcpListener::bind("127.0.0.1:0").await.expect("loopback"))
                .expect("has an address");
            let client = flywheel_sys::http::client(&flywheel_sys::http::Roots::default())
                .expect("settings hold");
            let token = serving
                .write_token()
                .expect("the first start makes one")
                .clone();
            let ask = serde_json::json!({"cache": "main", "store_path_hashes": []});
            let request = client
                .post(format!("{}/_api/v1/get-missing-paths", serving.url()))
                .json(&ask);
            let answer = request
                .bearer_auth(token.expose())
                .send()
                .await
                .expect("it answers");
            assert_eq!(answer.status(), 200);
            let key = serving.public_key("main").expect("served").clone();
            assert_eq!(
                known.get_or_insert_with(|| (key.clone(), token.clone())),
                &(key, token),
                "the same again"
            );
            serving.stop().await;
        }
    }
}
