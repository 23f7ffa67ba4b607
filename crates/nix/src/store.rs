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
use crate::settings::Settings;
use crate::store_location::{StoreLocation, Unwatched, default_state, locate, shown, socket_of};
use crate::store_path::{PathHash, STORE_DIR, StorePath};
use crate::store_watcher::StoreWatcher;
use crate::tool::{self, Nix};
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::text::one_line;

/// Opening a store is quick; a daemon that takes longer than this counts as dead.
const PING_LIMIT: Duration = Duration::from_secs(20);
/// Listing a big store through a daemon may take a while.
const LIST_LIMIT: Duration = Duration::from_secs(180);
/// How many of the paths that Nix lists are looked for in the store's folder.
const SAMPLE: usize = 16;
/// A daemon's worker opens the database right after it was connected to.
const WAKE_LIMIT: Duration = Duration::from_secs(2);
const WAKE_POLL_INTERVAL: Duration = Duration::from_millis(20);

#[derive(Debug, Error)]
pub enum Error {
    #[error(transparent)]
    Nix(#[from] tool::Error),
    #[error("the Nix store does not open: {0}")]
    Closed(String),
    /// The store opens, and its files cannot be read.
    #[error(transparent)]
    Unwatched(#[from] Unwatched),
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
    location: Result<StoreLocation, Unwatched>,
    db: Result<Arc<Mutex<Db>>, String>,
}

impl Store {
    /// Opens the store that `nix` uses. Its database is read directly if it is local and readable.
    ///
    /// # Errors
    /// When Nix itself cannot open the store.
    pub async fn open(nix: &Nix) -> Result<Self, Error> {
        let (opened, settings) = tokio::join!(ping(nix, PING_LIMIT), Settings::read(nix));
        let opened = match opened? {
            Ping::Open(opened) => opened,
            Ping::Failed(failure) => return Err(Error::Closed(failure.text().to_owned())),
        };
        Self::from_opened(nix, &opened, &settings?).await
    }

    /// Like `open`, for a store that has been pinged with this same `nix`, whose `settings` have been read.
    ///
    /// # Errors
    /// When the thread that opens the database panics.
    pub async fn from_opened(
        nix: &Nix,
        opened: &Opened,
        settings: &Settings,
    ) -> Result<Self, Error> {
        let setting = settings.text("store").unwrap_or_default();
        let location = locate(nix, &opened.url, &setting);
        let db = match &location {
            Ok(StoreLocation {
                folder,
                state: Some(state),
            }) => {
                let (folder, state) = (folder.clone(), state.clone());
                blocking(move || Ok(open_db(&state, &folder))).await?
            }
            // The daemon may serve any store, so no database of this machine is taken for its own.
            Ok(StoreLocation { state: None, .. }) => Err(format!(
                "the store is `{}`, and its database is not known",
                shown(&opened.url)
            )),
            Err(why) => Err(why.to_string()),
        };
        Ok(Self {
            nix: nix.clone(),
            location,
            db: db.map(|db| Arc::new(Mutex::new(db))),
        })
    }

    /// Opens the usual database alone, without running Nix and whichever store Nix would open.
    /// Returns `None` if the database cannot be read.
    pub(crate) async fn from_database(nix: &Nix) -> Option<Self> {
        let (state, folder) = (default_state(nix), PathBuf::from(STORE_DIR));
        let location = StoreLocation {
            folder: folder.clone(),
            state: Some(state.clone()),
        };
        let db = blocking(move || Ok(open_db(&state, &folder)))
            .await
            .ok()?
            .ok()?;
        Some(Self {
            nix: nix.clone(),
            location: Ok(location),
            db: Ok(Arc::new(Mutex::new(db))),
        })
    }

    /// Where the store is, or why it can be neither watched nor read.
    ///
    /// # Errors
    /// When it is not on this machine, or its paths cannot be parsed.
    pub fn location(&self) -> Result<&StoreLocation, &Unwatched> {
        self.location.as_ref()
    }

    /// The folder with the files of the store paths.
    pub fn folder(&self) -> &Path {
        self.location
            .as_ref()
            .map_or(Path::new(STORE_DIR), |location| &location.folder)
    }

    /// The store's state folder; the usual one where the store's own is not known.
    pub fn state(&self) -> PathBuf {
        let known = self.location.as_ref().ok();
        let state = known.and_then(|location| location.state.clone());
        state.unwrap_or_else(|| default_state(&self.nix))
    }

    /// The file or folder of a store path.
    pub fn file_of(&self, path: &StorePath) -> PathBuf {
        self.folder().join(path.base_name())
    }

    /// Why Nix is queried instead of the database, which is slower; `None` if the database is in
    /// use.
    pub fn database_error(&self) -> Option<&str> {
        self.db.as_ref().err().map(String::as_str)
    }

    /// The database file for a watcher; `None` if it cannot be read.
    pub(crate) fn database_file(&self) -> Option<PathBuf> {
        self.db.is_ok().then(|| Db::file(&self.state()))
    }

    /// The path whose id a mark is; `None` where it was deleted since, and without a readable database.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub async fn path_at(&self, mark: &Mark) -> Result<Option<StorePath>, Error> {
        let Some(id) = mark.id().filter(|_| self.db.is_ok()) else {
            return Ok(None);
        };
        let path = self.query(move |db| db.path_of_id(id)).await?;
        Ok(path.and_then(|path| path.parse().ok()))
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
        self.check_files(&found.infos)?;
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
        self.check_files(&found.infos)?;
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

    /// How many paths were registered after `mark` and deleted before `watcher` or a query after it could read them;
    /// nothing is known of those but their number. To be called after the watch has ended.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn unseen(&self, mark: &Mark, watcher: &StoreWatcher) -> Result<u64, Error> {
        let Some(mark) = mark.id() else { return Ok(0) };
        let (last, read) = watcher.rows_read();
        let (registered, later) = self.query(move |db| db.registered_after(last)).await?;
        Ok(u64::try_from(registered - mark - read - later).unwrap_or(0))
    }

    /// Returns those of `infos` that are made by content-addressed derivations, or by derivations that need such: they
    /// are substituted by their realisations, which a cache of paths alone does not have.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn floating(&self, infos: &[PathInfo]) -> Result<Vec<StorePath>, Error> {
        let derived = infos.iter().filter(|info| info.deriver.is_some());
        let derived: Vec<(StorePath, String)> = derived
            .filter_map(|info| Some((info.path.clone(), info.deriver.as_ref()?.name().to_owned())))
            .collect();
        if self.db.is_err() || derived.is_empty() {
            return Ok(Vec::new());
        }
        let names = self.query(Db::floating_derivations).await?;
        let floating = derived.into_iter().filter(|(_, name)| names.contains(name));
        Ok(floating.map(|(path, _)| path).collect())
    }

