//! Reads the facts of this machine: variables, folders, `/etc` and `/proc`. Starts nothing but `sudo -n true`, and that
//! only where its answer matters.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Access, StatVfsMountFlags};
use rustix::io::Errno;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::{BuildGroup, Folder, Machine, Namespaces, Opening, Socket, Sudo, User};
use crate::bootstrap::Host;
use crate::bootstrap::install::sudo_call;
use crate::bootstrap::plan::{Plan, Wanted, plan};
use crate::bootstrap::rootless::TRIAL;
use crate::settings::sets;
use crate::tool;
use flywheel_core::text::one_line;
use flywheel_sys::host::home::Entry;
use flywheel_sys::process::capture::Tool;
use flywheel_sys::process::namespace::Limits;
use flywheel_sys::runner::env::{Env, program_and_arguments};
use flywheel_sys::untrusted_file::{self, Owner};

/// `sudo` answers at once, unless it looks its host up in a name service that is away.
const SUDO_LIMIT: Duration = Duration::from_secs(3);
/// A local socket is connected at once.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);
/// Making a namespace takes milliseconds.
const TRIAL_LIMIT: Duration = Duration::from_secs(5);
/// A variable that is set names another store, or another socket, than the default ones.
const STORE_VARIABLES: [&str; 4] = [
    "NIX_REMOTE",
    "NIX_STORE_DIR",
    "NIX_STATE_DIR",
    "NIX_DAEMON_SOCKET_PATH",
];
/// Nix's own default for the setting `build-users-group`, where `/nix` belongs to root.
const BUILD_GROUP: &str = "nixbld";
/// The size of `nix.conf` that is looked at.
const CONF_LIMIT: u64 = 1 << 20;

impl Machine {
    /// Reads the facts that take no process and no wait: `sudo` is `Untried`, a socket `Present`. Takes less than a
    /// millisecond, so it may be called before the runtime starts.
    pub fn read(env: &Env) -> Self {
        Host::current().machine(env)
    }

    /// Tries `sudo`, if there is one and a store cannot be had without it.
    pub async fn try_sudo(&mut self) {
        if let Sudo::Untried(program) = &self.sudo
            && self.lacks_store()
        {
            self.sudo = try_sudo(program).await;
        }
    }

    /// Tries whether namespaces can be made, where the plan rests on them: a filter of system calls or a security module
    /// shows only then.
    pub async fn try_namespaces(&mut self, env: &Env, wanted: &Wanted) {
        if matches!(plan(self, wanted), Plan::Rootless(_))
            && let Some(forbidden) = try_namespaces(env).await
        {
            self.namespaces = forbidden;
        }
    }

    /// Tries whether the daemon's socket is alive.
    pub async fn try_socket(&mut self, env: &Env) {
        if self.socket == Socket::Present {
            self.socket = try_socket(&socket_path(env, Path::new("/nix"))).await;
        }
    }
}

impl Host {
    /// The facts of this machine, as far as reading gives them.
    pub(in crate::bootstrap) fn machine(&self, env: &Env) -> Machine {
        let nix = tool::find(env, &self.places);
        let user = user(self.uid, env);
        // One that the job's `PATH` has first may be anybody's.
        let sudo = match self
            .system_program("sudo")
            .or_else(|| tool::on_path(env, "sudo"))
        {
            Some(program) if !user.is_root() => Sudo::Untried(program),
            _ => Sudo::None,
        };
        let socket = match fs::symlink_metadata(socket_path(env, &self.nix)) {
            Ok(_) => Socket::Present,
            Err(_) => Socket::Absent,
        };
        Machine {
            sudo,
            folder: folder(&self.nix, user.is_root()),
            is_folder_open: fs::metadata(&self.nix).is_ok_and(|facts| is_open(facts.mode())),
            is_nix_below: nix
                .as_ref()
                .is_some_and(|found| self.leads_below(&found.program)),
            nix,
            is_elsewhere: is_elsewhere(env, &self.conf),
            is_daemon_named: env.get("NIX_REMOTE") == Some("daemon"),
            socket,
            build_group: build_group(&fs::read_to_string("/etc/group").unwrap_or_default()),
            namespaces: namespaces(&Limits::read()),
            apt: self.program("apt-get", env),
            is_interrupted: false,
            opening: Opening::Untried,
            user,
        }
    }

