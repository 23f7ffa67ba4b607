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
