//! `dist/flywheel` where the binary of the platform is not beside it: taken from a release server of loopback or from a
//! folder, and run only with the sum that the checkout has. What it does with a binary beside it: `tests/real/dist.rs`.

mod release_server;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::world::folders;
use release_server::{Answer, ReleaseServer};

const NAME: &str = "flywheel-aarch64-darwin";
/// No test waits longer, and no server holds a client for as long.
const LIMIT: Duration = Duration::from_secs(8);
/// Leaves a trace, so that a test sees whether anything was run.
const BINARY: &str = "#!/bin/sh\necho run >>\"$TRACE\"\nprintf '[%s]' \"$@\"\numask >&2\nexit 7\n";
/// The programs that the launcher calls; those that download come with a test.
const PROGRAMS: [&str; 19] = [
    "sh",
    "dirname",
    "readlink",
    "ls",
    "id",
    "mktemp",
    "mkdir",
    "mv",
    "rm",
    "chmod",
    "cp",
    "find",
    "touch",
    "tr",
    "cut",
    "sleep",
    "cat",
    "sha256sum",
    "timeout",
];

/// A checkout on a machine whose binary it lacks.
struct Checkout(TempDir);

/// How the launcher ended.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Checkout {
    /// Its sums are those of `binary`, which the release has.
    fn new(binary: &str) -> Self {
        let checkout = Self(tempfile::Builder::new().prefix("a b").tempdir().unwrap());
        fs::create_dir(checkout.path("dist")).unwrap();
        fs::create_dir(checkout.path("bin")).unwrap();
        let launcher = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/flywheel");
        fs::copy(launcher, checkout.path("dist/flywheel")).unwrap();
        let sum: String = Sha256::digest(binary)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        checkout.write("dist/SHA256SUMS", &format!("{sum}  {NAME}\n"));
        checkout.fake(
            "uname",
            "case $1 in -s) echo Darwin ;; -m) echo arm64 ;; esac",
        );
        for program in PROGRAMS {
            checkout.link(program, program);
        }
        checkout
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn fake(&self, name: &str, script: &str) {
        let file = format!("bin/{name}");
        self.write(&file, &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(self.path(&file), fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Gives the machine a program of ours, under another name.
    fn link(&self, name: &str, program: &str) {
        let path = std::env::var_os("PATH").unwrap();
        let found = std::env::split_paths(&path)
            .chain(["/usr/bin".into(), "/bin".into()])
            .map(|folder| folder.join(program))
            .find(|file| file.is_file());
        let found = found
            .unwrap_or_else(|| panic!("`{program}` is missing; scripts/bootstrap.sh installs it"));
        symlink(found, self.path("bin").join(name)).unwrap();
    }

    /// The checkout of a release whose files are at `url`.
    fn of_release(self, url: &str) -> Self {
        self.write("dist/RELEASE", &format!("{url}\n"));
        self
    }

    fn with_curl(self) -> Self {
        self.link("curl", "curl");
        self
    }

    fn run(&self, variables: &[(&str, &str)]) -> Ended {
        self.run_by(Command::new(self.path("dist/flywheel")), variables)
    }

    fn run_by(&self, mut command: Command, variables: &[(&str, &str)]) -> Ended {
        folders::isolate(&mut command, self.0.path())
            .args(["one", "two words"])
            .current_dir("/")
            .env("PATH", self.path("bin"))
            .env("TRACE", self.path("trace"))
            .envs(variables.iter().copied());
        let Output {
            status,
            stdout,
            stderr,
        } = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ended {
            code: status.code(),
            stdout: text(stdout),
            stderr: text(stderr),
        }
    }

    /// The binary was run as often as this.
    #[track_caller]
    fn check_runs(&self, times: usize) {
        let trace = fs::read_to_string(self.path("trace")).unwrap_or_default();
        assert_eq!(trace.lines().count(), times);
    }

    /// Nothing was run, nothing is left, and one line has all of `words` in it.
    #[track_caller]
    fn check_refusal(&self, ended: &Ended, code: i32, words: &[&str]) {
        let outcome = (ended.code, ended.stdout.as_str());
        assert_eq!(outcome, (Some(code), ""), "{ended:?}");
        for word in words {
            assert!(ended.stderr.contains(word), "no `{word}` in {ended:?}");
        }
        assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
        self.check_runs(0);
        assert_eq!(self.kept(), [] as [PathBuf; 0]);
    }

    /// What is in the folder of binaries that were taken from releases.
    fn kept(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path("home/.cache/flywheel/release"));
        let entries = entries.into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }
}

#[track_caller]
fn check_ran(ended: &Ended) {
    let outcome = (ended.code, ended.stdout.as_str());
    assert_eq!(outcome, (Some(7), "[one][two words]"), "{ended:?}");
}

/// A server that has the release's binary, and nothing else.
fn release() -> ReleaseServer {
    ReleaseServer::start(|path, _| match path.strip_prefix("/v1/") {
        Some(NAME) => Answer::Bytes(BINARY.into()),
        _ => Answer::Status(404),
    })
}

#[test]
fn a_platform_that_the_checkout_lacks_comes_from_the_release_once() {
    let server = release();
    let checkout = Checkout::new(BINARY).of_release(&server.url()).with_curl();
    let ended = checkout.run(&[]);
    check_ran(&ended);
    assert_eq!(ended.stderr, "0022\n", "the caller's mask");
    check_ran(&checkout.run(&[]));
    assert_eq!(server.asked(), [format!("/v1/{NAME}")]);
    checkout.check_runs(2);
    let [kept] = &checkout.kept()[..] else {
        panic!("{:?}", checkout.kept())
    };
    for (path, mode) in [
        (kept.parent().unwrap(), 0o40700),
        (kept, 0o40700),
        (&kept.join("flywheel"), 0o100_700),
    ] {
        assert_eq!(fs::metadata(path).unwrap().mode(), mode, "{path:?}");
    }
}

/// `sh` is bash on macOS, and busybox on Alpine.
#[test]
fn any_shell_will_do() {
    let server = ReleaseServer::start(|_, _| Answer::Bytes(BINARY.into()));
    for shell in [&["bash", "--posix"], &["busybox", "sh"]] {
        let checkout = Checkout::new(BINARY).of_release(&server.url()).with_curl();
        checkout.link(shell[0], shell[0]);
        // The one of busybox is its own `uname`.
        let sums = fs::read_to_string(checkout.path("dist/SHA256SUMS")).unwrap();
        let linux = format!("flywheel-{}-linux", std::env::consts::ARCH);
        let both = format!("{sums}{}", sums.replace(NAME, &linux));
        checkout.write("dist/SHA256SUMS", &both);
        let mut command = Command::new(checkout.path("bin").join(shell[0]));
        command.arg(shell[1]).arg(checkout.path("dist/flywheel"));
        check_ran(&checkout.run_by(command, &[]));
    }
}

#[test]
fn either_wget_will_do() {
    for program in ["wget", "busybox"] {
        let server = release();
        let checkout = Checkout::new(BINARY).of_release(&server.url());
        checkout.link("wget", program);
        check_ran(&checkout.run(&[]));
    }
}

#[test]
fn a_kept_binary_that_was_altered_is_taken_anew() {
    let server = release();
    let checkout = Checkout::new(BINARY).of_release(&server.url()).with_curl();
    check_ran(&checkout.run(&[]));
    let kept = checkout.kept()[0].join("flywheel");
    fs::write(&kept, "#!/bin/sh\necho altered\n").unwrap();
    check_ran(&checkout.run(&[]));
    assert_eq!(fs::read_to_string(kept).unwrap(), BINARY);
}

#[test]
fn other_bytes_than_those_of_the_sum_are_not_run() {
    let server =
        ReleaseServer::start(|_, _| Answer::Bytes(BINARY.replace("exit 7", "exit 8").into()));
    for program in ["curl", "wget", "busybox"] {
        let checkout = Checkout::new(BINARY).of_release(&server.url());
        checkout.link(if program == "curl" { "curl" } else { "wget" }, program);
        let words = [
            NAME,
            &server.url(),
            "SHA256SUMS says",
            "nothing was run",
            "FLYWHEEL_RELEASE_MIRROR",
        ];
        checkout.check_refusal(&checkout.run(&[]), 69, &words);
        let skipping = checkout.run(&[("FLYWHEEL_SKIP_CHECKSUM", "1")]);
        checkout.check_refusal(&skipping, 69, &words);
    }
}

#[test]
fn a_download_that_cannot_be_checked_is_not_run() {
    let server = release();
    let checkout = Checkout::new(BINARY).of_release(&server.url()).with_curl();
    fs::remove_file(checkout.path("bin/sha256sum")).unwrap();
    let ended = checkout.run(&[("FLYWHEEL_SKIP_CHECKSUM", "1")]);
    checkout.check_refusal(
        &ended,
        69,
        &["no `sha256sum`, `shasum` or `openssl`", "install one"],
    );
    assert_eq!(server.asked(), [] as [&str; 0]);

    // As on macOS.
    checkout.link("real-sha256sum", "sha256sum");
    checkout.fake("shasum", "[ \"$*\" = '-a 256' ] && exec real-sha256sum");
    check_ran(&checkout.run(&[]));
}

#[test]
fn a_truncated_download_is_tried_again_and_then_refused() {
    let once = ReleaseServer::start(|_, before| match before {
        0 => Answer::Half(BINARY.into()),
        _ => Answer::Bytes(BINARY.into()),
    });
    let checkout = Checkout::new(BINARY).of_release(&once.url()).with_curl();
    check_ran(&checkout.run(&[]));

    let always = ReleaseServer::start(|_, _| Answer::Half(BINARY.into()));
    let checkout = Checkout::new(BINARY).of_release(&always.url()).with_curl();
    let words = [
        NAME,
        "cannot be taken from",
        "curl ended with 18",
        "FLYWHEEL_RELEASE_MIRROR",
    ];
    checkout.check_refusal(&checkout.run(&[]), 69, &words);
    assert_eq!(always.asked().len(), 2);
}

#[test]
fn a_release_without_the_platform_is_named() {
    let server = ReleaseServer::start(|_, _| Answer::Status(404));
    for program in ["curl", "wget"] {
        let checkout = Checkout::new(BINARY).of_release(&server.url());
        checkout.link(program, program);
        let words = [
            &server.url(),
            "has no flywheel-aarch64-darwin",
            "FLYWHEEL_RELEASE_MIRROR",
        ];
        checkout.check_refusal(&checkout.run(&[]), 69, &words);
    }

    // Nor has the checkout a sum for it: nothing is asked for.
    let checkout = Checkout::new(BINARY).of_release(&server.url()).with_curl();
    checkout.write("dist/SHA256SUMS", "");
    let words = ["no binary for Darwin-arm64 yet", "FLYWHEEL_BIN"];
    checkout.check_refusal(&checkout.run(&[]), 69, &words);
    checkout.write("dist/SHA256SUMS", &format!("0123  {NAME}\n"));
    checkout.check_refusal(&checkout.run(&[]), 69, &["has no SHA-256 for"]);
    assert_eq!(server.asked().len(), 2, "{:?}", server.asked());
}

#[test]
fn a_checkout_of_no_release_says_so() {
    let checkout = Checkout::new(BINARY).with_curl();
    let words = [
        "is missing",
        "of no release that has it",
        "FLYWHEEL_RELEASE_MIRROR",
    ];
    checkout.check_refusal(&checkout.run(&[]), 69, &words);
}

#[test]
fn no_redirection_to_another_host_is_followed() {
    let elsewhere = release();
    for (program, to) in [
        (
            "curl",
            format!("http://127.0.0.1:{}/v1/{NAME}", elsewhere.port()),
        ),
        (
            "curl",
            format!("https://example.invalid/{NAME}?token=secret"),
        ),
        ("curl", format!("//example.invalid/{NAME}")),
        ("curl", "file:///etc/hostname".to_owned()),
        (
            "wget",
            format!("http://localhost:{}/v1/{NAME}", elsewhere.port()),
        ),
        ("wget", format!("//example.invalid/{NAME}")),
    ] {
        let location = to.clone();
        let server = ReleaseServer::start(move |_, _| Answer::Redirect(location.clone()));
        let checkout = Checkout::new(BINARY).of_release(&server.url());
        checkout.link(program, program);
        let ended = checkout.run(&[]);
        checkout.check_refusal(
            &ended,
            69,
            &["sends us to another place", "FLYWHEEL_RELEASE_MIRROR"],
        );
        assert!(!ended.stderr.contains("secret"), "{ended:?}");
    }
    assert_eq!(elsewhere.asked(), [] as [&str; 0]);

    // That of busybox follows by itself; what it brought is not run.
    let location = format!("http://localhost:{}/v1/{NAME}", elsewhere.port());
    let server = ReleaseServer::start(move |_, _| Answer::Redirect(location.clone()));
    let checkout = Checkout::new(BINARY).of_release(&server.url());
    checkout.link("wget", "busybox");
    checkout.check_refusal(&checkout.run(&[]), 69, &["sends us to another place"]);
}

#[test]
fn a_redirection_within_the_host_is_followed_and_not_without_end() {
    for program in ["curl", "wget", "busybox"] {
        let server = ReleaseServer::start(|path, _| match path {
            "/files/it" => Answer::Bytes(BINARY.into()),
            _ => Answer::Redirect("/files/it".to_owned()),
        });
        let checkout = Checkout::new(BINARY).of_release(&server.url());
        checkout.link(if program == "curl" { "curl" } else { "wget" }, program);
        check_ran(&checkout.run(&[]));
    }
    let server = ReleaseServer::start(|path, _| Answer::Redirect(format!("{path}x")));
    let checkout = Checkout::new(BINARY).of_release(&server.url()).with_curl();
    checkout.check_refusal(&checkout.run(&[]), 69, &["it redirects again and again"]);
    assert_eq!(server.asked().len(), 8);
}

/// A `curl` that answers as GitHub does, without a network: releases are kept by another host of GitHub's.
#[test]
fn github_may_send_to_where_it_keeps_its_files() {
    for (to, follows) in [
        (
            "https://release-assets.githubusercontent.com/a?sig=b%2Fc&x=1",
            true,
        ),
        ("http://release-assets.githubusercontent.com/a", false),
        ("https://githubusercontent.com.example.org/a", false),
        ("https://x@release-assets.githubusercontent.com/a", false),
    ] {
        let url = "https://github.com/OWNER/flywheel/releases/download/v1";
        let checkout = Checkout::new(BINARY).of_release(url);
        checkout.write("binary", BINARY);
        let (binary, asked) = (checkout.path("binary"), checkout.path("asked"));
        let script = format!(
            "while [ $# -gt 1 ]; do if [ \"$1\" = --output ]; then out=$2; fi; shift; done\necho \"$1\" >>'{}'\n\
             case $1 in {url}/{NAME}) echo '302 {to}' ;; *) cp '{}' \"$out\"; echo '200 ' ;; esac",
            asked.display(),
            binary.display()
        );
        checkout.fake("curl", &script);
        let ended = checkout.run(&[]);
        let asked = fs::read_to_string(asked).unwrap();
        if follows {
            check_ran(&ended);
            assert_eq!(asked, format!("{url}/{NAME}\n{to}\n"));
        } else {
            checkout.check_refusal(&ended, 69, &["sends us to another place"]);
            assert_eq!(asked, format!("{url}/{NAME}\n"));
        }
    }
}

#[test]
fn a_server_that_is_down_or_ill_is_named() {
    let address = release().url();
    let checkout = Checkout::new(BINARY).of_release(&address).with_curl();
    let words = [
        NAME,
        &address,
        "curl ended with 7",
        "see that this machine reaches it",
    ];
    checkout.check_refusal(&checkout.run(&[]), 69, &words);

    let ill = ReleaseServer::start(|_, _| Answer::Status(503));
    for (program, words) in [
        ("curl", "the server answered 503"),
        ("wget", "the server answered 503"),
    ] {
        let checkout = Checkout::new(BINARY).of_release(&ill.url());
        checkout.link(program, program);
        checkout.check_refusal(&checkout.run(&[]), 69, &[words]);
    }
}

/// GitHub signals the entry process alone, which is the launcher here.
#[test]
fn a_download_that_is_cancelled_ends_at_once_and_leaves_nothing() {
    for (program, signal, code) in [("curl", Signal::INT, 130), ("wget", Signal::TERM, 143)] {
        let server = ReleaseServer::start(|_, _| Answer::Hang);
        let checkout = Checkout::new(BINARY).of_release(&server.url());
        checkout.link(program, program);
        let mut command = Command::new(checkout.path("dist/flywheel"));
        folders::isolate(&mut command, checkout.0.path())
            .env("PATH", checkout.path("bin"))
            .env("TRACE", checkout.path("trace"));
        let mut child = command.spawn().unwrap();
        let begun = Instant::now();
        while server.asked().is_empty() {
            assert!(begun.elapsed() < LIMIT, "nothing was asked for");
            std::thread::sleep(Duration::from_millis(5));
        }
        rustix::process::kill_process(Pid::from_child(&child), signal).unwrap();
        let cancelled = Instant::now();
        assert_eq!(child.wait().unwrap().code(), Some(code), "{program}");
        // The server's thread waits for the client's end, and dropping it waits for that thread.
        drop(server);
        assert!(cancelled.elapsed() < LIMIT, "{program}: {cancelled:?}");
        checkout.check_runs(0);
        assert_eq!(checkout.kept(), [] as [PathBuf; 0]);
    }
}

#[test]
fn without_a_program_that_downloads_there_is_the_folder() {
    let server = release();
    let checkout = Checkout::new(BINARY).of_release(&server.url());
    let words = ["no `curl` or `wget`", "FLYWHEEL_RELEASE_MIRROR"];
    checkout.check_refusal(&checkout.run(&[]), 69, &words);

    let folder = checkout.path("the release");
    let folder = folder.to_str().unwrap();
    let variables = [("FLYWHEEL_RELEASE_MIRROR", folder)];
    let words = [folder, "has no flywheel-aarch64-darwin"];
    checkout.check_refusal(&checkout.run(&variables), 69, &words);
    fs::create_dir(folder).unwrap();
    checkout.write(&format!("the release/{NAME}"), "other bytes");
    let words = [folder, "SHA256SUMS says"];
    checkout.check_refusal(&checkout.run(&variables), 69, &words);
    checkout.write(&format!("the release/{NAME}"), BINARY);
    check_ran(&checkout.run(&variables));
    assert_eq!(server.asked(), [] as [&str; 0]);
}

#[test]
fn a_mirror_goes_before_the_release() {
    let (of_release, mirror) = (release(), release());
    let checkout = Checkout::new(BINARY)
        .of_release(&of_release.url())
        .with_curl();
    let url = format!("{}/", mirror.url());
    check_ran(&checkout.run(&[("FLYWHEEL_RELEASE_MIRROR", &url)]));
    assert_eq!(of_release.asked(), [] as [&str; 0]);
    assert_eq!(mirror.asked(), [format!("/v1/{NAME}")]);
}

#[test]
fn a_mirror_has_to_be_safe_to_ask() {
    let server = release();
    let checkout = Checkout::new(BINARY).of_release(&server.url()).with_curl();
    for bad in [
        "mirror.example.org/flywheel",
        "ftp://mirror.example.org",
        "http://mirror.example.org",
        "http://127.0.0.1.example.org/",
        "https://somebody:hunter2@mirror.example.org/",
        "https:///v1",
        "https://",
        "https://-o/x",
        "https://mirror.example.org/a b",
        "relative/folder",
        "--output",
    ] {
        let ended = checkout.run(&[("FLYWHEEL_RELEASE_MIRROR", bad)]);
        let words = [
            "`FLYWHEEL_RELEASE_MIRROR` must be",
            "absolute path of a folder",
        ];
        checkout.check_refusal(&ended, 64, &words);
        assert!(!ended.stderr.contains("hunter2"), "{ended:?}");
    }
    let checkout = checkout.of_release("http://mirror.example.org/v1");
    checkout.check_refusal(
        &checkout.run(&[]),
        69,
        &["RELEASE` holds no `https://` URL"],
    );
    assert_eq!(server.asked(), [] as [&str; 0]);
}

#[test]
fn a_folder_that_others_can_write_to_keeps_no_binary() {
    let server = release();
    let checkout = Checkout::new(BINARY).of_release(&server.url()).with_curl();
    let open = checkout.path("home/.cache/flywheel/release");
    fs::create_dir_all(&open).unwrap();
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
    let words = ["this user's alone", "`XDG_CACHE_HOME`"];
    checkout.check_refusal(&checkout.run(&[]), 69, &words);
    assert_eq!(server.asked(), [] as [&str; 0]);
    let own = checkout.path("own");
    check_ran(&checkout.run(&[("XDG_CACHE_HOME", own.to_str().unwrap())]));
}

#[test]
fn what_was_not_used_for_long_makes_room() {
    let server = release();
    let checkout = Checkout::new(BINARY).of_release(&server.url()).with_curl();
    let folder = checkout.path("home/.cache/flywheel/release");
    for (name, age) in [
        ("old", "40 days ago"),
        ("new.Ab12", "40 days ago"),
        ("recent", "10 days ago"),
    ] {
        fs::create_dir_all(folder.join(name)).unwrap();
        let touched = Command::new("touch")
            .args(["-d", age])
            .arg(folder.join(name))
            .status();
        assert!(touched.unwrap().success());
    }
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    check_ran(&checkout.run(&[]));
    let mut left: Vec<_> = checkout
        .kept()
        .iter()
        .map(|path| path.file_name().unwrap().len())
        .collect();
    left.sort_unstable();
    assert_eq!(left, ["recent".len(), 64]);
}
