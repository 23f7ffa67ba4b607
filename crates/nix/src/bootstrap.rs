//! Makes Nix ready for a job: uses the installed one, repairs what keeps it from working, or
//! installs one. Never runs an installer where Nix exists. Nothing but an installation outlives the
//! job: a repair is a setting, a variable, or a daemon that ends with Flywheel.

mod archive;
mod build_users;
pub(crate) mod closure;
mod distro;
mod examine;
mod install;
mod interrupted;
pub mod machine;
pub mod plan;
pub mod releases;
mod repair;
pub mod rootless;
mod undo;

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;

pub use self::examine::{Examined, examine};
use self::install::{Installer, Parts};
use self::machine::Machine;
use self::plan::{Impossible, Plan, RepairStep, Wanted, plan};
pub use self::repair::with_repairs;
pub use self::undo::undo;
use crate::ping::Opened;
use crate::settings::Settings;
use crate::store::Store;
use crate::tool::{self, Flavour, Nix, WELL_KNOWN};
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::progress::Sink;
use flywheel_sys::http::Roots;
use flywheel_sys::process::service::Service;
use flywheel_sys::runner::env::Env;

/// Time for our daemon to exit after SIGTERM; it has nothing to finish.
const DAEMON_GRACE: Duration = Duration::from_secs(2);
/// Folders in which newer versions refuse to build if they are world-writable.
const GUARDED_FOLDERS: [&str; 4] = ["/nix", "/nix/store", "/nix/var", "/nix/var/nix"];

#[derive(Debug, Error)]
pub enum Error {
    /// There is no working Nix on this machine, and none can be had as things are.
    #[error("{obstacle}")]
    Impossible {
        obstacle: String,
        /// What to change, in sentences.
        remedy: String,
    },
    /// No way to install Nix has worked.
    #[error("Nix could not be installed: {failures}")]
    Install {
        /// Each way with its reason.
        failures: String,
    },
    /// The installed program does not run.
    #[error(transparent)]
    Nix(#[from] tool::Error),
    /// A folder is world-writable, which makes Nix refuse to use it.
    #[error("`{0}` is world-writable, and {1} refuses to build there")]
    WorldWritable(PathBuf, String),
}

impl From<Impossible> for Error {
    fn from(Impossible { obstacle, remedy }: Impossible) -> Self {
        Self::Impossible { obstacle, remedy }
    }
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Impossible { remedy, .. } => remedy.clone(),
            Self::Install { .. } => {
                "Put Nix into the runner's image, or name a binary cache that this machine reaches and that has Nix by \
                 `nix-source`, or a release archive by `nix-mirror`."
                    .to_owned()
            }
            Self::Nix(_) => {
                "Repair the installation, or take it off `PATH` to have another one used. A variable such as `LD_LIBRARY_PATH` in the \
                 job's environment can break it, too.".to_owned()
            }
            Self::WorldWritable(folder, _) => format!("Run `chmod o-w {}` on it.", folder.display()),
        })
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
    /// How long the parts of making it ready took.
    pub parts: Parts,
    /// The folder to prepend to the command's `PATH`; `None` if `nix` is on it already.
    pub folder: Option<PathBuf>,
    /// The repairs that were made; they have been logged already.
    pub repairs: Vec<Repair>,
    /// The result of opening the store; `None` where it was opened after a repair.
    pub opened: Option<Opened>,
    /// Nix's settings before any change, if they have been read.
    pub settings_before: Option<Settings>,
    daemon: Option<Daemon>,
    /// Keeps a Nix that Flywheel has installed from being taken back meanwhile.
    _in_use: Option<File>,
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

/// Makes Nix ready within `limit`, which includes an installation. `roots` are the certificates that a download trusts.
///
/// # Errors
/// When no working Nix results; each error carries a hint for the machine's owner.
pub async fn ready(
    env: &Env,
    wanted: &Wanted,
    roots: &Roots,
    sink: &Sink,
    limit: Duration,
) -> Result<Ready, Error> {
    Host::current().ready(env, wanted, roots, sink, limit).await
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
    /// `/etc`.
    pub(crate) etc: PathBuf,
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
            etc: "/etc".into(),
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
        wanted: &Wanted,
        roots: &Roots,
        sink: &Sink,
        limit: Duration,
    ) -> Result<Ready, Error> {
        let work = Work {
            host: self,
            wanted,
            roots,
            env,
            sink,
            deadline: Instant::now() + limit,
        };
        let error = match work.ready().await {
            Err(error) if self.is_root() && self.is_interrupted(&error) => error,
            ended => return ended,
        };
        // A cancelled job may have ended the installer half-way, and a Nix that is half there does not run either.
        let machine = Machine {
            is_interrupted: true,
            ..self.machine(env)
        };
        let summary = plan(&machine, wanted).summary();
        sink.note(format!("plan: {summary} ({error})"));
        interrupted::complete(self, env, sink, work.deadline).await;
        work.ready().await
    }

    /// Whether Nix is missing or broken because an installation was interrupted. Where a Nix exists, the other packages
    /// of a machine are not our business.
    fn is_interrupted(&self, error: &Error) -> bool {
        match error {
            Error::Install { .. } => interrupted::is_interrupted(&self.packages),
            _ => interrupted::is_nix_interrupted(&self.packages),
        }
    }

    /// Checks for world-writable folders. Since the fixes for CVE-2025-46415, Nix refuses to build
    /// as other users below such folders.
    fn check_guarded(&self, nix: &Nix, users: BuildUsers, sink: &Sink) -> Result<(), Error> {
        let Some(folder) = self.guarded.iter().find(|folder| is_world_writable(folder)) else {
            return Ok(());
        };
        // Nix refuses only where it builds as other users. A volume of a pod is open to everybody, and its only user cannot
        // change that.
        if users == BuildUsers::None {
            return Ok(());
        }
        let strict = nix.version.flavour != Flavour::Lix && nix.version.at_least(2, 24);
        if strict {
            return Err(Error::WorldWritable(
                folder.clone(),
                nix.version.to_string(),
            ));
        }
        let folder = folder.display();
        sink.degraded(
            "nix",
            format!("`{folder}` is world-writable, which newer versions of Nix refuse: run `chmod o-w {folder}` as root"),
        );
        Ok(())
    }
}

