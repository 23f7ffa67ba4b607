//! `flake-checks` as a person runs it: what makes a verdict believed, what one broken system means for the others, the
//! reason of an error, and the command that does the same.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::world::versions::{Ran, VERSIONS, run};
use crate::world::{PATH, flywheel, folders, must, need, with_private_nix};
use flywheel_nix::hash::Sha256 as Hash;
use flywheel_nix::key::SecretKey;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::fingerprint;
use flywheel_nix::store_path::StorePath;

const CONFIG: &str = "experimental-features = nix-command flakes\nsandbox = false\nbuild-users-group =\nsubstituters =";

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
        let builder = r#"run = name: script: derivation { inherit name; system = "x86_64-linux"; builder = "/bin/bash"; args = [ "-c" script ]; };"#;
        Self::new(&format!(
            "{{ outputs = {{ self }}: let {builder} in {{ checks.x86_64-linux = {{ {checks} }}; }}; }}"
        ))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = with_private_nix(&self.path("nix"), program);
        folders::isolate(&mut command, self.folder.path())
            .current_dir(self.path("app"))
            .env("PATH", PATH)
            .env("NIX_CONFIG", CONFIG);
        command
    }

    fn nix(&self, arguments: &[&str]) -> String {
        let nix = need("nix", "apt-get install nix-bin");
        must(self.command(&nix).args(arguments))
    }

    /// Runs `flake-checks`.
    fn checked(&self, arguments: &[&str]) -> Checked {
        let lines = self.path("lines");
        let _ = fs::remove_file(&lines);
        let mut command = self.command(&flywheel());
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

/// Lines of bash that write a file.
fn write(name: &str, text: &str) -> String {
    format!("cat > '{name}' <<'END OF FILE'\n{text}\nEND OF FILE\n")
}

/// Lines of bash that run `flake-checks` on the flake of this folder, with further arguments. Its exit code and the file
/// of its verdicts are below `/out` by this name.
fn check(name: &str, arguments: &str) -> String {
    format!(
        "/fly/flywheel flake-checks --flake path:. --checks false --json-lines /out/{name} {arguments}\necho $? > /out/{name}-code\n"
    )
}

/// The exit code of a check of this name, and the kind of each verdict by label.
fn kinds(ran: &Ran, name: &str) -> (String, BTreeMap<String, String>) {
    let text = ran.file(name);
    let lines = text.lines().map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        (
            text(&line["label"]).replace("x86_64-linux.", ""),
            text(&line["cause"]["kind"]),
        )
    });
    let code = ran.file(&format!("{name}-code")).trim().to_owned();
    (code, lines.collect())
}

#[track_caller]
fn assert_kinds(ran: &Ran, name: &str, code: &str, wanted: &[(&str, &str)]) {
    let wanted: BTreeMap<String, String> = wanted
        .iter()
        .map(|(label, kind)| ((*label).to_owned(), (*kind).to_owned()))
        .collect();
    assert_eq!(
        kinds(ran, name),
        (code.to_owned(), wanted),
        "{name}\n{}",
        ran.log
    );
}

