//! The command line as a whole, through the front door: exit codes, help, version.

use crate::world::{Flywheel, Ran};

/// One flag as the help shows it.
#[derive(Debug)]
pub struct Flag {
    pub name: String,
    text: String,
}

fn flywheel(arguments: &[&str]) -> Ran {
    Flywheel::new(arguments).run()
}

/// Every verb, and every verb's verbs, as arguments: `["cache", "serve"]`.
pub fn verbs() -> Vec<Vec<String>> {
    let mut found = vec![Vec::new()];
    let mut next = 0;
    while next < found.len() {
        let verb: Vec<String> = found[next].clone();
        for name in subcommands(&help(&verb)) {
            found.push([verb.clone(), vec![name]].concat());
        }
        next += 1;
    }
    assert!(found.len() > 5, "{found:?}");
    found
}

pub fn help(verb: &[String]) -> String {
    let arguments: Vec<&str> = verb.iter().map(String::as_str).chain(["--help"]).collect();
    let ran = flywheel(&arguments);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{verb:?}");
    ran.stdout
}

/// The names under `Commands:`.
fn subcommands(help: &str) -> Vec<String> {
    let list = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let names = list
        .take_while(|line| !line.is_empty())
        .filter(|line| !line.starts_with("    "));
    names
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// The flags in a help text: a flag's line, and the lines below it that are further in.
pub fn flags(help: &str) -> Vec<Flag> {
    let mut flags: Vec<Flag> = Vec::new();
    let mut inside = false;
    for line in help.lines() {
        let indent = line.len() - line.trim_start().len();
        if line.trim_start().starts_with('-') && (2..=6).contains(&indent) {
            let name = line
                .split([' ', ',', '<', '['])
                .find(|word| word.starts_with("--"))
                .unwrap_or(line);
            flags.push(Flag {
                name: name.to_owned(),
                text: line.to_owned(),
            });
            inside = true;
        } else if inside && (indent > 6 || line.is_empty()) {
            flags
                .last_mut()
                .unwrap()
                .text
                .push_str(&format!("\n{line}"));
        } else {
            inside = false;
        }
    }
    flags.retain(|flag| !["--help", "--version"].contains(&flag.name.as_str()));
    flags
}

/// What a flag's help lacks: the name of its variable, its default, an example.
fn lacks(verb: &[impl AsRef<str>], flag: &Flag) -> Vec<&'static str> {
    // The help is wrapped to the width of a terminal.
    let text = flag.text.split_whitespace().collect::<Vec<_>>().join(" ");
    let upper = |word: &str| {
        word.trim_start_matches('-')
            .to_uppercase()
            .replace('-', "_")
    };
    // A verb that is no action puts its own name before that of a flag which is too general (`dir`), or all of its words.
    let variables = (0..=verb.len()).map(|words| {
        let words = verb[..words].iter().map(|word| upper(word.as_ref()));
        let words: Vec<String> = words.chain([upper(&flag.name)]).collect();
        words.join("_")
    });
    let variables: Vec<String> = variables.collect();
    let mentions = |words: &[&str]| words.iter().any(|word| text.to_lowercase().contains(word));
    let mut missing = Vec::new();
    // With `=` and its value now, or without where the value may be long.
    let named = |variable: &String| {
        ["=", "]"]
            .iter()
            .any(|end| text.contains(&format!("[env: FLYWHEEL_{variable}{end}")))
    };
    if !variables.iter().any(named) {
        missing.push("its environment variable");
    }
    if !mentions(&["default", "required", "either this or"]) {
        missing.push("its default (or that it is required, or what stands in for it)");
    }
    // clap lists the words where only a few are allowed.
    let lists_words = mentions(&["possible values:"]);
    if text.matches('`').count() < 2 && !lists_words {
        missing.push("an example in backticks");
    }
    missing
}

#[test]
fn help_is_given_behind_a_wrong_value() {
    for call in [
        &["nix-job", "--attic-enabled=bogus", "--help"][..],
        &["cache", "serve", "--level", "99", "-h"],
        &["watch-store", "bogus", "--help"],
    ] {
        let ran = Flywheel::new(call).run();
        assert_eq!(ran.code, 0, "{call:?}: {}", ran.stderr);
        assert!(ran.stdout.contains("Usage: flywheel"), "{call:?}");
    }
    let program = Flywheel::new(&["nix-job", "--attic-enabled=bogus", "--", "x", "--help"]).run();
    assert_eq!(program.code, 64, "the help of another program");
}

