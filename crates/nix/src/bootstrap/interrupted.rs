//! Completes an installation of packages that was interrupted, as when a job was cancelled while it installed Nix: until
//! then `apt-get` refuses every installation, and what is half installed may not run.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use crate::bootstrap::install::{APT_OPTIONS, program, step, tool};
use crate::bootstrap::{Error, Host};
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
    is_unfinished || has_half_installed(&packages.join("status"))
}

fn has_half_installed(status: &Path) -> bool {
    let Ok(file) = fs::File::open(status) else {
        return false;
    };
    let states = ["half-installed", "unpacked", "half-configured"];
    BufReader::new(file)
        .split(b'\n')
        .map_while(Result::ok)
        .filter_map(|line| String::from_utf8(line).ok())
        .filter_map(|line| line.strip_prefix("Status: ").map(str::to_owned))
        .any(|line| states.iter().any(|state| line.ends_with(state)))
}

/// Completes it, as `apt-get` itself tells people to. What fails is noted, since the caller tries Nix again anyway.
pub(super) async fn complete(host: &Host, env: &Env, sink: &Sink, deadline: Instant) {
    let (dpkg, apt) = (program("dpkg", host, env), program("apt-get", host, env));
    let configured = match dpkg {
        Some(dpkg) => configure(&tool(&dpkg, env), sink, deadline).await,
        None => Ok(()),
    };
    // What was unpacked without what it needs is completed by `apt-get` alone.
    let fixed = match apt {
        Some(apt) => {
            let fix = ["install", "-q", "-y", "-f", "--no-install-recommends"];
            let apt = tool(&apt, env).args(APT_OPTIONS).args(fix);
            step("apt-get install -f", apt, sink, deadline).await
        }
        None => Ok(()),
    };
    for error in [configured, fixed].into_iter().filter_map(Result::err) {
        sink.note(error.to_string());
    }
}

/// Configures what is unpacked, once no other installation runs.
async fn configure(dpkg: &Tool, sink: &Sink, deadline: Instant) -> Result<(), Error> {
    let give_up = deadline.min(Instant::now() + LOCK_LIMIT);
    loop {
        let call = dpkg.clone().args(["--configure", "-a"]);
        match step("dpkg --configure -a", call, sink, deadline).await {
            Err(Error::Install { problem, .. })
                if problem.contains("lock") && Instant::now() < give_up =>
            {
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
        status("installed");
        fs::write(packages.join("updates/0001"), "").expect("written");
        assert!(is_interrupted(packages));
    }
}
