//! Where a store is on this machine: the folder with its files, and the folder with its state. Both follow from what
//! Nix answers. It looks whether files exist, and neither runs Nix nor reads a store.
//!
//! A chroot store keeps the logical name `/nix/store` in its database, its links and its NARs, while the files are
//! below its root. `nix store ping` prints `local` for such a store (`NIX_REMOTE=/dir` in 2.8, 2.26 and 2.34), so that
//! the setting `store` has to be asked for as well.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::{fs, io};

use thiserror::Error;
use url::Url;

use crate::db::Db;
use crate::store_path::STORE_DIR;
use crate::tool::Nix;
use flywheel_core::text::one_line;
use flywheel_sys::host::home::Entry;
use flywheel_sys::http::redact;

/// Nix's state folder, unless `NIX_STATE_DIR` names another.
pub const STATE_DIR: &str = "/nix/var/nix";

/// Where a store is on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreLocation {
    /// The folder with the files of the store paths.
    pub folder: PathBuf,
    /// The folder with the database, the temporary roots and the garbage collector's roots; `None` where a daemon
    /// serves the store and it is unknown which state is the daemon's.
    pub state: Option<PathBuf>,
}

/// Why a store can be neither watched nor read. The texts are parts of a warning.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Unwatched {
    #[error("the store `{0}` is not on this machine")]
    Remote(String),
    /// The logical folder is another one, such as with `NIX_STORE_DIR`.
    #[error("the store's paths begin with `{}` and not with `{STORE_DIR}`", .0.display())]
    Prefix(PathBuf),
    #[error("the store's folder `{}` is not on this machine", .0.display())]
    Missing(PathBuf),
    /// Nix lists a path of which there is no file.
    #[error("the store's folder is not `{}`: Nix lists `{path}`, which is not there", folder.display())]
    Foreign { folder: PathBuf, path: String },
}

impl Unwatched {
    /// What to do about it, as a sentence.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Missing(_) | Self::Foreign { .. } => {
                "Add where its files are to the store's URL, as `?root=/dir` or `?real=/dir/nix/store`."
            }
            Self::Remote(_) => {
                "Let the job use a store on this machine (`NIX_REMOTE`, or `store` in Nix's settings), or copy the paths into one with `nix copy`."
            }
            Self::Prefix(_) => {
                "Use a Nix whose store is `/nix/store`: unset `NIX_STORE_DIR`, and name another root with `NIX_REMOTE=/dir`."
            }
        }
    }
}

/// A store as Nix's settings, `NIX_REMOTE` or `--store` name it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct StoreReference {
    kind: Kind,
    parameters: BTreeMap<String, String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// Nix chooses between the daemon and the files.
    Auto,
    /// The files themselves, below this root.
    Local(Option<PathBuf>),
    /// The daemon that listens on this socket.
    Daemon(Option<PathBuf>),
    /// Everything else.
    Remote,
}

