//! The facts of a machine that decide how Nix is made ready there, and their words for people. Decides nothing: `plan`
//! does.

mod probe;
mod surroundings;

pub use surroundings::Surroundings;

use std::path::PathBuf;

use crate::tool::FoundProgram;

/// What a plan is made from. Tests write their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    pub user: User,
    pub sudo: Sudo,
    /// `/nix`.
    pub folder: Folder,
    /// Whether every user of this machine can put something else into the place of what is in `/nix`.
    pub is_folder_open: bool,
    pub nix: Option<FoundProgram>,
    /// Whether that Nix is below `/nix`, or links lead there.
    pub is_nix_below: bool,
    /// Whether a variable or `nix.conf` names another store or another socket, so that `/nix` decides nothing.
    pub is_elsewhere: bool,
    /// Whether `NIX_REMOTE` sends every call of Nix to the daemon.
    pub is_daemon_named: bool,
    pub socket: Socket,
    pub build_group: BuildGroup,
    pub namespaces: Namespaces,
    /// `apt-get`.
    pub apt: Option<PathBuf>,
    /// Whether an installation of packages was interrupted, which is looked into only where Nix could not be made ready.
    pub is_interrupted: bool,
    /// What became of opening the store.
    pub opening: Opening,
}

/// The user that the job runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// The name in `/etc/passwd`, if it has an entry there.
    pub name: Option<String>,
    /// `HOME`, or else the home folder of that entry.
    pub home: Option<PathBuf>,
}

impl User {
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// The name, or else the number.
    pub fn shown(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.uid.to_string())
    }
}

/// Whether `sudo` runs commands as root without a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sudo {
    /// Not on this machine, or of no use to root.
    None,
    /// It is there, and has not been tried.
    Untried(PathBuf),
    Allowed(PathBuf),
    /// Its message.
    Refused(String),
}

/// `/nix`, as this user finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Folder {
    Absent {
        /// Whether this user can make it.
        makeable: bool,
    },
    Empty {
        writable: bool,
        owner: u32,
    },
    /// Something is in it.
    Used {
        /// Whether this user can add to the store and to its database.
        writable: bool,
        owner: u32,
    },
    /// On a file system that is mounted read-only.
    ReadOnly,
    /// A folder that could be written to, on a file system from which no program can be started.
    NoExec,
    /// `/nix` or `/nix/store` is a symbolic link, which Nix refuses.
    Link {
        place: PathBuf,
        target: PathBuf,
        /// Whether there is a folder behind it.
        leads_to_folder: bool,
    },
    /// A file, or something else that is no folder.
    NoFolder,
}

impl Folder {
    /// Whether this user can have a store there as it is.
    pub fn is_usable(&self) -> bool {
        match self {
            Self::Absent { makeable } => *makeable,
            Self::Empty { writable, .. } | Self::Used { writable, .. } => *writable,
            Self::ReadOnly | Self::NoExec | Self::Link { .. } | Self::NoFolder => false,
        }
    }
}

/// The socket of Nix's daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    Absent,
    /// The file is there; whether anything listens was not tried.
    Present,
    /// A process `nix-daemon` serves it.
    Alive,
    /// Something accepts connections, and there is no such process to be seen: it starts with the first client, or runs in
    /// another container.
    Activated,
    /// Nothing listens.
    Stale,
}

/// The group that Nix's build users are in by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BuildGroup {
    Missing,
    Empty,
    Present,
}

/// Whether this user can make a user namespace and a mount namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespaces {
    Allowed,
    Forbidden {
        /// A fragment such as "user namespaces are forbidden by `user.max_user_namespaces = 0`".
        obstacle: String,
        /// A sentence for an administrator.
        remedy: String,
    },
}

/// What became of opening the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    Untried,
    /// This process opens the store's files by itself. `None` where its builds have build users, or need none.
    Local {
        /// Why there are no build users although the settings ask for them, a fragment.
        no_build_users: Option<String>,
    },
    /// Through a daemon, or another store.
    Remote,
    /// The daemon of this machine does not answer.
    DeadDaemon {
        socket: PathBuf,
        /// Nix's message, on one line.
        problem: String,
    },
    /// The store's files belong to another user; with Nix's message.
    Denied(String),
    /// Another failure; with Nix's message.
    Closed(String),
}

