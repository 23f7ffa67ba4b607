//! Checks of the host, the same for every class: room on the disk, a writable temporary folder, memory, the clock, and
//! the hints that the runner gives.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::check_list::{CheckFailure, CheckList, CheckSpec, Found};
use super::inputs::Plan;
use crate::report::canary::Disk;
use flywheel_core::contract::Size;
use flywheel_core::disk::Room;
use flywheel_core::text::bytes;
use flywheel_nix::key::PublicKey;
use flywheel_nix::settings;
use flywheel_sys::host::disk::FileSystem;
use flywheel_sys::host::memory::{Cgroup, of_machine};
use flywheel_sys::runner::env::Env;

const DISK: CheckSpec = CheckSpec::required("disk-space", "disk", 5);
const INODES: CheckSpec = CheckSpec::required("disk-inodes", "inodes", 5);
const TEMPORARY: CheckSpec = CheckSpec::required("temporary-space", "temporary-space", 10);
const MEMORY: CheckSpec = CheckSpec::required("memory-envelope", "memory", 5);
const CLOCK: CheckSpec = CheckSpec::required("clock", "clock", 10);
const NIX_CONFIG: CheckSpec = CheckSpec::required("hint-nix-config", "hints", 5);
const HINTS: CheckSpec = CheckSpec::advisory("hints", "hints", 5);

/// Store paths have hundreds or thousands of files each, so with fewer inodes than this a job soon fails.
const LEAST_INODES: u64 = 20_000;
/// The numbers of a disk are there at once, unless it does not answer.
const DISK_LIMIT: Duration = Duration::from_secs(2);
/// How much is written to the temporary folder for a try.
const PROBE_BYTES: usize = 1 << 20;
/// The kernel keeps a part for itself: a machine of 8 GiB shows a little less than that.
const MACHINE_SLACK: f64 = 0.9;
/// 2025-01-01. Flywheel is younger than that, so an earlier date is a clock that was never set (1970, as a rule).
const EARLIEST: u64 = 1_735_689_600;
/// A server accepts tokens and certificates if its clock and ours differ by minutes, and no more.
const SKEW: Duration = Duration::from_secs(300);

/// Runs the checks of the host, and gives the disks that it has looked at.
pub(super) async fn checks(
    list: &mut CheckList,
    plan: &Plan,
    env: &Env,
    client: &reqwest::Client,
) -> Vec<Disk> {
    let folders = folders(plan, env);
    let of_jobs = folders.clone();
    let looked = |folders: Vec<PathBuf>, look: fn(&[PathBuf], u64) -> Found<()>, least: u64| {
        move |_| async move {
            let looked = tokio::task::spawn_blocking(move || look(&folders, least)).await;
            looked.unwrap_or_else(|panic| {
                Err(CheckFailure::new(
                    panic.to_string(),
                    "This is a fault of Flywheel's.",
                ))
            })
        }
    };
    list.check(DISK, looked(folders.clone(), disk, plan.min_free))
        .await;
    list.check(INODES, looked(folders, inodes, LEAST_INODES))
        .await;
    let base = plan.temporary.clone();
    list.check(TEMPORARY, looked(vec![base], temporary, 0))
        .await;
    match plan.memory {
        Some(wanted) => drop(list.check(MEMORY, |_| async move { memory(wanted) }).await),
        None => list.skip(MEMORY, "the contract names no memory for this lane"),
    }
    list.check(CLOCK, |limit| clock(plan, client, limit)).await;
    let config = env.get("NIX_CONFIG").unwrap_or_default();
    list.check(NIX_CONFIG, |_| async move { nix_config(config) })
        .await;
    list.check(HINTS, |_| async move { hints(env) }).await;
    let looking = tokio::task::spawn_blocking(move || disks(&of_jobs));
    // A disk that does not answer has failed the checks above.
    let found = tokio::time::timeout(DISK_LIMIT, looking).await;
    found.ok().and_then(Result::ok).unwrap_or_default()
}

