//! The house rules, held by machine. Each rule is a function from files to complaints; each test shows
//! that the repository gives none, and that a file which breaks the rule gives one.

mod actions;
mod folders;
mod layers;
pub mod source;

use source::{Source, file, files};

/// Lines of code in one file; CONTRIBUTING asks for half of it.
const LINES: usize = 600;

/// The sources of the program: those of the binary and those of every crate.
fn product() -> Vec<Source> {
    [files("src", ".rs"), files("crates", ".rs")].concat()
}

/// Panics with every complaint about the repository, or if the planted file gives none.
pub fn hold(rule: impl Fn(&[Source]) -> Vec<String>, mut real: Vec<Source>, planted: &[Source]) {
    let complaints = rule(&real);
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
    for broken in planted {
        real.push(broken.clone());
        let complaints = rule(&real);
        real.pop();
        assert!(
            !complaints.is_empty(),
            "no complaint about {}:\n{}",
            broken.name,
            broken.text
        );
    }
}

/// Complaints about lines of product code, one for each file and pattern that `allowed` does not let pass.
fn banned(
    files: &[Source],
    patterns: &[&str],
    allowed: impl Fn(&Source) -> bool,
    why: &str,
) -> Vec<String> {
    let mut complaints = Vec::new();
    for file in files.iter().filter(|file| !allowed(file)) {
        let code = file.product_code();
        for pattern in patterns.iter().filter(|pattern| holds_word(&code, pattern)) {
            complaints.push(format!("{}: `{pattern}`: {why}", file.name));
        }
    }
    complaints
}

/// Whether `pattern` stands in `code` and is not the end or the beginning of a longer word.
fn holds_word(code: &str, pattern: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(pattern).any(|(at, _)| {
        let after = &code[at + pattern.len()..];
        let open_end = !pattern.ends_with(part_of_word) || !after.starts_with(part_of_word);
        open_end && !code[..at].ends_with(part_of_word)
    })
}

#[test]
fn every_file_says_first_what_it_owns() {
    let rule = |files: &[Source]| {
        let mute = files.iter().filter(|file| !file.text.starts_with("//! "));
        mute.map(|file| format!("{}: does not begin with `//!`", file.name))
            .collect()
    };
    let real = [product(), files("tests", ".rs")].concat();
    hold(rule, real, &[Source::planted("src/x.rs", "use std::fs;")]);
}

#[test]
fn every_file_can_be_read_in_one_sitting() {
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        for file in files {
            let lines = file
                .code()
                .lines()
                .filter(|line| !line.trim().is_empty())
                .count();
            if lines > LINES {
                complaints.push(format!(
                    "{}: {lines} lines of code, {LINES} at most",
                    file.name
                ));
            }
        }
        complaints
    };
    let real = [product(), files("tests", ".rs")].concat();
    hold(
        rule,
        real,
        &[Source::planted("src/x.rs", &"f();\n".repeat(LINES + 1))],
    );
}

#[test]
fn only_runner_reads_the_environment() {
    let why = "only `runner/` reads the environment; take `Env` from the caller";
    let rule = |files: &[Source]| {
        banned(
            files,
            &["std::env", "option_env!"],
            |file| file.is_of("crates/sys/src/runner"),
            why,
        )
    };
    let planted = Source::planted("src/nix/x.rs", "fn f() { std::env::var(\"HOME\"); }");
    hold(
        rule,
        product(),
        &[planted, Source::planted("src/x.rs", "use std::env;")],
    );
}

#[test]
fn only_process_starts_children() {
    let why = "only `process/` starts children; use `process::capture::Tool`";
    let patterns = ["Command::new", "process::Command", "execv", "fork("];
    let rule = |files: &[Source]| {
        banned(
            files,
            &patterns,
            |file| file.is_of("crates/sys/src/process"),
            why,
        )
    };
    let planted = Source::planted("src/nix/x.rs", "fn f() { Command::new(\"nix\").spawn(); }");
    hold(
        rule,
        product(),
        &[
            planted,
            Source::planted("src/x.rs", "use tokio::process::Command;"),
        ],
    );
}