/// What it takes to make Nix ready.
struct Work<'a> {
    host: &'a Host,
    wanted: &'a Wanted,
    roots: &'a Roots,
    env: &'a Env,
    sink: &'a Sink,
    deadline: Instant,
}

impl Work<'_> {
    /// Makes the plan, and carries it out.
    async fn ready(&self) -> Result<Ready, Error> {
        let begun = Instant::now();
        let mut machine = self.host.machine(self.env);
        machine.try_sudo().await;
        let mut parts = vec![("probe", begun.elapsed())];
        let planned = plan(&machine, self.wanted);
        if planned != Plan::Ready {
            self.sink.note(format!("plan: {}", planned.summary()));
        }
        let installed = matches!(planned, Plan::Install(_));
        let with_daemon = matches!(&planned, Plan::Install(install) if install.daemon);
        parts.extend(self.prepare(&machine, planned).await?);
        let opening = Instant::now();
        let mut ready = self.open(machine).await?;
        if with_daemon {
            repair::serve_others(&mut ready, self.sink, self.deadline).await;
        }
        if !installed {
            self.note_version(&ready.nix);
        }
        parts.push(("open", opening.elapsed()));
        ready.installed = installed;
        ready.parts = parts;
        Ok(ready)
    }

    /// Says that the Nix that was found is another one than the input names.
    fn note_version(&self, nix: &Nix) {
        let Some(wanted) = &self.wanted.version else {
            return;
        };
        let program = std::fs::canonicalize(&nix.program);
        let program = program.as_deref().unwrap_or(&nix.program);
        if !wanted.is(nix.version.number(), program) {
            self.sink.note(format!(
                "`nix-version` names Nix {wanted}, and the Nix of this machine is used: {} at `{}` is there, and that input \
                 is for machines without one",
                nix.version,
                nix.program.display()
            ));
        }
    }

    /// Does what has to be done before Nix is called for the first time.
    async fn prepare(&self, machine: &Machine, planned: Plan) -> Result<Parts, Error> {
        let installer = Installer {
            host: self.host,
            machine,
            wanted: self.wanted,
            roots: self.roots,
            env: self.env,
            sink: self.sink,
            deadline: self.deadline,
        };
        match planned {
            Plan::Ready => Ok(Vec::new()),
            Plan::Install(install) => installer.install(&install).await,
            Plan::Repair(steps) => {
                for step in steps {
                    // The other steps follow from calls of Nix.
                    if let RepairStep::MakeFolder(preparation) = step {
                        installer.prepare(&preparation).await?;
                    }
                }
                Ok(Vec::new())
            }
            // A process that enters a namespace has done so by now, and its `/nix` can be written to.
            Plan::Rootless(rootless) => Err(rootless.not_entered().into()),
            Plan::Impossible(impossible) => Err(impossible.into()),
        }
    }

    /// Opens the store of the Nix that is there now, and repairs what keeps it from working.
    async fn open(&self, mut machine: Machine) -> Result<Ready, Error> {
        machine.nix = tool::find(self.env, &self.host.places);
        let Some(found) = machine.nix.clone() else {
            let failures = "what was installed has no program `nix`".into();
            return Err(Error::Install { failures });
        };
        // Calls of Nix cost more than everything else here, so those that do not depend on the
        // version run beside the version query.
        let unversioned = Nix::unversioned(&found.program, self.env);
        let early = async { Ok(repair::EarlyProbe::run(&unversioned, self.deadline).await) };
        // `try_join` cancels the other calls when the program turns out not to be Nix.
        let (nix, early) = tokio::try_join!(Nix::detect(&found.program, self.env), early)?;
        // The user's command must find the same Nix as Flywheel.
        let folder = (!found.on_path).then(|| nix.folder().to_owned());
        let mut ready = Ready {
            nix,
            installed: false,
            parts: Vec::new(),
            folder,
            repairs: Vec::new(),
            opened: None,
            settings_before: None,
            daemon: None,
            _in_use: closure::Manifest::hold(&self.host.nix),
        };
        let users = repair::open_store(
            &mut machine,
            self.wanted,
            &mut ready,
            early,
            self.sink,
            self.deadline,
        )
        .await?;
        self.host.check_guarded(&ready.nix, users, self.sink)?;
        for repair in &ready.repairs {
            // A changed setting costs the job nothing and is only noted; a dead daemon is a fault
            // that the machine's owner should see.
            if repair.setting.is_some() {
                self.sink.note(repair.text.as_str());
            } else {
                self.sink.degraded("nix", repair.text.as_str());
            }
        }
        Ok(ready)
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
