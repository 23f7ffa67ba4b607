//! `flake-checks` as a person runs it: what makes a verdict believed, what one broken system means for the others, the
//! reason of an error, and the command that does the same.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::world::{PATH, flywheel, folders, must, need, with_private_nix};
use flywheel_nix::hash::Sha256 as Hash;
use flywheel_nix::key::SecretKey;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::fingerprint;
use flywheel_nix::store_path::StorePath;

const CONFIG: &str = "experimental-features = nix-command flakes\nsandbox = false\nbuild-users-group =\nsubstituters =\n";

/// A flake in a folder of its own, with a store of its own.
struct Flake {
    folder: tempfile::TempDir,
}

/// What a run printed and found.
struct Checked {
    code: i32,
    printed: String,
    /// The lines of the file `json-lines`, by label without the system.
    lines: BTreeMap<String, Value>,
}

impl Checked {
    fn kind(&self, label: &str) -> &str {
        let line = self.lines.get(label);
        let line = line.unwrap_or_else(|| panic!("no verdict on `{label}`: {}", self.printed));
        line["cause"]["kind"].as_str().unwrap()
    }
}

impl Flake {
    fn new(text: &str) -> Self {
        let flake = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        for name in ["app", "home", "nix"] {
            fs::create_dir(flake.path(name)).unwrap();
        }
        fs::write(flake.path("app/flake.nix"), text).unwrap();
        flake
    }

    /// A flake whose checks for this system are these attributes.
    fn of_checks(checks: &str) -> Self {
        let builder = r#"run = name: script: derivation { inherit name; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" script ]; };"#;
        Self::new(&format!(
            "{{ outputs = {{ self }}: let {builder} in {{ checks.x86_64-linux = {{ {checks} }}; }}; }}"
        ))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, program: &Path, config: &str) -> Command {
        let mut command = with_private_nix(&self.path("nix"), program);
        folders::isolate(&mut command, self.folder.path())
            .current_dir(self.path("app"))
            .env("PATH", PATH)
            .env("NIX_CONFIG", format!("{CONFIG}{config}"));
        command
    }

    fn nix(&self, arguments: &[&str]) -> String {
        let nix = need("nix", "apt-get install nix-bin");
        must(self.command(&nix, "").args(arguments))
    }

    /// Runs `flake-checks` under these further settings of Nix.
    fn checked(&self, config: &str, arguments: &[&str]) -> Checked {
        let lines = self.path("lines");
        let _ = fs::remove_file(&lines);
        let mut command = self.command(&flywheel(), config);
        command.args(["flake-checks", "--flake", "path:.", "--checks", "false"]);
        command.args(["--json-lines", lines.to_str().unwrap()]);
        let output = command.args(arguments).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let lines = fs::read_to_string(lines).unwrap_or_default();
        let lines = lines.lines().map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            let label = line["label"].as_str().unwrap();
            let name = label.strip_prefix("x86_64-linux.").unwrap_or(label);
            (name.to_owned(), line)
        });
        Checked {
            code: output.status.code().unwrap(),
            printed: text(&output.stdout) + &text(&output.stderr),
            lines: lines.collect(),
        }
    }
}

/// The description of a path that no build ever made.
fn narinfo(path: &str, sign: impl FnOnce(&str) -> Option<String>) -> (String, String) {
    let path: StorePath = path.parse().unwrap();
    let nar_hash = Hash::parse(&format!("sha256:{}", "0".repeat(52))).unwrap();
    let signature = sign(&fingerprint(&path, &nar_hash, 120, &[]));
    let name = format!("{}.narinfo", &path.base_name()[..32]);
    let info = NarInfo {
        path,
        url: "nar/none.nar".to_owned(),
        compression: "none".to_owned(),
        file_hash: None,
        file_size: None,
        nar_hash,
        nar_size: 120,
        references: Vec::new(),
        deriver: None,
        signatures: signature.into_iter().collect(),
        ca: None,
    };
    (name, info.to_string())
}

