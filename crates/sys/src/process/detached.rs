//! Starts a copy of this program that outlives the step: in a session of its own, with none of the step's streams. It
//! does not hide: it keeps the step's environment, by which a runner finds it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;

use tokio::process::{Child, Command};

use crate::process::core_dump;

/// Closes file descriptors that the step's shell may have left open, since they would keep the step waiting. Rust's own
/// are closed on exec.
pub(super) const CLOSE_AND_EXEC: &str =
    r#"exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; exec "$0" "$@""#;

/// Starts `program` with `arguments`, without the variables in `without`; its standard error goes to `log`. Its
/// standard input and output are pipes to the caller. The program must call [`start_session`] first.
///
/// # Errors
/// When it cannot be started.
pub fn start(
    program: &Path,
    arguments: &[OsString],
    without: &[&str],
    log: File,
) -> io::Result<Child> {
    let mut command = Command::new("/bin/sh");
    command
        .arg("-c")
        .arg(CLOSE_AND_EXEC)
        .arg(program)
        .args(arguments)
        .current_dir("/");
    for name in without {
        command.env_remove(name);
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log);
    core_dump::with_inherited_limit(|| command.spawn())
}

/// Makes this process the leader of a new session, so that it does not get `SIGHUP` when a terminal closes.
pub fn start_session() {
    // It fails only for the leader of a process group, which has been separated already.
    let _ = rustix::process::setsid();
}

/// Closes the pipe to the process that started this one. Further output goes nowhere.
///
/// # Errors
/// When `/dev/null` cannot be opened.
pub fn close_stdout() -> io::Result<()> {
    let null = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(null)?;
    Ok(())
}
