//! Makes store paths valid: the Nix that has just arrived loads their descriptions into its database.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::bootstrap::closure::staging::StagingError;
use crate::hash::Sha256;
use crate::narinfo::NarInfo;
use crate::store_path::StorePath;
use crate::tool::error_summary;
use flywheel_sys::process::capture::{CaptureError, Tool};
use flywheel_sys::untrusted_file::{self, Owner};

const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// Far more than the descriptions of the largest closure take, in bytes.
const SIZE_LIMIT: u64 = 64 * 1024 * 1024;
/// Neither build users, who may be missing, nor a cache matter to a database.
const CONFIG: &str = "build-users-group =\nsubstituters =\nuse-sqlite-wal = true\n";

/// What the database says of a store path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Registration {
    pub(crate) path: StorePath,
    pub(crate) nar_hash: Sha256,
    pub(crate) nar_size: u64,
    pub(crate) references: Vec<StorePath>,
    pub(crate) deriver: Option<StorePath>,
}

impl From<NarInfo> for Registration {
    fn from(info: NarInfo) -> Self {
        Self {
            path: info.path,
            nar_hash: info.nar_hash,
            nar_size: info.nar_size,
            references: info.references,
            deriver: info.deriver,
        }
    }
}

/// As `nix-store --load-db` reads it, and `--dump-db` writes it.
impl fmt::Display for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.path)?;
        writeln!(f, "{}\n{}", self.nar_hash.base16(), self.nar_size)?;
        match &self.deriver {
            Some(deriver) => writeln!(f, "{deriver}")?,
            None => writeln!(f)?,
        }
        writeln!(f, "{}", self.references.len())?;
        self.references
            .iter()
            .try_for_each(|path| writeln!(f, "{path}"))
    }
}

fn file(nix: &Path) -> PathBuf {
    nix.join("var/flywheel/registration")
}

/// Runs `nix-store --load-db` of `program`, a store path that is in its place.
///
/// # Errors
/// When it fails, or does not end before `deadline`.
pub(super) async fn load(
    nix: &Path,
    program: &StorePath,
    registrations: &[&Registration],
    deadline: Instant,
) -> Result<(), StagingError> {
    if registrations.is_empty() {
        return Ok(());
    }
    let file = file(nix);
    let failure = |source| StagingError::new(file.clone(), source);
    let input = write(&file, registrations).map_err(failure)?;
    let store = nix.join("store");
    let state = nix.join("var/nix");
    let program = store.join(program.base_name()).join("bin/nix-store");
    let tool = Tool::new(&program)
        .arg("--load-db")
        // Settings of the machine or of the job could name another store.
        .env("NIX_CONFIG", CONFIG)
        .env("NIX_CONF_DIR", nix.join("var/flywheel"))
        .env("NIX_USER_CONF_FILES", "")
        .env("NIX_REMOTE", "local")
        .env("NIX_STORE_DIR", &store)
        .env("NIX_STATE_DIR", &state)
        .env("HOME", nix.join("var/flywheel"));
    let limit = deadline.saturating_duration_since(Instant::now());
    let ran = tool.run_on(input, limit).await;
    let removed = fs::remove_file(&file);
    let output = ran.map_err(|error| {
        let problem = match error {
            CaptureError::Start { source, .. } => format!("it does not start ({source})"),
            error => error.to_string(),
        };
        StagingError::Register(problem)
    })?;
    if !output.status.success() {
        let (status, message) = (output.status, error_summary(&output.stderr));
        let problem = format!("`nix-store --load-db` ended with {status}: {message}");
        return Err(StagingError::Register(problem));
    }
    removed.map_err(failure)
}

/// Writes the descriptions to a file that is locked for as long as this process or Nix has it open.
fn write(file: &Path, registrations: &[&Registration]) -> io::Result<File> {
    let mut options = fs::OpenOptions::new();
    let mut written = options.read(true).write(true).create_new(true).open(file)?;
    written.try_lock()?;
    let text: String = registrations.iter().map(ToString::to_string).collect();
    written.write_all(text.as_bytes())?;
    written.rewind()?;
    Ok(written)
}

/// Waits until a Nix has ended that loads the descriptions of an installation that was killed.
///
/// # Errors
/// When it does not end before `deadline`.
pub(super) async fn wait_for_orphan(nix: &Path, deadline: Instant) -> Result<(), StagingError> {
    let file = file(nix);
    let opened = match untrusted_file::open(&file, Owner::Own, SIZE_LIMIT) {
        Err(error) if error.is_absence() => return Ok(()),
        Err(problem) => return Err(StagingError::Foreign { file, problem }),
        Ok(opened) => opened,
    };
    loop {
        match opened.try_lock() {
            Ok(()) => break,
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                sleep(POLL_INTERVAL).await;
            }
            Err(TryLockError::WouldBlock) => return Err(StagingError::Busy),
            Err(TryLockError::Error(source)) => return Err(StagingError::new(file, source)),
        }
    }
    fs::remove_file(&file).map_err(|source| StagingError::new(file, source))
}
