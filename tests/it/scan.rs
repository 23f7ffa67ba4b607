//! `flywheel scan` through the front door.

use serde_json::Value;

use crate::world::{Flywheel, PLANTED_TOKEN};

fn folder(run: &Flywheel, files: &[(&str, &str)]) -> String {
    let folder = run.path("out");
    std::fs::create_dir_all(&folder).unwrap();
    for (name, text) in files {
        std::fs::write(folder.join(name), text).unwrap();
    }
    folder.display().to_string()
}

#[test]
fn a_secret_is_named_by_its_place_and_never_said() {
    // The harness looks for the other one in every file, and here it may stand in one.
    let secret = "x7Rk2Lm9Qs4Tv6Wz";
    let run = Flywheel::new(&["scan", "out"]).env("DEPLOY_TOKEN", secret);
    folder(
        &run,
        &[
            ("clean", "nothing"),
            ("config", &format!("token={secret}\n")),
        ],
    );
    let ran = run.run();
    assert_eq!(ran.code, 1, "{}{}", ran.stdout, ran.stderr);
    let printed = format!("{}{}", ran.stdout, ran.stderr);
    assert!(
        printed.contains("secret: the value of `DEPLOY_TOKEN` as it is in `config`, at byte 6"),
        "{printed}"
    );
    assert!(
        printed.contains("1 finding in 1 path") && !printed.contains(secret),
        "{printed}"
    );
}

#[test]
fn what_is_clean_is_clean() {
    let run = Flywheel::new(&["scan", "out"]).env("DEPLOY_TOKEN", PLANTED_TOKEN);
    folder(&run, &[("clean", "nothing at all")]);
    let ran = run.run();
    assert_eq!(
        (ran.code, ran.stdout.contains("0 findings in 1 path")),
        (0, true),
        "{}{}",
        ran.stdout,
        ran.stderr
    );
}

#[test]
fn exceptions_and_modes_are_obeyed_and_json_says_it_all() {
    let place = "/opt/runner/work/app";
    for (arguments, code, findings) in [
        (&[][..], 1, 1),
        (&["--policy", "machine-path = warn"], 0, 1),
        (&["--policy", "machine-path = off"], 0, 0),
        (
            &["--policy-allow", "machine-path out it is meant to be"],
            0,
            0,
        ),
        (
            &["--policy-allow", "machine-path other it is meant to be"],
            1,
            1,
        ),
    ] {
        let arguments = [&["scan", "out", "--format", "json"], arguments].concat();
        let run = Flywheel::new(&arguments).env("GITHUB_WORKSPACE", place);
        folder(&run, &[("script", &format!("cd {place}/src"))]);
        let ran = run.run();
        let report: Value = serde_json::from_str(&ran.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", ran.stdout));
        let found = report["findings"].as_array().unwrap();
        assert_eq!(
            (ran.code, found.len()),
            (code, findings),
            "{arguments:?}: {report}"
        );
        if let Some(one) = found.first() {
            assert_eq!(
                (one["rule"].as_str(), one["file"].as_str()),
                (Some("machine-path"), Some("script"))
            );
            assert_eq!(
                (one["offset"].as_u64(), one["withheld"].as_bool()),
                (Some(3), Some(code == 1))
            );
        }
    }
}

#[test]
fn wrong_input_is_64_and_says_what_was_meant() {
    for (arguments, message) in [
        (["--policy", "secrets = off"], "Did you mean `secret`?"),
        (["--policy-allow", "secret x"], "without a reason"),
        (["--policy-allow-file", "nowhere.txt"], "`nowhere.txt`"),
        (["--on-finding", "fial"], "Did you mean `fail`?"),
        (["--format", "xml"], "format"),
    ] {
        let ran = Flywheel::new(&["scan", ".", arguments[0], arguments[1]]).run();
        let printed = format!("{}{}", ran.stdout, ran.stderr);
        assert!(
            ran.code == 64 && printed.contains(message),
            "{arguments:?}: {} {printed}",
            ran.code
        );
    }
    let ran = Flywheel::new(&["scan", "nowhere"]).run();
    assert!(
        ran.code == 64 && ran.stderr.contains("`nowhere`, which cannot be found"),
        "{} {}",
        ran.code,
        ran.stderr
    );
}
