//! Makes Nix ready for a job: uses the one that is there, repairs what keeps it from working, or
//! installs one. Never runs an installer where Nix is; leaves nothing behind but an installation:
//! a repair is a setting, a variable, or a daemon that ends with us.

mod install;
mod repair;

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;

use crate::ping::Opened;
use crate::settings::Settings;
use crate::store::Store;
use crate::tool::{self, Flavour, Nix, WELL_KNOWN};
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::progress::Sink;
use flywheel_sys::process::service::Service;
use flywheel_sys::runner::env::Env;

/// A daemon that is asked to end has nothing to finish.
const DAEMON_GRACE: Duration = Duration::from_secs(2);
/// Folders that newer versions refuse to build in if everybody may write to them.
const GUARDED_FOLDERS: [&str; 4] = ["/nix", "/nix/store", "/nix/var", "/nix/var/nix"];

/// Why there is no working Nix.
#[derive(Debug, Error)]
pub enum Error {
    /// There is none, and none can be installed here.
    #[error("there is no `nix` on this machine, and none can be installed: {0}")]
    Missing(&'static str),
    /// The installation failed.
    #[error("Nix could not be installed: `{step}` {problem}")]
    Install {
        /// The command that failed.
        step: &'static str,
        /// What it said, on one line.
        problem: String,
    },
    /// The program that is there does not run.
    #[error(transparent)]
    Nix(#[from] tool::Error),
    /// Nobody answers at the daemon's socket.
    #[error("the Nix daemon does not answer at `{socket}`: {problem}")]
    DeadDaemon {
        /// Where it should.
        socket: PathBuf,
        /// What Nix said, on one line.
        problem: String,
    },
    /// There is no daemon, and the store belongs to another user.
    #[error("the Nix store belongs to another user and there is no daemon: {0}")]
    NoRights(String),
    /// The store does not open for another reason.
    #[error("the Nix store does not open: {0}")]
    Closed(String),
    /// Everybody may write to a folder that Nix then refuses to use.
    #[error("`{0}` is world-writable, and {1} refuses to build there")]
    WorldWritable(PathBuf, String),
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Missing(_) | Self::Install { .. } => {
                "Put Nix into the runner's image (Debian and Ubuntu: `apt-get install nix-bin`), or run the job as \
                 root on Debian or Ubuntu, where it is installed for you."
            }
            Self::Nix(_) => {
                "Repair the installation, or take it off `PATH` to have another one used."
            }
            Self::DeadDaemon { .. } => {
                "Start it on the runner (`systemctl restart nix-daemon`, or `nix-daemon` as root), or run the job as \
                 root, which starts one for the job."
            }
            Self::NoRights(_) => {
                "Start `nix-daemon` as root on the runner, run the job as root, or give `/nix` to the job's user."
            }
            Self::Closed(_) => {
                "Look at `NIX_CONFIG`, `NIX_REMOTE` and `/etc/nix/nix.conf` on the runner."
            }
            Self::WorldWritable(folder, _) => {
                return Some(format!("Run `chmod o-w {}` on it.", folder.display()));
            }
        };
        Some(hint.to_owned())
    }
}

/// Something that kept Nix from working and what was done about it, for this job alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// A sentence for the log.
    pub text: String,
    /// A line that the job's `NIX_CONFIG` needs.
    pub setting: Option<&'static str>,
    /// A variable that the command's environment needs.
    pub variable: Option<(&'static str, &'static str)>,
}

/// A Nix whose store opens.
pub struct Ready {
    /// It, with the runner's `NIX_CONFIG` and the repairs in force.
    pub nix: Nix,
    /// Whether it was installed just now.
    pub installed: bool,
    /// The folder to put in front of the command's `PATH`; `None` if Nix is on it.
    pub folder: Option<PathBuf>,
    /// What was done to make it work; whoever watches has been told.
    pub repairs: Vec<Repair>,
    /// What opening the store told; none where it was opened after a repair.
    pub opened: Option<Opened>,
    /// Nix's settings as they were found, if they were read on the way.
    pub settings_before: Option<Settings>,
    daemon: Option<Daemon>,
}

/// The daemon that was started for this job.
struct Daemon {
    service: Service,
    /// Its socket, if there was none before.
    created_socket: Option<PathBuf>,
}

impl Ready {
    /// The lines that the job's `NIX_CONFIG` needs, for `settings::Wanted::repairs`.
    pub fn settings(&self) -> Vec<String> {
        self.repairs
            .iter()
            .filter_map(|repair| repair.setting)
            .map(str::to_owned)
            .collect()
    }

    /// The variables that the command's environment needs.
    pub fn variables(&self) -> Vec<(&'static str, &'static str)> {
        self.repairs
            .iter()
            .filter_map(|repair| repair.variable)
            .collect()
    }