    /// A program of the system, from the job's `PATH` or from where systems have it.
    pub(in crate::bootstrap) fn program(&self, name: &str, env: &Env) -> Option<PathBuf> {
        tool::on_path(env, name).or_else(|| self.system_program(name))
    }

    fn system_program(&self, name: &str) -> Option<PathBuf> {
        let mut files = self.system.iter().map(|folder| folder.join(name));
        files.find(|file| file.is_file())
    }

    /// Whether a program is below `/nix`, by its name or by where its links lead.
    fn leads_below(&self, program: &Path) -> bool {
        let resolved = fs::canonicalize(program);
        program.starts_with(&self.nix) || resolved.is_ok_and(|file| file.starts_with(&self.nix))
    }
}

fn user(uid: u32, env: &Env) -> User {
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let entry = Entry::find(&users, uid);
    let home = env.path("HOME");
    User {
        uid,
        gid: rustix::process::getegid().as_raw(),
        name: entry.as_ref().map(|entry| entry.name.clone()),
        home: home.or_else(|| entry.map(|entry| entry.home)),
    }
}

/// Whether a store other than the one below `/nix` is named.
fn is_elsewhere(env: &Env, conf: &Path) -> bool {
    // `auto` and `daemon` are the store below `/nix` and its daemon.
    let named = |name: &str| {
        env.get(name)
            .is_some_and(|value| !matches!(value, "auto" | "daemon" | "local"))
    };
    let config = env.get("NIX_CONFIG").unwrap_or_default();
    let conf = || {
        let read = untrusted_file::read(conf, Owner::Any, CONF_LIMIT);
        String::from_utf8_lossy(&read.unwrap_or_default()).into_owned()
    };
    STORE_VARIABLES.iter().any(|name| named(name))
        || sets(config, "store")
        || sets(&conf(), "store")
}

fn socket_path(env: &Env, nix: &Path) -> PathBuf {
    let state = || {
        env.path("NIX_STATE_DIR")
            .unwrap_or_else(|| nix.join("var/nix"))
    };
    let path = env.path("NIX_DAEMON_SOCKET_PATH");
    path.unwrap_or_else(|| state().join("daemon-socket/socket"))
}

/// Whether everybody can rename what is in a folder of this mode. With the sticky bit, only its owner can.
fn is_open(mode: u32) -> bool {
    mode & 0o002 != 0 && mode & 0o1000 == 0
}

