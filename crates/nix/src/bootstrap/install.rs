//! Installs Nix where there is none, by the ways of the plan: each is tried once, and the next one where it fails.

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::archive::{self, ArchiveSource};
use super::closure::{self, ClosureSource};
use super::machine::{Folder, Machine};
use super::plan::{
    InstallPlan, Installer as WantedInstaller, NixVersion, Preparation, Wanted, Way,
};
use super::{Error, Host, build_users, distro, releases, undo};
use flywheel_core::exit::Explain as _;
use flywheel_core::progress::Sink;
use flywheel_core::text::one_line;
use flywheel_sys::http::Roots;
use flywheel_sys::process::capture::Tool;
use flywheel_sys::runner::env::Env;

/// Making a folder takes no time, but `sudo` may look the host up in a name service that is away.
const SUDO_LIMIT: Duration = Duration::from_secs(5);

/// A shorter wait is not worth a part of its own in the report.
const SHORT_WAIT: Duration = Duration::from_millis(100);

/// Where systems have their own programs; the last two are NixOS's.
const SYSTEM_PATH: &str =
    "/usr/sbin:/usr/bin:/sbin:/bin:/run/wrappers/bin:/run/current-system/sw/bin";

/// What an installation works with.
pub(super) struct Installer<'a> {
    pub(super) host: &'a Host,
    pub(super) machine: &'a Machine,
    pub(super) wanted: &'a Wanted,
    /// The certificates that a download trusts.
    pub(super) roots: &'a Roots,
    pub(super) env: &'a Env,
    pub(super) sink: &'a Sink,
    pub(super) deadline: Instant,
}

