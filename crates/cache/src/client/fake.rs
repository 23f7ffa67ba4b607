//! A small Attic server for tests, on loopback, with a switch for each kind of failure, and a store folder to publish
//! from.

mod cutting;

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use futures_util::StreamExt as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256 as Hasher};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;
use url::Url;

use self::cutting::Cutting;
use crate::client::attic::{Attic, ExpectContinue, Pool, StallTimeout};
use crate::client::endpoint::Endpoint;
use flywheel_core::secret::Secret;
use flywheel_nix::hash::Sha256;
use flywheel_nix::key::SecretKey;
use flywheel_nix::nar;
use flywheel_nix::path_info::{PathInfo, fingerprint};
use flywheel_nix::store_path::StorePath;
use flywheel_sys::http::{Clients, Roots};

/// A token with all rights.
pub(crate) const GOOD: &str = "token-good";
/// A token that may push but not read.
pub(crate) const PUSH_ONLY: &str = "token-push-only";
/// A token that may read but not push.
pub(crate) const PULL_ONLY: &str = "token-pull-only";

/// NARs up to this size are kept; of larger ones only the hash is checked.
const KEPT: usize = 16 * 1024 * 1024;

/// The kinds of failure. With all of them off, the server works.
#[derive(Default)]
pub(crate) struct Faults {
    pub(crate) public: bool,
    pub(crate) unknown_cache: bool,
    /// Responds with 500 to every third request.
    pub(crate) every_third_fails: bool,
    /// Responds with 429 and `Retry-After: 1` to this many uploads.
    pub(crate) busy: u32,
    /// Stores this many uploads and closes the connection without a response.
    pub(crate) cut_after_storing: u32,
    /// Never responds to uploads.
    pub(crate) uploads_hang: bool,
    /// Never responds to anything.
    pub(crate) hang: bool,
    /// Responds to everything with this status and HTML.
    pub(crate) html: Option<u16>,
    /// Responds to everything with a redirect.
    pub(crate) redirect: bool,
    /// A proxy refuses larger uploads before their body is read.
    pub(crate) proxy_limit: Option<u64>,
    /// A query with more hashes gets a 500.
    pub(crate) query_limit: Option<usize>,
    /// Refuses uploads with 401 before their body is read, but responds to queries.
    pub(crate) uploads_refused: bool,
    /// Rejects this many uploads as another NAR than announced.
    pub(crate) bad_nar: u32,
    /// The wait before each upload's response.
    pub(crate) delay: Duration,
    /// Serves this instead of the NAR's true hash.
    pub(crate) lying_hash: Option<Sha256>,
    /// Serves no NAR bodies, or empty ones.
    pub(crate) nar_missing: bool,
    pub(crate) nar_empty: bool,
    pub(crate) unsigned: bool,
    pub(crate) narinfo_missing: bool,
    /// A Nix cache without Attic's API.
    pub(crate) plain: bool,
    /// Narinfos of these hashes are not served, although the paths are said to be there. An upload brings them back.
    pub(crate) hidden: HashSet<String>,
    /// NARs of these hashes break off when they are served, as Attic's do when its storage has lost a chunk.
    pub(crate) broken_off: HashSet<String>,
    /// A known NAR is not stored again, so that a damaged one stays damaged.
    pub(crate) deduplicates: bool,
    /// Never responds to `nix-cache-info`.
    pub(crate) info_hangs: bool,
}

/// One stored path.
pub(crate) struct Stored {
    pub(crate) info: Value,
    nar: Vec<u8>,
    pub(crate) by_header: bool,
}

pub(crate) struct Server {
    pub(crate) faults: Mutex<Faults>,
    pub(crate) stored: Mutex<HashMap<String, Stored>>,
    /// Base names in the order in which they were stored.
    pub(crate) order: Mutex<Vec<String>>,
    pub(crate) upstream: Mutex<HashSet<String>>,
    pub(crate) key: SecretKey,
    pub(crate) queries: AtomicUsize,
    pub(crate) uploads: AtomicUsize,
    pub(crate) uploading: AtomicUsize,
    pub(crate) max_uploading: AtomicUsize,
    pub(crate) requests: AtomicUsize,
    cuts: Arc<AtomicU32>,
}