fn folder(nix: &Path, root: bool) -> Folder {
    // Nix looks at both, and opens no store behind a link.
    for place in [nix.to_owned(), nix.join("store")] {
        if let Ok(target) = fs::read_link(&place) {
            let target = place.parent().unwrap_or(Path::new("/")).join(target);
            let leads_to_folder = target.is_dir();
            return Folder::Link {
                place,
                target,
                leads_to_folder,
            };
        }
    }
    let facts = match fs::metadata(nix) {
        Ok(facts) if facts.is_dir() => facts,
        Ok(_) => return Folder::NoFolder,
        Err(_) => {
            let parent = nix.parent().unwrap_or(Path::new("/"));
            return match access(parent) {
                // Another user's folder in `/` is not made by anybody but root, whatever the rights of `/` are.
                Ok(()) => Folder::Absent { makeable: true },
                Err(_) => Folder::Absent { makeable: false },
            };
        }
    };
    let owner = facts.uid();
    let parts = ["", "store", "var/nix", "var/nix/db"].map(|part| nix.join(part));
    let tried = parts
        .iter()
        .filter(|part| part.is_dir())
        .map(|part| access(part));
    let denied: Vec<Errno> = tried.filter_map(Result::err).collect();
    // Who may not write there anyway is not told that nobody can.
    if denied.contains(&Errno::ROFS)
        || parts
            .iter()
            .any(|part| has_flag(part, StatVfsMountFlags::RDONLY))
    {
        return Folder::ReadOnly;
    }
    // The store's own group may write to `/nix/store`, which is not enough: Nix writes to the database as well.
    let writable = denied.is_empty() || root;
    // The store's file system.
    let store = &parts[usize::from(parts[1].is_dir())];
    if writable && has_flag(store, StatVfsMountFlags::NOEXEC) {
        return Folder::NoExec;
    }
    let is_empty =
        fs::read_dir(nix).is_ok_and(|mut entries| entries.all(|entry| is_no_content(&entry)));
    if is_empty {
        Folder::Empty { writable, owner }
    } else {
        Folder::Used { writable, owner }
    }
}

/// Whether the folder is on a file system that is mounted so.
fn has_flag(folder: &Path, flag: StatVfsMountFlags) -> bool {
    rustix::fs::statvfs(folder).is_ok_and(|stat| stat.f_flag.contains(flag))
}

/// A volume has this folder of the file system's own.
fn is_no_content(entry: &io::Result<fs::DirEntry>) -> bool {
    entry
        .as_ref()
        .is_ok_and(|entry| entry.file_name() == "lost+found")
}

fn access(folder: &Path) -> Result<(), Errno> {
    rustix::fs::access(folder, Access::WRITE_OK | Access::EXEC_OK)
}

/// The state of the default group of build users in the text of `/etc/group`.
fn build_group(groups: &str) -> BuildGroup {
    let line = groups
        .lines()
        .find_map(|line| line.strip_prefix(BUILD_GROUP)?.strip_prefix(':'));
    match line.map(|line| line.rsplit(':').next().unwrap_or_default().trim()) {
        None => BuildGroup::Missing,
        Some("") => BuildGroup::Empty,
        Some(_) => BuildGroup::Present,
    }
}

/// What is known without trying; see `Limits::obstacle`.
fn namespaces(limits: &Limits) -> Namespaces {
    match limits.obstacle() {
        Some(obstacle) => Namespaces::Forbidden {
            obstacle: obstacle.to_string(),
            remedy: format!("On the host, as root, {}.", obstacle.remedy()),
        },
        None => Namespaces::Allowed,
    }
}

/// What keeps another process of this program from making them. `None` where nothing does, or nothing was learned.
async fn try_namespaces(env: &Env) -> Option<Namespaces> {
    let (program, _) = program_and_arguments().ok()?;
    let tool = Tool::new(&program).arg(TRIAL).envs(env.all());
    let output = tool.run(TRIAL_LIMIT).await.ok()?.text();
    let (obstacle, remedy) = output.trim_end().split_once('\n')?;
    Some(Namespaces::Forbidden {
        obstacle: obstacle.to_owned(),
        remedy: remedy.to_owned(),
    })
}

async fn try_sudo(program: &Path) -> Sudo {
    match sudo_call(program).arg("true").run(SUDO_LIMIT).await {
        Ok(output) if output.status.success() => Sudo::Allowed(program.to_owned()),
        Ok(output) => Sudo::Refused(refusal(&output.stderr)),
        Err(error) => Sudo::Refused(one_line(&error.to_string(), 200)),
    }
}

/// The last line of what `sudo` printed: a lecture may come before it.
fn refusal(stderr: &str) -> String {
    let last = stderr
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("no reason given");
    one_line(last.trim_start_matches("sudo: "), 200)
}

