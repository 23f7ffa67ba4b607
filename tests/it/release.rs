//! The steps of a release, `scripts/release.sh`, in a small repository with a remote of its own and a `gh` that keeps what
//! it is given in a folder; and the list of dependencies that a release has.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use crate::world::folders;

const LINUX: [&str; 2] = ["flywheel-x86_64-linux", "flywheel-aarch64-linux"];
const MAC: &str = "flywheel-aarch64-darwin";
const CHANGES: &str = "# Changelog\n\n## Unreleased\n\n- Later.\n\n## 0.2.0 (2026-12-01)\n\nThe first.\n\n- It works.\n\n\
                       ## 0.1.0 (2026-01-01)\n\n- Before.\n";
/// A release is a folder here, in which `draft` says that it is one.
const GH: &str = r#"set -eu
echo "$*" >>"$WORLD/calls"
there=$WORLD/releases/${3-}
case "$1 $2" in
  'release view') [ -d "$there" ] && if [ -f "$there/draft" ]; then echo true; else echo false; fi ;;
  'release delete') rm -r "$there" ;;
  'release create')
    mkdir -p "$there" && : >"$there/draft"
    shift 3
    while [ $# -gt 0 ]; do
      case $1 in --title | --notes-file) shift ;; --*) ;; *) cp "$1" "$there" ;; esac
      shift
    done
    [ ! -f "$WORLD/breaks" ] || exit 1 ;;
  'release edit') rm "$there/draft" ;;
  'api '*) if [ -f "$WORLD/mutable" ]; then echo false; else echo true; fi ;;
esac"#;

struct Repository(TempDir);

impl Repository {
    /// What can be released as 0.2.0.
    fn new() -> Self {
        let repository = Self(tempfile::Builder::new().prefix("a b").tempdir().unwrap());
        for folder in ["main/dist", "main/scripts", "bin", "mac"] {
            fs::create_dir_all(repository.path(folder)).unwrap();
        }
        for script in ["release.sh", "dist-sums.sh"] {
            let from = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("scripts")
                .join(script);
            fs::copy(from, repository.path("main/scripts").join(script)).unwrap();
        }
        repository.write("bin/gh", &format!("#!/bin/sh\n{GH}\n"));
        repository.write("main/scripts/sbom.py", "#!/bin/sh\necho '{}'\n");
        repository.write("main/scripts/dist-check.sh", "#!/bin/sh\ncat verdict\n");
        repository.write("main/dist/flywheel", "#!/bin/sh\necho flywheel 0.2.0\n");
        for name in LINUX {
            repository.write(&format!("main/dist/{name}"), name);
        }
        let manifest = "[workspace.package]\nversion = \"0.2.0\"\n[other]\nversion = \"9.9.9\"\n";
        repository.write("main/Cargo.toml", manifest);
        repository.write("main/CHANGELOG.md", CHANGES);
        repository.git(&["init", "--quiet", "--bare", "../remote"]);
        repository.git(&["init", "--quiet", "--initial-branch=main"]);
        repository.git(&["remote", "add", "origin", "../remote"]);
        repository.commit();
        repository.git(&["push", "--quiet", "--set-upstream", "origin", "main"]);
        repository
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self, program: &str, arguments: &[&str]) -> Output {
        let path = std::env::var("PATH").unwrap();
        let mut command = Command::new(program);
        folders::isolate(&mut command, self.0.path())
            .args(arguments)
            .current_dir(self.path("main"))
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("WORLD", self.0.path())
            .env("GITHUB_REPOSITORY", "OWNER/flywheel")
            .env("GITHUB_SERVER_URL", "https://github.com");
        command.output().unwrap()
    }

