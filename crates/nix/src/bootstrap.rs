//! Makes Nix ready for a job: uses the installed one, repairs what keeps it from working, or
//! installs one. Never runs an installer where Nix exists. Nothing but an installation outlives the
//! job: a repair is a setting, a variable, or a daemon that ends with Flywheel.

mod install;
mod interrupted;
pub mod machine;
pub mod plan;
pub mod releases;
mod repair;
pub mod rootless;

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

/// Time for our daemon to exit after SIGTERM; it has nothing to finish.
const DAEMON_GRACE: Duration = Duration::from_secs(2);
/// Folders in which newer versions refuse to build if they are world-writable.
const GUARDED_FOLDERS: [&str; 4] = ["/nix", "/nix/store", "/nix/var", "/nix/var/nix"];

#[derive(Debug, Error)]
pub enum Error {
    /// There is no Nix, and it cannot be installed here.
    #[error("Nix is not installed on this machine and cannot be installed:  {0}")]
    Missing(&'static str),
    #[error("Nix could not be installed: `{step}` {problem}")]
    Install {
        /// The command that failed.
        step: &'static str,
        /// Its message, on one line.
        problem: String,
    },
    /// The installed program does not run.
    #[error(transparent)]
    Nix(#[from] tool::Error),
    /// Nothing listens on the daemon's socket.
    #[error("the Nix daemon does not answer at `{socket}`: {problem}")]
    DeadDaemon {
        socket: PathBuf,
        /// Nix's message, on one line.
        problem: String,
    },
    /// There is no daemon, and the store belongs to another user.
    #[error("the Nix store belongs to another user and there is no daemon: {0}")]
    NoRights(String),
    /// The store does not open for another reason.
    #[error("the Nix store does not open: {0}")]
    Closed(String),
    /// A folder is world-writable, which makes Nix refuse to use it.
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

/// Something that kept Nix from working, and the remedy for this job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// A sentence for the log.
    pub(crate) text: String,
    /// A line that the job's `NIX_CONFIG` needs.
    pub(crate) setting: Option<&'static str>,
    /// A variable that the command's environment needs.
    pub(crate) variable: Option<(&'static str, &'static str)>,
}

/// A working Nix: its store opens.
pub struct Ready {
    pub nix: Nix,
    /// Whether it was installed for this job.
    pub installed: bool,
    /// The folder to prepend to the command's `PATH`; `None` if `nix` is on it already.
    pub folder: Option<PathBuf>,
    /// The repairs that were made; they have been logged already.
    pub repairs: Vec<Repair>,
    /// The result of opening the store; `None` where it was opened after a repair.
    pub opened: Option<Opened>,
    /// Nix's settings before any change, if they have been read.
    pub settings_before: Option<Settings>,
    daemon: Option<Daemon>,
}

/// A daemon started for this job.
struct Daemon {
    service: Service,
    /// Its socket, if the file did not exist before.
    created_socket: Option<PathBuf>,
}

impl Ready {
    /// The lines that the repairs add to `NIX_CONFIG`, for `WantedSettings::repairs`.
    pub fn settings(&self) -> Vec<String> {
        self.repairs
            .iter()
            .filter_map(|repair| repair.setting)
            .map(str::to_owned)
            .collect()
    }

    /// The variables that the repairs add to the command's environment.
    pub fn variables(&self) -> Vec<(&'static str, &'static str)> {
        self.repairs
            .iter()
            .filter_map(|repair| repair.variable)
            .collect()
    }

    /// Stops the daemon that was started for this job, if any. Dropping `Ready` does the same, less
    /// gently.
    pub async fn stop(self) {
        let Some(Daemon {
            service,
            created_socket,
        }) = self.daemon
        else {
            return;
        };
        // Remove the socket only once nothing listens on it.
        service.stop(DAEMON_GRACE).await;
        if let Some(socket) = created_socket {
            // A dead socket that existed before stays; one that we created goes.
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// Makes Nix ready within `limit`, which includes an installation.
///
/// # Errors
/// When no working Nix results; each error carries a hint for the machine's owner.
pub async fn ready(env: &Env, sink: &Sink, limit: Duration) -> Result<Ready, Error> {
    Host::current().ready(env, sink, limit).await
}

/// Opens this machine's store for reading only, through its database, so that no call of Nix and no
/// daemon is needed. Returns `None` if there is no Nix or its database cannot be read; `ready` then
/// reports or repairs that. A path that the database lacks may still be valid in another store that
/// the settings name.
pub async fn local_store(env: &Env) -> Option<Store> {
    let found = tool::find(env, &Host::current().places)?;
    Store::from_database(&Nix::unversioned(&found.program, env)).await
}

/// The parts of the machine that bootstrapping depends on. Tests build their own.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// Folders where installers put Nix.
    pub(crate) places: Vec<PathBuf>,
    /// Folders with system programs, besides `PATH`.
    pub(crate) system: Vec<PathBuf>,
    /// The folder in which `dpkg` keeps the state of the packages.
    pub(crate) packages: PathBuf,
    /// The user that this process runs as.
    pub(crate) uid: u32,
    /// `/nix`.
    pub(crate) nix: PathBuf,
    /// Nix's own settings file.
    pub(crate) conf: PathBuf,
    /// The folders that must not be world-writable.
    pub(crate) guarded: Vec<PathBuf>,
}

impl Host {
    pub(crate) fn current() -> Self {
        Self {
            places: WELL_KNOWN.map(PathBuf::from).into(),
            system: ["/usr/bin", "/bin"].map(PathBuf::from).into(),
            packages: "/var/lib/dpkg".into(),
            uid: rustix::process::geteuid().as_raw(),
            nix: "/nix".into(),
            conf: "/etc/nix/nix.conf".into(),
            guarded: GUARDED_FOLDERS.map(PathBuf::from).into(),
        }
    }

    pub(crate) fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// Makes Nix ready on this machine.
    ///
    /// # Errors
    /// As for the function `ready`.
    pub(crate) async fn ready(
        &self,
        env: &Env,
        sink: &Sink,
        limit: Duration,
    ) -> Result<Ready, Error> {
        let deadline = Instant::now() + limit;
        let error = match self.ready_by(env, sink, deadline).await {
            Err(error) if self.is_root() && self.is_interrupted(&error) => error,
            ended => return ended,
        };
        // A cancelled job may have ended the installer half-way, and a Nix that is half there does not run either.
        sink.note(format!(
            "an installation of packages was interrupted on this machine ({error}): it is completed"
        ));
        interrupted::complete(self, env, sink, deadline).await;
        self.ready_by(env, sink, deadline).await
    }

    /// Whether Nix is missing or broken because an installation was interrupted. Where a Nix exists, the other packages
    /// of a machine are not our business.
    fn is_interrupted(&self, error: &Error) -> bool {
        match error {
            Error::Install { .. } => interrupted::is_interrupted(&self.packages),
            _ => interrupted::is_nix_interrupted(&self.packages),
        }
    }

    async fn ready_by(&self, env: &Env, sink: &Sink, deadline: Instant) -> Result<Ready, Error> {
        let found = tool::find(env, &self.places);
        let installed = found.is_none();
        // Never install where a Nix exists, even a broken one.
        if installed {
            install::install(self, env, sink, deadline).await?;
        }
        let found = found.or_else(|| tool::find(env, &self.places));
        let found = found.ok_or(Error::Missing("the package came without the program"))?;
        // Calls of Nix cost more than everything else here, so those that do not depend on the
        // version run beside the version query.
        let unversioned = Nix::unversioned(&found.program, env);
        let early = async { Ok(repair::EarlyProbe::run(&unversioned, deadline).await) };
        // `try_join` cancels the other calls when the program turns out not to be Nix.
        let (nix, early) = tokio::try_join!(Nix::detect(&found.program, env), early)?;
        // The user's command must find the same Nix as Flywheel.
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
            // A changed setting costs the job nothing and is only noted; a dead daemon is a fault
            // that the machine's owner should see.
            if repair.setting.is_some() {
                sink.note(repair.text.as_str());
            } else {
                sink.degraded("nix", repair.text.as_str());
            }
        }
        Ok(ready)
    }

    /// Checks for world-writable folders. Since the fixes for CVE-2025-46415, Nix refuses to build
    /// as other users below such folders.
    fn check_guarded(&self, nix: &Nix, users: BuildUsers, sink: &Sink) -> Result<(), Error> {
        let Some(folder) = self.guarded.iter().find(|folder| is_world_writable(folder)) else {
            return Ok(());
        };
        let strict = nix.version.flavour != Flavour::Lix && nix.version.at_least(2, 24);
        // Only some versions refuse, and only when they build as other users; for the rest a
        // warning is enough.
        if strict && users == BuildUsers::InForce {
            return Err(Error::WorldWritable(
                folder.clone(),
                nix.version.to_string(),
            ));
        }
        let folder = folder.display();
        sink.degraded(
            "nix",
            format!("`{folder}` is world-writable, which newer versions of Nix refuse;  run `chmod o-w {folder}`"),
        );
        Ok(())
    }
}

/// Whether builds run as separate build users.
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
