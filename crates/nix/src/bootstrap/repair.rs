//! Opens the store and repairs what keeps it shut: a daemon that is dead, build users that do not exist.

use std::time::Duration;

use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};

use crate::bootstrap::{BuildUsers, Daemon, Error, Host, Ready, Repair};
use crate::ping::{Opened, Ping, PingFailure, ping};
use crate::settings::Settings;
use crate::store::daemon_socket;
use crate::tool::{self, Nix};
use flywheel_core::text::one_line;
use flywheel_sys::process::capture::CaptureError;
use flywheel_sys::process::service::Service;

/// Opening the store is quick; a daemon that needs longer than this is taken for dead.
const PING_LIMIT: Duration = Duration::from_secs(20);
/// Another process may be making the store at this very moment: one that does not open for a reason of its own
/// is asked again so many times …
const OPEN_ATTEMPTS: usize = 10;
/// … after so long.
const OPEN_RETRY_DELAY: Duration = Duration::from_millis(100);
/// A daemon makes its socket at once.
const START_LIMIT: Duration = Duration::from_secs(10);
/// How often it is looked whether it has.
const START_POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Builds then run as the user that Nix itself runs as.
const NO_BUILD_USERS: &str = "build-users-group =";

/// What can be asked of a Nix whose version is not known yet.
pub(super) struct EarlyProbe {
    /// Whether the store opens.
    store: Result<Ping, Error>,
    /// `None` where they are asked for in another way.
    settings: Option<Settings>,
}

impl EarlyProbe {
    pub async fn run(nix: &Nix, deadline: Instant) -> Self {
        let (store, settings) = tokio::join!(ping_patiently(nix, deadline), Settings::read(nix));
        Self {
            store,
            settings: settings.ok(),
        }
    }
}

/// Opens the store, with repairs where needed, and says whether builds have users of their own.
pub(super) async fn open_store(
    host: &Host,
    ready: &mut Ready,
    early: EarlyProbe,
    deadline: Instant,
) -> Result<BuildUsers, Error> {
    let opening = early.store?;
    let settings = match early.settings {
        Some(settings) => Some(settings),
        // Only root's store cannot do without; for the others they are read when they are needed.
        None if host.root => Some(Settings::read(&ready.nix).await?),
        None => None,
    };
    ready.settings_before.clone_from(&settings);
    match opening {
        Ping::Open(opened) if opened.url == "local" => {
            let users = check_build_users(ready, &opened, settings.filter(|_| host.root));
            ready.opened = Some(opened);
            Ok(users)
        }
        Ping::Open(opened) => {
            ready.opened = Some(opened);
            Ok(BuildUsers::InForce)
        }
        Ping::Failed(PingFailure::NoDaemon(problem)) if has_own_daemon(&ready.nix) => {
            if host.root {
                restart_daemon(ready, &problem, deadline).await
            } else {
                Err(Error::DeadDaemon {
                    socket: daemon_socket(&ready.nix),
                    problem,
                })
            }
        }
        Ping::Failed(PingFailure::PermissionDenied(problem)) => Err(Error::NoRights(problem)),
        Ping::Failed(failure) => Err(Error::Closed(failure.text().to_owned())),
    }
}

/// Two jobs may open a new store at the same moment, and Nix lets one of them stumble: over a link that is there
/// already, a schema that is still empty, a database that is busy.
async fn ping_patiently(nix: &Nix, deadline: Instant) -> Result<Ping, Error> {
    for _ in 0..OPEN_ATTEMPTS {
        match ping_once(nix, deadline).await? {
            Ping::Failed(PingFailure::Other(_)) if Instant::now() < deadline => {
                sleep(OPEN_RETRY_DELAY).await;
            }
            answer => return Ok(answer),
        }
    }
    ping_once(nix, deadline).await
}

/// A store that takes too long to answer counts as a dead daemon.
async fn ping_once(nix: &Nix, deadline: Instant) -> Result<Ping, Error> {
    let limit = PING_LIMIT.min(deadline.saturating_duration_since(Instant::now()));
    match ping(nix, limit).await {
        Err(tool::Error::Run {
            source: CaptureError::Deadline { limit, .. },
            ..
        }) => {
            let text = format!("no answer within {} s", limit.as_secs());
            Ok(Ping::Failed(PingFailure::NoDaemon(text)))
        }
        answer => Ok(answer?),
    }
}

