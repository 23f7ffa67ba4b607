//! The embedded binary cache: Attic's protocol for writing, Nix's HTTP protocol for reading and `nix copy`.
//!
//! One process serves one folder. `Server::open` locks the folder, `serve` answers on a listener
//! until `Serving::stop`. Owns the folder's content, including keys and tokens; never talks to
//! another cache, and never decides who publishes what.

mod attic;
mod body;
mod compress;
mod connection;
mod durable;
mod error;
mod folder;
mod gc;
mod ingest;
mod state;
mod store;
mod substituter;
mod token;
mod upload;
mod upload_info;

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
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
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use folder::FolderError;
pub use gc::{GcReport, Limits};
pub use token::TokenError;

use crate::server::connection::BytesMoved;
use crate::server::error::{ErrorResponse, LoggedCause};
use crate::server::folder::Folder;
use crate::server::state::{Cache, ServerState};
use crate::server::store::Store;
use crate::server::token::Tokens;
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::progress::Sink;
use flywheel_core::secret::Secret;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::{KeyError, PublicKey, SecretKey};

/// Attic's priority, lower than that of `cache.nixos.org` (40).
pub const DEFAULT_PRIORITY: u32 = 41;
/// zstd's own default level.
pub const DEFAULT_LEVEL: i32 = 3;
/// Paths used within an hour are not removed because of the size limit.
pub(crate) const DEFAULT_GRACE: Duration = Duration::from_secs(3600);
pub(crate) const DEFAULT_GC_INTERVAL: Duration = Duration::from_secs(600);
/// Paths signed with this key need not be uploaded, because everyone can get them from its cache.
pub(crate) const DEFAULT_UPSTREAM_KEY: &str = "cache.nixos.org-1";
/// Interval between two syncs: uploads are on disk this long after their arrival, plus the time of
/// the sync itself.
const SYNC_INTERVAL: Duration = Duration::from_secs(5);
/// Time limit for the last sync when the server stops.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);
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
            Self::Tokens(_) => Some(
                "Each line of the file is `<scope> <token> [<cache>]`, scope `read` or `write`."
                    .into(),
            ),
            Self::KeyFile { .. } => None,
            Self::Key { .. } => {
                Some("Restore the file; its format is that of `nix key generate-secret`.".into())
            }
        }
    }
}

/// A cache server that has locked its folder but does not listen yet.
#[derive(Debug)]
pub struct Server {
    state: Arc<ServerState>,
    tokens_file: PathBuf,
}

impl Server {
    /// Locks the folder and creates what is missing in it: tokens, keys, subfolders. Blocks on the
    /// disk for a moment.
    ///
    /// # Errors
    /// When another process holds the folder, or something in it cannot be read or created.
    pub fn open(folder: &Path, options: Options) -> Result<Self, OpenError> {
        let root = folder.to_owned();
        let folder = Folder::open(folder, &options.caches)?;
        let (tokens_file, tokens) = match &options.tokens {
            Some(file) => (file.clone(), Tokens::open(file)?),
            None => (folder.tokens(), Tokens::open_or_create(&folder.tokens())?),
        };
        if is_open_to_others(&tokens_file) {
            let text = format!(
                "`{}` can be read by other users; `chmod 600` it",
                tokens_file.display()
            );
            options.log.degraded("tokens", text);
        }
        let mut caches = Vec::new();
        for name in &options.caches {
            caches.push(Cache {
                name: name.clone(),
                key: open_key(&folder.key(name), name)?,
            });
        }
        // Recovery happens before the server listens, so no client sees a path that is then
        // removed.
        let (store, rolled_back) = Store::open(folder).map_err(|source| FolderError::Unusable {
            folder: root,
            source,
        })?;
        if let Some(paths) = rolled_back {
            let paths = flywheel_core::text::count(paths, "path");
            let text = format!(
                "the machine stopped while the cache was running; removed, since the last uploads may be incomplete: {paths}"
            );
            options.log.degraded("crash", text);
        }
        let store = Arc::new(store);
        Ok(Self {
            state: Arc::new(ServerState::new(store, tokens, caches, options)),
            tokens_file,
        })
    }

    fn write_token(&self) -> Option<&Secret> {
        self.state.tokens.write_token()
    }

    fn public_keys(&self) -> Vec<(String, PublicKey)> {
        self.state
            .caches
            .iter()
            .map(|(name, cache)| (name.clone(), cache.key.public()))
            .collect()
    }

