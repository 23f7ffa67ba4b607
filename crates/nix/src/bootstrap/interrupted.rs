//! Completes an installation of packages that was interrupted, as when a job was cancelled while it installed Nix: until
//! then `apt-get` refuses every installation, and what is half installed may not run.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use crate::bootstrap::Host;
use crate::bootstrap::distro::{APT_OPTIONS, StepError, step, tool};
use flywheel_core::progress::Sink;
use flywheel_sys::process::capture::Tool;
use flywheel_sys::runner::env::Env;

/// How long another installation on the machine is waited for. `dpkg` itself does not wait.
const LOCK_LIMIT: Duration = Duration::from_secs(60);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Whether an installation was interrupted. `packages` is the folder of `dpkg`: `updates` holds the changes of a run that
/// has not ended, in files with numbers for names, and `status` the state of each package. Blocks for milliseconds.
pub(super) fn is_interrupted(packages: &Path) -> bool {
    let updates = fs::read_dir(packages.join("updates")).into_iter().flatten();
    let is_number = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
    let is_unfinished = updates
        .flatten()
        .any(|entry| is_number(&entry.file_name().to_string_lossy()));
    is_unfinished || !half_installed(&packages.join("status")).is_empty()
}

/// Whether a package of Nix's own is half installed.
pub(super) fn is_nix_interrupted(packages: &Path) -> bool {
    half_installed(&packages.join("status"))
        .iter()
        .any(|name| name.starts_with("nix") || name.starts_with("libnix"))
}

/// The names of the packages that are half installed.
fn half_installed(status: &Path) -> Vec<String> {
    let Ok(file) = fs::File::open(status) else {
        return Vec::new();
    };
    let states = ["half-installed", "unpacked", "half-configured"];
    let lines = BufReader::new(file).split(b'\n').map_while(Result::ok);
    let (mut package, mut half) = (String::new(), Vec::new());
    for line in lines.filter_map(|line| String::from_utf8(line).ok()) {
        if let Some(name) = line.strip_prefix("Package: ") {
            name.clone_into(&mut package);
        } else if let Some(status) = line.strip_prefix("Status: ")
            && states.iter().any(|state| status.ends_with(state))
        {
            half.push(package.clone());
        }
    }
    half
}

/// Completes it, as `apt-get` itself tells people to. What fails is noted, since the caller tries Nix again anyway.
pub(super) async fn complete(host: &Host, env: &Env, sink: &Sink, deadline: Instant) {
    let (dpkg, apt) = (host.program("dpkg", env), host.program("apt-get", env));
    let configured = match dpkg {
        Some(dpkg) => configure(&tool(&dpkg, env), sink, deadline).await,
        None => Ok(()),
    };
    // What was unpacked without what it needs is completed by `apt-get` alone.
    let fixed = match apt {
        Some(apt) => {
            let fix = [
                "install",
                "-q",
                "-y",
                "-f",
                "--no-remove",
                "--no-install-recommends",
            ];
            let apt = tool(&apt, env).args(APT_OPTIONS).args(fix);
            step("apt-get install -f", apt, sink, deadline).await
        }
        None => Ok(()),
    };
    for error in [configured, fixed].into_iter().filter_map(Result::err) {
        sink.note(error.to_string());
    }
}

/// Whether `dpkg` says that another process has its lock, and not the name of a package.
fn is_locked(problem: &str) -> bool {
    [
        "frontend lock",
        "locked by",
        "Unable to lock",
        "status database area",
    ]
    .iter()
    .any(|words| problem.contains(words))
}

/// Configures what is unpacked, once no other installation runs.
async fn configure(dpkg: &Tool, sink: &Sink, deadline: Instant) -> Result<(), StepError> {
    let give_up = deadline.min(Instant::now() + LOCK_LIMIT);
    loop {
        let call = dpkg.clone().args(["--configure", "-a"]);
        match step("dpkg --configure -a", call, sink, deadline).await {
            Err(error) if is_locked(&error.problem) && Instant::now() < give_up => {
                tokio::time::sleep(LOCK_POLL_INTERVAL).await;
            }
            ended => return ended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_no_package_with_that_word_in_its_name() {
        assert!(is_locked(
            "dpkg: error: dpkg frontend lock was locked by another process with pid 7"
        ));
        assert!(!is_locked(
            "dpkg: error processing package libblockdev3 (--configure)"
        ));
    }

    #[test]
    fn an_interrupted_installation_is_known_by_what_dpkg_left() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let packages = folder.path();
        assert!(!is_interrupted(packages), "no dpkg");
        fs::create_dir(packages.join("updates")).expect("made");
        fs::write(packages.join("updates/tmp.i"), "").expect("written");
        let status = |state: &str| {
            let text = format!(
                "Package: a\nStatus: install ok installed\n\nPackage: b\nStatus: install ok {state}\nDescription: unpacked\n"
            );
            fs::write(packages.join("status"), text).expect("written");
        };
        for whole in ["installed", "config-files", "not-installed"] {
            status(whole);
            assert!(!is_interrupted(packages), "{whole}");
        }
        for half in ["half-configured", "half-installed", "unpacked"] {
            status(half);
            assert!(is_interrupted(packages), "{half}");
        }
        assert!(!is_nix_interrupted(packages), "another's package");
        fs::write(
            packages.join("status"),
            "Package: nix-bin\nStatus: install ok unpacked\n",
        )
        .expect("written");
        assert!(is_nix_interrupted(packages));
        status("installed");
        fs::write(packages.join("updates/0001"), "").expect("written");
        assert!(is_interrupted(packages));
    }
}
