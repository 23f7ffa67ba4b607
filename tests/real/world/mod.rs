//! Real tools for the tests, each in a `/nix` of its own. A missing tool fails the test.

pub mod act;
pub mod arm64;
pub mod broken;
pub mod cache;
pub mod flake;
#[path = "../../it/world/folders.rs"]
pub mod folders;
#[path = "../../it/world/github.rs"]
#[expect(dead_code, reason = "the fast suite uses more of it")]
pub mod github;
#[path = "../../it/world/port.rs"]
pub mod port;
pub mod processes;
pub mod runner;
pub mod versions;

use std::path::{Path, PathBuf};
use std::process::Command;

/// The `PATH` of a job: what a Debian host has, and nothing of the developer's.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The absolute path of a tool; a missing one panics with `how` to get it. `scripts/bootstrap.sh tools`
/// puts its tools below `target/tools`.
pub fn need(tool: &str, how: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::iter::once(root().join("target/tools/bin"))
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join(tool))
        .find(|file| file.is_file())
        .unwrap_or_else(|| panic!("`{tool}` is missing: {how}"))
}

/// The binary under test: `FLYWHEEL_BIN`, else the one that this build made.
pub fn flywheel() -> PathBuf {
    std::env::var_os("FLYWHEEL_BIN")
        .map_or_else(|| env!("CARGO_BIN_EXE_flywheel").into(), PathBuf::from)
}

/// The binary itself, also where `FLYWHEEL_BIN` is a launcher: for places where a shell script
/// lacks its helpers, or its neighbours are out of reach.
pub fn binary() -> PathBuf {
    let named = flywheel();
    let is_script = std::fs::read(&named).is_ok_and(|bytes| bytes.starts_with(b"#!"));
    if is_script {
        named.with_file_name(act::BINARY)
    } else {
        named
    }
}

/// A command in a mount namespace where `nix` is the folder `/nix`, so that tests neither see each
/// other's stores nor touch the machine's. Needs root, as the whole suite does.
pub fn with_private_nix(nix: &Path, program: &Path) -> Command {
    std::fs::create_dir_all(nix).unwrap();
    std::fs::create_dir_all("/nix").unwrap();
    let unshare = need("unshare", "apt-get install util-linux");
    let mut command = Command::new(unshare);
    command.args([
        "--mount",
        "--propagation",
        "private",
        // Not by `PATH`, on which the harness of act has another one.
        "/bin/sh",
        "-c",
        "mount --bind \"$0\" /nix && exec \"$@\"",
    ]);
    command.arg(nix).arg(program);
    command
}

/// Runs a command that must succeed; its standard output.
pub fn must(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stdout}\n{stderr}",
        output.status
    );
    stdout.into_owned()
}