impl Server {
    pub(crate) fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().expect("not poisoned")
    }

    pub(crate) fn has(&self, info: &PathInfo) -> bool {
        self.stored
            .lock()
            .expect("not poisoned")
            .contains_key(info.path.hash().as_str())
    }

    /// Makes the server serve another body than it was given.
    pub(crate) fn damage(&self, info: &PathInfo, change: impl FnOnce(&mut Vec<u8>)) {
        let mut stored = self.stored.lock().expect("lock");
        let stored = stored.get_mut(info.path.hash().as_str()).expect("stored");
        change(&mut stored.nar);
    }

    /// The stored paths with references that are neither stored nor upstream.
    pub(crate) fn dangling(&self) -> Vec<String> {
        let (stored, upstream) = (
            self.stored.lock().expect("lock"),
            self.upstream.lock().expect("lock"),
        );
        let missing = |name: &Value| {
            let name = name.as_str().expect("base name");
            !stored.contains_key(&name[..32]) && !upstream.contains(name)
        };
        let dangles = |stored: &&Stored| {
            stored.info["references"]
                .as_array()
                .expect("array")
                .iter()
                .any(missing)
        };
        stored
            .values()
            .filter(dangles)
            .map(|stored| stored.info["store_path"].to_string())
            .collect()
    }

    /// Whether no path was stored before a path that it refers to.
    pub(crate) fn was_in_order(&self) -> bool {
        let order = self.order.lock().expect("lock");
        let stored = self.stored.lock().expect("lock");
        order.iter().enumerate().all(|(n, name)| {
            let references = stored[&name[..32]].info["references"]
                .as_array()
                .expect("array")
                .clone();
            references
                .iter()
                .all(|r| order.iter().position(|o| o == r).is_none_or(|at| at <= n))
        })
    }
}

/// A fake server that runs until it is dropped, and the store folder beside it.
pub(crate) struct Fake {
    pub(crate) server: Arc<Server>,
    pub(crate) address: SocketAddr,
    pub(crate) store: TempDir,
    running: Option<AbortOnDropHandle<()>>,
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let server = Arc::new(Server {
            faults: Mutex::default(),
            stored: Mutex::default(),
            order: Mutex::default(),
            upstream: Mutex::default(),
            key: SecretKey::generate("main").expect("random"),
            queries: AtomicUsize::new(0),
            uploads: AtomicUsize::new(0),
            uploading: AtomicUsize::new(0),
            max_uploading: AtomicUsize::new(0),
            requests: AtomicUsize::new(0),
            cuts: Arc::default(),
        });
        let store = tempfile::tempdir().expect("temporary folder");
        let mut fake = Self {
            server,
            address: ([127, 0, 0, 1], 0).into(),
            store,
            running: None,
        };
        fake.listen().await;
        fake
    }

    /// Listens, again on the same port after `stop`.
    pub(crate) async fn listen(&mut self) {
        let listener = TcpListener::bind(self.address).await.expect("loopback");
        self.address = listener.local_addr().expect("bound");
        let listener = Cutting {
            listener,
            cuts: Arc::clone(&self.server.cuts),
        };
        let app = Router::new()
            .route("/_api/v1/cache-config/{cache}", get(config))
            .route("/_api/v1/get-missing-paths", post(missing))
            .route("/_api/v1/upload-path", put(upload))
            .route("/{cache}/{file}", get(read))
            .route("/{cache}/nar/{file}", get(body))
            .with_state(Arc::clone(&self.server));
        let serve = async move {
            // It ends only by being dropped.
            let _ = axum::serve(listener, app).await;
        };
        self.running = Some(AbortOnDropHandle::new(tokio::spawn(serve)));
    }

    /// Closes the port; open connections finish.
    pub(crate) async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            running.abort();
            let _ = running.await;
        }
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        let url: Url = format!("http://{}", self.address).parse().expect("URL");
        Endpoint::new(url, "main".parse().expect("name"))
    }

    pub(crate) fn attic(&self, token: &str) -> Attic {
        self.attic_with_timeout(token, StallTimeout::default())
    }

    pub(crate) fn attic_with_timeout(&self, token: &str, stall_timeout: StallTimeout) -> Attic {
        let clients = Clients::new(&Roots::default()).expect("settings hold");
        let pool = Arc::new(Pool::new(clients.direct));
        let sender = Box::new(ExpectContinue::new(
            Arc::clone(&pool),
            clients.streaming.clone(),
            stall_timeout,
        ));
        let api_timeout = Duration::from_secs(2);
        Attic::with_sender(
            self.endpoint(),
            Secret::new(token),
            (clients.api, clients.streaming),
            pool,
            sender,
            api_timeout,
        )
    }

    /// Adds a path of one file to the store folder.
    pub(crate) fn path(&self, name: &str, content: &[u8], references: &[&PathInfo]) -> PathInfo {
        let digest = Sha256(Hasher::digest(name).into()).base32();
        let path =
            StorePath::from_base_name(&format!("{}-{name}", &digest[..32])).expect("base name");
        let file = self.store.path().join(path.base_name());
        std::fs::write(&file, content).expect("written");
        let mut nar = Vec::new();
        nar::write(&file, &mut nar).expect("readable");
        let mut references: Vec<StorePath> =
            references.iter().map(|info| info.path.clone()).collect();
        references.sort_unstable();
        PathInfo {
            path,
            nar_hash: Sha256(Hasher::digest(&nar).into()),
            nar_size: nar.len() as u64,
            references,
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            ultimate: true,
        }
    }

    pub(crate) fn file(&self, info: &PathInfo) -> PathBuf {
        self.store.path().join(info.path.base_name())
    }
}