async fn try_socket(path: &Path) -> Socket {
    match timeout(CONNECT_LIMIT, UnixStream::connect(path)).await {
        // Whoever may not connect learns nothing of what listens there.
        Ok(Err(error)) if error.kind() == io::ErrorKind::PermissionDenied => Socket::Present,
        Ok(Err(_)) => Socket::Stale,
        Ok(Ok(_)) if runs("nix-daemon") => Socket::Alive,
        // A daemon that is busy lets a client wait.
        Ok(Ok(_)) | Err(_) => Socket::Activated,
    }
}

/// Whether a process of this name is to be seen.
fn runs(name: &str) -> bool {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut names = entries.filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
    names.any(|comm| comm.trim_end() == name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_build_group_counts_with_its_members() {
        for (groups, expected) in [
            ("root:x:0:\n", BuildGroup::Missing),
            ("nixbld2:x:3:a\n", BuildGroup::Missing),
            ("nixbld:x:30000:\n", BuildGroup::Empty),
            ("nixbld:x:30000:nixbld1,nixbld2\n", BuildGroup::Present),
        ] {
            assert_eq!(build_group(groups), expected, "{groups}");
        }
    }

    #[test]
    fn a_setting_of_the_kernel_that_forbids_namespaces_is_named() {
        assert_eq!(namespaces(&Limits::default()), Namespaces::Allowed);
        let limits = Limits {
            max_user_namespaces: Some(0),
            ..Limits::default()
        };
        let Namespaces::Forbidden { obstacle, remedy } = namespaces(&limits) else {
            panic!("it forbids them");
        };
        let name = "user.max_user_namespaces";
        assert!(
            obstacle.contains(name) && remedy.contains(name),
            "{obstacle} {remedy}"
        );
    }

    #[test]
    fn a_folder_is_empty_in_use_or_absent() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let nix = folder.path().join("nix");
        let look = || super::folder(&nix, false);
        assert_eq!(look(), Folder::Absent { makeable: true });
        fs::write(&nix, "").expect("written");
        assert_eq!(look(), Folder::NoFolder);
        fs::remove_file(&nix).expect("removed");
        for (link, leads_to_folder) in [("nowhere", false), (".", true)] {
            symlink(link, &nix).expect("linked");
            let (place, target) = (nix.clone(), folder.path().join(link));
            let found = Folder::Link {
                place,
                target,
                leads_to_folder,
            };
            assert_eq!(look(), found);
            fs::remove_file(&nix).expect("removed");
        }
        fs::create_dir(&nix).expect("made");
        symlink("/tmp", nix.join("store")).expect("linked");
        assert!(matches!(look(), Folder::Link { place, .. } if place.ends_with("nix/store")));
        fs::remove_file(nix.join("store")).expect("removed");
        fs::create_dir_all(nix.join("lost+found")).expect("made");
        assert!(matches!(look(), Folder::Empty { writable: true, .. }));
        fs::create_dir(nix.join("store")).expect("made");
        assert!(matches!(look(), Folder::Used { writable: true, .. }));
    }

    #[test]
    fn a_store_that_is_named_elsewhere_is_known() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let conf = folder.path().join("nix.conf");
        let env =
            |pairs: &[(&str, &str)]| is_elsewhere(&Env::from_pairs(pairs.iter().copied()), &conf);
        assert!(!env(&[]) && !env(&[("NIX_REMOTE", "daemon")]));
        assert!(env(&[("NIX_REMOTE", "/srv/root")]) && env(&[("NIX_STORE_DIR", "/srv/store")]));
        assert!(env(&[("NIX_CONFIG", "store = /srv")]));
        fs::write(&conf, "store = /srv\n").expect("written");
        assert!(env(&[]));
    }

    #[test]
    fn the_reason_of_a_refusal_comes_last() {
        assert_eq!(
            refusal("We trust …\n\nsudo: a password is required\n"),
            "a password is required"
        );
        assert_eq!(refusal(""), "no reason given");
    }
}