    /// Ends the daemon that was started for this job, if one was. Dropping does the same, less gently.
    pub async fn stop(self) {
        let Some(Daemon {
            service,
            created_socket,
        }) = self.daemon
        else {
            return;
        };
        service.stop(DAEMON_GRACE).await;
        if let Some(socket) = created_socket {
            // A socket that nobody answers at is what the job found; where it found none, none stays.
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// Makes Nix ready. `limit` bounds it all, an installation included.
///
/// # Errors
/// When there is no working Nix at the end; each error says what the machine's owner can do.
pub async fn ready(env: &Env, sink: &Sink, limit: Duration) -> Result<Ready, Error> {
    Host::current().ready(env, sink, limit).await
}

/// The store of this machine for one who only reads it: by its database, so that it wants no call of Nix and no daemon.
/// `None` where that does not do: there is no Nix, or its database is not ours to read. Then `ready` says why, or mends
/// it. A path that is not in it may yet be valid, in a store that the settings name.
pub async fn local_store(env: &Env) -> Option<Store> {
    let found = tool::find(env, &Host::current().places)?;
    Store::from_database(&Nix::unversioned(&found.program, env)).await
}

/// The machine, as far as bootstrapping depends on it. Tests make their own.
#[derive(Clone, Debug)]
pub struct Host {
    /// Where installers put Nix.
    pub places: Vec<PathBuf>,
    /// Where programs of the system are, besides `PATH`.
    pub system: Vec<PathBuf>,
    /// Whether this process is root's.
    pub root: bool,
    /// The folders that must not be world-writable.
    pub guarded: Vec<PathBuf>,
}

impl Host {
    /// This machine.
    pub fn current() -> Self {
        Self {
            places: WELL_KNOWN.map(PathBuf::from).into(),
            system: ["/usr/bin", "/bin"].map(PathBuf::from).into(),
            root: rustix::process::geteuid().is_root(),
            guarded: GUARDED_FOLDERS.map(PathBuf::from).into(),
        }
    }

    /// Makes Nix ready on it.
    ///
    /// # Errors
    /// As `ready` says.
    pub async fn ready(&self, env: &Env, sink: &Sink, limit: Duration) -> Result<Ready, Error> {
        let deadline = Instant::now() + limit;
        let found = tool::find(env, &self.places);
        let installed = found.is_none();
        if installed {
            install::install(self, env, sink, deadline).await?;
        }
        let found = found.or_else(|| tool::find(env, &self.places));
        let found = found.ok_or(Error::Missing("the package came without the program"))?;
        // Calls of Nix cost more than all the rest, so what does not depend on the version is asked beside it.
        let unversioned = Nix::unversioned(&found.program, env);
        let early = async { Ok(repair::EarlyProbe::run(&unversioned, deadline).await) };
        // A program that is no Nix is not asked again and again.
        let (nix, early) = tokio::try_join!(Nix::detect(&found.program, env), early)?;
        let folder = (!found.on_path).then(|| nix.folder().to_owned());
        let mut ready = Ready {
            nix,
            installed,
            folder,
            repairs: Vec::new(),
            opened: None,
            settings_before: None,
            daemon: None,
        };
        let users = repair::open_store(self, &mut ready, early, deadline).await?;
        self.check_guarded(&ready.nix, users, sink)?;
        for repair in &ready.repairs {
            // A setting costs the job nothing; a dead daemon is for the machine's owner to know.
            if repair.setting.is_some() {
                sink.note(repair.text.as_str());
            } else {
                sink.degraded("nix", repair.text.as_str());
            }
        }
        Ok(ready)
    }

    /// Since the fixes of CVE-2025-46415 Nix builds as other users only where strangers cannot write.
    fn check_guarded(&self, nix: &Nix, users: BuildUsers, sink: &Sink) -> Result<(), Error> {
        let Some(folder) = self.guarded.iter().find(|folder| is_world_writable(folder)) else {
            return Ok(());
        };
        let strict = nix.version.flavour != Flavour::Lix && nix.version.at_least(2, 24);
        if strict && users == BuildUsers::InForce {
            return Err(Error::WorldWritable(
                folder.clone(),
                nix.version.to_string(),
            ));
        }
        let folder = folder.display();
        sink.degraded(
            "nix",
            format!("`{folder}` is world-writable, which newer versions refuse; run `chmod o-w {folder}`"),
        );
        Ok(())
    }
}

/// Whether builds run as users of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BuildUsers {
    InForce,
    None,
}

fn is_world_writable(folder: &Path) -> bool {
    std::fs::symlink_metadata(folder).is_ok_and(|facts| facts.is_dir() && facts.mode() & 0o002 != 0)
}

#[cfg(test)]
mod tests;