type App = State<Arc<Server>>;

#[derive(Clone, Copy, PartialEq)]
enum Want {
    Read,
    Push,
}

fn error(status: u16, name: &str, message: &str) -> Response {
    let status = StatusCode::from_u16(status).expect("status");
    (
        status,
        axum::Json(json!({"code": status.as_u16(), "error": name, "message": message})),
    )
        .into_response()
}

/// Applies the faults that concern any request, and then the token's rights, as atticd does.
async fn admit(server: &Server, headers: &HeaderMap, want: Want) -> Result<(), Response> {
    let count = server.requests.fetch_add(1, Ordering::Relaxed);
    let (hang, html, redirect, third, public, unknown) = {
        let faults = server.faults();
        let third = faults.every_third_fails && count % 3 == 2;
        (
            faults.hang,
            faults.html,
            faults.redirect,
            third,
            faults.public,
            faults.unknown_cache,
        )
    };
    if hang {
        std::future::pending::<()>().await;
    }
    if let Some(status) = html {
        let page = "<html><head><title>Welcome to nginx</title></head></html>";
        return Err((StatusCode::from_u16(status).expect("status"), page).into_response());
    }
    if redirect {
        return Err((
            StatusCode::FOUND,
            [(header::LOCATION, "https://elsewhere.example/x?t=1")],
        )
            .into_response());
    }
    if third {
        return Err(error(500, "InternalServerError", "the third"));
    }
    let given = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let (reads, pushes) = match given.strip_prefix("Bearer ").unwrap_or_default() {
        GOOD => (true, true),
        PUSH_ONLY => (public, true),
        PULL_ONLY => (true, false),
        _ => (public, false),
    };
    if unknown {
        return Err(if reads {
            error(404, "NoSuchCache", "none")
        } else {
            error(401, "Unauthorized", "who")
        });
    }
    match (want, reads, pushes) {
        (Want::Read, true, _) | (Want::Push, _, true) => Ok(()),
        (_, false, false) => Err(error(401, "Unauthorized", "who are you")),
        _ => Err(error(403, "AccessError", "not allowed")),
    }
}

