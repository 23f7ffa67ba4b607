//! A store for a user who cannot have one at `/nix`: it lives in a folder of his own that outlives the job, and the job
//! alone sees that folder as `/nix`. Decides whether it is needed and where it lives; installs nothing into it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, StatVfsMountFlags, access, statvfs};
use rustix::process::geteuid;
use thiserror::Error;

use crate::bootstrap::machine::{Machine, Namespaces, Sudo};
use crate::bootstrap::plan::{Plan, Wanted, plan};
use flywheel_core::exit::{Exit, Explain};
use flywheel_sys::host::private::PrivateFolder;
use flywheel_sys::process::namespace::{self, Limits, Obstacle, View};
use flywheel_sys::runner::env::{Env, current_folder};
use flywheel_sys::untrusted_file::check_exclusive_folder;

/// Where Nix has its store.
const NIX: &str = "/nix";
/// The name of the folder with everything of the store.
const NAME: &str = "rootless";
/// What Nix has made where it has opened the store.
const DATABASE: &str = "nix/var/nix/db";
/// Where every user can keep something, on every Linux; the first outlives a reboot (Filesystem Hierarchy Standard).
const COMMON: [&str; 2] = ["/var/tmp", "/tmp"];
/// Variables with folders that are emptied with the job. What takes the place of a missing home is in one of them.
const PASSING: [&str; 3] = ["RUNNER_TEMP", "XDG_RUNTIME_DIR", "TMPDIR"];

/// Who works on the store that a verb is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Viewers {
    /// This process and those that it starts.
    Children,
    /// Processes that this one does not start, such as the later steps of a job.
    Others,
}

/// Why there is no store.
#[derive(Debug, Error)]
pub enum Error {
    #[error("{lack}; a folder of this user's own cannot be shown there instead: {obstacle}")]
    Forbidden {
        lack: String,
        /// What makes this store unnecessary, in sentences.
        remedy: String,
        obstacle: Obstacle,
    },
    #[error(
        "{lack}; a folder of this user's own can be shown there to the processes that Flywheel starts, and to no others"
    )]
    Others { lack: String, remedy: String },
    #[error("{lack}, and no folder can hold a store of this user's own ({})", .tried.join("; "))]
    NoPlace {
        lack: String,
        remedy: String,
        /// Each folder with what is wrong with it.
        tried: Vec<String>,
    },
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Forbidden {
                remedy, obstacle, ..
            } => format!("{remedy} Or: {}", on_host(obstacle)),
            Self::Others { remedy, .. } => format!(
                "Run the commands in one step with `flywheel nix-job`, which needs none of this. Or: {remedy}"
            ),
            Self::NoPlace { remedy, .. } => {
                format!("Give the user a home folder that can be written to. Or: {remedy}")
            }
        })
    }
}

/// What an administrator does about an obstacle, a sentence.
fn on_host(obstacle: &Obstacle) -> String {
    format!("On the host, as root, {}.", obstacle.remedy())
}

/// A store that is now seen as `/nix`.
#[derive(Debug)]
pub struct Rootless {
    /// The folder that is seen as `/nix`.
    pub folder: PathBuf,
    /// The entries of the root folder that the job does not see.
    pub left_out: Vec<PathBuf>,
}

impl Rootless {
    /// A line for the log.
    pub fn sentence(&self) -> String {
        let folder = self.folder.display();
        let mut text = format!(
            "this user cannot have a store at `{NIX}`: it lives in `{folder}`, and this job alone sees it as `{NIX}`"
        );
        if !self.left_out.is_empty() {
            let left_out = self.left_out.iter().map(|path| path.display().to_string());
            let left_out = left_out.collect::<Vec<_>>().join("`, `");
            text.push_str(&format!(" (not seen in it: `{left_out}`)"));
        }
        text
    }
}

/// That there is no store at `/nix`, and that this user can have none there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Why, a fragment.
    reason: String,
    /// What makes a store of the user's own unnecessary, in sentences.
    remedy: String,
    /// Whether there is a Nix. From 2.10 on, it makes a store in the home folder by itself, which every process of the user
    /// can open.
    pub is_nix_there: bool,
}

