//! The store as the job sees it: what it holds, what was added, what belongs to what.
//! Reads Nix's database where it can and asks Nix where it cannot; never writes.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use thiserror::Error;

use crate::db::{self, Db};
use crate::path_info::{PathInfo, PathInfos};
use crate::path_json::{self, JsonError};
use crate::ping::{Opened, Ping, ping};
use crate::result_links;
use crate::store_path::{PathHash, STORE_DIR, StorePath};
use crate::store_watcher::StoreWatcher;
use crate::tool::{self, Flavour, Nix};
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::text::one_line;

/// Nix's state folder, unless `NIX_STATE_DIR` names another.
pub const STATE_DIR: &str = "/nix/var/nix";
/// Opening a store is quick; a daemon that takes longer than this counts as dead.
const PING_LIMIT: Duration = Duration::from_secs(20);
/// Listing a big store through a daemon may take a while.
const LIST_LIMIT: Duration = Duration::from_secs(180);
/// A daemon's worker opens the database right after it was connected to.
const WAKE_LIMIT: Duration = Duration::from_secs(2);
const WAKE_POLL_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Debug, Error)]
pub enum Error {
    #[error(transparent)]
    Nix(#[from] tool::Error),
    #[error("the Nix store does not open: {0}")]
    Closed(String),
    /// The database failed, and opening it again did not help.
    #[error(transparent)]
    Db(#[from] db::Error),
    /// The output of Nix was not understood.
    #[error("the output of `nix path-info` was not understood")]
    Json(#[from] JsonError),
    /// The folder with the job's result links could not be read.
    #[error("folder `{folder}` could not be read")]
    Folder {
        folder: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// One of our threads panicked.
    #[error("a thread that was reading the store panicked")]
    Thread(#[source] tokio::task::JoinError),
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        match self {
            Self::Thread(_) => Exit::Bug,
            _ => Exit::Host,
        }
    }
}

/// A point in the store's history. `added_since` returns what was added later.
#[derive(Clone, Debug)]
pub struct Mark(MarkKind);

impl Mark {
    /// The id of the path registered last; `None` for a store without a readable database.
    pub fn id(&self) -> Option<i64> {
        match &self.0 {
            MarkKind::Id(id) => Some(*id),
            MarkKind::Paths(_) => None,
        }
    }

    /// The mark of an earlier job, from the id it recorded.
    pub fn after_id(id: i64) -> Self {
        Self(MarkKind::Id(id))
    }
}

#[derive(Clone, Debug)]
enum MarkKind {
    /// The id of the path registered last.
    Id(i64),
    /// All paths there were, for a store without a readable database.
    Paths(Arc<BTreeSet<StorePath>>),
}

#[derive(Clone, Debug)]
pub struct Store {
    nix: Nix,
    state: PathBuf,
    db: Result<Arc<Mutex<Db>>, String>,
}

impl Store {
    /// Opens the store that `nix` uses. Its database is read directly if it is local and readable.
    ///
    /// # Errors
    /// When Nix itself cannot open the store.
    pub async fn open(nix: &Nix) -> Result<Self, Error> {
        let opened = match ping(nix, PING_LIMIT).await? {
            Ping::Open(opened) => opened,
            Ping::Failed(failure) => return Err(Error::Closed(failure.text().to_owned())),
        };
        Self::from_opened(nix, &opened).await
    }

    /// Like `open`, for a store that has been pinged with this same `nix`.
    ///
    /// # Errors
    /// When the thread that opens the database panics.
    pub async fn from_opened(nix: &Nix, opened: &Opened) -> Result<Self, Error> {
        let state = state_folder(nix);
        // The database describes this machine's store only; for any other, Nix is queried.
        let db = if is_own(&opened.url, &state) {
            let state = state.clone();
            blocking(move || Ok(open_db(&state))).await?
        } else {
            Err(format!("the store is `{}`", one_line(&opened.url, 120)))
        };
        Ok(Self {
            nix: nix.clone(),
            state,
            db: db.map(|db| Arc::new(Mutex::new(db))),
        })
    }

    /// Opens the local database alone, without running Nix and whichever store Nix would open.
    /// Returns `None` if the database cannot be read.
    pub(crate) async fn from_database(nix: &Nix) -> Option<Self> {
        let state = state_folder(nix);
        let folder = state.clone();
        let db = blocking(move || Ok(open_db(&folder))).await.ok()?.ok()?;
        Some(Self {
            nix: nix.clone(),
            state,
            db: Ok(Arc::new(Mutex::new(db))),
        })
    }

    /// Why Nix is queried instead of the database, which is slower; `None` if the database is in
    /// use.
    pub fn database_error(&self) -> Option<&str> {
        self.db.as_ref().err().map(String::as_str)
    }

    /// The database file for a watcher; `None` if it cannot be read.
    pub(crate) fn database_file(&self) -> Option<PathBuf> {
        self.db.is_ok().then(|| Db::file(&self.state))
    }

    /// Marks the current state of the store.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn mark(&self) -> Result<Mark, Error> {
        if self.db.is_ok() {
            // An id is enough, since ids only grow.
            return Ok(Mark(MarkKind::Id(self.query(Db::last_id).await?)));
        }
        let found = self.list().await?;
        let readable = found.infos.into_iter().map(|info| info.path);
        let unreadable = found
            .unreadable
            .iter()
            .filter_map(|path| path.path.parse().ok());
        Ok(Mark(MarkKind::Paths(Arc::new(
            readable.chain(unreadable).collect(),
        ))))
    }

    /// Returns everything added since `mark` that is still valid: built, substituted, copied or
    /// evaluated.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn added_since(&self, mark: &Mark) -> Result<PathInfos, Error> {
        let before = match &mark.0 {
            MarkKind::Id(id) => {
                let id = *id;
                let added = self.query(move |db| db.added_after(id)).await?;
                let infos = added.rows.into_iter().map(|(_, info)| info).collect();
                return Ok(PathInfos {
                    infos,
                    unreadable: added.unreadable,
                });
            }
            MarkKind::Paths(before) => Arc::clone(before),
        };
        let mut found = self.list().await?;
        found.infos.retain(|info| !before.contains(&info.path));
        found
            .unreadable
            .retain(|path| path.path.parse().is_ok_and(|path| !before.contains(&path)));
        Ok(found)
    }

    /// Watches for paths added after `mark` and reports each as it becomes valid. Returns `None`
    /// without a readable database; `added_since` at the end then finds the same paths.
    pub fn watch(
        &self,
        mark: &Mark,
        on_added: impl FnMut(Vec<PathInfo>) + Send + 'static,
    ) -> Option<StoreWatcher> {
        match (&mark.0, self.database_file()) {
            (MarkKind::Id(id), Some(file)) => StoreWatcher::start(&file, *id, on_added),
            _ => None,
        }
    }

    /// Returns the valid paths with these hashes, or none if the database cannot be read.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn valid_by_hash(&self, hashes: Vec<PathHash>) -> Result<Vec<StorePath>, Error> {
        if self.db.is_err() || hashes.is_empty() {
            return Ok(Vec::new());
        }
        self.query(move |db| db.valid_by_hash(&hashes)).await
    }

    /// Returns up to `most` valid paths, of at most `nar_size` bytes each, that a cache with this
    /// key probably has, or none if the database cannot be read.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn likely_served(
        &self,
        key: Option<&str>,
        nar_size: u64,
        most: u32,
    ) -> Result<Vec<StorePath>, Error> {
        if self.db.is_err() {
            return Ok(Vec::new());
        }
        let key = key.map(str::to_owned);
        self.query(move |db| db.likely_served(key.as_deref(), nar_size, most))
            .await
    }