async fn config(State(server): App, headers: HeaderMap) -> Response {
    if server.faults().plain {
        return StatusCode::NOT_FOUND.into_response();
    }
    if let Err(answer) = admit(&server, &headers, Want::Read).await {
        return answer;
    }
    let key = server.key.public().to_string();
    axum::Json(json!({
        "api_endpoint": "https://attic.elsewhere.example/", "public_key": key,
        "upstream_cache_key_names": ["upstream-1"], "is_public": server.faults().public, "store_dir": "/nix/store",
    }))
    .into_response()
}

async fn missing(
    State(server): App,
    headers: HeaderMap,
    axum::Json(question): axum::Json<Value>,
) -> Response {
    if server.faults().plain {
        return StatusCode::NOT_FOUND.into_response();
    }
    server.queries.fetch_add(1, Ordering::Relaxed);
    if let Err(answer) = admit(&server, &headers, Want::Push).await {
        return answer;
    }
    let hashes = question["store_path_hashes"].as_array().expect("array");
    if server
        .faults()
        .query_limit
        .is_some_and(|limit| hashes.len() > limit)
    {
        return error(500, "InternalServerError", "too many SQL variables");
    }
    let stored = server.stored.lock().expect("lock");
    let missing: Vec<&Value> = hashes
        .iter()
        .filter(|h| !stored.contains_key(h.as_str().expect("hash")))
        .collect();
    axum::Json(json!({ "missing_paths": missing })).into_response()
}

fn take(count: &mut u32) -> bool {
    let any = *count > 0;
    *count = count.saturating_sub(1);
    any
}

async fn upload(State(server): App, headers: HeaderMap, body: Body) -> Response {
    server.uploads.fetch_add(1, Ordering::Relaxed);
    if let Err(answer) = admit(&server, &headers, Want::Push).await {
        return answer;
    }
    let length: u64 = headers[header::CONTENT_LENGTH]
        .to_str()
        .expect("text")
        .parse()
        .expect("exact length");
    let (hang, cut, bad, delay) = {
        let mut faults = server.faults();
        if faults.uploads_refused {
            return error(401, "Unauthorized", "early");
        }
        if faults.proxy_limit.is_some_and(|limit| length > limit) {
            let page = "<html><head><title>413 Request Entity Too Large</title></head></html>";
            return (StatusCode::PAYLOAD_TOO_LARGE, page).into_response();
        }
        if take(&mut faults.busy) {
            return (
                StatusCode::TOO_MANY_REQUESTS,
                [(header::RETRY_AFTER, "1")],
                "slow down",
            )
                .into_response();
        }
        (
            faults.uploads_hang,
            take(&mut faults.cut_after_storing),
            take(&mut faults.bad_nar),
            faults.delay,
        )
    };
    if hang {
        std::future::pending::<()>().await;
    }
    let now = server.uploading.fetch_add(1, Ordering::SeqCst) + 1;
    server.max_uploading.fetch_max(now, Ordering::SeqCst);
    let received = receive(&headers, body).await;
    tokio::time::sleep(delay).await;
    server.uploading.fetch_sub(1, Ordering::SeqCst);
    let Some((info, nar, by_header)) = received.filter(|_| !bad) else {
        return error(400, "RequestError", "Bad NAR Hash or Size");
    };
    let name = info["store_path"]
        .as_str()
        .expect("path")
        .rsplit('/')
        .next()
        .expect("name")
        .to_owned();
    store(
        &server,
        &name[..32],
        Stored {
            info,
            nar,
            by_header,
        },
    );
    server.order.lock().expect("lock").push(name);
    if cut {
        server.cuts.fetch_add(1, Ordering::SeqCst);
    }
    axum::Json(json!({"kind": "Uploaded", "file_size": 1, "frac_deduplicated": null}))
        .into_response()
}

/// Stores a path, with the NAR that was there before where the server deduplicates.
fn store(server: &Server, hash: &str, mut stored: Stored) {
    if server.faults().deduplicates {
        if let Some(known) = server.stored.lock().expect("lock").remove(hash) {
            stored.nar = known.nar;
        }
    } else {
        server.faults().broken_off.remove(hash);
    }
    server.faults().hidden.remove(hash);
    server
        .stored
        .lock()
        .expect("lock")
        .insert(hash.to_owned(), stored);
}

