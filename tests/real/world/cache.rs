//! A real `flywheel cache serve` on loopback, for jobs to read from and publish to.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::port::Port;
use super::{PATH, arm64, flywheel, folders};

/// How the server is started, but for its arguments.
type Program = fn() -> Command;

/// A running cache with one cache named `main`. It dies with this value.
pub struct Cache {
    folder: TempDir,
    child: Child,
    port: Port,
    program: Program,
    more: Vec<String>,
    /// `http://127.0.0.1:<port>`.
    pub url: String,
    /// `main:…`.
    pub key: String,
    /// A token that may write.
    pub token: String,
}

impl Cache {
    /// Starts one in a new folder; `more` are further arguments, such as `--private`.
    pub fn start(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokens = folder.path().join("cache/tokens");
        Self::launch(folder, &tokens, || Command::new(flywheel()), more)
    }

    /// Starts the committed binary for arm64.
    pub fn start_on_arm64() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokens = folder.path().join("cache/tokens");
        Self::launch(folder, &tokens, || arm64::command(&arm64::binary()), &[])
    }

    /// Starts one that knows the tokens of a file.
    pub fn start_with_tokens(tokens: &Path) -> Self {
        Self::launch(
            tempfile::tempdir().unwrap(),
            tokens,
            || Command::new(flywheel()),
            &["--tokens", tokens.to_str().unwrap()],
        )
    }

    fn launch(folder: TempDir, tokens: &Path, program: Program, more: &[&str]) -> Self {
        let more: Vec<String> = more.iter().map(|&word| word.to_owned()).collect();
        let port = Port::reserve();
        let (child, url, key) = serve(program(), folder.path(), &port, &more);
        let tokens = std::fs::read_to_string(tokens).unwrap();
        let token = tokens
            .lines()
            .find_map(|line| line.strip_prefix("write "))
            .unwrap()
            .trim()
            .to_owned();
        Self {
            folder,
            child,
            port,
            program,
            more,
            url,
            key,
            token,
        }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        let (_, address) = self.url.split_once("://").unwrap();
        address.trim_end_matches('/').parse().unwrap()
    }

    /// The folder that it serves.
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("cache")
    }

    /// Starts it again after `kill`, in the same folder and on the same port.
    pub fn restart(&mut self) {
        (self.child, ..) = serve((self.program)(), self.folder.path(), &self.port, &self.more);
    }

    /// Kills it; the port is closed from then on.
    pub fn kill(&mut self) {
        // It fails only if the server has ended by itself.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// The names of the store paths that it serves, without their hashes, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self
            .infos()
            .iter()
            .filter_map(|text| name_of(text))
            .collect();
        names.sort();
        names
    }

    fn infos(&self) -> Vec<String> {
        fn walk(folder: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.is_dir() {
                    walk(&path, found);
                } else if let Ok(text) = std::fs::read_to_string(&path)
                    && text.contains("StorePath: ")
                {
                    found.push(text);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.folder.path(), &mut found);
        found
    }
}

fn serve(
    mut command: Command,
    folder: &Path,
    port: &Port,
    more: &[String],
) -> (Child, String, String) {
    command.args([
        "cache",
        "serve",
        "--quiet",
        "--stop-after",
        "15m",
        "--listen",
        &port.address(),
        "--dir",
    ]);
    folders::isolate(&mut command, folder);
    let mut child = command
        .env("PATH", PATH)
        .arg(folder.join("cache"))
        .args(more)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let url = lines.next().expect("the server prints where it listens");
    let key = lines
        .find_map(|line| line.strip_prefix("public-key ").map(str::to_owned))
        .expect("and its key");
    (child, url, key)
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.kill();
    }
}

fn name_of(info: &str) -> Option<String> {
    let path = info
        .lines()
        .find_map(|line| line.strip_prefix("StorePath: "))?;
    Some(path.rsplit('/').next()?.get(33..)?.to_owned())
}