impl Machine {
    /// Whether a store has to come to be at `/nix`, and this user cannot make it as things are.
    pub(super) fn lacks_store(&self) -> bool {
        // A Nix that is outside starts, and opens its store, on a disk without programs as well.
        let is_usable = match self.folder {
            Folder::NoExec => self.nix.is_some(),
            _ => self.folder.is_usable(),
        };
        let no_store = !is_usable && !self.is_elsewhere;
        // Where a Nix is there, a daemon may serve its store. Without any, the socket is nobody's.
        no_store && (self.nix.is_none() || self.socket == Socket::Absent)
    }

    /// The facts as rows of a table: what it is, and how it stands.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        vec![
            ("user", self.user_text()),
            ("sudo", self.sudo_text()),
            ("/nix", self.folder_text()),
            ("Nix", self.nix_text()),
            ("daemon", self.socket_text().to_owned()),
            ("build users", self.build_group_text().to_owned()),
            ("user namespaces", self.namespaces_text()),
        ]
    }

    fn user_text(&self) -> String {
        let User { uid, name, .. } = &self.user;
        let name = match name {
            Some(name) => format!("{name} ({uid})"),
            None => format!("{uid}, without an entry in `/etc/passwd`"),
        };
        match &self.user.home {
            Some(home) => format!("{name}, home `{}`", home.display()),
            None => format!("{name}, no home"),
        }
    }

    fn sudo_text(&self) -> String {
        match &self.sudo {
            Sudo::None if self.user.is_root() => "not needed".into(),
            Sudo::None => "none".into(),
            Sudo::Untried(_) => "there, not needed".into(),
            Sudo::Allowed(_) => "without a password".into(),
            Sudo::Refused(problem) => format!("refuses: {problem}"),
        }
    }

    fn folder_text(&self) -> String {
        let rights = |writable: &bool, owner: &u32| match writable {
            true if self.is_folder_open => "writable, by every user of this machine".to_owned(),
            true if *owner != self.user.uid && *owner != 0 => {
                format!("writable, and by user {owner}, whose it is")
            }
            true => "writable".to_owned(),
            false if *owner == self.user.uid => "not writable".to_owned(),
            false => format!("not writable, of user {owner}"),
        };
        match &self.folder {
            Folder::Absent { makeable: true } => "none, can be made".into(),
            Folder::Absent { makeable: false } => "none".into(),
            Folder::Empty { writable, owner } => format!("empty, {}", rights(writable, owner)),
            Folder::Used { writable, owner } => format!("in use, {}", rights(writable, owner)),
            Folder::ReadOnly => "mounted read-only".into(),
            Folder::NoExec => "mounted with `noexec`".into(),
            Folder::Link { place, target, .. } => format!(
                "`{}` is a symbolic link to `{}`",
                place.display(),
                target.display()
            ),
            Folder::NoFolder => "no folder".into(),
        }
    }

    fn nix_text(&self) -> String {
        let elsewhere = if self.is_elsewhere {
            ", its store is named elsewhere"
        } else {
            ""
        };
        match &self.nix {
            Some(FoundProgram { program, on_path }) => {
                let place = if *on_path {
                    "on `PATH`"
                } else {
                    "not on `PATH`"
                };
                format!("`{}`, {place}{elsewhere}", program.display())
            }
            None => "none".into(),
        }
    }

    fn socket_text(&self) -> &'static str {
        match self.socket {
            Socket::Absent => "no socket",
            Socket::Present => "a socket",
            Socket::Alive => "answers",
            Socket::Activated => "answers, started by its first client or elsewhere",
            Socket::Stale => "a socket where nothing listens",
        }
    }

    fn build_group_text(&self) -> &'static str {
        match self.build_group {
            BuildGroup::Missing => "no group `nixbld`",
            BuildGroup::Empty => "a group `nixbld` without members",
            BuildGroup::Present => "a group `nixbld`",
        }
    }

    fn namespaces_text(&self) -> String {
        match &self.namespaces {
            Namespaces::Allowed => "allowed".into(),
            Namespaces::Forbidden { obstacle, .. } => obstacle.clone(),
        }
    }
}