/// Reads the description and the NAR; `None` if the NAR is not the one described.
async fn receive(headers: &HeaderMap, body: Body) -> Option<(Value, Vec<u8>, bool)> {
    let (mut preamble, mut info) = (0, Vec::new());
    match headers.get("x-attic-nar-info") {
        Some(text) => info = text.as_bytes().to_vec(),
        None => {
            preamble = headers["x-attic-nar-info-preamble-size"]
                .to_str()
                .ok()?
                .parse()
                .ok()?;
        }
    }
    let (mut hasher, mut size, mut nar) = (Hasher::new(), 0, Vec::new());
    let mut stream = body.into_data_stream();
    while let Some(block) = stream.next().await {
        let mut block = block.ok()?;
        if info.len() < preamble {
            let part = block.split_to(block.len().min(preamble - info.len()));
            info.extend_from_slice(&part);
        }
        hasher.update(&block);
        size += block.len();
        if size <= KEPT {
            nar.extend_from_slice(&block);
        }
    }
    let info: Value = serde_json::from_slice(&info).ok()?;
    let hash = Sha256(hasher.finalize().into());
    let good = info["nar_hash"] == hash.to_string() && info["nar_size"] == size;
    good.then_some((info, nar, preamble == 0))
}

async fn read(
    State(server): App,
    Path((_, file)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Err(answer) = admit(&server, &headers, Want::Read).await {
        return answer;
    }
    if file == "nix-cache-info" {
        let hangs = server.faults().info_hangs;
        if hangs {
            std::future::pending::<()>().await;
        }
        return "WantMassQuery: 1\nStoreDir: /nix/store\nPriority: 41\n".into_response();
    }
    let faults = server.faults();
    let stored = server.stored.lock().expect("lock");
    let stored = stored
        .get(file.trim_end_matches(".narinfo"))
        .filter(|_| !faults.narinfo_missing)
        .filter(|_| !faults.hidden.contains(file.trim_end_matches(".narinfo")));
    let Some(Stored { info, .. }) = stored else {
        return error(404, "NoSuchObject", "none");
    };
    let path: StorePath = info["store_path"]
        .as_str()
        .expect("text")
        .parse()
        .expect("path");
    let hash = faults
        .lying_hash
        .unwrap_or(Sha256::parse(info["nar_hash"].as_str().expect("text")).expect("hash"));
    let names: Vec<&str> = info["references"]
        .as_array()
        .expect("array")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let references: Vec<StorePath> = names
        .iter()
        .map(|name| StorePath::from_base_name(name).expect("name"))
        .collect();
    let size = info["nar_size"].as_u64().expect("number");
    let mut text = format!(
        "StorePath: {path}\nURL: nar/{}.nar\nCompression: zstd\nNarHash: sha256:{}\nNarSize: {size}\nReferences: {}\n",
        path.hash(),
        hash.base16(),
        names.join(" ")
    );
    if !faults.unsigned {
        text += &format!(
            "Sig: {}\n",
            server
                .key
                .sign(&fingerprint(&path, &hash, size, &references))
        );
    }
    text.into_response()
}

async fn body(
    State(server): App,
    Path((_, file)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Err(answer) = admit(&server, &headers, Want::Read).await {
        return answer;
    }
    let faults = server.faults();
    let stored = server.stored.lock().expect("lock");
    match stored
        .get(file.trim_end_matches(".nar"))
        .filter(|_| !faults.nar_missing)
    {
        None => error(404, "NoSuchObject", "none"),
        Some(_) if faults.nar_empty => Response::default(),
        Some(stored) if faults.broken_off.contains(file.trim_end_matches(".nar")) => {
            let packed = zstd::encode_all(&stored.nar[..], 1).expect("packed");
            let half = packed[..packed.len() / 2].to_vec();
            let broken = io::Error::other("a chunk is missing");
            Body::from_stream(futures_util::stream::iter([Ok(half), Err(broken)])).into_response()
        }
        Some(stored) => zstd::encode_all(&stored.nar[..], 1)
            .expect("packed")
            .into_response(),
    }
}
