//! Makes a machine in fresh namespaces, runs a script of `guest/` in it with a deadline, and reads what it left.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::host::finish;
use crate::machines::Story;

/// A machine that is not done by then is ended and fails. The slowest takes 20 s on a busy machine.
const DEADLINE: Duration = Duration::from_secs(150);
/// The binary's name in `dist/`.
const BINARY: &str = "flywheel-x86_64-linux";

/// What all machines share.
pub(crate) struct Rig {
    repository: PathBuf,
    binary: PathBuf,
    /// The outputs of the demo as an ordinary machine builds them, each with its hash.
    expected: String,
}

/// What a machine left.
#[derive(Clone, Debug, Default)]
pub(crate) struct Left {
    /// Why nothing can be said of the machine, if so.
    pub(crate) broken: Option<String>,
    pub(crate) code: String,
    pub(crate) log: String,
    pub(crate) seconds: f64,
    /// The step's outputs, `name=value` a line.
    pub(crate) outputs: Vec<(String, String)>,
    /// Files of the host that were found.
    pub(crate) planted: String,
    /// What `setup --plan` said there, and its exit code; empty where it was not asked.
    pub(crate) plan: String,
    pub(crate) plan_code: String,
    /// Outputs of the demo that the cache does not serve as an ordinary machine builds them.
    pub(crate) unserved: String,
}

impl Left {
    pub(crate) fn output(&self, name: &str) -> &str {
        let mut outputs = self.outputs.iter();
        outputs
            .find(|(one, _)| one == name)
            .map_or("", |(_, value)| value)
    }
}

impl Rig {
    /// Panics with the remedy where something is missing.
    pub(crate) fn new(repository: &Path, binary: &Path) -> Self {
        assert!(binary.is_file(), "{} is missing", binary.display());
        assert!(
            rustix::process::geteuid().is_root(),
            "machines have mounts and users of their own: run this as root"
        );
        put_checkout(repository, binary);
        let mut rig = Self {
            repository: repository.to_owned(),
            binary: binary.to_owned(),
            expected: String::new(),
        };
        let folder = rig.folder("judge");
        let ended = rig.enter("judge", &folder, &["/guest/judge.sh", "expect"]);
        let printed = fs::read_to_string(folder.join("run.log")).unwrap();
        ended.unwrap_or_else(|error| {
            panic!("the judge has no outputs to expect: {error}\n{printed}")
        });
        rig.expected = fs::read_to_string(folder.join("expected")).unwrap();
        assert_eq!(rig.expected.lines().count(), 3, "{}", rig.expected);
        fs::remove_dir_all(folder).unwrap();
        rig
    }

    /// Makes a machine and has a story happen there; the folder with what it left.
    pub(crate) fn tell(&self, machine: &str, story: Story) -> (PathBuf, Left) {
        let folder = self.folder(&format!("{machine}-{}", story.as_str()));
        let ended = self.enter(machine, &folder, &["/guest/run.sh", story.as_str()]);
        let mut left = read(&folder, ended);
        if left.code == "0" && story == Story::Demo {
            left.unserved = self.judge(&folder).unwrap_or_else(|error| error);
        }
        (folder, left)
    }

    /// What of the demo's outputs the cache that it left does not serve.
    fn judge(&self, folder: &Path) -> Result<String, String> {
        fs::write(folder.join("expected"), &self.expected).unwrap();
        self.enter("judge", folder, &["/guest/judge.sh", "judge"])
            .map_err(|error| format!("the judge: {error}"))?;
        Ok(fs::read_to_string(folder.join("unserved")).unwrap())
    }

    /// An empty folder for what a machine leaves.
    fn folder(&self, machine: &str) -> PathBuf {
        let folder = self.repository.join("target/machines").join(machine);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    /// Runs a script on a machine.
    fn enter(&self, machine: &str, folder: &Path, arguments: &[&str]) -> Result<(), String> {
        let log = fs::File::create(folder.join("run.log")).unwrap();
        let mut command = Command::new("unshare");
        command
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--net",
                "--ipc",
                "--uts",
                "--kill-child",
            ])
            .args(["--propagation", "private", "sh"])
            .arg(self.repository.join("tests/machines/guest/enter.sh"))
            .arg(machine)
            .args([&self.binary, folder])
            .args(arguments)
            .stdin(Stdio::null())
            .stderr(log.try_clone().unwrap())
            .stdout(log);
        finish(&mut command, DEADLINE, "machine")
    }
}

/// Makes this checkout as GitHub hands it to a job, in `target/machines/checkout`: the actions, and the binary that is tried
/// with its sum, behind the launcher.
fn put_checkout(repository: &Path, binary: &Path) {
    let checkout = repository.join("target/machines/checkout");
    let _ = fs::remove_dir_all(&checkout);
    fs::create_dir_all(checkout.join("dist")).unwrap();
    let copied = Command::new("cp")
        .args([
            "--recursive",
            "action.yml",
            "actions",
            "scripts",
            "rust-toolchain.toml",
        ])
        .arg(&checkout)
        .current_dir(repository)
        .status();
    assert!(copied.unwrap().success(), "`cp` failed");
    let dist = checkout.join("dist");
    fs::copy(repository.join("dist/flywheel"), dist.join("flywheel")).unwrap();
    let bytes = fs::read(binary).unwrap();
    let sum: String = Sha256::digest(&bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    fs::copy(binary, dist.join(BINARY)).unwrap();
    fs::write(dist.join("SHA256SUMS"), format!("{sum}  {BINARY}\n")).unwrap();
}

fn read(folder: &Path, ended: Result<(), String>) -> Left {
    let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap_or_default();
    let mut broken = ended.err();
    if broken.is_none() && text("done").is_empty() {
        broken = Some("its script did not come to its end".to_owned());
    }
    if let Some(reason) = &mut broken {
        let printed = text("run.log");
        reason.push_str(&format!(": {}", printed.lines().last().unwrap_or_default()));
    }
    Left {
        broken,
        code: text("exit").trim().to_owned(),
        log: text("log"),
        seconds: text("seconds").trim().parse().unwrap_or(f64::INFINITY),
        outputs: outputs(&text("files/OUTPUT")),
        planted: text("planted"),
        plan: text("plan"),
        plan_code: text("plan-exit").trim().to_owned(),
        unserved: String::new(),
    }
}

/// Takes the runner's file of outputs apart: `name<<DELIMITER`, the value, the delimiter.
fn outputs(text: &str) -> Vec<(String, String)> {
    let mut outputs = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some((name, delimiter)) = line.split_once("<<") {
            let value: Vec<&str> = lines
                .by_ref()
                .take_while(|line| *line != delimiter)
                .collect();
            outputs.push((name.to_owned(), value.join("\n")));
        }
    }
    outputs
}