/// A cache claims to have the result of each of these checks, all of which fail.
#[test]
fn a_cache_is_believed_only_with_a_signature_of_a_trusted_key() {
    let names = ["unsigned", "forged", "foreign", "moved", "signed"];
    let checks = names.map(|name| format!("{name} = run \"{name}\" \"exit 1\";"));
    let flake = Flake::of_checks(&checks.concat());
    let outs = flake.nix(&[
        "eval",
        "--json",
        "path:.#checks.x86_64-linux",
        "--apply",
        "c: builtins.mapAttrs (n: d: builtins.unsafeDiscardStringContext d.outPath) c",
    ]);
    let outs: BTreeMap<String, String> = serde_json::from_str(&outs).unwrap();
    let (trusted, impostor, other) = (
        SecretKey::generate("main").unwrap(),
        SecretKey::generate("main").unwrap(),
        SecretKey::generate("other").unwrap(),
    );
    let cache = flake.path("cache");
    fs::create_dir(&cache).unwrap();
    fs::write(cache.join("nix-cache-info"), "StoreDir: /nix/store\n").unwrap();
    for (name, path) in &outs {
        let (file, text) = narinfo(path, |text| match name.as_str() {
            "unsigned" => None,
            "forged" => Some(impostor.sign(text)),
            "foreign" => Some(other.sign(text)),
            "moved" => Some(trusted.sign(&text.replace("-moved;", "-signed;"))),
            _ => Some(trusted.sign(text)),
        });
        fs::write(cache.join(file), text).unwrap();
    }
    let key = format!("trusted-public-keys = {}\n", trusted.public());
    let with = |parameters: &str, more: &str| {
        let url = format!("file://{}{parameters}", cache.display());
        flake.checked(&format!("substituters = {url}\n{key}{more}"), &[])
    };

    let checked = with("", "");
    assert_eq!(checked.code, 1, "{}", checked.printed);
    for name in &names[..4] {
        assert_eq!(checked.kind(name), "build", "{name}: {}", checked.printed);
    }
    assert_eq!(checked.kind("signed"), "already-cached");
    assert!(
        checked
            .printed
            .contains("without a valid signature of a key in `trusted-public-keys`; built instead"),
        "{}",
        checked.printed
    );
    // Without any key nothing is believed, and what the settings choose to take is, by other words.
    let untrusting = format!(
        "substituters = file://{}\ntrusted-public-keys =\n",
        cache.display()
    );
    let checked = flake.checked(&untrusting, &[]);
    assert_eq!(checked.kind("signed"), "build", "{}", checked.printed);
    for checked in [
        with("?trusted=true", ""),
        with("", "require-sigs = false\n"),
    ] {
        assert_eq!(checked.code, 0, "{}", checked.printed);
        for name in &names[..4] {
            assert_eq!(checked.kind(name), "already-cached-unsigned", "{name}");
        }
        assert_eq!(checked.kind("signed"), "already-cached");
    }
}

#[test]
fn only_the_systems_that_are_asked_for_are_touched() {
    let flake = Flake::new(
        r#"{ outputs = { self }: let
      run = system: derivation { name = "x"; inherit system; builder = "/bin/sh"; args = [ "-c" "echo > $out" ]; };
    in { checks = {
      x86_64-linux.ok = run "x86_64-linux";
      aarch64-darwin = throw "no darwin here";
      riscv64-linux = import (run "riscv64-linux");
    }; }; }"#,
    );
    for systems in ["auto", "x86_64-linux"] {
        let checked = flake.checked("", &["--systems", systems]);
        assert_eq!(checked.code, 0, "{}", checked.printed);
        assert_eq!(checked.lines.len(), 1, "{}", checked.printed);
        let others = "the outputs of aarch64-darwin, riscv64-linux";
        assert!(
            checked.printed.contains("not looked at") && checked.printed.contains(others),
            "{}",
            checked.printed
        );
    }
    // Of those that are asked for, a broken one hides no other.
    let checked = flake.checked("", &["--systems", "x86_64-linux aarch64-darwin"]);
    assert_eq!(checked.code, 1, "{}", checked.printed);
    assert_eq!(checked.kind("ok"), "already-in-store");
    assert_eq!(checked.kind("aarch64-darwin"), "evaluation");
    assert!(
        checked
            .printed
            .contains("aarch64-darwin: Does not evaluate: no darwin here"),
        "{}",
        checked.printed
    );
}

#[test]
fn the_reason_of_an_error_comes_before_its_trace() {
    let flake = Flake::new(
        r#"{ outputs = { self }: { checks.x86_64-linux = builtins.foldl' (a: b: a // b) { } [ (throw "the needle") ]; }; }"#,
    );
    let checked = flake.checked("", &[]);
    assert_eq!(checked.code, 1, "{}", checked.printed);
    assert!(
        checked
            .printed
            .contains("the outputs cannot be listed: error: the needle"),
        "{}",
        checked.printed
    );
}