    /// Returns the metadata of these paths. Paths that are not valid (any more) are left out.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn infos(&self, paths: &[StorePath]) -> Result<PathInfos, Error> {
        let paths = paths.to_vec();
        if self.db.is_ok() {
            return self.query(move |db| db.infos(&paths)).await;
        }
        let mut found = self.list().await?;
        let wanted: BTreeSet<String> = paths.iter().map(ToString::to_string).collect();
        found
            .infos
            .retain(|info| wanted.contains(&info.path.to_string()));
        found.unreadable.retain(|path| wanted.contains(&path.path));
        Ok(found)
    }

    /// Returns the metadata of these paths and of everything they refer to, transitively. Paths
    /// that are not valid are left out.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn closure(&self, paths: &[StorePath]) -> Result<PathInfos, Error> {
        let paths = paths.to_vec();
        if self.db.is_ok() {
            return self.query(move |db| db.closure(&paths)).await;
        }
        Ok(closure_in(self.list().await?, paths))
    }

    /// Returns everything that the named paths lead to: what they refer to and, for each derivation among that, its
    /// outputs and what was built from it after `mark`. Paths that are not valid are left out.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn leads_to(
        &self,
        named: Vec<StorePath>,
        mark: &Mark,
    ) -> Result<BTreeSet<StorePath>, Error> {
        if self.db.is_ok() {
            let mark = mark.id().unwrap_or_default();
            return self.query(move |db| db.leads_to(&named, mark)).await;
        }
        Ok(leads_to_in(&self.list().await?.infos, named))
    }

    /// Returns the store paths that links below `folder`, made or changed since `since`, point to.
    /// These are the job's results, even where nothing had to be built. Validity is not checked.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub async fn result_links(
        &self,
        folder: &Path,
        since: SystemTime,
    ) -> Result<Vec<StorePath>, Error> {
        let (gcroots, folder) = (self.state.join("gcroots"), folder.to_owned());
        blocking(move || {
            result_links::find(&gcroots, &folder, since)
                .map_err(|source| Error::Folder { folder, source })
        })
        .await
    }

    /// Runs a query on a thread that may block. If it fails, the database is opened anew and the
    /// query runs once more.
    async fn query<T: Send + 'static>(
        &self,
        query: impl Fn(&Db) -> Result<T, db::Error> + Send + 'static,
    ) -> Result<T, Error> {
        let db = self
            .db
            .as_ref()
            .map(Arc::clone)
            .map_err(|why| Error::Closed(why.clone()))?;
        let file = Db::file(&self.state);
        blocking(move || {
            // A panic under this lock leaves nothing half-done, because the database is only read.
            let mut db = db.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // The first error is dropped: a persistent one comes back from the new handle.
            if let Ok(answer) = query(&db) {
                return Ok(answer);
            }
            // A new handle helps if the file has been replaced since.
            *db = Db::open(&file)?;
            Ok(query(&db)?)
        })
        .await
    }

    /// Lists every valid path by running Nix.
    async fn list(&self) -> Result<PathInfos, Error> {
        let mut arguments = vec!["path-info", "--all", "--json"];
        // Nix 2.34 and later warn when the format is missing and announce that they will reject it.
        if self.nix.version.flavour != Flavour::Lix && self.nix.version.at_least(2, 33) {
            arguments.extend(["--json-format", "1"]);
        }
        let output = self.nix.run_checked(&arguments, LIST_LIMIT).await?;
        blocking(move || Ok(path_json::parse(&output.stdout)?)).await
    }
}