/// Whether the plan is a store of this user's own; without regard to what may forbid it, which `enter` finds. Tries `sudo`
/// where it matters, and leaves no thread behind.
pub fn need(env: &Env) -> Option<Need> {
    let mut machine = Machine::read(env);
    if !machine.lacks_store() {
        return None;
    }
    if matches!(machine.sudo, Sudo::Untried(_)) {
        // Without a runtime of its own thread, so that the namespaces can still be made.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.ok()?.block_on(machine.try_sudo());
    }
    machine.namespaces = Namespaces::Allowed;
    let wanted = Wanted {
        is_for_children_alone: true,
        ..Wanted::default()
    };
    match plan(&machine, &wanted) {
        Plan::Rootless(rootless) => Some(Need {
            reason: rootless.reason,
            remedy: rootless.remedy,
            is_nix_there: machine.nix.is_some(),
        }),
        _ => None,
    }
}

/// The folder with the store that jobs of this user had shown to them as `/nix`, if there is one.
pub(super) fn own_store(env: &Env) -> Option<PathBuf> {
    Places::of_env(env).with_store()
}

/// Such stores that were not removed to their end.
pub(super) fn half_removed(env: &Env) -> Vec<PathBuf> {
    let places = Places::of_env(env);
    let own = places.bases().map(|base| places.own_folder(base));
    let own = own.filter(|own| check_exclusive_folder(own).is_ok());
    let all = own.map(|own| gone(&own.join(NAME)));
    all.filter(|folder| folder.is_dir()).collect()
}

/// Where such a store is while it is removed.
pub(super) fn gone(place: &Path) -> PathBuf {
    place.with_extension("gone")
}

/// Whether one of these paths, or what it links to, is in the store that an earlier step has left in this user's folder. Nix
/// itself may have put another one elsewhere.
pub fn holds(env: &Env, paths: &[PathBuf]) -> bool {
    let Some(place) = Places::of_env(env).with_store() else {
        return false;
    };
    let store = Path::new(NIX).join("store");
    paths.iter().any(|path| {
        let target = fs::read_link(path).unwrap_or_else(|_| path.clone());
        let name = target.strip_prefix(&store).ok();
        // A file inside of a store path, too.
        name.and_then(|name| name.components().next())
            .is_some_and(|name| place.join("nix/store").join(name).exists())
    })
}

/// Lets this process, and all that it starts, see a store of this user's own as `/nix`. To be called before any thread is
/// started, and only where it is needed.
///
/// # Errors
/// When the system does not allow it, or no folder can hold the store. This process must end then.
pub fn enter(env: &Env, need: Need, viewers: Viewers) -> Result<Rootless, Error> {
    let Need {
        reason: lack,
        remedy,
        ..
    } = need;
    if viewers == Viewers::Others {
        return Err(Error::Others { lack, remedy });
    }
    let limits = Limits::read();
    if let Some(obstacle) = limits.obstacle() {
        return Err(Error::Forbidden {
            lack,
            remedy,
            obstacle,
        });
    }
    let place = match Places::of_env(env).first_usable() {
        Ok(place) => place,
        Err(tried) => {
            return Err(Error::NoPlace {
                lack,
                remedy,
                tried,
            });
        }
    };
    let view = View {
        folder: place.join("nix"),
        seen_at: NIX.into(),
        scratch: place.join("root"),
    };
    let left_out = namespace::enter(&view).map_err(|refused| Error::Forbidden {
        lack,
        remedy,
        obstacle: limits.explain(&refused),
    })?;
    Ok(Rootless {
        folder: view.folder,
        left_out,
    })
}

/// The verb of the process that calls `try_out`.
pub const TRIAL: &str = "namespace-trial";