/// A text as a string of Nix's.
fn quoted(text: &str) -> String {
    let text = text.replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{}\"", text.replace('$', "\\$").replace('\n', "\\n"))
}

#[test]
fn the_command_by_hand_works_for_odd_names() {
    let names = [
        "plain",
        "a|b",
        "per%20cent",
        "q?x",
        "^c",
        "c^",
        "c^out",
        "c^*",
        "t`t",
        "über",
        "a b",
        "a.b",
        "a#b",
        "a'b",
        "'a",
        "-a",
        "a$b",
        "a\\b",
        "{a}",
        "[a]",
        "a&b",
        "a=b",
        "a+b",
        "a/b",
        "a:b",
        "a;b",
        "a<b>",
        "a!b",
        "a@b",
        "(a)",
        "a*b",
        "日本",
        "a\"b",
        "a\nb",
        "",
        " ",
        "${x}",
        "$(x)",
        "a%zz",
        "1a",
        "a..b",
        ".",
        "or",
        "/x",
    ];
    let checks: Vec<String> = names
        .iter()
        .map(|name| format!("{} = run \"odd\" \"echo > $out\";", quoted(name)))
        .collect();
    let flake = Flake::of_checks(&checks.concat());
    let checked = flake.checked("", &[]);
    assert_eq!(checked.code, 0, "{}", checked.printed);
    assert_eq!(checked.lines.len(), names.len(), "{}", checked.printed);
    let mut script = String::new();
    for line in checked.lines.values() {
        let command = line["reproduce"].as_str().unwrap();
        let dry = if command.starts_with("nix build ") {
            "--dry-run"
        } else {
            ""
        };
        script.push_str(&format!("{command} {dry} || echo \"failed: $_\"\n"));
    }
    let output = must(
        flake
            .command(Path::new("/bin/bash"), "")
            .args(["-c", &script]),
    );
    assert!(!output.contains("failed:"), "{output}\n{script}");
}

/// Somebody puts the derivation of a check that passes in the place of one that fails.
#[test]
fn a_memory_that_others_may_write_to_is_not_believed() {
    let flake =
        Flake::of_checks("good = run \"good\" \"echo > $out\"; bad = run \"bad\" \"exit 1\";");
    let memory = flake.path("memory");
    let arguments = ["--evaluation-memory-folder", memory.to_str().unwrap()];
    let checked = flake.checked("", &arguments);
    assert_eq!(checked.kind("bad"), "build", "{}", checked.printed);
    let file = fs::read_dir(&memory)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    forge(&file, &|body| hexadecimal(&Sha256::digest(body)));

    fs::set_permissions(&memory, fs::Permissions::from_mode(0o777)).unwrap();
    let checked = flake.checked("", &arguments);
    assert_eq!(
        (checked.code, checked.kind("bad")),
        (1, "build"),
        "{}",
        checked.printed
    );
    assert!(
        checked.printed.contains("is not believed: `") && checked.printed.contains("(mode 0777)"),
        "{}",
        checked.printed
    );
    fs::set_permissions(&memory, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(&file, Some(1), None).unwrap();
    let checked = flake.checked("", &arguments);
    assert_eq!(
        (checked.code, checked.kind("bad")),
        (1, "build"),
        "{}",
        checked.printed
    );
    assert!(
        checked.printed.contains("belongs to another user (id 1)"),
        "{}",
        checked.printed
    );
}

/// Replaces what is remembered of `x86_64-linux.bad` by what is of `x86_64-linux.good`.
pub(super) fn forge(file: &Path, sum: &dyn Fn(&str) -> String) {
    let text = fs::read_to_string(file).unwrap();
    let (_, body) = text.split_once('\n').unwrap();
    let mut body: Value = serde_json::from_str(body).unwrap();
    let good = body["facts"]["x86_64-linux.good"].clone();
    assert!(good["drv"].is_string(), "{body}");
    body["facts"]["x86_64-linux.bad"] = json!(good);
    let body = body.to_string();
    fs::write(file, format!("{}\n{body}", sum(&body))).unwrap();
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