/// The folder in which this Nix keeps its state.
pub fn state_folder(nix: &Nix) -> PathBuf {
    nix.variable("NIX_STATE_DIR")
        .map_or_else(|| STATE_DIR.into(), PathBuf::from)
}

/// The socket of the daemon for this state folder.
pub(crate) fn daemon_socket(nix: &Nix) -> PathBuf {
    let named = nix.variable("NIX_DAEMON_SOCKET_PATH").map(PathBuf::from);
    named.unwrap_or_else(|| state_folder(nix).join("daemon-socket/socket"))
}

/// Whether a store with this URL is the one that the state folder describes.
fn is_own(url: &str, state: &Path) -> bool {
    let socket = state.join("daemon-socket/socket");
    matches!(url, "local" | "daemon")
        // Some versions print the socket's URL instead of `daemon`.
        || url
            .strip_prefix("unix://")
            .is_some_and(|path| Path::new(path) == socket)
}

/// Opens the database of a state folder, or returns the reason on one line. Blocking.
///
/// # Errors
/// When it is missing, unreadable, or empty although the store is not.
pub fn open_db(state: &Path) -> Result<Db, String> {
    let file = Db::file(state);
    let opened = Db::open(&file).or_else(|error| {
        if file.exists() {
            open_beside_daemon(&file, state).ok_or(error)
        } else {
            Err(error)
        }
    });
    let db = opened.map_err(|error| describe(&error))?;
    // A container may mount the host's store and socket but have a state folder of its own, with an
    // empty database.
    if db.last_id().map_err(|error| describe(&error))? == 0 && store_has_entries() {
        return Err(format!("`{}` lists no paths", file.display()));
    }
    Ok(db)
}