impl StoreReference {
    /// Parses it as Nix does (`StoreReference::parse`, before 2.25 `openStore`).
    fn parse(text: &str) -> Self {
        let text = text.trim();
        let (base, query) = text.split_once('?').unwrap_or((text, ""));
        let path = |path: &str| (!path.is_empty()).then(|| PathBuf::from(decoded(path)));
        let kind = match base {
            "" | "auto" => Kind::Auto,
            "local" => Kind::Local(None),
            "daemon" => Kind::Daemon(None),
            _ => {
                if let Some(root) = base.strip_prefix("local://") {
                    Kind::Local(path(root))
                } else if let Some(socket) = base.strip_prefix("unix://") {
                    Kind::Daemon(path(socket))
                } else if base.contains('/') && !base.contains("://") {
                    // A plain path is not decoded.
                    Kind::Local(Some(base.into()))
                } else {
                    Kind::Remote
                }
            }
        };
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        Self {
            kind,
            parameters: pairs
                .map(|(name, value)| (decoded(name), decoded(value)))
                .collect(),
        }
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.parameters
            .get(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    }
}

/// Locates the store of `nix`. `opened` is the URL that `nix store ping` prints, `setting` the value of the setting
/// `store`.
///
/// # Errors
/// When no file of the store is on this machine, or its paths cannot be parsed.
pub fn locate(nix: &Nix, opened: &str, setting: &str) -> Result<StoreLocation, Unwatched> {
    let reference = StoreReference::parse(setting);
    let kind = match &reference.kind {
        Kind::Auto if opened.starts_with("daemon") || opened.starts_with("unix:") => {
            Kind::Daemon(None)
        }
        Kind::Auto if !opened.starts_with("local") => Kind::Remote,
        kind => kind.clone(),
    };
    if kind == Kind::Remote {
        let url = if reference.kind == Kind::Remote {
            setting
        } else {
            opened
        };
        return Err(Unwatched::Remote(shown(url)));
    }
    check_prefix(nix, &reference)?;
    let mut found = place(nix, &kind, &reference);
    if reference.kind == Kind::Auto && reference.parameters.is_empty() {
        found = fallback(nix, opened).unwrap_or(found);
    }
    if !found.folder.is_dir() {
        return Err(Unwatched::Missing(found.folder));
    }
    // A state folder without a database is not the store's. One that cannot be read is: Nix answers for it.
    found.state = found.state.filter(|state| !is_absent(&Db::file(state)));
    Ok(found)
}

/// The location that a reference names, whether or not a store is there.
fn place(nix: &Nix, kind: &Kind, reference: &StoreReference) -> StoreLocation {
    let root = match kind {
        Kind::Local(Some(root)) => Some(root.clone()),
        _ => reference.path("root"),
    };
    let root = root.map(|root| std::path::absolute(&root).unwrap_or(root));
    let below = |default: &str| {
        let relative = default.strip_prefix('/').expect("it is absolute");
        root.as_ref().map(|root| root.join(relative))
    };
    let folder = reference.path("real").or_else(|| below(STORE_DIR));
    let state = reference.path("state").or_else(|| below(STATE_DIR));
    let state = match kind {
        // Nothing in a socket's name says which store is behind it, but the usual socket is that of the usual store.
        Kind::Daemon(socket) if state.is_none() => {
            let socket = socket.clone().unwrap_or_else(|| daemon_socket(nix));
            is_same_file(&socket, &socket_of(&default_state(nix))).then(|| default_state(nix))
        }
        _ => Some(state.unwrap_or_else(|| default_state(nix))),
    };
    StoreLocation {
        folder: folder.unwrap_or_else(|| STORE_DIR.into()),
        state,
    }
}

/// Whether a store that a command names (`--store`, `NIX_REMOTE=`) is the one at `own`, which `nix` uses by itself.
/// Relative paths are below `folder`.
pub fn is_same_store(nix: &Nix, own: &StoreLocation, named: &str, folder: &Path) -> bool {
    if nix.variable("NIX_REMOTE") == Some(named) && !is_relative(named) {
        return true;
    }
    let reference = StoreReference::parse(named);
    let mut kind = reference.kind.clone();
    match &mut kind {
        Kind::Remote => return false,
        // Whether Nix takes the daemon or the files, the usual state is the same.
        Kind::Auto => kind = Kind::Local(None),
        Kind::Local(Some(root)) => *root = folder.join(&root),
        Kind::Local(None) | Kind::Daemon(_) => (),
    }
    let named = place(nix, &kind, &reference);
    let is_fallback = reference.kind == Kind::Auto && fallback(nix, "local").as_ref() == Some(own);
    is_fallback
        || (named.state.is_some()
            && named.state.as_deref().map(lexical) == own.state.as_deref().map(lexical)
            && lexical(&named.folder) == lexical(&own.folder))
}

/// Whether a reference names a folder that depends on where Nix runs.
fn is_relative(named: &str) -> bool {
    matches!(StoreReference::parse(named).kind, Kind::Local(Some(root)) if root.is_relative())
}

/// The value of `NIX_REMOTE` if it depends on the folder that Nix runs in.
pub fn relative_remote(nix: &Nix) -> Option<&str> {
    nix.variable("NIX_REMOTE")
        .filter(|named| is_relative(named))
}

/// The store that Nix makes in the home folder by itself (2.10 and later): for an ordinary user, where there is neither
/// a state folder nor a daemon. Only the first call prints a warning with the folder's name.
fn fallback(nix: &Nix, opened: &str) -> Option<StoreLocation> {
    let is_told = |name| nix.variable(name).is_some();
    let is_possible = opened.starts_with("local")
        && !rustix::process::geteuid().is_root()
        && !is_told("NIX_STATE_DIR")
        && !is_told("NIX_STORE_DIR")
        // Opening the store has just made its state folder, so one that is absent was not opened.
        && !Path::new(STATE_DIR).exists();
    if !is_possible {
        return None;
    }
    let roots = data_folders(nix)
        .into_iter()
        .map(|folder| folder.join("root"));
    roots
        .map(|root| StoreLocation {
            folder: root.join("nix/store"),
            state: Some(root.join("nix/var/nix")),
        })
        .find(|location| {
            let state = location.state.as_ref().expect("set above");
            !is_absent(&Db::file(state))
        })
}

/// Nix's data folders in the order in which it looks for them (`getDataDir`).
fn data_folders(nix: &Nix) -> Vec<PathBuf> {
    let below = |name: &str, rest: &str| nix.variable(name).map(|it| Path::new(it).join(rest));
    let homes = [nix.variable("HOME").map(PathBuf::from), home_of_user()];
    let owner = rustix::process::geteuid().as_raw();
    // Nix does not use a home folder of another user.
    let is_own = |home: &PathBuf| fs::metadata(home).is_ok_and(|facts| facts.uid() == owner);
    [below("NIX_DATA_HOME", ""), below("XDG_DATA_HOME", "nix")]
        .into_iter()
        .flatten()
        .chain(
            homes
                .into_iter()
                .flatten()
                .filter(is_own)
                .map(|home| home.join(".local/share/nix")),
        )
        .collect()
}

/// The home folder in `/etc/passwd`.
fn home_of_user() -> Option<PathBuf> {
    Entry::of_this_user().map(|entry| entry.home)
}

/// A logical folder other than `/nix/store` changes the names of all paths, and the hashes in them.
fn check_prefix(nix: &Nix, reference: &StoreReference) -> Result<(), Unwatched> {
    let variable = |name| nix.variable(name).map(PathBuf::from);
    let prefix = reference
        .path("store")
        .or_else(|| variable("NIX_STORE_DIR"))
        .or_else(|| variable("NIX_STORE"));
    match prefix {
        Some(prefix) if lexical(&prefix) != Path::new(STORE_DIR) => Err(Unwatched::Prefix(prefix)),
        _ => Ok(()),
    }
}

/// The folder in which this Nix keeps its state, unless its store is elsewhere.
pub fn default_state(nix: &Nix) -> PathBuf {
    nix.variable("NIX_STATE_DIR")
        .map_or_else(|| STATE_DIR.into(), PathBuf::from)
}

/// The socket of the daemon that `nix` connects to.
pub fn daemon_socket(nix: &Nix) -> PathBuf {
    let named = nix.variable("NIX_DAEMON_SOCKET_PATH").map(PathBuf::from);
    named.unwrap_or_else(|| socket_of(&default_state(nix)))
}

/// The socket of the daemon that serves the store with this state folder.
pub(crate) fn socket_of(state: &Path) -> PathBuf {
    state.join("daemon-socket/socket")
}

fn is_absent(file: &Path) -> bool {
    fs::symlink_metadata(file).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Whether two names lead to one file.
fn is_same_file(one: &Path, other: &Path) -> bool {
    one == other
        || matches!((fs::canonicalize(one), fs::canonicalize(other)), (Ok(one), Ok(other)) if one == other)
}

/// The path without `.`, `..` and double slashes; links are followed if it exists.
fn lexical(path: &Path) -> PathBuf {
    if let Ok(path) = fs::canonicalize(path) {
        return path;
    }
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(clean.pop()),
            Component::CurDir => (),
            part => clean.push(part),
        }
    }
    clean
}

/// A store's URL for messages, without credentials and on one line.
pub fn shown(url: &str) -> String {
    let plain = url.parse::<Url>().map_or_else(
        |_| {
            let place = url.split('?').next().unwrap_or_default();
            // What stands before an `@` may be a user with a password.
            place.rsplit('@').next().unwrap_or_default().to_owned()
        },
        |url| redact(&url),
    );
    one_line(&plain, 120)
}

/// Decodes `%20` and the like. Other text is left alone.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let code = after
            .get(..2)
            .filter(|_| first == b'%')
            .and_then(|code| std::str::from_utf8(code).ok())
            .and_then(|code| u8::from_str_radix(code, 16).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests;