/// The file systems of these folders, each once.
fn disks(folders: &[PathBuf]) -> Vec<Disk> {
    let mut found: Vec<Disk> = Vec::new();
    let all = folders
        .iter()
        .filter_map(|folder| FileSystem::of(folder).ok());
    for disk in all {
        let mount = disk.mount.display().to_string();
        if let Ok(room) = disk.room()
            && found.iter().all(|known| known.mount != mount)
        {
            found.push(Disk { mount, room });
        }
    }
    found
}

/// The folders that a job of the class writes to.
fn folders(plan: &Plan, env: &Env) -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from("."), plan.temporary.clone()];
    if plan.class == "nix-builder" {
        let store = env
            .path("NIX_STORE_DIR")
            .unwrap_or_else(|| "/nix/store".into());
        folders.extend(
            [store.clone(), "/nix".into()]
                .into_iter()
                .find(|folder| folder.is_dir()),
        );
    }
    folders.retain(|folder| folder.is_dir());
    folders
}

fn disk(folders: &[PathBuf], least: u64) -> Found<()> {
    let found = look(folders, |room| Some(room.free))?;
    let Some((folder, free)) = found else {
        return Ok(((), "nothing to look at".to_owned()));
    };
    let text = format!("{} free in `{}`", bytes(free), folder.display());
    if free >= least {
        return Ok(((), text));
    }
    let hint = "Make room: collect garbage (`nix-collect-garbage`), or give the runner a bigger volume; `min-free` sets the bound.";
    Err(CheckFailure::new(
        format!("{text}, and {} are needed", bytes(least)),
        hint,
    ))
}

fn inodes(folders: &[PathBuf], least: u64) -> Found<()> {
    let found = look(folders, |room| Some(room.inodes?.free))?;
    let Some((folder, free)) = found else {
        return Ok(((), "this file system has no fixed number".to_owned()));
    };
    let text = format!("{free} free in `{}`", folder.display());
    if free >= least {
        return Ok(((), text));
    }
    Err(CheckFailure::new(
        format!("{text}, and {least} are needed"),
        "Remove small files, or make the file system anew with more inodes.",
    ))
}

/// The folder with the smallest number, if any has a number.
fn look(
    folders: &[PathBuf],
    number: impl Fn(&Room) -> Option<u64>,
) -> Result<Option<(PathBuf, u64)>, CheckFailure> {
    let mut least: Option<(PathBuf, u64)> = None;
    for folder in folders {
        let room = FileSystem::of(folder).and_then(|disk| disk.room());
        let room = room.map_err(|error| {
            CheckFailure::new(
                format!("`{}` cannot be looked at: {error}", folder.display()),
                "Look at the runner's mounts.",
            )
        })?;
        if let Some(found) =
            number(&room).filter(|found| least.as_ref().is_none_or(|(_, known)| found < known))
        {
            least = Some((folder.clone(), found));
        }
    }
    Ok(least)
}

fn temporary(folders: &[PathBuf], _: u64) -> Found<()> {
    let folder = folders.first().map_or(Path::new("/tmp"), PathBuf::as_path);
    let tried = || -> std::io::Result<()> {
        let file = tempfile::Builder::new()
            .prefix("flywheel-canary-")
            .tempfile_in(folder)?;
        std::fs::write(file.path(), vec![0x5a; PROBE_BYTES])?;
        let back = std::fs::read(file.path())?;
        if back.len() == PROBE_BYTES {
            Ok(())
        } else {
            Err(std::io::Error::other("it gives back less than was written"))
        }
    };
    match tried() {
        Ok(()) => Ok(((), format!("`{}` can be written to", folder.display()))),
        Err(error) => {
            let text = format!("`{}` cannot be written to: {error}", folder.display());
            Err(CheckFailure::new(
                text,
                "Point `RUNNER_TEMP` or `TMPDIR` to a folder of the runner's user, with room.",
            ))
        }
    }
}