/// A cache claims to have the result of each of these checks, all of which fail.
#[test]
fn a_cache_is_believed_only_with_a_signature_of_a_trusted_key() {
    let names = ["forged", "foreign", "moved", "signed", "unsigned"];
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
    let mut script = write(
        "flake.nix",
        &fs::read_to_string(flake.path("app/flake.nix")).unwrap(),
    );
    script.push_str("mkdir /root/cache\n");
    script.push_str(&write("/root/cache/nix-cache-info", "StoreDir: /nix/store"));
    for (name, path) in &outs {
        let (file, text) = narinfo(path, |text| match name.as_str() {
            "unsigned" => None,
            "forged" => Some(impostor.sign(text)),
            "foreign" => Some(other.sign(text)),
            "moved" => Some(trusted.sign(&text.replace("-moved;", "-signed;"))),
            _ => Some(trusted.sign(text)),
        });
        script.push_str(&write(
            &format!("/root/cache/{file}"),
            // Nix takes neither an empty line nor a field without the space behind its name.
            text.trim_end_matches('\n'),
        ));
    }
    let key = format!("trusted-public-keys = {}", trusted.public());
    for (name, parameters, more) in [
        ("with-key", "", key.as_str()),
        ("without-key", "", "trusted-public-keys ="),
        ("trusted", "?trusted=true", &key),
        ("careless", "", &format!("{key}\nrequire-sigs = false")),
    ] {
        let config = format!("substituters = file:///root/cache{parameters}\n{more}");
        script.push_str(&format!(
            "NIX_CONFIG=\"$BASE\n{config}\"\n{}",
            check(name, "")
        ));
    }
    let script = format!("BASE=$NIX_CONFIG\n{script}");

    let failed = names.map(|name| (name, "build"));
    let unsigned = names.map(|name| (name, "already-cached-unsigned"));
    let but_signed = |kinds: [(&'static str, &'static str); 5]| {
        kinds.map(|(name, kind)| match name {
            "signed" => (name, "already-cached"),
            _ => (name, kind),
        })
    };
    for version in VERSIONS {
        let ran = run(version, &script);
        assert_kinds(&ran, "with-key", "1", &but_signed(failed));
        assert_kinds(&ran, "without-key", "1", &failed);
        assert_kinds(&ran, "trusted", "0", &but_signed(unsigned));
        assert_kinds(&ran, "careless", "0", &but_signed(unsigned));
        let words = "without a valid signature of a key in `trusted-public-keys`; built instead";
        assert!(ran.log.contains(words), "{version}: {}", ran.log);
    }
}

#[test]
fn only_the_systems_that_are_asked_for_are_touched() {
    let flake = r#"{ outputs = { self }: let
      run = system: derivation { name = "x"; inherit system; builder = "/bin/bash"; args = [ "-c" "echo > $out" ]; };
    in { checks = {
      x86_64-linux.ok = run "x86_64-linux";
      aarch64-darwin = throw "no darwin here";
      riscv64-linux = import (run "riscv64-linux");
    }; }; }"#;
    let script = [
        write("flake.nix", flake),
        check("auto", ""),
        check("one", "--systems x86_64-linux"),
        // Of those that are asked for, a broken one hides no other.
        check("two", "--systems 'x86_64-linux aarch64-darwin'"),
    ];
    for version in VERSIONS {
        let ran = run(version, &script.concat());
        assert_kinds(&ran, "auto", "0", &[("ok", "built")]);
        assert_kinds(&ran, "one", "0", &[("ok", "already-in-store")]);
        let both = [("ok", "already-in-store"), ("aarch64-darwin", "evaluation")];
        assert_kinds(&ran, "two", "1", &both);
        for words in [
            "not looked at, because `systems` does not ask for them: the outputs of aarch64-darwin, riscv64-linux",
            "aarch64-darwin: Does not evaluate: no darwin here",
        ] {
            assert!(ran.log.contains(words), "{version}: {words}\n{}", ran.log);
        }
    }
}