/// Tries what `enter` does, and makes no folder for it. To be called before any thread is started, by a process that is of no
/// use for anything else then.
///
/// # Errors
/// When `enter` would fail: the obstacle, a fragment, and the remedy, a sentence.
pub fn try_out(env: &Env) -> Result<(), (String, String)> {
    let limits = Limits::read();
    let forbidden = |obstacle: Obstacle| (obstacle.to_string(), on_host(&obstacle));
    if let Some(obstacle) = limits.obstacle() {
        return Err(forbidden(obstacle));
    }
    let scratch = Places::of_env(env).would_hold().map_err(|tried| {
        let tried = tried.join("; ");
        let remedy = "Give the user a home folder that can be written to.";
        let obstacle = format!("no folder can hold a store of this user's own ({tried})");
        (obstacle, remedy.to_owned())
    })?;
    // Any folder shows whether one can be shown.
    let view = View {
        folder: "/proc".into(),
        seen_at: NIX.into(),
        scratch,
    };
    let entered = namespace::enter(&view);
    entered
        .map(|_| ())
        .map_err(|refused| forbidden(limits.explain(&refused)))
}

/// The folder that this process sees as `/nix`, if it is another one.
pub fn folder() -> Option<&'static Path> {
    namespace::entered().map(|view| view.folder.as_path())
}

/// The folders that can hold the store, the best first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Places {
    /// Folders with everybody's content, in which each user has a folder of his own.
    tool_cache: Option<PathBuf>,
    /// The user's own folder for state that outlives a job.
    state: Option<PathBuf>,
    /// Folders that each user can write to.
    common: Vec<PathBuf>,
    /// The checkouts, in which no store may be: `git clean` would take it, and a flake would copy it.
    checkouts: Vec<PathBuf>,
}

impl Places {
    fn of_env(env: &Env) -> Self {
        let home = env.path("HOME");
        let state = env
            .path("XDG_STATE_HOME")
            .or_else(|| home.as_ref().map(|home| home.join(".local/state")));
        let passing = PASSING.iter().filter_map(|name| env.path(name));
        let passing: Vec<PathBuf> = passing.chain(["/tmp".into()]).collect();
        let state = state.filter(|state| !passing.iter().any(|folder| state.starts_with(folder)));
        let named = ["GITHUB_WORKSPACE", "CI_PROJECT_DIR"];
        let named = named.iter().filter_map(|name| env.path(name));
        let current = current_folder().unwrap_or_default();
        // Some people have their settings in a checkout that is the home folder itself.
        let around = checkout_around(&current).filter(|checkout| home.as_ref() != Some(checkout));
        Self {
            tool_cache: env.path("RUNNER_TOOL_CACHE"),
            state,
            common: COMMON.map(PathBuf::from).into(),
            checkouts: named.chain(around).collect(),
        }
    }

    /// The folder of the store, made where it was not there; or what is wrong with each that was tried.
    fn first_usable(&self) -> Result<PathBuf, Vec<String>> {
        if let Some(place) = self.with_store() {
            return Ok(place);
        }
        let mut tried = Vec::new();
        for base in self.bases() {
            match self.check(base).and_then(|()| self.make(base)) {
                Ok(place) => return Ok(place),
                Err(problem) => tried.push(format!("`{}`: {problem}", base.display())),
            }
        }
        Err(tried)
    }

    /// A folder of the user's in which `first_usable` would find or make the store; or what is wrong with each.
    fn would_hold(&self) -> Result<PathBuf, Vec<String>> {
        if let Some(place) = self.with_store() {
            return Ok(place.join("root"));
        }
        let mut tried = Vec::new();
        for base in self.bases() {
            let there = base.ancestors().find(|folder| folder.exists());
            let there = there.unwrap_or(base);
            let writable = || access(there, Access::WRITE_OK).map_err(io::Error::from);
            match self.check(base).and_then(|()| writable()) {
                Ok(()) => return Ok(there.to_owned()),
                Err(problem) => tried.push(format!("`{}`: {problem}", base.display())),
            }
        }
        Err(tried)
    }

