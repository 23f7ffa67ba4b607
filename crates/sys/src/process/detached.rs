//! A copy of this program that outlives the step that started it: its own session, none of the step's
//! streams. Hides from nobody: it keeps the step's environment, by which a runner finds it.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;

use tokio::process::{Child, Command};

/// Files that a shell may have opened in the step and left to its children are closed; Rust closes its own.
const SCRIPT: &str = r#"exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; exec "$0" "$@""#;

/// Starts `program` with `arguments`, without the variables in `without`, its errors going to `log`.
/// Its input and output are pipes to the caller. It is to call `leave_session` first of all.
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
        .arg(SCRIPT)
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
    command.spawn()
}

/// Makes this process the leader of a session of its own, so that no terminal's end reaches it.
pub fn leave_session() {
    // It fails only for one that leads a group already, and then nothing is to be left.
    let _ = rustix::process::setsid();
}

/// Lets go of the pipe to the one who started this process: nobody listens from here on.
///
/// # Errors
/// When `/dev/null` cannot be opened.
pub fn let_go_of_output() -> io::Result<()> {
    let null = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(null)?;
    Ok(())
}
