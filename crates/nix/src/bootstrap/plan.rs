//! The plan by which Nix is made ready: a pure decision from the machine's facts and the inputs. The one place that says
//! what is done on which machine; carrying it out is for `bootstrap` and the modules beside this one.

mod obstacles;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use url::Url;

use super::machine::{Folder, Machine, Namespaces, Opening, Socket, Sudo};
use super::releases;
use crate::key::PublicKey;
use crate::store_path::StorePath;
use flywheel_core::text::one_line;
pub(super) use obstacles::does_not_open;
use obstacles::{folder_obstacle, folder_remedy, nowhere};

#[cfg(test)]
mod tests;

/// What is missing where only the store is.
const NO_STORE: &str = "Nix is installed, and has no store";

/// What the inputs ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub installer: Installer,
    pub version: Option<NixVersion>,
    /// The binary caches that the closure is fetched from, in order. Without any, the default ones.
    pub sources: Vec<BinaryCache>,
    /// Where the release archive is taken from.
    pub mirror: Option<Mirror>,
    /// Whether a fresh Nix gets build users and a daemon.
    pub daemon: bool,
    /// Whether what uses the store is this process and its children, so that a namespace of their own can show it to them.
    pub is_for_children_alone: bool,
}

/// How Nix comes to a machine that has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Installer {
    /// The first that works of those below.
    #[default]
    Auto,
    /// As a closure from a binary cache.
    Closure,
    /// From a release archive.
    Tarball,
    /// As a package of the distribution.
    Distro,
    /// Not at all.
    None,
}

/// Which Nix is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NixVersion {
    /// `2.31.2`.
    Number(String),
    /// A path that the binary cache has.
    Path(StorePath),
}

impl FromStr for NixVersion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with('/') {
            let path = text.parse().map(Self::Path);
            return path
                .map_err(|_| "is no store path of Nix, `/nix/store/HASH-nix-VERSION`".into());
        }
        let numbers: Vec<&str> = text.split('.').collect();
        let is_number = |part: &&str| {
            (1..=4).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
        };
        if matches!(numbers.len(), 2 | 3) && numbers.iter().all(is_number) {
            Ok(Self::Number(text.to_owned()))
        } else {
            Err(format!(
                "must be a version such as `2.31.2` or a whole store path, not `{}`",
                one_line(text, 80)
            ))
        }
    }
}

impl NixVersion {
    /// Whether a Nix is the one that is meant: by the version that it prints, or by the file of its program.
    pub(super) fn is(&self, version: &str, program: &Path) -> bool {
        match self {
            // `2.31` asks for any of that series.
            Self::Number(number) => version.strip_prefix(number.as_str()).is_some_and(|rest| {
                rest.is_empty() || (rest.starts_with('.') && number.matches('.').count() == 1)
            }),
            Self::Path(path) => program.starts_with(path.to_string()),
        }
    }
}

impl fmt::Display for NixVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => f.write_str(number),
            Self::Path(path) => write!(f, "{path}"),
        }
    }
}

/// A binary cache, and the keys that it is believed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BinaryCache {
    pub address: Url,
    pub keys: Vec<PublicKey>,
}

/// Where a release archive is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mirror {
    /// The archive itself, or an address with the layout of `https://releases.nixos.org/nix/`.
    Url(Url),
    /// The archive, or a folder with archives in it.
    Path(PathBuf),
}

/// What is done to make Nix ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// The Nix that is there is used as it is.
    Ready,
    /// The Nix that is there is used, after these steps.
    Repair(Vec<RepairStep>),
    Install(InstallPlan),
    /// This process and its children get a `/nix` of their own; then this is planned anew.
    Rootless(RootlessPlan),
    Impossible(Impossible),
}

/// Why there can be no working Nix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Impossible {
    /// A fragment.
    pub obstacle: String,
    /// What to change, in sentences.
    pub remedy: String,
}

/// What keeps an existing Nix from working, and is mended for the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RepairStep {
    /// An interrupted installation of packages is completed.
    CompletePackages,
    /// `sudo` makes `/nix` for this user.
    MakeFolder(Preparation),
    /// Builds run as the user that runs Nix; with the reason.
    WithoutBuildUsers(String),
    /// A daemon is started for the job, or else the store is used without one; with the reason.
    StartDaemon(String),
}