#[test]
fn what_is_called_like_a_system_is_told_from_one() {
    let flake = r#"{ outputs = { self }: let
      run = script: derivation { name = "x"; system = "x86_64-linux"; builder = "/bin/bash"; args = [ "-c" script ]; };
      ok = run "echo > $out";
      bad = run "exit 1";
    in {
      checks.x86_64-linux = { app-linux = bad; aarch64-linux = bad; };
      ci = { app-linux = bad; app-windows = bad; };
      packages = { x86_64-linux = { inherit ok; }; javascript-ghcjs = { }; x86_64-genode.none = throw "not asked for"; };
      formatter = { x86_64-linux = ok; aarch64-darwin = throw "no darwin here"; };
    }; }"#;
    let script = [
        write("flake.nix", flake),
        check("checks", ""),
        check("of-system", "--flake-attr checks.x86_64-linux"),
        check("ci", "--flake-attr ci"),
        check("packages", "--flake-attr packages"),
        check("formatter", "--flake-attr formatter"),
    ];
    for version in VERSIONS {
        let ran = run(version, &script.concat());
        let cross = [("app-linux", "build"), ("aarch64-linux", "build")];
        assert_kinds(&ran, "checks", "1", &cross);
        assert_kinds(&ran, "of-system", "1", &cross);
        assert_kinds(
            &ran,
            "ci",
            "1",
            &[("app-linux", "build"), ("app-windows", "build")],
        );
        assert_kinds(&ran, "packages", "0", &[("ok", "built")]);
        assert_kinds(
            &ran,
            "formatter",
            "0",
            &[("x86_64-linux", "already-in-store")],
        );
    }
}

#[test]
fn the_reason_of_an_error_comes_before_its_trace() {
    let listed = r#"{ outputs = { self }: { checks.x86_64-linux = builtins.foldl' (a: b: a // b) { } [ (throw "the needle") ]; }; }"#;
    let one = r#"{ outputs = { self }: { checks.x86_64-linux.a = derivation {
      name = "a"; system = "x86_64-linux"; builder = "/bin/bash"; args = [ (throw "the pin") ];
    }; }; }"#;
    let syntax = "{ outputs = { self }: the-fork; }";
    let script = [listed, one, syntax].map(|flake| write("flake.nix", flake) + &check("lines", ""));
    for version in VERSIONS {
        let ran = run(version, &script.concat());
        for words in [
            "the outputs cannot be listed: error: the needle",
            "x86_64-linux.a: Does not evaluate: the pin",
            "failed: undefined variable 'the-fork'",
        ] {
            assert!(ran.log.contains(words), "{version}: {words}\n{}", ran.log);
        }
        let text = error_text(&ran);
        assert!(text.starts_with("error: the pin"), "{version}: {text}");
    }
}

/// The text of the only verdict's cause.
fn error_text(ran: &Ran) -> String {
    let line = ran.line("x86_64-linux.a");
    line["cause"]["text"].as_str().unwrap().to_owned()
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
    let checked = flake.checked(&[]);
    assert_eq!(checked.code, 0, "{}", checked.printed);
    assert_eq!(checked.lines.len(), names.len(), "{}", checked.printed);
    let text = fs::read_to_string(flake.path("app/flake.nix")).unwrap();
    let mut script = write("flake.nix", &text);
    for line in checked.lines.values() {
        let command = line["reproduce"].as_str().unwrap();
        let dry = if command.starts_with("nix build ") {
            "--dry-run"
        } else {
            ""
        };
        script.push_str(&format!(
            "{command} {dry} || echo \"failed: {}\"\n",
            line["label"]
                .to_string()
                .replace(['"', '`', '$', '\\'], "_")
        ));
    }
    for version in VERSIONS {
        let ran = run(version, &script);
        assert!(!ran.log.contains("failed:"), "{version}: {}", ran.log);
    }
}

/// Somebody puts the derivation of a check that passes in the place of one that fails.
#[test]
fn a_memory_that_others_may_write_to_is_not_believed() {
    let flake =
        Flake::of_checks("good = run \"good\" \"echo > $out\"; bad = run \"bad\" \"exit 1\";");
    let memory = flake.path("memory");
    let arguments = ["--evaluation-memory-folder", memory.to_str().unwrap()];
    let checked = flake.checked(&arguments);
    assert_eq!(checked.kind("bad"), "build", "{}", checked.printed);
    let file = fs::read_dir(&memory)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .path();
    forge(&file, &|body| hexadecimal(&Sha256::digest(body)));

    fs::set_permissions(&memory, fs::Permissions::from_mode(0o777)).unwrap();
    let checked = flake.checked(&arguments);
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
    let checked = flake.checked(&arguments);
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