/// Opens the database while holding a connection to the daemon. An unprivileged reader needs the
/// database's shared memory, which exists only while some process has the database open. The
/// daemon's worker opens it for every connection, so the connection is held until our own handle
/// keeps it alive.
fn open_beside_daemon(file: &Path, state: &Path) -> Option<Db> {
    let _connection = UnixStream::connect(state.join("daemon-socket/socket")).ok()?;
    let deadline = Instant::now() + WAKE_LIMIT;
    loop {
        if let Ok(db) = Db::open(file) {
            return Some(db);
        }
        if Instant::now() > deadline {
            return None;
        }
        std::thread::sleep(WAKE_POLL_INTERVAL);
    }
}

fn store_has_entries() -> bool {
    let entries = std::fs::read_dir(STORE_DIR).into_iter().flatten().flatten();
    entries
        .into_iter()
        .any(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
}

fn describe(error: &db::Error) -> String {
    let source = std::error::Error::source(error)
        .map(ToString::to_string)
        .unwrap_or_default();
    one_line(&format!("{error}: {source}"), 300)
}

/// The same as `Db::leads_to`, for a listing of the whole store, which does not name the outputs of derivations.
fn leads_to_in(all: &[PathInfo], named: Vec<StorePath>) -> BTreeSet<StorePath> {
    let by_path: BTreeMap<&StorePath, &PathInfo> =
        all.iter().map(|info| (&info.path, info)).collect();
    let mut derived: BTreeMap<&StorePath, Vec<&StorePath>> = BTreeMap::new();
    for info in all {
        if let Some(deriver) = &info.deriver {
            derived.entry(deriver).or_default().push(&info.path);
        }
    }
    let mut found = BTreeSet::new();
    let mut ahead = named;
    while let Some(path) = ahead.pop() {
        let Some(info) = by_path.get(&path) else {
            continue;
        };
        if found.insert(path.clone()) {
            ahead.extend(info.references.iter().cloned());
            ahead.extend(derived.get(&path).into_iter().flatten().copied().cloned());
        }
    }
    found
}

/// Returns the part of `all` that is reachable from `paths`.
fn closure_in(all: PathInfos, paths: Vec<StorePath>) -> PathInfos {
    let mut known: BTreeMap<StorePath, PathInfo> = all
        .infos
        .into_iter()
        .map(|info| (info.path.clone(), info))
        .collect();
    let mut seen: BTreeSet<StorePath> = paths.iter().cloned().collect();
    let mut found = PathInfos::default();
    let mut ahead = paths;
    while let Some(path) = ahead.pop() {
        let Some(info) = known.remove(&path) else {
            continue;
        };
        ahead.extend(
            info.references
                .iter()
                .filter(|path| seen.insert((*path).clone()))
                .cloned(),
        );
        found.infos.push(info);
    }
    found.infos.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    // The references of an unreadable path are unknown, so it can be named but not followed.
    found.unreadable = all
        .unreadable
        .into_iter()
        .filter(|path| path.path.parse().is_ok_and(|p| seen.contains(&p)))
        .collect();
    found
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(Error::Thread)?
}
