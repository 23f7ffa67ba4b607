//! `flywheel publish` and the writer of NARs against real Nix.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use crate::faults::{Fault, Plan, When};
use crate::world::{PATH, flywheel, folders, need, with_private_nix};

/// A tree of everything that a NAR can hold, different for each seed.
fn random_tree(folder: &Path, seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    std::fs::create_dir(folder).unwrap();
    let mut folders = vec![folder.to_owned()];
    for n in 0..60 {
        let parent = folders[random(folders.len() as u64) as usize].clone();
        // Upper and lower case, dots, spaces and bytes that are no text: order is by bytes alone.
        let prefixes: [&[u8]; 8] = [b"a", b"B", b".", b"-", b" x", b"\xff", "ä".as_bytes(), b"z"];
        let prefix = prefixes[random(8) as usize];
        let name = [prefix, format!("{n}").as_bytes()].concat();
        let path = parent.join(std::ffi::OsStr::from_bytes(&name));
        match random(4) {
            0 => {
                std::fs::create_dir(&path).unwrap();
                folders.push(path);
            }
            1 => symlink(format!("../target {n}"), &path).unwrap(),
            _ => {
                let size = [0, 1, 7, 8, 9, 65_536, 200_000][random(7) as usize];
                std::fs::write(&path, vec![n as u8; size]).unwrap();
                let mode = [0o444, 0o555, 0o644, 0o654][random(4) as usize];
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            }
        }
    }
}

#[test]
fn nars_are_those_of_nix() {
    let folder = tempfile::tempdir().unwrap();
    let nix_store = need("nix-store", "apt-get install nix-bin");
    for seed in 1..=12 {
        let tree = folder.path().join(format!("tree-{seed}"));
        random_tree(&tree, seed);
        let mut ours = Vec::new();
        flywheel_nix::nar::write(&tree, &mut ours).unwrap();
        let mut dump = with_private_nix(&folder.path().join("nix"), &nix_store);
        let theirs = folders::isolate(&mut dump, folder.path())
            .env("PATH", PATH)
            .arg("--dump")
            .arg(&tree)
            .output()
            .unwrap();
        assert!(
            theirs.status.success(),
            "{}",
            String::from_utf8_lossy(&theirs.stderr)
        );
        assert!(
            ours == theirs.stdout,
            "tree {seed}: {} bytes here, {} there",
            ours.len(),
            theirs.stdout.len()
        );
    }
}