/// How Nix is installed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstallPlan {
    pub preparation: Preparation,
    /// In the order in which they are tried.
    pub ways: Vec<Way>,
    /// With build users and a daemon.
    pub daemon: bool,
}

/// What `/nix` needs before something is put there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Preparation {
    /// This user can write there, or make it.
    Nothing,
    /// `sudo` makes it for this user.
    Sudo(PathBuf),
}

/// One way to install Nix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Closure,
    Tarball,
    Distro,
}

impl Way {
    /// The word of the input `nix-installer`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closure => "closure",
            Self::Tarball => "tarball",
            Self::Distro => "distro",
        }
    }
}

/// A `/nix` for this process and its children alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootlessPlan {
    /// Whether `/nix` is there to be covered.
    pub covers_folder: bool,
    /// Why nothing else will do, a fragment.
    pub reason: String,
    /// What makes it unnecessary, in sentences.
    pub remedy: String,
}

/// Decides what is done. `machine.opening` is `Untried` before Nix has been called; afterwards the plan is made again.
pub fn plan(machine: &Machine, wanted: &Wanted) -> Plan {
    if machine.is_interrupted {
        return Plan::Repair(vec![RepairStep::CompletePackages]);
    }
    match (&machine.opening, &machine.nix) {
        (Opening::Untried, None) => for_missing_nix(machine, wanted),
        (Opening::Untried, Some(_)) => for_untried_nix(machine, wanted),
        (Opening::Local { no_build_users: None } | Opening::Remote, _) => Plan::Ready,
        (Opening::Local { no_build_users: Some(problem) }, _) => {
            Plan::Repair(vec![RepairStep::WithoutBuildUsers(problem.clone())])
        }
        // Only root can start a daemon that serves this store.
        (Opening::DeadDaemon { problem, .. }, _) if machine.user.is_root() => {
            Plan::Repair(vec![RepairStep::StartDaemon(problem.clone())])
        }
        (Opening::DeadDaemon { socket, problem }, _) => Plan::Impossible(Impossible {
            obstacle: format!(
                "the Nix daemon does not answer at `{}`: {problem}",
                socket.display()
            ),
            remedy: "Start it on the runner (`systemctl restart nix-daemon`, or `nix-daemon` as root), or run the job \
                     as root, which starts one for the job."
                .into(),
        }),
        (Opening::Denied(problem), _) => for_denied_store(machine, wanted, problem),
        // Nix's own message names a file in the folder, and not what is wrong with it.
        (Opening::Closed(problem), _)
            if !machine.is_elsewhere
                && matches!(machine.folder, Folder::ReadOnly | Folder::Link { .. } | Folder::NoFolder) =>
        {
            nowhere(machine, wanted, &format!("the Nix store does not open ({problem})"))
        }
        (Opening::Closed(problem), _) => Plan::Impossible(does_not_open(problem)),
    }
}

/// A Nix that has not been called yet: what can be known without a call is whether it has a store at all.
fn for_untried_nix(machine: &Machine, wanted: &Wanted) -> Plan {
    if !machine.lacks_store() {
        return Plan::Ready;
    }
    match ground(machine, wanted) {
        Ground::Prepared(preparation) => Plan::Repair(vec![RepairStep::MakeFolder(preparation)]),
        Ground::Rootless(rootless) => Plan::Rootless(rootless),
        // A job that needs a store of its own ends without one; so does its plan.
        Ground::None if wants_rootless(machine, wanted) => nowhere(machine, wanted, NO_STORE),
        // Some versions make do with a store in the home folder, so that this is not the last word.
        Ground::None => Plan::Ready,
    }
}

fn for_denied_store(machine: &Machine, wanted: &Wanted, problem: &str) -> Plan {
    if !machine.is_elsewhere && !matches!(machine.folder, Folder::Used { .. }) {
        return nowhere(machine, wanted, NO_STORE);
    }
    if machine.is_elsewhere {
        return Plan::Impossible(Impossible {
            obstacle: format!(
                "the Nix store that the environment or `nix.conf` names belongs to another user, or cannot be made: {problem}"
            ),
            remedy: "Look at `NIX_STORE_DIR`, `NIX_STATE_DIR`, `NIX_REMOTE` and `NIX_CONFIG` in the job's environment, and \
                     at `/etc/nix/nix.conf` on the runner."
                .into(),
        });
    }
    Plan::Impossible(Impossible {
        obstacle: format!("the Nix store belongs to another user and there is no daemon: {problem}"),
        remedy: "Start `nix-daemon` as root on the runner, run the job as root, or give `/nix` to the job's user.".into(),
    })
}