    /// The folder of a store that is there, and as good as a new one.
    fn with_store(&self) -> Option<PathBuf> {
        let usable = self.bases().filter(|base| self.check(base).is_ok());
        // Where everybody can write, another user can have made the folder, or a link that he turns elsewhere later.
        let own = usable
            .map(|base| self.own_folder(base))
            .filter(|own| check_exclusive_folder(own).is_ok());
        let mut places = own.map(|own| own.join(NAME));
        places.find(|place| place.join(DATABASE).is_dir() && make(place).is_ok())
    }

    fn bases(&self) -> impl Iterator<Item = &PathBuf> {
        let named = self.tool_cache.iter().chain(&self.state);
        named.chain(&self.common).filter(|base| base.is_absolute())
    }

    /// This user's folder below one of the bases. The folder for state is his alone; in the others each user has one.
    fn own_folder(&self, base: &Path) -> PathBuf {
        if self.state.as_deref() == Some(base) {
            base.join("flywheel")
        } else {
            base.join(format!("flywheel-{}", geteuid().as_raw()))
        }
    }

    fn make(&self, base: &Path) -> io::Result<PathBuf> {
        let own = if self.state.as_deref() == Some(base) {
            self.own_folder(base)
        } else {
            // Another user may have taken the name.
            PrivateFolder::shared(base).map_err(io::Error::other)?
        };
        let place = own.join(NAME);
        make(&place)?;
        Ok(place)
    }

    fn check(&self, base: &Path) -> io::Result<()> {
        if self
            .checkouts
            .iter()
            .any(|checkout| base.starts_with(checkout))
        {
            return Err(io::Error::other("it is inside the checkout"));
        }
        // The folder itself may have to be made yet.
        let there = base.ancestors().find(|folder| folder.exists());
        let flags = statvfs(there.unwrap_or(base))?.f_flag;
        if forbids_programs(flags) {
            return Err(io::Error::other(
                "programs cannot be run from it (`noexec`)",
            ));
        }
        Ok(())
    }
}

#[cfg(target_os = "linux")]
fn forbids_programs(flags: StatVfsMountFlags) -> bool {
    flags.contains(StatVfsMountFlags::NOEXEC)
}

/// Other systems have no store of this kind, because they have no namespaces.
#[cfg(not(target_os = "linux"))]
fn forbids_programs(_: StatVfsMountFlags) -> bool {
    false
}

/// Makes the folder of a store with its two parts. Nobody but this user may look into it.
fn make(place: &Path) -> io::Result<()> {
    let make =
        |folder: &Path, mode: u32| DirBuilder::new().recursive(true).mode(mode).create(folder);
    make(place, 0o700)?;
    let found = fs::symlink_metadata(place)?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(io::Error::other("it is not a folder of this user alone"));
    }
    // As `/nix` it has the rights that it has elsewhere. Without its folder for state, Nix 2.10 and later would go to a store
    // in the home folder.
    for part in ["nix/store", "nix/var/nix"] {
        make(&place.join(part), 0o755)?;
    }
    make(&place.join("root"), 0o700)?;
    access(place.join("nix"), Access::WRITE_OK).map_err(io::Error::from)
}

