//! A running `flywheel cache serve`, and paths to send to it.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use flywheel_nix::hash::Sha256;
use flywheel_nix::narinfo::NarInfo;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use sha2::Digest as _;
use tempfile::TempDir;

use crate::world::{Flywheel, PLANTED_TOKEN, Ran, folders};

/// Far longer than anything that these tests wait for takes, on a busy machine too.
const DEADLINE: Duration = Duration::from_secs(20);
/// The pause between two checks of a condition, which leaves the processor to the server.
const PAUSE: Duration = Duration::from_millis(2);

/// A server with the planted token as its write token, and `reader-token` for reading.
pub struct Served {
    run: Flywheel,
    /// The cache's folder.
    dir: PathBuf,
    child: Option<Child>,
    /// `http://127.0.0.1:<port>`.
    pub url: String,
    /// The `public-key` lines.
    pub keys: Vec<String>,
    stdout: BufReader<ChildStdout>,
    client: reqwest::Client,
    tokens: TempDir,
}

impl Served {
    /// Serves a new folder with more arguments.
    pub fn start(more: &[&str]) -> Self {
        Self::in_folder(tempfile::tempdir().unwrap(), more)
    }

    /// Serves a new folder whose files cannot grow over 64 KiB.
    pub fn start_limited() -> Self {
        Self::launch(tempfile::tempdir().unwrap(), None, &[], |command| {
            let mut shell = Command::new("/bin/sh");
            // The binary inherits that SIGXFSZ is ignored, so a write over the limit fails instead of killing it.
            // The unit of `ulimit -f` is 512 bytes.
            shell.args(["-c", "trap '' XFSZ; ulimit -f 128; exec \"$0\" \"$@\""]);
            shell.arg(command.get_program()).args(command.get_args());
            let folder = command.get_current_dir().unwrap();
            folders::isolate(&mut shell, folder).current_dir(folder);
            shell.envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            );
            shell
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            shell
        })
    }

    /// Serves the folder of an earlier server.
    pub fn in_folder(folder: TempDir, more: &[&str]) -> Self {
        Self::launch(folder, None, more, |command| command)
    }

    /// The file with the tokens.
    pub fn tokens_file(&self) -> PathBuf {
        self.tokens.path().join("tokens")
    }

    /// Another process on the folder of this server.
    pub fn beside(&self, more: &[&str]) -> Self {
        Self::launch(
            tempfile::tempdir().unwrap(),
            Some(&self.dir),
            more,
            |command| command,
        )
    }

    fn launch(
        folder: TempDir,
        dir: Option<&Path>,
        more: &[&str],
        wrap: impl Fn(Command) -> Command,
    ) -> Self {
        let tokens = tempfile::tempdir().unwrap();
        let file = tokens.path().join("tokens");
        let text = format!("write {PLANTED_TOKEN}\nread reader-token\nwrite team-token team\n");
        std::fs::write(&file, text).unwrap();
        let dir = dir.map_or_else(|| folder.path().join("cache"), Path::to_owned);
        let mut arguments = vec![
            "cache",
            "serve",
            "--dir",
            dir.to_str().unwrap(),
            "--listen",
            "127.0.0.1:0",
        ];
        arguments.extend([
            "--tokens",
            file.to_str().unwrap(),
            "--cache",
            "main",
            "--cache",
            "team",
        ]);
        arguments.extend(more);
        let client = flywheel_sys::http::client(&flywheel_sys::http::Roots::default()).unwrap();
        let mut run = Flywheel::new(&arguments);
        run.folder = folder;
        let mut child = wrap(run.command()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut lines = Vec::new();
        while !lines
            .last()
            .is_some_and(|line: &String| line.starts_with("tokens-file "))
        {
            let mut line = String::new();
            if stdout.read_line(&mut line).unwrap() == 0 {
                let output = child.wait_with_output().unwrap();
                panic!(
                    "the server did not start: {}",
                    String::from_utf8_lossy(&output.stderr)
                );
            }
            lines.push(line.trim_end().to_owned());
        }
        let keys = lines
            .iter()
            .filter_map(|line| line.strip_prefix("public-key "))
            .map(str::to_owned)
            .collect();
        Self {
            run,
            dir,
            child: Some(child),
            url: lines[0].to_owned(),
            keys,
            stdout,
            client,
            tokens,
        }
    }

    /// The one client of this server, because making a client takes a while.
    pub fn client(&self) -> &reqwest::Client {
        &self.client
    }

    /// `host:port`.
    pub fn address(&self) -> String {
        self.url.trim_start_matches("http://").to_owned()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The sorted names in a folder of the cache.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.path(folder)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// The most memory that the server ever had, in KiB.
    pub fn peak_kib(&self) -> u64 {
        let id = self.child.as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmHWM:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        let id = i32::try_from(self.child.as_ref().unwrap().id()).unwrap();
        kill_process(Pid::from_raw(id).unwrap(), signal).unwrap();
    }

    /// Waits for the end, checks that no secret was written anywhere, and gives the folder back.
    pub fn wait(mut self) -> (Ran, TempDir) {
        let mut child = self.child.take().unwrap();
        let begun = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < DEADLINE, "the server did not end");
            std::thread::park_timeout(PAUSE);
        }
        let mut output = child.wait_with_output().unwrap();
        std::io::Read::read_to_end(&mut self.stdout, &mut output.stdout).unwrap();
        let ran = self.run.check(&output);
        (
            ran,
            std::mem::replace(&mut self.run.folder, tempfile::tempdir().unwrap()),
        )
    }

    /// SIGTERM, then as `wait`.
    pub fn stop(self) -> (Ran, TempDir) {
        self.signal(Signal::TERM);
        self.wait()
    }

    /// Polls `holds` until it is true.
    pub fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let begun = Instant::now();
        while !holds() {
            assert!(begun.elapsed() < DEADLINE, "never came: {what}");
            std::thread::park_timeout(PAUSE);
        }
    }

    /// Uploads with Attic's protocol and the planted token: status and JSON.
    pub async fn upload(&self, path: &TestPath) -> (u16, Value) {
        self.upload_as(PLANTED_TOKEN, &path.info("main"), path.nar.clone())
            .await
    }

    /// Uploads any metadata with any NAR.
    pub async fn upload_as(
        &self,
        token: &str,
        info: &Value,
        nar: impl Into<reqwest::Body>,
    ) -> (u16, Value) {
        let request = self
            .client()
            .put(format!("{}/_api/v1/upload-path", self.url))
            .bearer_auth(token);
        answer(
            request
                .header("X-Attic-Nar-Info", info.to_string())
                .body(nar),
        )
        .await
    }

    /// The narinfo of a path, if the cache has one; checked against the cache's key.
    pub async fn narinfo(&self, cache: &str, path: &TestPath) -> Option<NarInfo> {
        let url = format!("{}/{cache}/{}.narinfo", self.url, path.hash());
        let response = self.client().get(url).send().await.unwrap();
        if response.status() == 404 {
            return None;
        }
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/x-nix-narinfo");
        let info = NarInfo::parse(&response.text().await.unwrap()).unwrap();
        let key = self
            .keys
            .iter()
            .find(|key| key.starts_with(&format!("{cache}:")))
            .unwrap();
        assert!(info.signed_by(&key.parse().unwrap()), "a bad signature");
        Some(info)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Status and JSON of the answer; `null` where it is none.
pub async fn answer(request: reqwest::RequestBuilder) -> (u16, Value) {
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    (
        status,
        serde_json::from_slice(&response.bytes().await.unwrap()).unwrap_or(Value::Null),
    )
}

/// A store path that exists in tests only.
#[derive(Clone)]
pub struct TestPath {
    /// `<hash>-<name>`.
    pub base: String,
    /// Its NAR.
    pub nar: Vec<u8>,
    /// Base names.
    pub references: Vec<String>,
}

impl TestPath {
    /// A path whose hash is `letter` thirty-two times: one file with this content.
    pub fn new(letter: char, content: &[u8]) -> Self {
        let base = format!("{}-{letter}", letter.to_string().repeat(32));
        Self {
            base,
            nar: nar(content),
            references: Vec::new(),
        }
    }

    /// The same with references.
    pub fn refers_to(mut self, others: &[&TestPath]) -> Self {
        self.references = others.iter().map(|other| other.base.clone()).collect();
        self
    }

    /// The 32 characters.
    pub fn hash(&self) -> &str {
        &self.base[..32]
    }

    /// The NAR's hash.
    pub fn nar_hash(&self) -> Sha256 {
        sha256(&self.nar)
    }

    /// Attic's upload info.
    pub fn info(&self, cache: &str) -> Value {
        json!({
            "cache": cache, "store_path_hash": self.hash(), "store_path": format!("/nix/store/{}", self.base),
            "references": self.references, "system": null, "deriver": null, "sigs": [], "ca": null,
            "nar_hash": format!("sha256:{}", self.nar_hash().base16()), "nar_size": self.nar.len(),
        })
    }
}

/// The text of a file that carries a sum of itself, with something replaced.
pub fn resealed(file: &Path, from: &str, to: &str) -> String {
    let text = std::fs::read_to_string(file).unwrap();
    let (_, text) = text.split_once('\n').unwrap();
    let text = text.replace(from, to);
    format!("Sum: {}\n{text}", &sha256(text.as_bytes()).base16()[..16])
}

pub fn sha256(bytes: &[u8]) -> Sha256 {
    Sha256(sha2::Sha256::digest(bytes).into())
}

/// The NAR of one plain file.
fn nar(content: &[u8]) -> Vec<u8> {
    let mut nar = Vec::new();
    for part in [
        b"nix-archive-1" as &[u8],
        b"(",
        b"type",
        b"regular",
        b"contents",
        content,
        b")",
    ] {
        nar.extend((part.len() as u64).to_le_bytes());
        nar.extend(part);
        nar.resize(nar.len().next_multiple_of(8), 0);
    }
    nar
}