#[test]
fn only_runner_and_verbs_print() {
    let why =
        "stdout is for data and workflow commands; send `Progress`, or ask `runner::workflow`";
    let patterns = ["println!", "print!", "eprintln!", "eprint!"];
    let allowed = |file: &Source| file.is_of("crates/sys/src/runner") || file.is_of("src/command");
    let rule = |files: &[Source]| banned(files, &patterns, allowed, why);
    hold(
        rule,
        product(),
        &[Source::planted(
            "src/cache/x.rs",
            "fn f() { println!(\"hello\"); }",
        )],
    );
}

#[test]
fn only_http_looks_names_up() {
    let why = "getaddrinfo crashes a static binary; `http` has the resolver";
    let patterns = [
        "ToSocketAddrs",
        "to_socket_addrs",
        "lookup_host",
        "getaddrinfo",
        "GaiResolver",
    ];
    let rule = |files: &[Source]| banned(files, &patterns, |_| false, why);
    hold(
        rule,
        product(),
        &[Source::planted("src/x.rs", "use std::net::ToSocketAddrs;")],
    );
}

#[test]
fn the_trust_gate_is_pure() {
    let why = "the gate has no I/O, no async, no clock, no secret";
    let patterns = [
        "async",
        "await",
        "tokio",
        "std::fs",
        "std::io",
        "std::net",
        "std::env",
        "Instant",
        "SystemTime",
        "Secret",
        "File",
        "reqwest",
    ];
    let rule = |files: &[Source]| {
        banned(
            files,
            &patterns,
            |file| !file.is_of("crates/core/src/trust"),
            why,
        )
    };
    let planted = [
        Source::planted("crates/core/src/trust.rs", "fn judge(token: &Secret) {}"),
        Source::planted("crates/core/src/trust/refs.rs", "async fn f() {}"),
        Source::planted("crates/core/src/trust.rs", "use std::fs;"),
    ];
    hold(rule, product(), &planted);
}

#[test]
fn no_caller_is_named_in_the_program() {
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        for file in files {
            let text = file.text.to_lowercase();
            for name in [
                "tinyland",
                "gloriousflywheel",
                "linux-xr",
                "gh-nix",
                "gh-docker",
                "gh-dind",
            ] {
                if text.contains(name) {
                    complaints.push(format!(
                        "{}: names `{name}`; it belongs in an example",
                        file.name
                    ));
                }
            }
        }
        complaints
    };
    hold(
        rule,
        product(),
        &[Source::planted(
            "src/x.rs",
            "const LANE: &str = \"Tinyland-nix\";",
        )],
    );
}

#[test]
fn no_test_is_ignored_and_nothing_is_left_for_later() {
    // Written in two parts, so that the rule does not find its own words here.
    let words = [
        concat!("#[ig", "nore"),
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
    ];
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        for file in files {
            for word in words.iter().filter(|word| file.text.contains(**word)) {
                complaints.push(format!("{}: `{word}`", file.name));
            }
        }
        complaints
    };
    let real = [product(), files("tests", ".rs"), files("scripts", ".sh")].concat();
    let planted: Vec<_> = words
        .iter()
        .map(|word| Source::planted("src/x.rs", word))
        .collect();
    hold(rule, real, &planted);
}

#[test]
fn no_file_names_a_folder_of_somebodys_machine() {
    let here = format!("{}/", source::root().display());
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        for file in files {
            let prose = file.name.ends_with(".md");
            for name in [here.as_str(), "/root/", "/home/", "/Users/"] {
                if file.text.contains(name) && (prose || name == here) {
                    complaints.push(format!(
                        "{}: `{name}` is a folder of one machine",
                        file.name
                    ));
                }
            }
        }
        complaints
    };
    let mut real = files("", ".md");
    for (folder, ending) in [
        ("src", ".rs"),
        ("tests", ".rs"),
        ("scripts", ""),
        (".github", ""),
        ("actions", ".yml"),
    ] {
        real.extend(files(folder, ending));
    }
    let planted = [
        Source::planted("README.md", "cd /home/me"),
        Source::planted("src/x.rs", &format!("{here}x")),
    ];
    hold(rule, real, &planted);
}