/// The nearest folder at or above this one that Git has a checkout in.
fn checkout_around(folder: &Path) -> Option<PathBuf> {
    let mut folders = folder.ancestors();
    folders
        .find(|folder| folder.join(".git").exists())
        .map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn places(base: &Path) -> Places {
        let of = |name: &str| {
            let folder = base.join(name);
            fs::create_dir_all(&folder).expect("made");
            folder
        };
        Places {
            tool_cache: Some(of("tools")),
            state: Some(of("state")),
            common: vec![of("lasting")],
            checkouts: vec![of("work/repository")],
        }
    }

    #[test]
    fn the_store_is_where_it_was_and_otherwise_in_the_tool_cache() {
        let base = tempfile::tempdir().expect("temporary folder");
        let all = places(base.path());
        let first = all.first_usable().expect("usable");
        assert!(first.starts_with(base.path().join("tools")), "{first:?}");
        let mode = fs::metadata(&first).expect("made").mode();
        assert_eq!(mode & 0o777, 0o700);
        let state = base.path().join("state/flywheel/rootless");
        fs::create_dir_all(state.join(DATABASE)).expect("made");
        assert_eq!(all.first_usable().expect("usable"), state);
        fs::create_dir_all(first.join(DATABASE)).expect("made");
        assert_eq!(all.first_usable().expect("usable"), first);
    }

    #[test]
    fn a_store_behind_a_link_is_not_taken_for_this_users() {
        let base = tempfile::tempdir().expect("temporary folder");
        let all = places(base.path());
        let elsewhere = base.path().join("elsewhere");
        fs::create_dir_all(elsewhere.join(NAME).join(DATABASE)).expect("made");
        let link = base.path().join(format!("tools/flywheel-{}", geteuid()));
        std::os::unix::fs::symlink(&elsewhere, &link).expect("linked");
        let found = all.first_usable().expect("usable");
        assert!(!found.starts_with(&link), "{found:?}");
    }

    #[test]
    fn what_is_emptied_with_the_job_holds_no_store() {
        let state = |temporary| {
            let env = Env::from_pairs([("HOME", "/runner/temp/home"), ("RUNNER_TEMP", temporary)]);
            Places::of_env(&env).state
        };
        assert_eq!(state("/runner/temp"), None);
        let lasting = PathBuf::from("/runner/temp/home/.local/state");
        assert_eq!(state("/runner/other"), Some(lasting));
    }

    #[test]
    fn a_checkout_holds_no_store() {
        let base = tempfile::tempdir().expect("temporary folder");
        let mut all = places(base.path());
        let inside = base.path().join("work/repository/.cache");
        all.tool_cache = Some(inside.clone());
        all.state = None;
        let found = all.first_usable().expect("usable");
        assert!(found.starts_with(&all.common[0]) && !inside.exists());
        all.common = vec![inside.clone()];
        let tried = all.first_usable().expect_err("nothing is left");
        assert!(
            tried.iter().all(|text| text.contains("checkout")),
            "{tried:?}"
        );
        assert!(!inside.exists());
    }

    #[test]
    fn a_folder_that_others_can_write_to_holds_no_store() {
        let base = tempfile::tempdir().expect("temporary folder");
        let mut all = places(base.path());
        all.tool_cache = Some("relative".into());
        let open = base.path().join("state/flywheel/rootless");
        fs::create_dir_all(&open).expect("made");
        fs::set_permissions(&open, Permissions::from_mode(0o777)).expect("set");
        let found = all.first_usable().expect("usable");
        assert!(found.starts_with(&all.common[0]), "{found:?}");
    }

    #[test]
    fn the_checkout_around_a_folder_is_found() {
        let base = tempfile::tempdir().expect("temporary folder");
        let deep = base.path().join("repository/a/b");
        fs::create_dir_all(&deep).expect("made");
        fs::write(base.path().join("repository/.git"), "gitdir: elsewhere").expect("written");
        assert_eq!(checkout_around(&deep), Some(base.path().join("repository")));
    }

    #[test]
    fn every_refusal_names_what_an_administrator_does() {
        let lack = || "there is no `/nix`".to_owned();
        let remedy = || "Make the folder: `install -d -o 1 -g 1 /nix`.".to_owned();
        let obstacle = Obstacle::Setting {
            name: "user.max_user_namespaces",
            value: 0,
            allowing: 15_000,
        };
        let errors = [
            Error::Forbidden {
                lack: lack(),
                remedy: remedy(),
                obstacle,
            },
            Error::Others {
                lack: lack(),
                remedy: remedy(),
            },
            Error::NoPlace {
                lack: lack(),
                remedy: remedy(),
                tried: vec!["`/x`: full".to_owned()],
            },
        ];
        for error in &errors {
            let hint = error.hint().expect("each has one");
            assert!(hint.contains("`install -d -o "), "{hint}");
            assert_eq!(error.exit(), Exit::Host);
        }
        let hint = errors[0].hint().expect("a hint");
        assert!(
            hint.contains("`sysctl -w user.max_user_namespaces=15000`"),
            "{hint}"
        );
    }
}
