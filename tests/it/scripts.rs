//! The scripts that people start with, on a machine that has next to nothing.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output};

use crate::world::folders;

/// A machine with the programs of every Debian, and an `apt-get` that installs nothing and writes down its calls.
struct Machine {
    folder: tempfile::TempDir,
}

impl Machine {
    /// `packages`: what its archive has.
    fn new(packages: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in [
            "bash", "dirname", "env", "id", "sed", "grep", "mkdir", "tee",
        ] {
            let mut places = ["/usr/bin", "/bin"]
                .iter()
                .map(|place| Path::new(place).join(name));
            let program = places.find(|file| file.exists());
            symlink(program.unwrap(), folder.path().join(name)).unwrap();
        }
        let here = folder.path().display();
        let fake = [
            ("apt-get", format!("echo \"$*\" >>{here}/calls; exit 1")),
            ("sudo", "exec \"$@\"".to_owned()),
            ("apt-cache", format!("[ \"$*\" = 'show {packages}' ]")),
            ("python3", "exit 0".to_owned()),
        ];
        for (name, script) in fake {
            let file = folder.path().join(name);
            std::fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { folder }
    }

    fn bootstrap(&self) -> Output {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bootstrap.sh");
        folders::isolate(&mut Command::new(script), self.folder.path())
            .arg("tools")
            .env("PATH", self.folder.path())
            .output()
            .unwrap()
    }

    fn calls(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("calls")).unwrap_or_default()
    }
}

#[test]
fn without_rust_the_first_line_says_what_to_install() {
    let machine = Machine::new("nothing");
    let output = machine.bootstrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(69), "{text}");
    let first = text.lines().next().unwrap_or_default();
    assert!(
        first.contains("`cargo` is missing") && first.contains("https://rustup.rs"),
        "{text}"
    );
    assert_eq!(machine.calls(), "", "nothing was installed before");
}

/// Whoever builds anew keeps what the launcher compares a release's binaries with.
#[test]
fn new_sums_keep_those_of_what_only_a_release_has() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    let of_release = format!("{}  flywheel-aarch64-darwin\n", "5".repeat(64));
    let old = format!("{}  flywheel-x86_64-linux\n", "4".repeat(64));
    write("SHA256SUMS", &format!("{of_release}{old}"));
    write("flywheel-x86_64-linux", "");
    write("flywheel", "the launcher");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/dist-sums.sh");
    let status = Command::new(script).arg(folder.path()).status().unwrap();
    assert!(status.success());
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    assert_eq!(
        std::fs::read_to_string(folder.path().join("SHA256SUMS")).unwrap(),
        format!("{of_release}{empty}  flywheel-x86_64-linux\n")
    );
}

#[test]
fn rust_comes_from_the_distribution_where_it_has_rustup() {
    let machine = Machine::new("rustup");
    let output = machine.bootstrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let installing = text
        .lines()
        .find(|line| line.starts_with("bootstrap: installing"));
    assert!(
        installing.is_some_and(|line| line.contains(" rustup ")),
        "{text}"
    );
    assert!(machine.calls().contains("update"), "{}", machine.calls());
}

/// What `selftest.yml` judges a machine by: the outputs of `nix-job`, in the order of a row.
fn selftest_row(event: &str, outputs: [&str; 7]) -> (bool, String) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("row");
    let names = [
        "OUTCOME",
        "EXIT_CODE",
        "CACHE_STATE",
        "TRUST",
        "PUBLISHED",
        "VERIFIED",
        "LOST",
    ];
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/selftest.sh");
    let status = Command::new(script)
        .arg("row")
        .arg("machine")
        .arg(&file)
        .env("GITHUB_EVENT_NAME", event)
        .envs(names.into_iter().zip(outputs))
        .stdout(std::process::Stdio::null())
        .status();
    let row = std::fs::read_to_string(file).unwrap();
    (status.unwrap().success(), row)
}

