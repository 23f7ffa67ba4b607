//! `flywheel completions`: what Bash makes of the script.

use crate::world::Flywheel;

#[test]
fn bash_completes_verbs_flags_and_words() {
    let script = run(&["completions", "bash"]);
    assert_eq!((script.code, script.stderr.as_str()), (0, ""));
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("flywheel.bash");
    std::fs::write(&file, &script.stdout).unwrap();
    for (words, expected) in [
        (&["ca"][..], &["cache", "cache-contract"][..]),
        (&["cache", "to"], &["token"]),
        (&["cache", "token", "new", "--sco"], &["--scope"]),
        (&["nix-job", "--push-cache", ""], &["auto", "false", "true"]),
    ] {
        let line = [&["flywheel"], words].concat();
        let last = line.len() - 1;
        // As Bash calls the function that the script names for `flywheel`.
        let call = format!(
            "source \"$1\"; shift; COMP_WORDS=(\"$@\"); COMP_CWORD={last}; f=$(complete -p flywheel | sed 's/.*-F \\([^ ]*\\).*/\\1/'); \
             \"$f\" flywheel \"${{COMP_WORDS[{last}]}}\" \"${{COMP_WORDS[{}]}}\"; printf '%s\\n' \"${{COMPREPLY[@]}}\" | sort",
            last - 1
        );
        let ran = std::process::Command::new("bash")
            .args(["-c", &call, "bash", file.to_str().unwrap()])
            .args(&line)
            .output()
            .unwrap();
        let found = String::from_utf8(ran.stdout).unwrap();
        let found: Vec<&str> = found.lines().collect();
        assert_eq!(
            found,
            expected,
            "{words:?}: {}",
            String::from_utf8_lossy(&ran.stderr)
        );
    }
    for (shell, begin) in [("zsh", "#compdef flywheel"), ("fish", "# Print an optspec")] {
        let script = run(&["completions", shell]).stdout;
        assert!(script.starts_with(begin), "{shell}: {}", &script[..60]);
        assert!(script.contains("cache-contract"), "{shell}");
    }
    assert_eq!(run(&["completions", "tcsh"]).code, 64);
}

fn run(arguments: &[&str]) -> crate::world::Ran {
    Flywheel::new(arguments).run()
}
