//! A script in a root of its own with one version of Nix, as the matrix has them: what Nix says differs between them.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use super::{PATH, arm64, binary, folders, root};

/// The versions that `scripts/nix-versions.sh` unpacks.
pub const VERSIONS: [&str; 3] = ["2.8.0", "2.26.3", "2.34.8"];
/// A script that takes longer has hung.
const LIMIT_SECONDS: &str = "150";

/// Where nothing is asked of a cache, and builders see the root's own programs.
const CONFIG: &str = "extra-experimental-features = nix-command flakes\nsandbox = false\nbuild-users-group =\nsubstituters =";

/// A script that has ended.
pub struct Ran {
    pub code: i32,
    /// What it printed on both streams.
    pub log: String,
    out: TempDir,
}

impl Ran {
    /// The text of a file that the script wrote below `/out`.
    pub fn file(&self, name: &str) -> String {
        let file = self.out.path().join(name);
        fs::read_to_string(&file).unwrap_or_else(|error| panic!("{name}: {error}\n{}", self.log))
    }

    /// The line of an output in `/out/lines`, a file of `json-lines`.
    #[track_caller]
    pub fn line(&self, label: &str) -> Value {
        let lines = self.file("lines");
        let mut lines = lines
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .find(|line| line["label"] == label)
            .unwrap_or_else(|| panic!("no line of {label}\n{}", self.log))
    }
}

/// Runs lines of bash as root where `/nix` is empty and the binary is `/fly/flywheel`, in an empty folder.
pub fn run(version: &str, script: &str) -> Ran {
    run_by(
        Command::new("timeout"),
        Network::Own,
        version,
        &binary(),
        script,
    )
}

/// Does the same on the network of the test, which serves on 127.0.0.1.
pub fn run_beside(version: &str, script: &str) -> Ran {
    run_by(
        Command::new("timeout"),
        Network::Tests,
        version,
        &binary(),
        script,
    )
}

/// Does the same where every program is for arm64, with the committed binary.
pub fn run_on_arm64(script: &str) -> Ran {
    let timeout = arm64::command(Path::new("timeout"));
    run_by(
        timeout,
        Network::Own,
        "2.26.3-arm64",
        &arm64::binary(),
        script,
    )
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Network {
    Own,
    Tests,
}

fn run_by(
    mut timeout: Command,
    network: Network,
    version: &str,
    binary: &Path,
    script: &str,
) -> Ran {
    let tree = root().join(format!("target/tools/nix-{version}"));
    assert!(
        tree.join("usr/bin/nix").exists(),
        "Nix {version} is missing: scripts/nix-versions.sh unpacks it"
    );
    let (guest, out) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let script = format!(
        "set -u\nexport PATH=/usr/bin:/bin:/usr/sbin HOME=/root\nunset TMPDIR XDG_RUNTIME_DIR XDG_STATE_HOME\nexport NIX_CONFIG='{CONFIG}'\nmkdir /root/work\ncd /root/work\n{script}\n"
    );
    fs::write(guest.path().join("script.sh"), script).unwrap();
    let log = fs::File::create(out.path().join("log")).unwrap();
    folders::isolate(&mut timeout, guest.path())
        .args([
            "--kill-after=5",
            LIMIT_SECONDS,
            "unshare",
            "--mount",
            "--pid",
            "--ipc",
        ])
        .args((network == Network::Own).then_some("--net"))
        .env(
            "NETWORK",
            if network == Network::Own {
                "own"
            } else {
                "tests"
            },
        )
        .args(["--fork", "--kill-child", "--propagation", "private", "sh"])
        .arg(root().join("tests/matrix/guest/enter.sh"))
        .args([tree.as_path(), binary])
        .args([guest.path(), out.path()])
        .args(["/bin/bash", "/guest/script.sh"])
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .stderr(log.try_clone().unwrap())
        .stdout(log);
    let status = timeout.status().unwrap();
    let log = fs::read_to_string(out.path().join("log")).unwrap();
    Ran {
        code: status.code().unwrap_or(-1),
        log,
        out,
    }
}
