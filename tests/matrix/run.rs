//! Makes one run: fresh namespaces, a root of its own, and the scripts in `guest/`, with a deadline.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::cells::{Cell, VERSIONS};
use crate::host::finish;

/// A run that is not over by then is ended and fails. The slowest take 15 s on an idle machine.
const DEADLINE: Duration = Duration::from_secs(240);

/// A cell with the seed that names its derivations and decides what is left open.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    pub(crate) cell: Cell,
    pub(crate) seed: u64,
}

impl Run {
    /// Where the job runs, as GitHub's variable has it: on a host for this job alone, or on one of one's own.
    fn environment(&self) -> &'static str {
        match self.seed % 2 {
            0 => "self-hosted",
            _ => "github-hosted",
        }
    }
}

/// What all runs share.
pub(crate) struct Rig {
    repository: PathBuf,
    binary: PathBuf,
    keep: bool,
}

impl Rig {
    /// Panics with the remedy where something is missing.
    pub(crate) fn new(repository: &Path, binary: &Path, keep: bool) -> Self {
        for version in VERSIONS {
            let program = tree(repository, version).join("usr/bin/nix");
            assert!(
                program.is_file(),
                "{} is missing: scripts/nix-versions.sh unpacks it",
                program.display()
            );
        }
        assert!(binary.is_file(), "{} is missing", binary.display());
        assert!(
            rustix::process::geteuid().is_root(),
            "the matrix makes mounts and users of its own: run it as root"
        );
        Self {
            repository: repository.to_owned(),
            binary: binary.to_owned(),
            keep,
        }
    }

    /// Makes a run; its folder, how long it took in seconds, and how it ended if not well.
    pub(crate) fn make(&self, run: &Run) -> (PathBuf, f64, Result<(), String>) {
        let name = format!("{}-{}", run.cell.to_string().replace('/', "-"), run.seed);
        let folder = self.repository.join("target/matrix").join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let started = Instant::now();
        let Cell {
            version,
            kind,
            shape,
        } = run.cell;
        let seed = run.seed.to_string();
        let arguments = [
            "/guest/run.sh",
            version,
            kind,
            shape,
            &seed,
            run.environment(),
        ];
        let finished = self.enter(version, &folder, &arguments);
        (folder, started.elapsed().as_secs_f64(), finished)
    }

    /// Has a version of Nix read back from the embedded cache what it has written to it.
    ///
    /// # Errors
    /// With what it printed.
    pub(crate) fn read_back(&self, version: &str) -> Result<(), String> {
        let name = format!("read-back-{version}");
        let folder = self.repository.join("target/matrix").join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let arguments = ["/guest/read-back.sh", "/fly/flywheel"];
        let finished = self.enter(version, &folder, &arguments);
        let printed = fs::read_to_string(folder.join("run.log")).unwrap();
        self.clean(&folder, finished.is_ok());
        finished.map_err(|error| format!("{error}:\n{printed}"))
    }

    /// Runs a script in a root of its own.
    fn enter(&self, version: &str, folder: &Path, arguments: &[&str]) -> Result<(), String> {
        let guest = self.repository.join("tests/matrix/guest");
        let log = fs::File::create(folder.join("run.log")).unwrap();
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--net",
                "--ipc",
                "--kill-child",
            ])
            .args(["--propagation", "private", "sh"])
            .arg(guest.join("enter.sh"))
            .arg(tree(&self.repository, version))
            .args([&self.binary, &guest])
            .arg(folder)
            .arg("/bin/bash")
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(log.try_clone().unwrap())
            .stdout(log);
        finish(&mut command, DEADLINE, "run")
    }

    /// Removes the folder of a run that holds.
    pub(crate) fn clean(&self, folder: &Path, holds: bool) {
        if holds && !self.keep {
            fs::remove_dir_all(folder).unwrap();
        }
    }
}

/// The unpacked Debian of a version of Nix.
fn tree(repository: &Path, version: &str) -> PathBuf {
    repository
        .join("target/tools")
        .join(format!("nix-{version}"))
}