fn for_missing_nix(machine: &Machine, wanted: &Wanted) -> Plan {
    if wanted.installer == Installer::None {
        return Plan::Impossible(Impossible {
            obstacle: "Nix is not installed on this machine, and `nix-installer` is `none`".into(),
            remedy: "Put Nix into the runner's image, or leave `nix-installer` out.".into(),
        });
    }
    if machine.is_daemon_named && machine.socket == Socket::Absent && !machine.user.is_root() {
        return Plan::Impossible(Impossible {
            obstacle: "Nix is not installed on this machine, and neither is the daemon that `NIX_REMOTE` names".into(),
            remedy: "Take `NIX_REMOTE` out of the job's environment, so that Nix is installed for this user, or start \
                     `nix-daemon` as root on the runner."
                .into(),
        });
    }
    if wanted.daemon && !machine.user.is_root() {
        return Plan::Impossible(Impossible {
            obstacle: format!(
                "`nix-daemon` takes root, and the job runs as user {}",
                machine.user.shown()
            ),
            remedy: "Leave `nix-daemon` out, so that Nix is installed for this user, or run the job as root.".into(),
        });
    }
    let distro = machine.user.is_root() && machine.apt.is_some();
    let asked = |way: Way| match wanted.installer {
        Installer::Auto => true,
        Installer::Closure => way == Way::Closure,
        Installer::Tarball => way == Way::Tarball,
        Installer::Distro => way == Way::Distro,
        Installer::None => false,
    };
    // A store path names what only a binary cache has, and a package has the version that it has.
    let gives = |way: Way| match (&wanted.version, way) {
        (Some(NixVersion::Path(_)), way) => way == Way::Closure,
        (Some(NixVersion::Number(number)), Way::Closure) => releases::closure(number).is_some(),
        (Some(NixVersion::Number(_)), way) => way == Way::Tarball,
        // A package brings its own users and its own way to start a daemon.
        (None, Way::Distro) => !wanted.daemon,
        (None, _) => true,
    };
    let ground = ground(machine, wanted);
    let has_ground = !matches!(ground, Ground::None);
    // What a package brings needs a store as well.
    let is_of_no_use = matches!(
        machine.folder,
        Folder::ReadOnly | Folder::NoExec | Folder::Link { .. } | Folder::NoFolder
    );
    let can = |way: Way| match way {
        Way::Closure | Way::Tarball => has_ground,
        Way::Distro => distro && !is_of_no_use,
    };
    // An archive that somebody has named is meant: a pod without the internet would wait for a cache in vain.
    let order = match wanted.mirror {
        Some(_) => [Way::Tarball, Way::Closure, Way::Distro],
        None => [Way::Closure, Way::Tarball, Way::Distro],
    };
    let ways: Vec<Way> = order
        .into_iter()
        .filter(|way| asked(*way) && gives(*way) && can(*way))
        .collect();
    match ground {
        _ if ways.is_empty() && has_ground => no_way(machine, wanted),
        Ground::None if ways.is_empty() => {
            nowhere(machine, wanted, "Nix is not installed on this machine")
        }
        Ground::Rootless(rootless) => Plan::Rootless(rootless),
        Ground::Prepared(preparation) => install(preparation, ways, wanted),
        Ground::None => install(Preparation::Nothing, ways, wanted),
    }
}

fn install(preparation: Preparation, ways: Vec<Way>, wanted: &Wanted) -> Plan {
    Plan::Install(InstallPlan {
        preparation,
        ways,
        daemon: wanted.daemon,
    })
}

