//! Finds out by small builds how a daemon really builds. A client shows only its own settings: they may say
//! `sandbox = true` while the daemon builds without one. Only a user whom the daemon trusts sees what holds, because the
//! daemon obeys such a user's settings. For checks alone: no job waits for these builds or leaves them in the store.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use crate::tool::Nix;

/// Whether builds of the daemon see the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// None do.
    Strict,
    /// Those do that ask for it.
    Relaxed,
    /// All do.
    Off,
}

/// What the probes showed; `None` where their builds ended in another way than expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DaemonFacts {
    pub sandbox: Option<Sandbox>,
    /// Whether the experimental feature `ca-derivations` is on.
    pub ca_derivations: Option<bool>,
}

impl DaemonFacts {
    /// By what each user of this daemon can change what it registers for others, as the rest of a sentence that begins with
    /// the daemon.
    pub fn weaknesses(&self) -> Vec<&'static str> {
        let sandbox = match self.sandbox {
            Some(Sandbox::Off) => {
                Some("builds without a sandbox, where builds of others can reach this job's")
            }
            Some(Sandbox::Relaxed) => Some(
                "builds without a sandbox whatever asks for it (`sandbox = relaxed`), where such builds of others can reach this job's",
            ),
            Some(Sandbox::Strict) | None => None,
        };
        let records =
            "has `ca-derivations` on, where records of others can stand in the place of this job's";
        let records = (self.ca_derivations == Some(true)).then_some(records);
        sandbox.into_iter().chain(records).collect()
    }

    /// What could not be found out.
    pub fn unknown(&self) -> Vec<&'static str> {
        let sandbox = self.sandbox.is_none().then_some("`sandbox`");
        let records = self.ca_derivations.is_none().then_some("`ca-derivations`");
        sandbox.into_iter().chain(records).collect()
    }
}

/// How one probe's build ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Built,
    /// Its builder is a file of the host's, and the build did not see it.
    Blind,
    /// Its builder was seen, and its user may not run it.
    Seen,
    /// The daemon does not allow what the derivation asks for.
    Refused,
    Other,
}

/// Probes the daemon that `nix` connects to, within `limit`. `folder` is for a file that a build outside of a sandbox sees;
/// `system` is the kind of machine that the daemon builds for.
///
/// # Errors
/// When that file cannot be made.
pub async fn probe(
    nix: &Nix,
    system: &str,
    folder: &Path,
    limit: Duration,
) -> io::Result<DaemonFacts> {
    let nonce = format!("{:032x}", fastrand::u128(..));
    let witness = folder.join(format!("flywheel-witness-{nonce}"));
    fs::write(&witness, "#!/bin/sh\necho seen > \"$out\"\n")?;
    fs::set_permissions(&witness, Permissions::from_mode(0o755))?;
    let derivation = |name: &str, builder: &str, more: &str| {
        let builder = builder.replace(['\\', '"', '$'], "_");
        format!(
            r#"derivation {{ name = "flywheel-probe-{name}-{nonce}"; system = "{system}"; builder = "{builder}"; {more} }}"#
        )
    };
    let outside = witness.display().to_string();
    let plain = derivation("plain", &outside, "");
    let open = derivation("open", &outside, "__noChroot = true;");
    let floating =
        r#"__contentAddressed = true; outputHashAlgo = "sha256"; outputHashMode = "recursive";"#;
    let floating = derivation("floating", &outside, floating);
    let (plain, open, floating) = tokio::join!(
        build(nix, &plain, limit),
        build(nix, &open, limit),
        build(nix, &floating, limit),
    );
    // What cannot be removed goes with the runner's temporary folder.
    let _ = fs::remove_file(&witness);
    Ok(DaemonFacts {
        sandbox: sandbox(plain, open),
        ca_derivations: match floating {
            Ended::Refused => Some(false),
            Ended::Built | Ended::Blind | Ended::Seen => Some(true),
            Ended::Other => None,
        },
    })
}

/// Judges by a build that asks for nothing, and by one that asks for no sandbox.
fn sandbox(plain: Ended, open: Ended) -> Option<Sandbox> {
    match (plain, open) {
        (Ended::Built | Ended::Seen, _) => Some(Sandbox::Off),
        (Ended::Blind, Ended::Refused) => Some(Sandbox::Strict),
        (Ended::Blind, Ended::Built | Ended::Seen) => Some(Sandbox::Relaxed),
        _ => None,
    }
}

async fn build(nix: &Nix, expression: &str, limit: Duration) -> Ended {
    let arguments = [
        "build",
        "--no-link",
        "--print-build-logs",
        "--extra-experimental-features",
        "ca-derivations",
        "--option",
        "substitute",
        "false",
        "--expr",
        expression,
    ];
    match nix.run(&arguments, limit).await {
        Ok(output) if output.status.success() => Ended::Built,
        Ok(output) => ended(&output.stderr),
        Err(_) => Ended::Other,
    }
}

/// How the build ended that failed with this text.
fn ended(stderr: &str) -> Ended {
    let has = |words: &[&str]| words.iter().all(|word| stderr.contains(word));
    if has(&["__noChroot", "not allowed"]) || has(&["ca-derivations", "is disabled"]) {
        Ended::Refused
    } else if has(&["flywheel-witness-", "No such file or directory"]) {
        Ended::Blind
    } else if has(&["flywheel-witness-", "Permission denied"]) {
        Ended::Seen
    } else {
        Ended::Other
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_is_judged_by_what_its_builds_saw() {
        assert_eq!(sandbox(Ended::Blind, Ended::Refused), Some(Sandbox::Strict));
        assert_eq!(sandbox(Ended::Blind, Ended::Seen), Some(Sandbox::Relaxed));
        assert_eq!(sandbox(Ended::Seen, Ended::Other), Some(Sandbox::Off));
        // A builder that is not seen even where no sandbox is asked for shows nothing: it was another machine's.
        assert_eq!(sandbox(Ended::Blind, Ended::Blind), None);
        assert_eq!(sandbox(Ended::Other, Ended::Refused), None);
    }

    #[test]
    fn only_what_was_seen_is_a_weakness() {
        let strict = DaemonFacts {
            sandbox: Some(Sandbox::Strict),
            ca_derivations: Some(false),
        };
        assert!(strict.weaknesses().is_empty() && strict.unknown().is_empty());
        let unknown = DaemonFacts::default();
        assert!(unknown.weaknesses().is_empty());
        assert_eq!(unknown.unknown(), ["`sandbox`", "`ca-derivations`"]);
        let weak = DaemonFacts {
            sandbox: Some(Sandbox::Off),
            ca_derivations: Some(true),
        };
        assert_eq!(weak.weaknesses().len(), 2);
    }
}