/// The verbs, as their modules are called: `nix_job`.
fn verbs() -> Vec<String> {
    let cli = file("src/cli.rs").code();
    let verbs = cli
        .split_once("enum Verb {")
        .and_then(|(_, rest)| rest.split_once('}'))
        .expect("src/cli.rs: enum Verb")
        .0;
    // `Name(module::Inputs)`, boxed or not.
    let module = |line: &str| {
        line.split_once("::")?
            .0
            .rsplit(['(', '<'])
            .next()
            .map(str::to_owned)
    };
    let verbs: Vec<_> = verbs.lines().filter_map(module).collect();
    assert!(
        !verbs.is_empty(),
        "src/cli.rs: no `Name(module::Inputs)` in `enum Verb`"
    );
    verbs
}

/// Complaints about verbs that lack a module, a file of tests or a line in the changelog, and about modules and actions
/// that belong to no verb.
fn names_of_verbs(files: &[Source]) -> Vec<String> {
    let has = |name: &str| files.iter().any(|file| file.name == name);
    let begins = |start: &str| files.iter().any(|file| file.name.starts_with(start));
    let changelog = files
        .iter()
        .find(|file| file.name == "CHANGELOG.md")
        .map_or("", |file| file.text.as_str());
    let mut complaints = Vec::new();
    for verb in verbs() {
        let word = verb.replace('_', "-");
        if !has(&format!("src/command/{verb}.rs")) && !has(&format!("src/command/{verb}/mod.rs")) {
            complaints.push(format!("{word}: no src/command/{verb}.rs"));
        }
        // A verb with verbs of its own may have one file for each: `cache_serve.rs`.
        if !has(&format!("tests/it/{verb}.rs")) && !begins(&format!("tests/it/{verb}_")) {
            complaints.push(format!("{word}: no tests/it/{verb}.rs"));
        }
        if !changelog.contains(&format!("`{word}"))
            && !changelog.contains(&format!("`flywheel {word}"))
        {
            complaints.push(format!("{word}: not in CHANGELOG.md"));
        }
    }
    for file in files {
        let command = file
            .name
            .strip_prefix("src/command/")
            .and_then(|name| name.split(['/', '.']).next());
        let action = file
            .name
            .strip_prefix("actions/")
            .and_then(|name| name.split('/').next());
        let known = |name: &str| verbs().contains(&name.replace('-', "_"));
        for name in command.into_iter().chain(action) {
            if name != "mod" && !known(name) {
                complaints.push(format!("{}: there is no verb `{name}`", file.name));
            }
        }
    }
    complaints
}

#[test]
fn a_verb_has_one_name_everywhere() {
    let mut real = [
        files("src/command", ".rs"),
        files("tests/it", ".rs"),
        files("actions", "action.yml"),
    ]
    .concat();
    real.push(file("CHANGELOG.md"));
    let planted = [
        Source::planted("src/command/deploy.rs", ""),
        Source::planted("actions/deploy/action.yml", ""),
    ];
    hold(names_of_verbs, real.clone(), &planted);
    for missing in [
        "src/command/explain.rs",
        "tests/it/explain.rs",
        "CHANGELOG.md",
    ] {
        let without: Vec<_> = real
            .iter()
            .filter(|file| file.name != missing)
            .cloned()
            .collect();
        assert_ne!(
            names_of_verbs(&without),
            Vec::<String>::new(),
            "no complaint about the missing {missing}"
        );
    }
}

#[test]
fn the_menu_and_ci_call_scripts_that_exist() {
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        for file in files {
            let words = file
                .text
                .split(|c: char| c.is_whitespace() || "\"'`".contains(c));
            for name in
                words.filter(|word| word.starts_with("scripts/") && word.len() > "scripts/".len())
            {
                let name = name.trim_end_matches(['.', ',', ':', ';', ')', '`']);
                if !source::root().join(name).is_file() {
                    complaints.push(format!("{}: there is no `{name}`", file.name));
                }
            }
        }
        complaints
    };
    let mut real = files(".github", ".yml");
    real.extend([file("justfile"), file(".ci/run"), file("CONTRIBUTING.md")]);
    hold(
        rule,
        real,
        &[Source::planted(
            "justfile",
            "x:\n    scripts/unheard-of.sh\n",
        )],
    );
}