/// Whether the store is this machine's, so that its daemon is ours to start.
fn has_own_daemon(nix: &Nix) -> bool {
    let remote = nix.variable("NIX_REMOTE").unwrap_or("auto");
    matches!(remote, "auto" | "daemon") || remote.starts_with("unix://")
}

/// A store that we open ourselves. As root, when there are settings, Nix builds as other users, and refuses if
/// there are none.
fn check_build_users(ready: &mut Ready, opened: &Opened, settings: Option<Settings>) -> BuildUsers {
    let group = settings
        .and_then(|settings| settings.text("build-users-group"))
        .unwrap_or_default();
    if group.is_empty() {
        return BuildUsers::None;
    }
    let problem = match &opened.missing_group {
        Some(group) => format!("the group `{group}` does not exist"),
        None if is_empty_group(&group) => format!("the group `{group}` has no members"),
        None => return BuildUsers::InForce,
    };
    let text = format!("{problem}, so builds run as root (`{NO_BUILD_USERS}`)");
    apply(
        ready,
        Repair {
            text,
            setting: Some(NO_BUILD_USERS),
            variable: None,
        },
    );
    BuildUsers::None
}

/// Only a group that the system's file lists without members is surely empty.
fn is_empty_group(name: &str) -> bool {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    groups.lines().any(|line| {
        let mut fields = line.split(':');
        fields.next() == Some(name)
            && fields
                .nth(2)
                .is_some_and(|members| members.trim().is_empty())
    })
}

/// As root: starts the daemon that the job was promised, or does without one.
async fn restart_daemon(
    ready: &mut Ready,
    dead: &str,
    deadline: Instant,
) -> Result<BuildUsers, Error> {
    let direct = ready.nix.clone().with_variable("NIX_REMOTE", Some("local"));
    let users = match ping_patiently(&direct, deadline).await? {
        Ping::Open(opened) => {
            let settings = Settings::read(&direct).await?;
            check_build_users(ready, &opened, Some(settings))
        }
        Ping::Failed(failure) => return Err(Error::Closed(failure.text().to_owned())),
    };
    match start_daemon(&ready.nix, deadline).await {
        Ok(daemon) => {
            ready.daemon = Some(daemon);
            let text = format!("the Nix daemon was dead ({dead}); one was started for this job");
            apply(
                ready,
                Repair {
                    text,
                    setting: None,
                    variable: None,
                },
            );
        }
        Err(problem) => {
            let text = format!(
                "the Nix daemon is dead ({dead}) and did not start ({problem}); the job uses the store directly"
            );
            apply(
                ready,
                Repair {
                    text,
                    setting: None,
                    variable: Some(("NIX_REMOTE", "local")),
                },
            );
        }
    }
    Ok(users)
}

/// Starts the `nix-daemon` that is beside `nix`, and waits until the store opens through it.
async fn start_daemon(nix: &Nix, deadline: Instant) -> Result<Daemon, String> {
    // A daemon that was told to use a daemon would ask itself.
    let own = nix.clone().with_variable("NIX_REMOTE", None);
    let socket = daemon_socket(nix);
    let created_socket = (!socket.exists()).then(|| socket.clone());
    let program = nix.folder().join("nix-daemon");
    let started = Service::start(&program, &["--daemon"], &own.variables());
    let mut daemon = started.map_err(|error| one_line(&error.to_string(), 200))?;
    let limit = deadline.min(Instant::now() + START_LIMIT);
    let waited = timeout_at(limit, async {
        while daemon.is_alive() && UnixStream::connect(&socket).await.is_err() {
            sleep(START_POLL_INTERVAL).await;
        }
        daemon.is_alive() && matches!(ping_patiently(nix, limit).await, Ok(Ping::Open(_)))
    });
    if waited.await == Ok(true) {
        return Ok(Daemon {
            service: daemon,
            created_socket,
        });
    }
    let output = one_line(&daemon.stop(super::DAEMON_GRACE).await, 200);
    Err(if output.is_empty() {
        "it said nothing".to_owned()
    } else {
        output
    })
}

/// Notes a repair, and has our own calls of Nix follow it.
fn apply(ready: &mut Ready, repair: Repair) {
    if let Some(line) = repair.setting {
        let config = format!("{}\n{line}\n", ready.nix.config().trim_end());
        ready.nix = ready.nix.clone().with_config(config.trim_start());
    }
    if let Some((name, value)) = repair.variable {
        ready.nix = ready.nix.clone().with_variable(name, Some(value));
    }
    ready.repairs.push(repair);
}