#[test]
fn a_machine_passes_the_selftest_only_with_nothing_lost() {
    let good = ["success", "0", "attached", "may-publish", "3", "3", "0"];
    let (passed, row) = selftest_row("push", good);
    assert!(passed);
    assert_eq!(
        row,
        "passed | success | attached | may-publish | 3 | 3 | 0\n"
    );
    let reads = ["success", "0", "attached", "read-only", "0", "0", "0"];
    assert!(selftest_row("pull_request", reads).0);

    for (event, at, value) in [
        ("push", 0, "failure"),
        ("push", 1, "1"),
        ("push", 2, "degraded"),
        ("push", 3, "read-only"),
        ("push", 4, "0"),
        ("push", 5, "2"),
        ("push", 6, "1"),
        ("push", 6, ""),
        ("pull_request", 0, "success"),
    ] {
        let mut bad = good;
        bad[at] = value;
        let (passed, row) = selftest_row(event, bad);
        assert!(!passed && row.starts_with("failed | "), "{event}: {row}");
    }
    assert!(!selftest_row("push", [""; 7]).0);
}

#[test]
fn the_selftests_table_names_machines_that_left_no_row() {
    let folder = tempfile::tempdir().unwrap();
    let good = "passed | success | attached | may-publish | 3 | 3 | 0\n";
    std::fs::write(folder.path().join("good"), good).unwrap();
    let table = |names: &[&str]| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/selftest.sh");
        let mut command = Command::new(script);
        let output = command.arg("table").arg(folder.path()).args(names).output();
        let output = output.unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let rows = text.lines().skip(2).map(str::to_owned);
        (output.status.code(), rows.collect::<Vec<_>>())
    };
    let row = "| good | passed | success | attached | may-publish | 3 | 3 | 0 |".to_owned();
    let absent = |verdict: &str| format!("| x | {verdict} | no row | - | - | - | - | - |");
    assert_eq!(table(&["good"]), (Some(0), vec![row.clone()]));
    assert_eq!(
        table(&["good", "x?"]),
        (Some(0), vec![row.clone(), absent("not yet")])
    );
    assert_eq!(
        table(&["x", "good"]),
        (Some(1), vec![absent("failed"), row])
    );
    std::fs::write(
        folder.path().join("x"),
        "failed | failure | - | - | - | - | -\n",
    )
    .unwrap();
    assert_eq!(table(&["x"]).0, Some(1));
    assert_eq!(table(&[]).0, Some(64));
}

#[test]
fn a_program_is_static_by_its_header_and_not_by_its_text() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let names_loader = |program: &Path| {
        let status = Command::new("sh")
            .args(["-euc", ". \"$1\"; names_loader \"$2\"", "-"])
            .arg(root.join("tests/machines/guest/elf.sh"))
            .arg(program)
            .status();
        status.unwrap().success()
    };
    assert!(names_loader(Path::new("/bin/sh")), "it is dynamic");
    // The committed binary has the loader's name in it, which `setup --plan` looks for.
    let ours = root.join("dist/flywheel-x86_64-linux");
    let text = std::fs::read(&ours).unwrap();
    let name = b"/lib64/ld-linux-x86-64.so.2";
    assert!(text.windows(name.len()).any(|window| window == name));
    assert!(!names_loader(&ours), "it is static");
}

#[test]
fn the_machines_script_explains_itself_without_making_anything() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/machines.sh");
    let folder = tempfile::tempdir().unwrap();
    // Without cargo, and without the programs that unpack a Debian.
    for name in ["bash", "dirname", "sed", "env"] {
        let mut places = ["/usr/bin", "/bin"]
            .iter()
            .map(|place| Path::new(place).join(name));
        symlink(
            places.find(|file| file.exists()).unwrap(),
            folder.path().join(name),
        )
        .unwrap();
    }
    let output = folders::isolate(&mut Command::new(script), folder.path())
        .arg("--help")
        .env("PATH", folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for word in ["scripts/machines.sh NAME", "--enter", "FLYWHEEL_BIN"] {
        assert!(text.contains(word), "{text}");
    }
}