    fn git(&self, arguments: &[&str]) -> String {
        let who = ["-c", "user.name=A", "-c", "user.email=a@example.org"];
        let output = self.command("git", &[&who, arguments].concat());
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn commit(&self) {
        self.git(&["add", "--all"]);
        self.git(&["commit", "--quiet", "--message", "x"]);
    }

    fn step(&self, arguments: &[&str]) -> Output {
        self.command("scripts/release.sh", arguments)
    }

    #[track_caller]
    fn passes(&self, arguments: &[&str]) -> String {
        let output = self.step(arguments);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn fails(&self, arguments: &[&str], code: i32, words: &str) {
        let output = self.step(arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(words), "no `{words}` in: {text}");
    }

    fn stage(&self) {
        let (mac, out) = (self.path("mac"), self.path("out"));
        self.passes(&[
            "stage",
            "0.2.0",
            mac.to_str().unwrap(),
            out.to_str().unwrap(),
        ]);
    }

    fn publish(&self) -> [String; 3] {
        let out = self.path("out").to_str().unwrap().to_owned();
        ["publish".to_owned(), "0.2.0".to_owned(), out]
    }
}

fn as_words(words: &[String; 3]) -> [&str; 3] {
    words.each_ref().map(String::as_str)
}

#[test]
fn only_what_is_ready_is_released() {
    let repository = Repository::new();
    let check = ["check", "0.2.0"];
    repository.passes(&check);
    for version in ["v0.2.0", "0.2", "0.2.0-rc1", "00.2.0", "--help", "0.2.0\n"] {
        repository.fails(&["check", version], 64, "a version is three numbers");
    }
    repository.fails(&["deploy"], 64, "no such step");
    repository.fails(
        &["check", "9.9.9"],
        1,
        "`Cargo.toml` has version 0.2.0, not 9.9.9",
    );

    repository.write("main/CHANGELOG.md", &CHANGES.replace(" (2026-12-01)", ""));
    repository.fails(&check, 1, "no heading `## 0.2.0 (YYYY-MM-DD)`");
    repository.write(
        "main/CHANGELOG.md",
        &CHANGES.replace("The first.\n\n- It works.\n", ""),
    );
    repository.fails(&check, 1, "says nothing about 0.2.0");
    repository.write("main/CHANGELOG.md", CHANGES);

    repository.write("main/dist/flywheel", "#!/bin/sh\necho flywheel 0.1.0\n");
    repository.fails(&check, 1, "the committed binary is `flywheel 0.1.0`");
    repository.write("main/dist/flywheel", "#!/bin/sh\necho flywheel 0.2.0\n");

    repository.git(&[
        "commit",
        "--quiet",
        "--allow-empty",
        "--message",
        "not merged",
    ]);
    repository.fails(&check, 1, "not on the branch `main`");
    repository.git(&["reset", "--quiet", "--hard", "origin/main"]);
    repository.git(&["tag", "v0.2.0"]);
    repository.fails(&check, 1, "the tag v0.2.0 is there already");
}

#[test]
fn what_is_not_proved_is_not_released() {
    let repository = Repository::new();
    for (verdict, is_proved) in [
        ("dist-check: proved: x86_64 aarch64", true),
        (
            "dist-check: proved: x86_64; aarch64 by the sum of its sources",
            false,
        ),
        (
            "dist-check: NOT PROVED: aarch64\ndist-check: proved: x86_64 aarch64",
            false,
        ),
        ("", false),
    ] {
        repository.write("main/verdict", &format!("{verdict}\n"));
        if is_proved {
            repository.passes(&["prove"]);
        } else {
            repository.fails(&["prove"], 1, "both binaries have to be proved");
        }
    }
}

#[test]
fn a_release_is_published_whole_with_the_sums_of_its_tag() {
    let repository = Repository::new();
    repository.write(&format!("mac/{MAC}"), "for a Mac");
    repository.write("mac/something-else", "x");
    // Of the release before, whose binary for the other Mac is not made any more.
    let old = format!("{}  flywheel-x86_64-darwin\n", "5".repeat(64));
    repository.write("main/dist/SHA256SUMS", &old);
    repository.commit();
    repository.git(&["push", "--quiet"]);
    repository.stage();
    repository.passes(&["tag", "0.2.0"]);
    let said = repository.passes(&as_words(&repository.publish()));
    assert_eq!(said, "release: v0.2.0 is published, and v0 names it\n");

    let published = repository.path("releases/v0.2.0");
    let mut files: Vec<_> = fs::read_dir(&published)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let mut expected = [LINUX[0], LINUX[1], MAC, "SHA256SUMS", "flywheel.cdx.json"];
    expected.sort_unstable();
    assert_eq!(files, expected);

    // The remote's tag has what the launcher needs, and `v0` is the same commit.
    let sums = fs::read_to_string(published.join("SHA256SUMS")).unwrap();
    assert_eq!(sums.lines().count(), 3, "{sums}");
    let show = |what: &str| repository.git(&["-C", "../remote", "show", what]);
    assert_eq!(show("v0.2.0:dist/SHA256SUMS"), sums);
    assert_eq!(show("v0:dist/SHA256SUMS"), sums);
    let release = "https://github.com/OWNER/flywheel/releases/download/v0.2.0\n";
    assert_eq!(show("v0.2.0:dist/RELEASE"), release);
    assert_eq!(show("v0.2.0^:dist/SHA256SUMS"), old, "one commit ahead");
    assert_eq!(
        repository.passes(&["notes", "0.2.0"]),
        "The first.\n\n- It works.\n\n"
    );
}

#[test]
fn a_release_that_broke_off_goes_on_and_none_is_made_twice() {
    let repository = Repository::new();
    let words = repository.publish();
    let publish = as_words(&words);
    repository.write("breaks", "");
    repository.stage();
    repository.passes(&["tag", "0.2.0"]);
    assert!(!repository.step(&publish).status.success());
    assert!(repository.path("releases/v0.2.0/draft").exists());

    // On another machine, where the tag is fetched.
    fs::remove_file(repository.path("breaks")).unwrap();
    repository.git(&["checkout", "--quiet", "--detach", "origin/main"]);
    repository.stage();
    repository.passes(&["tag", "0.2.0"]);
    repository.passes(&publish);
    assert!(!repository.path("releases/v0.2.0/draft").exists());

    repository.passes(&publish);
    let calls = fs::read_to_string(repository.path("calls")).unwrap();
    assert_eq!(calls.matches("release create").count(), 2, "{calls}");
    assert_eq!(calls.matches("release edit").count(), 1, "{calls}");

    // Another commit cannot have its name.
    repository.git(&["checkout", "--quiet", "main"]);
    repository.git(&["commit", "--quiet", "--allow-empty", "--message", "later"]);
    repository.stage();
    repository.fails(&["tag", "0.2.0"], 1, "names another commit already");
}

#[test]
fn a_release_that_can_be_altered_is_a_failure_and_an_older_one_does_not_take_the_major_tag() {
    let repository = Repository::new();
    repository.stage();
    repository.passes(&["tag", "0.2.0"]);
    let words = repository.publish();
    repository.write("mutable", "");
    repository.fails(&as_words(&words), 1, "turn on immutable releases");
    fs::remove_file(repository.path("mutable")).unwrap();
    repository.git(&["tag", "v0.10.0", "v0.2.0^"]);
    let said = repository.passes(&as_words(&words));
    assert_eq!(said, "release: v0.2.0 is published; v0 names a newer one\n");

    repository.write("out/flywheel-x86_64-linux", "other bytes");
    repository.fails(&as_words(&words), 1, "other files than its sums say");
    repository.write("out/SHA256SUMS", "");
    repository.fails(&as_words(&words), 1, "has other sums");
}

#[test]
fn the_list_of_dependencies_is_that_of_cargo_lock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Of this processor, whose crates are here.
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(root.join("scripts/sbom.py"))
        .arg(target)
        .env("CARGO_NET_OFFLINE", "true")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let bom: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&bom["bomFormat"], &bom["specVersion"]),
        (&"CycloneDX".into(), &"1.6".into())
    );
    assert_eq!(
        bom["metadata"]["component"]["version"],
        env!("CARGO_PKG_VERSION")
    );

    let locked = fs::read_to_string(root.join("Cargo.lock")).unwrap();
    let components = bom["components"].as_array().unwrap();
    let mut names = BTreeSet::new();
    for component in components {
        let text = |key: &str| component[key].as_str().unwrap();
        let entry = format!(
            "name = \"{}\"\nversion = \"{}\"\n",
            text("name"),
            text("version")
        );
        let at = locked.find(&entry).unwrap_or_else(|| panic!("{entry}"));
        let entry = locked[at..].split("\n\n").next().unwrap();
        if let Some(sum) = component["hashes"][0]["content"].as_str() {
            assert!(entry.contains(&format!("checksum = \"{sum}\"")), "{entry}");
        } else {
            assert!(text("name").starts_with("flywheel-"), "{component}");
        }
        assert!(
            component["licenses"][0]["expression"].is_string(),
            "{component}"
        );
        names.insert(text("name").to_owned());
    }
    // What the manifest names as a dependency, and not for tests alone.
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    let section = |heading: &str| {
        let (_, rest) = manifest.split_once(&format!("\n{heading}\n")).unwrap();
        let lines = rest.lines().take_while(|line| !line.starts_with('['));
        let crates = lines.filter_map(|line| line.split(['.', ' ']).next());
        let crates = crates.filter(|name| !name.is_empty() && !name.starts_with('#'));
        crates.map(str::to_owned).collect::<BTreeSet<String>>()
    };
    let (wanted, for_tests) = (section("[dependencies]"), section("[dev-dependencies]"));
    assert!(
        wanted.len() > 10 && wanted.is_subset(&names),
        "{:?}",
        &wanted - &names
    );
    for name in ["insta", "jsonschema"] {
        assert!(for_tests.contains(name) && !names.contains(name), "{name}");
    }
}
