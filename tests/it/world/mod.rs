//! The world that a test puts around the binary, and how it runs it.

pub mod bazel;
pub mod cache_server;
pub mod faults;
pub mod folders;
pub mod github;
pub mod port;
pub mod scripted_nix;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// The secret planted in every run that has a token: it must appear in nothing that the run writes.
pub const PLANTED_TOKEN: &str = "planted-token-4f1d9c2b7a";

/// The binary under test: `FLYWHEEL_BIN`, else the one that this build made.
pub fn binary() -> PathBuf {
    std::env::var_os("FLYWHEEL_BIN")
        .map_or_else(|| env!("CARGO_BIN_EXE_flywheel").into(), PathBuf::from)
}

/// A run of the binary that is still to start, in a cleared environment with folders of its own.
pub struct Flywheel {
    /// The folder below which everything is that the run may write to.
    pub folder: TempDir,
    arguments: Vec<String>,
    environment: BTreeMap<String, String>,
}

pub struct Ran {
    /// Exit status, -1 for death by a signal.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Flywheel {
    /// A run with these arguments, outside of CI.
    pub fn new(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Some tests fill the folders, or name one in an argument, before anything is started.
        folders::variables(folder.path());
        std::fs::create_dir(folder.path().join("runner-temp")).unwrap();
        Self {
            folder,
            arguments: arguments
                .iter()
                .map(|argument| (*argument).to_owned())
                .collect(),
            environment: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
        }
    }

    /// The same, as a step of a GitHub job: runner files, `GITHUB_ACTIONS`, `RUNNER_TEMP`.
    pub fn in_job(arguments: &[&str]) -> Self {
        let mut run = Self::new(arguments)
            .env("GITHUB_ACTIONS", "true")
            .env("CI", "true");
        for name in [
            "GITHUB_OUTPUT",
            "GITHUB_ENV",
            "GITHUB_PATH",
            "GITHUB_STEP_SUMMARY",
        ] {
            let file = run.path(name);
            std::fs::write(&file, "").unwrap();
            run = run.env(name, file.to_str().unwrap());
        }
        let temp = run.path("runner-temp");
        run.env("RUNNER_TEMP", temp.to_str().unwrap())
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.insert(name.to_owned(), value.to_owned());
        self
    }

    /// A path below the run's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What a file below the run's folder holds now; empty if there is none.
    pub fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// The command, not yet started, for tests that talk to it while it runs.
    pub fn command(&self) -> Command {
        let mut command = Command::new(binary());
        folders::isolate(&mut command, self.folder.path());
        command
            .args(&self.arguments)
            .envs(&self.environment)
            .current_dir(self.folder.path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs it to its end, and checks that the planted secret appears in nothing it wrote.
    pub fn run(&self) -> Ran {
        self.check(&self.command().output().unwrap())
    }

    /// Checks a finished run for the planted secret.
    pub fn check(&self, output: &Output) -> Ran {
        let ran = Ran {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        };
        for (what, text) in [("stdout", &ran.stdout), ("stderr", &ran.stderr)] {
            // These lines never reach a log: the runner removes them.
            let shown = text
                .lines()
                .filter(|line| !line.starts_with("::add-mask::"));
            for line in shown {
                assert!(
                    !line.contains(PLANTED_TOKEN),
                    "the planted token stands in {what}: {line}"
                );
            }
        }
        no_secret_below(self.folder.path());
        ran
    }
}

/// Asserts that no file below `folder` holds the planted secret.
pub fn no_secret_below(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            no_secret_below(&entry.path());
        } else if kind.is_file() {
            let bytes = std::fs::read(entry.path()).unwrap();
            let found = bytes
                .windows(PLANTED_TOKEN.len())
                .any(|window| window == PLANTED_TOKEN.as_bytes());
            assert!(
                !found,
                "the planted token stands in {}",
                entry.path().display()
            );
        }
    }
}