    /// Returns the outputs of these derivations, valid or not, as far as they are known before they are built; none if
    /// the database cannot be read.
    ///
    /// # Errors
    /// When the store gives no answer.
    pub async fn outputs_of(&self, derivations: Vec<StorePath>) -> Result<Vec<StorePath>, Error> {
        if self.db.is_err() || derivations.is_empty() {
            return Ok(Vec::new());
        }
        self.query(move |db| db.outputs_of(&derivations)).await
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
        let (gcroots, folder) = (self.state().join("gcroots"), folder.to_owned());
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
        let file = Db::file(&self.state());
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

    /// Checks that paths which Nix lists are in the folder that the store is thought to have. Only needed without a
    /// database, since a database lies beside its own store.
    fn check_files(&self, listed: &[PathInfo]) -> Result<(), Unwatched> {
        self.location.clone()?;
        let sample: Vec<&PathInfo> = listed.iter().take(SAMPLE).collect();
        let is_absent = |info: &&PathInfo| self.file_of(&info.path).symlink_metadata().is_err();
        let absent: Vec<&PathInfo> = sample.iter().copied().filter(is_absent).collect();
        // One that is absent may have been collected since, and one that is there may be in both stores.
        match absent.first() {
            Some(info) if 2 * absent.len() > sample.len() => Err(Unwatched::Foreign {
                folder: self.folder().to_owned(),
                path: info.path.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Lists every valid path by running Nix.
    async fn list(&self) -> Result<PathInfos, Error> {
        let arguments = [self.nix.version.path_info_as_json(), &["--all"]].concat();
        let output = self.nix.run_checked(&arguments, LIST_LIMIT).await?;
        blocking(move || Ok(path_json::parse(&output.stdout)?)).await
    }
}

/// Opens the database of a state folder, or returns the reason on one line. `store` is the folder with the files of
/// its paths. Blocking.
///
/// # Errors
/// When it is missing, unreadable, or empty although the store is not.
pub fn open_db(state: &Path, store: &Path) -> Result<Db, String> {
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
    if db.last_id().map_err(|error| describe(&error))? == 0 && has_entries(store) {
        return Err(format!("`{}` lists no paths", file.display()));
    }
    Ok(db)
}

/// Opens the database while holding a connection to the daemon. An unprivileged reader needs the
/// database's shared memory, which exists only while some process has the database open. The
/// daemon's worker opens it for every connection, so the connection is held until our own handle
/// keeps it alive.
fn open_beside_daemon(file: &Path, state: &Path) -> Option<Db> {
    let _connection = UnixStream::connect(socket_of(state)).ok()?;
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

fn has_entries(store: &Path) -> bool {
    let entries = std::fs::read_dir(store).into_iter().flatten().flatten();
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