/// How long each part of an installation took.
pub(crate) type Parts = Vec<(&'static str, Duration)>;

/// Why a way did not lead to a Nix.
struct WayFailure {
    problem: String,
    end: WayEnd,
}

/// What follows from a way that failed.
#[derive(Clone, Copy)]
enum WayEnd {
    NextWay,
    /// The machine is at fault, so that no way helps.
    Host,
    /// What came is not what was signed.
    Tampered,
}

impl WayEnd {
    fn with(self, problem: String) -> WayFailure {
        WayFailure { problem, end: self }
    }
}

impl Installer<'_> {
    /// Carries the plan out.
    ///
    /// # Errors
    /// When no way works; with the reason of each.
    pub(super) async fn install(&self, plan: &InstallPlan) -> Result<Parts, Error> {
        let begun = Instant::now();
        self.prepare(&plan.preparation).await?;
        let mut failures = Vec::new();
        let mut ways = plan.ways.iter().peekable();
        while let Some(way) = ways.next() {
            match self.try_way(*way).await {
                Ok(parts) => {
                    self.make_build_users(plan.daemon);
                    return Ok(with_wait(parts, begun.elapsed()));
                }
                Err(WayFailure { problem, end }) => {
                    let failure = format!("{}: {problem}", way.as_str());
                    let text = format!("Nix is not installed by {failure}");
                    failures.push(failure);
                    match end {
                        // The error that this ends with has the last one's cause.
                        WayEnd::NextWay if ways.peek().is_some() => self.sink.note(text),
                        WayEnd::NextWay => {}
                        WayEnd::Host => break,
                        // Another way would only hide it, and may know of no signature at all.
                        WayEnd::Tampered => break,
                    }
                }
            }
        }
        Err(Error::Install {
            failures: failures.join("; "),
        })
    }

    /// Makes the users that builds run as, if a daemon is wanted. Without them builds run as root, and the job goes on.
    fn make_build_users(&self, is_wanted: bool) {
        let made = if is_wanted {
            build_users::make(&self.host.etc, &self.host.nix)
        } else {
            Ok(())
        };
        if let Err(error) = made {
            self.sink
                .degraded("nix", format!("the build users could not be made: {error}"));
        }
    }

    async fn try_way(&self, way: Way) -> Result<Parts, WayFailure> {
        match way {
            Way::Closure => self.closure().await,
            Way::Tarball => self.tarball().await,
            Way::Distro => self.distro().await,
        }
    }

    /// Fetches the closure from the first cache that has it.
    async fn closure(&self) -> Result<Parts, WayFailure> {
        let path = match &self.wanted.version {
            Some(NixVersion::Path(path)) => path.clone(),
            Some(NixVersion::Number(number)) => releases::closure(number).ok_or_else(|| {
                WayEnd::NextWay.with(format!("the store path of Nix {number} is not known"))
            })?,
            None => releases::closure(releases::CLOSURE_VERSION)
                .expect("the release has a store path for each system"),
        };
        let upstream = [releases::upstream()];
        let sources = match self.wanted.sources.as_slice() {
            [] => upstream.as_slice(),
            sources => sources,
        };
        let mut problems = Vec::new();
        let mut end = WayEnd::NextWay;
        for source in sources {
            let source = ClosureSource {
                address: source.address.clone(),
                keys: source.keys.clone(),
                path: path.clone(),
                roots: self.roots.clone(),
            };
            let error =
                match closure::install(&source, &self.host.nix, self.sink, self.deadline).await {
                    Ok(installed) => return Ok(installed.parts),
                    Err(error) => error,
                };
            let hint = error.hint().unwrap_or_default();
            problems.push(format!("{} ({hint})", chain(&error)));
            if error.is_of_host() {
                end = WayEnd::Host;
                break;
            }
            if error.is_tampering() {
                end = WayEnd::Tampered;
                break;
            }
        }
        Err(end.with(problems.join("; ")))
    }

    async fn tarball(&self) -> Result<Parts, WayFailure> {
        let source = ArchiveSource {
            mirror: self.wanted.mirror.as_ref(),
            version: match &self.wanted.version {
                Some(NixVersion::Number(number)) => Some(number),
                Some(NixVersion::Path(_)) | None => None,
            },
            // By itself, Flywheel takes nothing that it does not know: the sum beside an archive is the word of the
            // server that has the archive.
            takes_unknown: self.wanted.mirror.is_some()
                || self.wanted.version.is_some()
                || self.wanted.installer == WantedInstaller::Tarball,
            roots: self.roots,
        };
        let installed = archive::install(&source, &self.host.nix, self.sink, self.deadline).await;
        installed.map_err(|error| {
            let end = match error {
                archive::Error::Staging(_) => WayEnd::Host,
                archive::Error::Sum { .. } => WayEnd::Tampered,
                _ => WayEnd::NextWay,
            };
            end.with(chain(&error))
        })
    }

    async fn distro(&self) -> Result<Parts, WayFailure> {
        let missing = || WayEnd::NextWay.with("there is no `apt-get`".to_owned());
        let apt = self.machine.apt.as_deref().ok_or_else(missing)?;
        let begun = Instant::now();
        let installed = distro::install(apt, self.env, self.sink, self.deadline).await;
        installed.map_err(|error| WayEnd::NextWay.with(error.to_string()))?;
        Ok(vec![("package", begun.elapsed())])
    }

    /// Does what `/nix` needs first.
    ///
    /// # Errors
    /// When `sudo` fails all the same.
    pub(super) async fn prepare(&self, preparation: &Preparation) -> Result<(), Error> {
        let Preparation::Sudo(sudo) = preparation else {
            return Ok(());
        };
        self.sink.note(format!(
            "`sudo` makes `{}` for user {}; nothing else is done as root",
            self.host.nix.display(),
            self.machine.user.shown()
        ));
        let failed = |problem: String| Error::Impossible {
            obstacle: format!(
                "`sudo` did not make `{}`: {problem}",
                self.host.nix.display()
            ),
            remedy: format!(
                "Have the runner's image make it: `{}` as root.",
                ["install"]
                    .iter()
                    .copied()
                    .map(str::to_owned)
                    .chain(self.folder_arguments())
                    .collect::<Vec<_>>()
                    .join(" ")
            ),
        };
        let call = sudo_call(sudo).arg("install").args(self.folder_arguments());
        match call.run(SUDO_LIMIT).await {
            Ok(output) if output.status.success() => {
                let before = match self.machine.folder {
                    Folder::Empty { owner, .. } => Some(owner),
                    _ => None,
                };
                undo::mark(&self.host.nix, before).map_err(|error| failed(error.to_string()))
            }
            Ok(output) => Err(failed(one_line(&output.stderr, 200))),
            Err(error) => Err(failed(one_line(&error.to_string(), 200))),
        }
    }

    /// What `install` is given to make the folder.
    fn folder_arguments(&self) -> Vec<String> {
        let user = &self.machine.user;
        [
            "-d",
            "-o",
            &user.uid.to_string(),
            "-g",
            &user.gid.to_string(),
            "-m",
            "755",
        ]
        .map(str::to_owned)
        .into_iter()
        .chain([self.host.nix.display().to_string()])
        .collect()
    }
}

/// The parts of an installation that took `all`, with what was waited for besides: another job's installation, `sudo`, a
/// source that did not answer.
fn with_wait(mut parts: Parts, all: Duration) -> Parts {
    let known: Duration = parts.iter().map(|(_, time)| *time).sum();
    let wait = all.saturating_sub(known);
    if wait >= SHORT_WAIT {
        parts.insert(0, ("wait", wait));
    }
    parts
}

/// The message of an error with those of its causes.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", chain(cause)),
        None => error.to_string(),
    }
}

/// A call of `sudo` that never waits for a password. What it runs is not looked up on the job's `PATH`, where a checkout
/// may have folders.
pub(super) fn sudo_call(sudo: &Path) -> Tool {
    Tool::new(sudo)
        .env("PATH", SYSTEM_PATH)
        .env("LC_ALL", "C")
        .arg("-n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_waited_for_is_a_part_of_its_own() {
        let parts = || vec![("fetch", Duration::from_secs(1))];
        let short = with_wait(parts(), Duration::from_millis(1050));
        assert_eq!(short, parts());
        let long = with_wait(parts(), Duration::from_secs(3));
        assert_eq!(long[0], ("wait", Duration::from_secs(2)));
        // Another job has installed it.
        let all = with_wait(Vec::new(), Duration::from_secs(2));
        assert_eq!(all, [("wait", Duration::from_secs(2))]);
    }
}
