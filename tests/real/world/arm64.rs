//! arm64 programs on this machine: `scripts/with-arm64.sh` has the kernel start them in qemu-user.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::root;

/// The binary's name in `dist/`.
pub const BINARY: &str = "flywheel-aarch64-linux";

/// The committed binary.
pub fn binary() -> PathBuf {
    root().join("dist").join(BINARY)
}

/// A program as it is started where arm64 programs run; it keeps its process ID and its exit code.
pub fn command(program: &Path) -> Command {
    let mut command = Command::new(root().join("scripts/with-arm64.sh"));
    command.arg(program);
    command
}
