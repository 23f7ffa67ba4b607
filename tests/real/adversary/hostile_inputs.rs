//! Inputs of every verb with values that nobody should give. A verb refuses them with 64, or goes on; it never panics,
//! never hangs, prints no password and no workflow command or control character of the value.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::{Attack, Trial};
use crate::world::{flywheel, folders, processes};

/// A verb that has no work ends within this time.
const LIMIT: Duration = Duration::from_secs(20);
const PASSWORD: &str = "planted-pass-word-1";
/// These serve until they are stopped, or run what they are given.
const LEFT_OUT: [&str; 2] = ["cache serve", "cache"];
/// These name what is run or waited for; a hostile value of them is no input that must be refused.
const WORK: [&str; 3] = ["command", "stop-after", "listen"];

/// Each verb with its flags.
fn verbs() -> Vec<(String, Vec<String>)> {
    let output = Command::new(flywheel())
        .args(["reference", "--format", "json"])
        .output()
        .unwrap();
    let verbs: Value = serde_json::from_slice(&output.stdout).unwrap();
    let verbs = verbs.as_array().unwrap().iter().map(|verb| {
        let inputs = verb["inputs"].as_array().unwrap().iter();
        let flags = inputs.filter(|input| input["is_flag"] == true);
        let names = flags.map(|input| input["name"].as_str().unwrap().to_owned());
        let names = names
            .filter(|name| !WORK.contains(&name.as_str()))
            .collect();
        (verb["name"].as_str().unwrap().to_owned(), names)
    });
    verbs
        .filter(|(name, flags): &(String, Vec<String>)| {
            !LEFT_OUT.contains(&name.as_str()) && !flags.is_empty()
        })
        .collect()
}

fn hostile(trial: &mut Trial) -> OsString {
    let texts = [
        "".to_owned(),
        " ".to_owned(),
        "-1".to_owned(),
        "--".to_owned(),
        "18446744073709551616".to_owned(),
        "1e309".to_owned(),
        "${HOME}".to_owned(),
        "a\nb".to_owned(),
        "\r\n::error::obeyed".to_owned(),
        "::add-mask::obeyed".to_owned(),
        "x\u{1b}[2Jx".to_owned(),
        "x\u{202e}x\u{200b}x\u{9b}2J".to_owned(),
        "a".repeat(100_000),
        "{\"a\":[".repeat(500),
        "/nix/store/../../etc/shadow".to_owned(),
        "/proc/self/environ".to_owned(),
        "/dev/null/x".to_owned(),
        format!("https://user:{PASSWORD}@127.0.0.1:1/a b"),
        format!("s3://bucket?endpoint=http://user:{PASSWORD}@127.0.0.1:1&region=x"),
        format!("http://user:{PASSWORD}@[::1/"),
        "é́".repeat(300),
    ];
    if trial.random.u8(..) < 16 {
        let bytes = (0..20).map(|_| trial.random.u8(1..)).collect();
        return OsString::from_vec(bytes);
    }
    trial.pick(&texts).into()
}

fn run(
    verb: &str,
    flags: &[(String, OsString)],
    trial: &mut Trial,
) -> (ExitStatus, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(flywheel());
    command.args(verb.split(' '));
    folders::isolate(&mut command, folder.path()).current_dir(folder.path());
    // No tool is found, so that a verb whose inputs are taken has nothing to work with.
    command.env("PATH", folder.path());
    for (name, value) in flags {
        if trial.random.bool() || value.is_empty() {
            let mut flag = OsString::from(format!("--{name}="));
            flag.push(value);
            command.arg(flag);
        } else {
            let variable = name.to_uppercase().replace('-', "_");
            command.env(format!("FLYWHEEL_{variable}"), value);
        }
    }
    let words = format!("{}: {command:?}", trial.seed);
    // A file takes any amount while nobody reads.
    let printed = tempfile::NamedTempFile::new().unwrap();
    let file = printed.reopen().unwrap();
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file);
    let mut child = command.spawn().unwrap();
    let ended = processes::ended(&mut child, LIMIT);
    let status = ended.unwrap_or_else(|| panic!("it did not end: {words}"));
    let text = std::fs::read(printed.path()).unwrap();
    (status, String::from_utf8_lossy(&text).into_owned(), words)
}

#[test]
fn no_value_of_an_input_makes_a_verb_panic_hang_or_print_it_raw() {
    let verbs = verbs();
    assert!(verbs.len() > 8, "{verbs:?}");
    let mut attack = Attack::begin("hostile inputs");
    while let Some(mut trial) = attack.next() {
        let (verb, flags) = trial.pick(&verbs);
        let given: Vec<(String, OsString)> = (0..trial.random.usize(1..=3))
            .map(|_| (trial.pick(flags).clone(), hostile(&mut trial)))
            .collect();
        let (status, text, words) = run(verb, &given, &mut trial);
        let what = format!("{words}\n{text}");
        let code = status.code();
        assert!(
            code.is_some_and(|code| code != 70 && code != 101),
            "{code:?}: {what}"
        );
        assert!(!text.contains(PASSWORD), "a password: {what}");
        let is_raw = |c: char| c == '\u{1b}' || c == '\u{202e}' || c == '\u{9b}';
        assert!(!text.contains(is_raw), "a control character: {what}");
        let obeyed = text
            .lines()
            .any(|line| line.trim_start().starts_with("::add-mask::obeyed"));
        assert!(
            !obeyed && !text.contains("\n::error::obeyed"),
            "a command: {what}"
        );
        attack.count(match code {
            Some(64) => "refused".to_owned(),
            Some(0) => "taken".to_owned(),
            code => format!("ended with {}", code.unwrap_or(-1)),
        });
    }
    attack.report();
}
