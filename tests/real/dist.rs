//! `dist/`: the launcher's behaviour with a binary of the tests' own, and the committed binaries where
//! there is nothing but themselves.

mod proof;

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::world::act::{BINARY, put_binary};
use crate::world::{PATH, arm64, folders, need, root};

/// The committed binaries, with what `readelf` calls their processors.
const COMMITTED: [(&str, &str); 2] = [
    (BINARY, "Advanced Micro Devices X86-64"),
    (arm64::BINARY, "AArch64"),
];

/// In bytes; `scripts/dist-check.sh` has the same limit.
const SIZE_LIMIT: u64 = 14 * 1024 * 1024;

/// A `dist/` in a folder of its own, whose binary is a script that shows what it was given.
struct Dist {
    folder: TempDir,
}

/// How the launcher ended.
#[derive(Debug, PartialEq, Eq)]
struct Ended {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Dist {
    fn new() -> Self {
        let dist = Self {
            folder: tempfile::Builder::new().prefix("a b").tempdir().unwrap(),
        };
        let script = dist.folder.path().join("script");
        fs::write(&script, "#!/bin/sh\nprintf '[%s]' \"$@\"\nexit 7\n").unwrap();
        fs::create_dir(dist.path("dist")).unwrap();
        fs::create_dir(dist.path("bin")).unwrap();
        fs::copy(root().join("dist/flywheel"), dist.path("dist/flywheel")).unwrap();
        put_binary(&script, &dist.path("dist"));
        dist
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts a program in front of `PATH`.
    fn fake(&self, name: &str, script: &str) {
        fs::write(
            self.path("bin").join(name),
            format!("#!/bin/sh\n{script}\n"),
        )
        .unwrap();
        fs::set_permissions(
            self.path("bin").join(name),
            fs::Permissions::from_mode(0o755),
        )
        .unwrap();
    }

    /// The launcher, called as `program`, in another folder and with a cleared environment.
    fn launcher(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        folders::isolate(&mut command, self.folder.path())
            .args(["one", "two words", "", "*"])
            .current_dir("/");
        command.env(
            "PATH",
            format!("{}:/usr/bin:/bin", self.path("bin").display()),
        );
        command
    }

    fn run(&self) -> Ended {
        ended(&mut self.launcher(&self.path("dist/flywheel")))
    }
}

fn ended(command: &mut Command) -> Ended {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ended {
        code: status.code().unwrap(),
        stdout: text(stdout),
        stderr: text(stderr),
    }
}

fn passed_through() -> Ended {
    Ended {
        code: 7,
        stdout: "[one][two words][][*]".to_owned(),
        stderr: String::new(),
    }
}

/// Ends with `code`, runs nothing, and prints a message with all of `words` in it.
fn check_refusal(ended: &Ended, code: i32, words: &[&str]) {
    assert_eq!((ended.code, ended.stdout.as_str()), (code, ""), "{ended:?}");
    for word in words {
        assert!(
            ended.stderr.contains(word),
            "no `{word}` in: {}",
            ended.stderr
        );
    }
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
}

#[test]
fn the_launcher_passes_arguments_and_exit_code_through() {
    assert_eq!(Dist::new().run(), passed_through());
}

#[test]
fn the_launcher_is_the_binary() {
    let dist = Dist::new();
    let script = dist.path("script");
    fs::write(&script, "#!/bin/sh\necho $$\n").unwrap();
    put_binary(&script, &dist.path("dist"));
    let child = dist
        .launcher(&dist.path("dist/flywheel"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let id = child.id();
    let output = child.wait_with_output().unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("{id}\n"),
        "signals must reach the binary itself"
    );
}

#[test]
fn the_launcher_finds_itself_through_links() {
    let dist = Dist::new();
    fs::create_dir(dist.path("x y")).unwrap();
    symlink(dist.path("dist/flywheel"), dist.path("x y/absolute")).unwrap();
    symlink("../dist/flywheel", dist.path("x y/relative")).unwrap();
    symlink("x y/relative", dist.path("twice")).unwrap();
    symlink("dist", dist.path("folder")).unwrap();
    for program in ["x y/absolute", "x y/relative", "twice", "folder/flywheel"] {
        assert_eq!(
            ended(&mut dist.launcher(&dist.path(program))),
            passed_through(),
            "{program}"
        );
    }
    let mut by_path = Command::new("/bin/sh");
    folders::isolate(&mut by_path, dist.folder.path())
        .args(["-c", "exec flywheel one 'two words' '' '*'"])
        .current_dir(dist.path("x y"));
    by_path
        .env("PATH", "../dist:/usr/bin:/bin")
        .env("CDPATH", "/usr");
    assert_eq!(
        ended(&mut by_path),
        passed_through(),
        "found on a relative PATH"
    );
}

#[test]
fn a_damaged_binary_is_never_run() {
    let dist = Dist::new();
    let before = sum_of(&dist.path("dist").join(BINARY));
    fs::write(dist.path("dist").join(BINARY), "#!/bin/sh\necho evil\n").unwrap();
    let now = sum_of(&dist.path("dist").join(BINARY));
    check_refusal(
        &dist.run(),
        69,
        &["damaged", &before, &now, "check the repository out again"],
    );

    fs::write(
        dist.path("dist/SHA256SUMS"),
        format!("{now}  another-file\n"),
    )
    .unwrap();
    check_refusal(&dist.run(), 69, &["has no sum for flywheel-x86_64-linux"]);
    // Where the binary itself is missing: `tests/it/launcher.rs`.
    fs::remove_file(dist.path("dist/SHA256SUMS")).unwrap();
    check_refusal(&dist.run(), 69, &["SHA256SUMS` is missing"]);
}

#[test]
fn a_binary_without_its_mode_is_named() {
    let dist = Dist::new();
    fs::set_permissions(
        dist.path("dist").join(BINARY),
        fs::Permissions::from_mode(0o644),
    )
    .unwrap();
    check_refusal(&dist.run(), 69, &["is not executable", "chmod +x"]);
}

#[test]
fn another_platform_gets_a_clear_message() {
    for (system, machine) in [
        ("Darwin", "arm64"),
        ("Linux", "riscv64"),
        ("MINGW64_NT-10.0", "x86_64"),
    ] {
        let dist = Dist::new();
        dist.fake(
            "uname",
            &format!("case $1 in -s) echo {system} ;; -m) echo {machine} ;; esac"),
        );
        check_refusal(
            &dist.run(),
            69,
            &[
                &format!("no binary for {system}-{machine} yet"),
                "only for Linux-x86_64 and Linux-aarch64",
                "FLYWHEEL_BIN",
            ],
        );
    }
}

#[test]
fn each_processor_gets_its_binary() {
    let dist = Dist::new();
    let other = "#!/bin/sh\necho for arm64\n";
    let binary = dist.path("dist").join(arm64::BINARY);
    fs::write(&binary, other).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    let sums = dist.path("dist/SHA256SUMS");
    let both = format!(
        "{}{}  {}\n",
        fs::read_to_string(&sums).unwrap(),
        sum_of(&binary),
        arm64::BINARY
    );
    fs::write(&sums, both).unwrap();
    let for_arm64 = Ended {
        code: 0,
        stdout: "for arm64\n".to_owned(),
        stderr: String::new(),
    };
    for (machine, expected) in [
        ("x86_64", &passed_through()),
        ("amd64", &passed_through()),
        ("aarch64", &for_arm64),
        ("arm64", &for_arm64),
    ] {
        dist.fake(
            "uname",
            &format!("case $1 in -s) echo Linux ;; -m) echo {machine} ;; esac"),
        );
        assert_eq!(&dist.run(), expected, "{machine}");
    }
}

#[test]
fn in_a_job_the_message_is_an_annotation() {
    let dist = Dist::new();
    dist.fake("uname", "echo Plan9");
    let ended = ended(
        dist.launcher(&dist.path("dist/flywheel"))
            .env("GITHUB_ACTIONS", "true"),
    );
    assert_eq!((ended.code, ended.stderr.as_str()), (69, ""));
    assert!(
        ended
            .stdout
            .starts_with("::error title=flywheel::there is no binary for Plan9-Plan9"),
        "{ended:?}"
    );
}

#[test]
fn any_tool_that_computes_sums_will_do_and_none_is_an_error() {
    let dist = Dist::new();
    for tool in ["dirname", "uname", "readlink", "sh"] {
        symlink(
            need(tool, "apt-get install coreutils"),
            dist.path("bin").join(tool),
        )
        .unwrap();
    }
    let path = dist.path("bin");
    let run = || {
        ended(
            dist.launcher(&dist.path("dist/flywheel"))
                .env("PATH", &path),
        )
    };
    check_refusal(
        &run(),
        69,
        &[
            "no `sha256sum`, `shasum` or `openssl`",
            "FLYWHEEL_SKIP_CHECKSUM=1",
        ],
    );
    let skipped = ended(
        dist.launcher(&dist.path("dist/flywheel"))
            .env("PATH", &path)
            .env("FLYWHEEL_SKIP_CHECKSUM", "1"),
    );
    assert_eq!(skipped, passed_through());

    let sha256sum = need("sha256sum", "apt-get install coreutils")
        .display()
        .to_string();
    for (tool, call) in [
        (
            "openssl",
            format!(
                "[ \"$*\" = 'dgst -sha256 -r' ] && read -r x <<E\n$({sha256sum})\nE\necho \"${{x%% *}} *stdin\""
            ),
        ),
        (
            "shasum",
            format!("[ \"$*\" = '-a 256' ] && exec {sha256sum}"),
        ),
        ("sha256sum", format!("exec {sha256sum}")),
    ] {
        dist.fake(tool, &call);
        assert_eq!(run(), passed_through(), "{tool}");
        fs::remove_file(dist.path("bin").join(tool)).unwrap();
    }
    // `FLYWHEEL_SKIP_CHECKSUM` has no effect where the sum can be computed.
    dist.fake("sha256sum", "echo 0123 -");
    let lied = ended(
        dist.launcher(&dist.path("dist/flywheel"))
            .env("PATH", &path)
            .env("FLYWHEEL_SKIP_CHECKSUM", "1"),
    );
    check_refusal(&lied, 69, &["damaged", "0123"]);
}

#[test]
fn flywheel_bin_names_another_binary() {
    let dist = Dist::new();
    let run = |binary: &str| {
        ended(
            dist.launcher(&dist.path("dist/flywheel"))
                .env("FLYWHEEL_BIN", binary),
        )
    };
    fs::write(dist.path("dist/SHA256SUMS"), "").unwrap();
    assert_eq!(
        run(dist.path("script").to_str().unwrap()).code,
        64,
        "not executable"
    );
    fs::set_permissions(dist.path("script"), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(run(dist.path("script").to_str().unwrap()), passed_through());
    check_refusal(
        &run("dist/script"),
        64,
        &["`FLYWHEEL_BIN` must be an absolute path, not `dist/script`"],
    );
    check_refusal(
        &run("/nonexistent/flywheel"),
        64,
        &["`FLYWHEEL_BIN` names no executable file: `/nonexistent/flywheel`"],
    );
    // A `FLYWHEEL_BIN` that names the launcher itself starts it once more, and the sum is checked as usual.
    check_refusal(
        &run(dist.path("dist/flywheel").to_str().unwrap()),
        69,
        &["has no sum"],
    );
}

#[test]
fn the_committed_binaries_are_small_static_and_alone_in_a_chroot() {
    // What a release alone has comes before or after these two.
    let recorded = fs::read_to_string(root().join("dist/SHA256SUMS")).unwrap();
    for name in ["aarch64", "x86_64"].map(|processor| format!("flywheel-{processor}-linux")) {
        let sum = sum_of(&root().join("dist").join(&name));
        let line = format!("{sum}  {name}");
        assert!(recorded.lines().any(|other| other == line), "{recorded}");
    }
    for (name, processor) in COMMITTED {
        let binary = root().join("dist").join(name);
        let size = fs::metadata(&binary).unwrap().len();
        assert!(size < SIZE_LIMIT, "{name}: {size} bytes");

        let headers = Command::new(need("readelf", "apt-get install binutils"))
            .arg("-hlW")
            .arg(&binary)
            .output()
            .unwrap();
        let headers = String::from_utf8(headers.stdout).unwrap();
        assert!(
            headers.contains(processor) && headers.contains("LOAD") && !headers.contains("INTERP"),
            "{name}: {headers}"
        );

        let empty = tempfile::tempdir().unwrap();
        fs::copy(&binary, empty.path().join("flywheel")).unwrap();
        // Both run there; qemu is not needed for the one, and does no harm.
        let chroot = need("chroot", "apt-get install coreutils");
        let mut command = arm64::command(&chroot);
        folders::isolate(&mut command, empty.path())
            .arg(empty.path())
            .args(["/flywheel", "--version"])
            .env("PATH", PATH);
        let version = format!("flywheel {}\n", env!("CARGO_PKG_VERSION"));
        let expected = Ended {
            code: 0,
            stdout: version,
            stderr: String::new(),
        };
        assert_eq!(ended(&mut command), expected, "{name}");
    }
}

/// Kernels for arm64 have pages of 4, 16 or 64 KiB; a program whose parts lie closer together does not start on all.
#[test]
fn the_binary_for_arm64_starts_on_kernels_with_pages_of_64_kib() {
    let headers = Command::new(need("readelf", "apt-get install binutils"))
        .arg("-lW")
        .arg(arm64::binary())
        .output()
        .unwrap();
    let headers = String::from_utf8(headers.stdout).unwrap();
    let loaded = headers
        .lines()
        .filter(|line| line.trim_start().starts_with("LOAD"));
    let alignments: Vec<&str> = loaded
        .filter_map(|line| line.split_whitespace().last())
        .collect();
    assert!(alignments.len() >= 2, "{headers}");
    assert!(
        alignments.iter().all(|alignment| *alignment == "0x10000"),
        "{headers}"
    );
}

#[test]
fn the_committed_binaries_name_no_folder_of_this_machine() {
    for (file, _) in COMMITTED {
        let bytes = fs::read(root().join("dist").join(file)).unwrap();
        for name in [
            &format!("{}/src/", root().display()),
            "/.cargo/",
            "/.rustup/",
        ] {
            let found = bytes
                .windows(name.len())
                .any(|window| window == name.as_bytes());
            assert!(!found, "`{name}` stands in {file}");
        }
    }
}

fn sum_of(file: &Path) -> String {
    let output = Command::new(need("sha256sum", "apt-get install coreutils"))
        .arg(file)
        .output()
        .unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .to_owned()
}