/// Nothing that was asked for is to be had on this machine.
fn no_way(machine: &Machine, wanted: &Wanted) -> Plan {
    let obstacle = match (wanted.installer, &wanted.version) {
        (Installer::Distro, None) if wanted.daemon => {
            "`nix-daemon` has no use for the distribution's package".to_owned()
        }
        (Installer::Distro, None) if machine.user.is_root() => {
            "this system has no `apt-get`".to_owned()
        }
        (Installer::Distro, None) => format!(
            "`apt-get` takes root, and the job runs as user {}",
            machine.user.shown()
        ),
        (_, Some(version)) => format!(
            "Nix {version} is not to be had by `nix-installer: {}`",
            wanted.installer.as_str()
        ),
        (_, None) => format!(
            "`nix-installer: {}` is of no use",
            wanted.installer.as_str()
        ),
    };
    Plan::Impossible(Impossible {
        obstacle: format!(
            "Nix is not installed on this machine and cannot be installed: {obstacle}"
        ),
        remedy: "Leave `nix-installer` out, so that every way is tried that this machine allows."
            .into(),
    })
}

impl Installer {
    /// The word of the input.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Closure => "closure",
            Self::Tarball => "tarball",
            Self::Distro => "distro",
            Self::None => "none",
        }
    }
}

/// Where a store can come to be.
enum Ground {
    Prepared(Preparation),
    Rootless(RootlessPlan),
    None,
}

fn ground(machine: &Machine, wanted: &Wanted) -> Ground {
    if machine.folder.is_usable() {
        return Ground::Prepared(Preparation::Nothing);
    }
    // What others have put there is not taken from them.
    let is_free = matches!(machine.folder, Folder::Absent { .. } | Folder::Empty { .. });
    if is_free && let Sudo::Allowed(program) = &machine.sudo {
        return Ground::Prepared(Preparation::Sudo(program.clone()));
    }
    if machine.namespaces == Namespaces::Allowed && wants_rootless(machine, wanted) {
        return Ground::Rootless(RootlessPlan {
            covers_folder: !matches!(machine.folder, Folder::Absent { .. }),
            reason: folder_obstacle(machine),
            remedy: folder_remedy(machine),
        });
    }
    Ground::None
}

/// Whether a store of this user's own would do, if it is allowed.
fn wants_rootless(machine: &Machine, wanted: &Wanted) -> bool {
    // A folder of our own would hide the Nix that is below `/nix`, and all else that is there.
    !machine.is_nix_below && wanted.is_for_children_alone && !machine.user.is_root()
}

impl Plan {
    /// The plan in one line, a fragment.
    pub fn summary(&self) -> String {
        match self {
            Self::Ready => "ready: the Nix of this machine is used as it is".into(),
            Self::Repair(steps) => {
                let steps: Vec<String> = steps.iter().map(RepairStep::text).collect();
                format!("repair: {}", steps.join("; "))
            }
            Self::Install(install) => format!("install: {}", install.text()),
            Self::Rootless(rootless) => format!(
                "rootless: {}, so the job gets a `/nix` that it alone sees",
                rootless.reason
            ),
            Self::Impossible(Impossible { obstacle, .. }) => format!("impossible: {obstacle}"),
        }
    }
}

impl RepairStep {
    fn text(&self) -> String {
        match self {
            Self::CompletePackages => "an interrupted installation of packages is completed".into(),
            Self::MakeFolder(preparation) => preparation.text().unwrap_or_default().into(),
            Self::WithoutBuildUsers(problem) => format!("{problem}, so builds run as this user"),
            Self::StartDaemon(problem) => {
                format!("the daemon does not answer ({problem}), so one is started for the job")
            }
        }
    }
}

impl Preparation {
    fn text(&self) -> Option<&'static str> {
        match self {
            Self::Nothing => None,
            Self::Sudo(_) => Some("`sudo` makes `/nix` for this user"),
        }
    }
}

impl RootlessPlan {
    /// What is left where the namespace was not entered.
    pub(super) fn not_entered(self) -> Impossible {
        Impossible {
            obstacle: format!(
                "{}, and this process has no namespace of its own",
                self.reason
            ),
            remedy: format!(
                "Run the job by `nix-job`, which makes one. Or: {}",
                self.remedy
            ),
        }
    }
}

impl InstallPlan {
    fn text(&self) -> String {
        let ways: Vec<&str> = self.ways.iter().map(|way| way.as_str()).collect();
        let first = self
            .preparation
            .text()
            .map(|text| format!("{text}; "))
            .unwrap_or_default();
        let users = if self.daemon {
            ", with build users and a daemon"
        } else {
            ""
        };
        format!("{first}Nix is installed by {}{users}", ways.join(", else "))
    }
}