fn memory(wanted: Size) -> Found<()> {
    let (group, machine) = (
        Cgroup::current().and_then(|group| group.read().limit),
        of_machine(),
    );
    // Both have to be enough: the limit of a control group may be larger than the machine.
    let enough_machine =
        machine.is_none_or(|machine| machine as f64 >= wanted.bytes() as f64 * MACHINE_SLACK);
    let enough_group = group.is_none_or(|limit| limit >= wanted.bytes());
    let text = match (group, machine) {
        (Some(limit), _) => format!("a limit of {}", bytes(limit)),
        (None, Some(machine)) => format!("no limit, and {} in the machine", bytes(machine)),
        (None, None) => "the kernel does not report the memory".to_owned(),
    };
    if enough_machine && enough_group {
        return Ok(((), format!("{text}; the class has {wanted}")));
    }
    let hint = "Give the runner the memory of its lane, or correct `memory` of the lane in `flywheel.yml`.";
    Err(CheckFailure::new(
        format!("{text}, and the class has {wanted}"),
        hint,
    ))
}

async fn clock(plan: &Plan, client: &reqwest::Client, limit: Duration) -> Found<()> {
    let now = SystemTime::now();
    let seconds = now
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let hint = "Set the clock, or start the machine's time service.";
    if seconds < EARLIEST {
        return Err(CheckFailure::new(
            format!("it says {}", httpdate::fmt_http_date(now)),
            hint,
        ));
    }
    // The cache server's clock is the reference. A server that does not answer fails a check of its own.
    let Some(endpoint) = &plan.cache else {
        return Ok(((), "it is after the year 2024".to_owned()));
    };
    let response = client
        .head(endpoint.read("nix-cache-info"))
        .timeout(limit.min(Duration::from_secs(3)))
        .send()
        .await;
    let date = response.ok().and_then(|answer| {
        httpdate::parse_http_date(answer.headers().get("date")?.to_str().ok()?).ok()
    });
    let Some(date) = date else {
        return Ok(((), "it is after the year 2024".to_owned()));
    };
    let skew = date
        .duration_since(now)
        .or_else(|_| now.duration_since(date))
        .unwrap_or_default();
    let text = format!("{} s from the cache server's", skew.as_secs());
    if skew <= SKEW {
        Ok(((), text))
    } else {
        Err(CheckFailure::new(text, hint))
    }
}

fn nix_config(config: &str) -> Found<()> {
    match settings::malformed(config).first() {
        None => Ok((
            (),
            if config.is_empty() {
                "none"
            } else {
                "well formed"
            }
            .to_owned(),
        )),
        Some(line) => Err(CheckFailure::new(
            format!(
                "`NIX_CONFIG` has no `name = value` on line {line}, so Nix refuses every command"
            ),
            "Correct `NIX_CONFIG` in the runner's environment.",
        )),
    }
}

/// Checks the other hints. A malformed hint is not used, which makes jobs slower without failing any.
fn hints(env: &Env) -> Found<()> {
    let mut given = Vec::new();
    let mut wrong = Vec::new();
    let mut look = |name: &'static str, check: &dyn Fn(&str) -> Option<String>| {
        if let Some(text) = env.get(name) {
            given.push(name);
            wrong.extend(check(text).map(|problem| format!("`{name}` {problem}")));
        }
    };
    look("ATTIC_SERVER", &|text| match url::Url::parse(text) {
        _ if text.contains("${") => Some("holds a literal `${…}`".to_owned()),
        Ok(url) if matches!(url.scheme(), "http" | "https") && url.host_str().is_some() => None,
        _ => Some("is no http or https address".to_owned()),
    });
    look("ATTIC_CACHE", &|text| {
        text.parse::<flywheel_nix::cache_name::CacheName>()
            .err()
            .map(|_| "is no name of a cache".to_owned())
    });
    look("ATTIC_PUBLIC_KEY", &|text| {
        text.parse::<PublicKey>()
            .err()
            .map(|_| "is no public key".to_owned())
    });
    look("BAZEL_REMOTE_CACHE", &|text| {
        text.contains("${")
            .then(|| "holds a literal `${…}`".to_owned())
    });
    if wrong.is_empty() {
        return Ok((
            (),
            if given.is_empty() {
                "none".to_owned()
            } else {
                given.join(", ")
            },
        ));
    }
    Err(CheckFailure::new(
        wrong.join(", "),
        "Correct it in the runner's environment; a malformed hint is not used.",
    ))
}