#[test]
fn help_reads_like_documentation() {
    let mut complaints = Vec::new();
    for verb in verbs() {
        for flag in flags(&help(&verb)) {
            for what in lacks(&verb, &flag) {
                complaints.push(format!(
                    "flywheel {} {}: the help lacks {what}",
                    verb.join(" "),
                    flag.name
                ));
            }
        }
    }
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

#[test]
fn help_that_lacks_something_is_noticed() {
    let help = "Does it.\n\nUsage: x\n\nOptions:\n      --good <URL>\n          The server, such as `https://x/`\n\n          \
                [env: FLYWHEEL_GOOD=]\n          [default: none]\n\n      --bad\n          Does something\n\n  -h, --help\n          \
                Print help\n\nExamples:\n  flywheel x --bad\n";
    let flags = flags(help);
    let found: Vec<_> = flags
        .iter()
        .map(|flag| (flag.name.as_str(), lacks(&["x"], flag).len()))
        .collect();
    assert_eq!(found, [("--good", 0), ("--bad", 3)]);
}

#[test]
fn every_verb_says_what_it_is_for() {
    for verb in verbs() {
        let help = help(&verb);
        let first = help.lines().next().unwrap_or_default();
        let describes =
            first.len() > 20 && !first.starts_with("Usage") && !first.starts_with("What `");
        assert!(describes, "flywheel {}: {help}", verb.join(" "));
        let secrets = ["--token", "--password", "--secret"];
        let leaky = flags(&help)
            .into_iter()
            .find(|flag| secrets.contains(&flag.name.as_str()));
        assert!(
            leaky.is_none(),
            "an argument can be read by every process: {leaky:?}"
        );
    }
}

#[test]
fn every_help_shows_an_example_and_the_exit_codes_of_the_reference() {
    let page = crate::house::source::file("docs/reference.md").text;
    let (_, table) = page.split_once("## Exit codes").unwrap();
    let rows = table.lines().skip_while(|line| !line.starts_with("|--"));
    let rows = rows.skip(1).take_while(|line| !line.is_empty());
    let rows: Vec<String> = rows
        .map(|row| row.trim_matches(['|', ' ']).replace(" | ", " "))
        .collect();
    assert!(rows.len() >= 6, "{rows:?}");
    for verb in verbs() {
        let help = help(&verb).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(help.contains("Example"), "{verb:?} has no example");
        let (_, codes) = help.split_once("Exit codes: ").expect("exit codes");
        for row in &rows {
            assert!(
                codes.contains(row.as_str()),
                "{verb:?} lacks {row:?}: {codes}"
            );
        }
    }
}

#[test]
fn a_message_names_an_input_as_it_is_given_where_it_is_read() {
    let wrong = |run: Flywheel| {
        let ran = run.run();
        assert_eq!(ran.code, 64, "{}{}", ran.stdout, ran.stderr);
        format!("{}{}", ran.stdout, ran.stderr)
    };
    let call = ["nix-job", "--push-cache", "x", "--", "true"];
    for (run, named) in [
        (Flywheel::new(&call), "flywheel: `--push-cache` must be"),
        (
            Flywheel::new(&["nix-job"]).env("FLYWHEEL_PUSH_CACHE", "x"),
            "flywheel: `FLYWHEEL_PUSH_CACHE` must be",
        ),
        (
            Flywheel::new(&["nix-job"]),
            "help: Give the command to run, such as `--command 'nix build .#default'`.",
        ),
        (
            Flywheel::new(&["nix-job"]).env("GITLAB_CI", "true"),
            "such as `FLYWHEEL_COMMAND=nix build .#default`.",
        ),
        (
            Flywheel::in_job(&call),
            "flywheel::input `push-cache` must be",
        ),
        (
            Flywheel::in_job(&["nix-job"]),
            "such as `command: nix build .#default`.",
        ),
    ] {
        let text = wrong(run);
        assert!(text.contains(named), "{named}: {text}");
    }
}

#[test]
fn help_and_version_are_no_failures() {
    for arguments in [["--help"], ["-h"], ["--version"], ["-V"]] {
        let ran = flywheel(&arguments);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{arguments:?}");
    }
    assert_eq!(
        flywheel(&["--version"]).stdout,
        concat!("flywheel ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn help_and_version_are_understood_as_words() {
    for (words, flags) in [
        (&["help"][..], &["--help"][..]),
        (&["help", "nix-job"], &["nix-job", "--help"]),
        (&["help", "cache", "serve"], &["cache", "serve", "--help"]),
        (&["version"], &["--version"]),
    ] {
        let ran = flywheel(words);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{words:?}");
        assert_eq!(ran.stdout, flywheel(flags).stdout, "{words:?}");
    }
    for words in [&["help", "nix-jab"][..], &["help", "nix-job", "true"]] {
        let ran = flywheel(words);
        assert_eq!((ran.code, ran.stdout.as_str()), (64, ""), "{words:?}");
        let wrong = format!("there is no verb `{}`", words[words.len() - 1]);
        assert!(ran.stderr.contains(&wrong), "{}", ran.stderr);
    }
}

#[test]
fn a_wrong_command_line_is_64_and_says_what_was_meant() {
    for (arguments, word) in [
        (&["nix-job", "--hlep"][..], "'--help'"),
        (&["nix-jab"], "'nix-job'"),
        (&["nix-jab", "--help"], "'nix-job'"),
        (&["explian"], "'explain'"),
        (&["nix-job", "--push-cahce", "auto"], "'--push-cache'"),
        (&[], "Usage: flywheel"),
    ] {
        let ran = flywheel(arguments);
        assert_eq!((ran.code, ran.stdout.as_str()), (64, ""), "{arguments:?}");
        assert!(ran.stderr.contains(word), "{arguments:?}: {}", ran.stderr);
    }
}

#[test]
fn a_wrong_command_line_touches_nothing() {
    let run =
        Flywheel::in_job(&["nix-job", "--hlep"]).env("ATTIC_TOKEN", crate::world::PLANTED_TOKEN);
    let ran = run.run();
    assert_eq!(ran.code, 64);
    for file in [
        "GITHUB_OUTPUT",
        "GITHUB_ENV",
        "GITHUB_PATH",
        "GITHUB_STEP_SUMMARY",
    ] {
        assert_eq!(run.read(file), "", "{file}");
    }
    for folder in ["home", "tmp", "runner-temp"] {
        assert_eq!(
            std::fs::read_dir(run.path(folder)).unwrap().count(),
            0,
            "{folder}"
        );
    }
}

#[test]
fn an_empty_value_counts_as_not_given() {
    let explain = |arguments: &[&str], value: &str| {
        let run = Flywheel::in_job(&[&["explain"], arguments].concat());
        run.env("FLYWHEEL_PUSH_CACHE", value).run()
    };
    for (arguments, value) in [
        (&["--require-publish", ""][..], ""),
        (&["--require-publish="], " \n"),
        // A flag goes before its variable even where it is empty.
        (&["--push-cache", " "], "nonsense"),
    ] {
        let ran = explain(arguments, value);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{arguments:?}");
    }
    let ran = explain(&[], "nonsense");
    assert_eq!(ran.code, 64);
    assert!(
        ran.stdout
            .starts_with("::error title=flywheel::input `push-cache` must be `auto`, `true` or `false`, not `nonsense`"),
        "{}",
        ran.stdout
    );
    let help = explain(&["--help"], "").stdout;
    assert!(help.contains("[env: FLYWHEEL_PUSH_CACHE]"), "{help}");
}

#[test]
fn a_value_that_may_hold_a_secret_is_not_quoted() {
    let secret = crate::world::PLANTED_TOKEN;
    let with_password = format!("https://user:{secret}@host.example/");
    let not_whole = format!("https://user:{secret}@host example/");
    for (arguments, value) in [
        (&["nix-job", "--attic-server"][..], &with_password),
        (&["nix-job", "--attic-server"], &not_whole),
        (&["nix-job", "--attic-public-key"], &secret.to_owned()),
        (&["nix-job", "--cache"], &with_password),
        (&["nix-job", "--cache"], &not_whole),
        (&["setup", "--bazel-remote-cache"], &with_password),
        (&["validate-builders", "--pushgateway"], &not_whole),
    ] {
        // The run itself checks that the planted secret is in nothing that it wrote.
        let ran = Flywheel::in_job(&[arguments, &[value]].concat()).run();
        assert_eq!(ran.code, 64, "{arguments:?}: {}", ran.stdout);
    }
}

/// Inputs whose values can carry a password, in every form that a URL has one.
#[test]
fn no_password_of_a_value_stands_in_help_or_errors() {
    let secret = crate::world::PLANTED_TOKEN;
    let urls = [
        format!("https://me:{secret}@cache.example/"),
        format!("s3://bucket?endpoint=https://me:{secret}@s3.example"),
        format!("s3://bucket?endpoint=me:{secret}@s3.example"),
        format!("s3://bucket?endpoint=https%3A%2F%2Fme%3A{secret}%40s3.example"),
        format!("s3:/me:{secret}@bucket"),
        format!("me:{secret}@cache.example"),
        format!("grpcs://me:{secret}@bazel.example:8980"),
        format!("ssh-ng://me:{secret}@host"),
    ];
    let names = [
        "FLYWHEEL_CACHE",
        "FLYWHEEL_ATTIC_SERVER",
        "FLYWHEEL_BAZEL_CACHE",
        "FLYWHEEL_ENDPOINT",
        "FLYWHEEL_GATEWAY",
        "FLYWHEEL_FLAKE",
        "FLYWHEEL_EXTRA_NIX_CONFIG",
        "ATTIC_SERVER",
        "BAZEL_REMOTE_CACHE",
        "NIX_CONFIG",
    ];
    for verb in [
        "nix-job",
        "flake-checks",
        "publish",
        "explain",
        "validate-builders",
        "cache-contract",
        "setup",
    ] {
        let help = Flywheel::new(&[verb, "--help"]);
        let help = names.iter().fold(help, |run, name| run.env(name, &urls[1]));
        // `run` looks for the secret in all that was printed.
        assert_eq!(help.run().code, 0, "{verb}");
    }
    for url in &urls {
        for flag in ["cache", "attic-server"] {
            let flag = format!("--{flag}={url}");
            let ran = Flywheel::in_job(&["nix-job", &flag, "--", "true"]).run();
            assert_eq!(ran.code, 64, "{flag}: {}", ran.stdout);
        }
    }
}