    /// Starts answering on a listener, and collects garbage now and at every interval.
    ///
    /// # Errors
    /// When the listener has no address.
    pub fn serve(self, listener: TcpListener) -> io::Result<Serving> {
        let address = listener.local_addr()?;
        let (public_keys, write_token) = (self.public_keys(), self.write_token().cloned());
        // One token stops the listener, the collector and the regular sync.
        let stop = CancellationToken::new();
        let tasks = tokio::spawn(run(self.state, listener, stop.clone()));
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

/// Time that open requests get to finish after `stop`.
const STOP_GRACE: Duration = Duration::from_secs(3);

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

async fn run(state: Arc<ServerState>, listener: TcpListener, stop: CancellationToken) {
    let collecting = tokio::spawn(collect_regularly(Arc::clone(&state), stop.clone()));
    let syncing = tokio::spawn(sync_regularly(Arc::clone(&state), stop.clone()));
    // The other tasks stop with the same token and are joined afterwards.
    connection::serve(listener, router(Arc::clone(&state)), stop, STOP_GRACE).await;
    let _ = collecting.await;
    let _ = syncing.await;
    // If the disk needs longer, nothing is lost: the system has all data, and the next server waits
    // for the disk instead.
    let _ = tokio::time::timeout(CLOSE_LIMIT, sync(&state, Store::close)).await;
}

async fn sync_regularly(state: Arc<ServerState>, stop: CancellationToken) {
    while stop
        .run_until_cancelled(tokio::time::sleep(SYNC_INTERVAL))
        .await
        .is_some()
    {
        sync(&state, Store::sync).await;
    }
}

async fn sync(state: &Arc<ServerState>, how: fn(&Store) -> io::Result<()>) {
    let store = Arc::clone(&state.store);
    let broken = match tokio::task::spawn_blocking(move || how(&store)).await {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(error) if error.is_cancelled() => "the server had to stop at once".to_owned(),
        Err(error) => error.to_string(),
    };
    let text = format!(
        "recent uploads may not be on disk, and would be lost if the machine stopped:  {broken}"
    );
    state.options.log.degraded("disk", text);
}

async fn collect_regularly(state: Arc<ServerState>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(state.options.gc_interval.max(Duration::from_secs(1)));
    // After a long collection, wait a full interval before the next one.
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => (),
        }
        let (store, limits) = (Arc::clone(&state.store), state.options.limits);
        match tokio::task::spawn_blocking(move || gc::collect(&store, &limits, true)).await {
            Ok(Ok(done)) => state.options.log.note(done.to_string()),
            Ok(Err(error)) => state
                .options
                .log
                .degraded("gc", format!("garbage collection stopped: {error}")),
            Err(error) => state
                .options
                .log
                .degraded("gc", format!("garbage collection panicked:  {error}")),
        }
    }
}

/// Collects garbage in a folder that no server uses. Since no client is reading, there is no grace
/// period.
///
/// # Errors
/// When a server holds the folder, or the disk fails.
pub fn collect(folder: &Path, limits: &Limits) -> Result<GcReport, FolderError> {
    let unusable = |source| FolderError::Unusable {
        folder: folder.to_owned(),
        source,
    };
    let (store, _) = Store::open(Folder::open(folder, &[])?).map_err(unusable)?;
    let collected = gc::collect(&store, limits, false).map_err(unusable)?;
    store.close().map_err(unusable)?;
    Ok(collected)
}

fn is_open_to_others(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|about| about.permissions().mode() & 0o077 != 0)
}

fn open_key(file: &Path, cache: &CacheName) -> Result<SecretKey, OpenError> {
    let key_error = |source| OpenError::Key {
        file: file.to_owned(),
        source,
    };
    let file_error = |source| OpenError::KeyFile {
        file: file.to_owned(),
        source,
    };
    match std::fs::read_to_string(file) {
        Ok(text) => SecretKey::parse(&text).map_err(key_error),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // The key's name is the cache's, which clients see in signatures.
            let key = SecretKey::generate(cache.as_str()).map_err(key_error)?;
            token::write_private(file, key.encode().as_bytes()).map_err(file_error)?;
            Ok(key)
        }
        Err(error) => Err(file_error(error)),
    }
}

fn router(state: Arc<ServerState>) -> Router {
    // GET serves substituters, PUT serves `nix copy`.
    let narinfo = get(substituter::get_narinfo).put(substituter::put_narinfo);
    let nar = get(substituter::get_nar).put(substituter::put_nar);
    Router::new()
        .route("/", get(async || "Flywheel's binary cache\n"))
        .route("/_api/v1/cache-config/{cache}", get(attic::cache_config))
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
            let open = || Server::open(folder.path(), Options::default());
            let in_use =
                |error: &OpenError| matches!(error, OpenError::Folder(FolderError::InUse(_)));
            let server = folder::when_free(open, in_use);
            assert!(open().is_err_and(|error| in_use(&error)));
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