/// Nix as root in a `/nix` of its own, and an embedded cache on loopback.
struct Bench {
    folder: tempfile::TempDir,
    server: std::process::Child,
    url: String,
    key: String,
    token: String,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut serve = std::process::Command::new(flywheel());
        folders::isolate(&mut serve, folder.path()).env("PATH", PATH);
        let server = serve
            .args([
                "cache",
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--stop-after",
                "10m",
                "--quiet",
                "--dir",
            ])
            .arg(at("cache"))
            .stdout(std::fs::File::create(at("serve.out")).unwrap())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        let printed = loop {
            let printed = std::fs::read_to_string(at("serve.out")).unwrap();
            if printed.contains("tokens-file") {
                break printed;
            }
            assert!(
                Instant::now() < deadline,
                "the cache does not start: {printed}"
            );
            std::thread::yield_now();
        };
        let word = |name: &str| {
            printed
                .lines()
                .find_map(|line| line.strip_prefix(name))
                .unwrap()
                .trim()
                .to_owned()
        };
        let tokens = std::fs::read_to_string(word("tokens-file ")).unwrap();
        let token = tokens
            .lines()
            .find_map(|line| line.strip_prefix("write "))
            .unwrap()
            .trim()
            .to_owned();
        Self {
            url: printed.lines().next().unwrap().to_owned(),
            key: word("public-key "),
            server,
            token,
            folder,
        }
    }

    fn command(&self, program: &Path) -> std::process::Command {
        let mut command = with_private_nix(&self.folder.path().join("nix"), program);
        let config = "build-users-group =\nsubstituters =\nsandbox = false\nexperimental-features = nix-command flakes";
        folders::isolate(&mut command, self.folder.path())
            .env("PATH", "/usr/bin:/bin")
            .env("NIX_CONFIG", config)
            .current_dir(self.folder.path());
        command
    }

    /// Builds an expression to a link, with these settings besides.
    fn build(&self, expression: &str, link: &str, settings: &[&str]) -> Output {
        let tool = need("nix-build", "apt-get install nix-bin");
        self.command(&tool)
            .args(["-E", expression, "-o", link])
            .args(settings)
            .output()
            .unwrap()
    }

    fn publish(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = self.command(&flywheel());
        command.env("ATTIC_TOKEN", &self.token).arg("publish");
        command
            .args(["--attic-server", &self.url, "--attic-public-key", &self.key])
            .args(arguments);
        command
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// A path that refers to thirty others, which all refer to one.
const TREE: &str = r#"let
  path = name: text: derivation {
    inherit name; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo '${text}' > $out" ];
  };
  base = path "base" "base";
  middle = builtins.genList (n: path "middle-${toString n}" "${base} ${toString n}") 30;
in path "top" (toString middle)"#;

fn success(output: &Output) -> String {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn what_is_published_is_substituted_on_an_emptied_store() {
    let bench = Bench::new();
    success(&bench.build(TREE, "result", &[]));
    let printed = success(&bench.publish(&["./result"]).output().unwrap());
    assert!(
        printed.contains("32 published, 32 verified, 0 lost"),
        "{printed}"
    );
    let printed = success(&bench.publish(&["./result"]).output().unwrap());
    assert!(
        printed.contains("0 published, 32 already there (4 bodies read), 0 verified, 0 lost")
            && printed.contains("a sample of 4 of the 32 bodies that were already there, seed "),
        "{printed}"
    );
    assert!(!printed.contains(&bench.token), "the token is shown");

    std::fs::remove_dir_all(bench.folder.path().join("nix")).unwrap();
    std::fs::remove_dir_all(bench.folder.path().join("home")).unwrap();
    let substituter = format!("{}/main", bench.url);
    let settings = [
        "--option",
        "substituters",
        &substituter,
        "--option",
        "trusted-public-keys",
        &bench.key,
    ];
    let printed = success(&bench.build(TREE, "again", &[&settings[..], &["-j", "0"]].concat()));
    assert!(
        printed.contains("copying path") && !printed.contains("building '"),
        "{printed}"
    );
}

#[test]
fn nothing_is_asked_of_nix_where_its_database_is_readable() {
    let bench = Bench::new();
    success(&bench.build(TREE, "result", &[]));
    let (folder, called) = (
        bench.folder.path().join("bin"),
        bench.folder.path().join("called"),
    );
    std::fs::create_dir(&folder).unwrap();
    let script = format!("#!/bin/sh\necho \"$@\" >>{}\nexit 1\n", called.display());
    std::fs::write(folder.join("nix"), script).unwrap();
    std::fs::set_permissions(folder.join("nix"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", folder.display());
    let printed = success(
        &bench
            .publish(&["./result"])
            .env("PATH", &path)
            .output()
            .unwrap(),
    );
    assert!(
        printed.contains("32 published, 32 verified, 0 lost") && !called.exists(),
        "{printed}"
    );

    let unknown = "/nix/store/00000000000000000000000000000000-unknown";
    std::fs::create_dir(bench.folder.path().join(unknown.trim_start_matches('/'))).unwrap();
    let ran = bench.publish(&[unknown]).output().unwrap();
    let printed = String::from_utf8_lossy(&ran.stderr);
    assert!(
        ran.status.code() == Some(1)
            && printed.contains(&format!("`{unknown}` is not valid in the store")),
        "{printed}"
    );
}

#[test]
fn a_path_of_two_gib_is_published_in_flat_memory() {
    let bench = Bench::new();
    let big = r#"derivation {
      name = "big"; system = builtins.currentSystem; builder = "/bin/sh";
      args = [ "-c" "/bin/dd if=/dev/zero of=$out bs=1048576 count=2048 2>&1" ];
    }"#;
    success(&bench.build(big, "big", &[]));
    let child = bench
        .publish(&["./big"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // `unshare` and `sh` become the binary by `exec`, so that this is its process.
    let status = format!("/proc/{}/status", child.id());
    let ended = std::thread::spawn(move || child.wait_with_output().unwrap());
    let mut peak_kib = 0;
    while !ended.is_finished() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let peak = text.lines().find_map(|line| {
            line.strip_prefix("VmHWM:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        });
        peak_kib = peak_kib.max(peak.unwrap_or(0));
        std::thread::yield_now();
    }
    let printed = success(&ended.join().unwrap());
    // Above the budget of verification, so that its body is read back in one run of eight.
    assert!(
        printed.contains("1 published, 1 verified") && printed.contains(", 0 lost"),
        "{printed}"
    );
    assert!((1..64 * 1024).contains(&peak_kib), "{peak_kib} KiB");
}

/// A path of this many MiB that nothing compresses, added to the store.
fn noise(bench: &Bench, mib: usize) -> String {
    let file = bench.folder.path().join("noise");
    let mut content = vec![0; mib << 20];
    fastrand::Rng::with_seed(9).fill(&mut content);
    std::fs::write(&file, content).unwrap();
    let tool = need("nix-store", "apt-get install nix-bin");
    let added = bench.command(&tool).arg("--add").arg(&file).output();
    let printed = added.unwrap();
    assert!(printed.status.success());
    String::from_utf8(printed.stdout).unwrap().trim().to_owned()
}

/// The same publication through a front with faults.
fn publish_through(bench: &Bench, front: &str, arguments: &[&str]) -> std::process::Command {
    let mut command = bench.command(&flywheel());
    command
        .env("ATTIC_TOKEN", &bench.token)
        .args(["publish", "--attic-server", front])
        .args(["--attic-public-key", &bench.key])
        .args(arguments);
    command
}

/// In real time: a server may compress and store a NAR before it answers, as Attic does.
#[test]
fn sixty_megabytes_that_are_answered_after_eighty_seconds_are_not_lost() {
    let bench = Bench::new();
    let path = noise(&bench, 58);
    let hold = Duration::from_secs(80);
    let front = Plan::new()
        .fault("PUT", When::Always, Fault::HoldAnswer(hold))
        .before(bench.url.trim_start_matches("http://").parse().unwrap());
    let begun = Instant::now();
    let ran = publish_through(&bench, &front.url(), &[&path]).output();
    let printed = success(&ran.unwrap());
    assert!(begun.elapsed() > hold, "{:?}", begun.elapsed());
    assert!(
        printed.contains("1 published, 1 verified, 0 lost"),
        "{printed}"
    );
}

/// In real time: without an answer to any upload, or to anything at all after the probe, the job waits 35 s at most.
#[test]
fn a_server_that_leaves_uploads_unanswered_costs_half_a_minute() {
    let bench = Bench::new();
    success(&bench.build(TREE, "result", &[]));
    let front = Plan::new()
        .fault("PUT", When::Always, Fault::Hang)
        .before(bench.url.trim_start_matches("http://").parse().unwrap());
    let begun = Instant::now();
    let ran = publish_through(&bench, &front.url(), &["./result"]).output();
    let ran = ran.unwrap();
    let printed =
        String::from_utf8_lossy(&[&ran.stdout[..], &ran.stderr[..]].concat()).into_owned();
    assert!(
        begun.elapsed() < Duration::from_secs(35),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(ran.status.code(), Some(1), "{printed}");
    assert!(
        printed.contains(
            "publishing stalled: the cache has neither taken a byte nor answered for 30 s"
        ) && printed.contains("0 published, 0 verified, 32 lost"),
        "{printed}"
    );
}

/// As by an Attic server whose storage has lost a chunk: it goes on saying that it has the path, and takes the NAR for
/// known when it is sent anew.
#[test]
fn a_path_that_is_there_without_its_body_is_lost_and_not_already_there() {
    let bench = Bench::new();
    let path = noise(&bench, 9);
    let printed = success(&bench.publish(&[&path]).output().unwrap());
    assert!(
        printed.contains("1 published, 1 verified, 0 lost"),
        "{printed}"
    );
    let front = Plan::new()
        .fault("GET /main/nar/", When::Always, Fault::Status(500))
        .before(bench.url.trim_start_matches("http://").parse().unwrap());
    // What is served stays damaged, whatever is sent: so the path is lost, and not already there.
    let ran = publish_through(&bench, &front.url(), &[&path])
        .output()
        .unwrap();
    let printed =
        String::from_utf8_lossy(&[&ran.stdout[..], &ran.stderr[..]].concat()).into_owned();
    assert_eq!(ran.status.code(), Some(1), "{printed}");
    assert!(
        printed.contains("0 published, 0 verified, 1 lost")
            && printed.contains("it is no better after it was sent anew"),
        "{printed}"
    );
}
