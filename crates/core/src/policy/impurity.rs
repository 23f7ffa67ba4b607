//! Detects whether a command, a program's arguments or Nix's settings request impure evaluation.
//! Pure: it reads text as it stands and runs nothing, so arguments that a command computes are seen
//! only when the process exists.

/// The option or setting that requests impure evaluation, as written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Impurity(pub String);

/// Searches a shell script or command line, including `sh -c "…"`. Comments, quotes and backslashes
/// are removed first, so that they neither hide nor fake an option.
pub fn impurity_in_command(text: &str) -> Option<Impurity> {
    let plain: String = text
        .lines()
        // A comment may mention `--impure` without using it.
        .filter(|line| !line.trim_start().starts_with('#'))
        .map(|line| {
            line.trim_end()
                .strip_suffix('\\')
                .map_or_else(|| format!("{line}\n"), |line| format!("{line} "))
        })
        .collect();
    // A script passed as one argument may contain its line breaks as `\n`.
    let plain = plain.replace("\\n", " ");
    let plain: String = plain
        .chars()
        .filter(|c| !matches!(c, '\'' | '"' | '\\'))
        .collect();
    let tokens: Vec<&str> = plain
        .split(|c: char| c.is_whitespace() || "();|&`{}=,$".contains(c))
        .collect();
    impurity_in_tokens(
        &tokens
            .into_iter()
            .filter(|token| !token.is_empty())
            .collect::<Vec<_>>(),
    )
}

/// Searches the arguments of a running program; each may itself be a script.
pub fn impurity_in_arguments(arguments: &[String]) -> Option<Impurity> {
    let tokens: Vec<&str> = arguments
        .iter()
        .map(|token| token.trim_end_matches('\0'))
        .collect();
    impurity_in_tokens(&tokens).or_else(|| {
        arguments
            .iter()
            .skip(1)
            .find_map(|argument| impurity_in_command(argument))
    })
}

/// Searches lines of Nix's configuration. The last assignment counts.
pub fn impurity_in_settings(text: &str) -> Option<Impurity> {
    let mut values = text.lines().filter_map(|line| {
        let (name, value) = line.split('#').next()?.split_once('=')?;
        (name.trim() == "pure-eval").then(|| value.trim())
    });
    values
        .next_back()
        .filter(|value| is_no(value))
        .map(|value| Impurity(format!("pure-eval = {value}")))
}

/// The values that Nix reads as false (`BaseSetting<bool>::parse`).
fn is_no(token: &str) -> bool {
    matches!(token, "false" | "no" | "0")
}

fn impurity_in_tokens(tokens: &[&str]) -> Option<Impurity> {
    for (at, token) in tokens.iter().enumerate() {
        let rest = &tokens[at + 1..];
        match *token {
            "--impure" | "--no-pure-eval" => return Some(Impurity((*token).to_owned())),
            // `--option pure-eval false` as well as `pure-eval = false`, split into words.
            "--option" | "pure-eval" => {
                let value = if *token == "--option" {
                    rest.get(1).filter(|_| rest[0] == "pure-eval")
                } else {
                    rest.first()
                };
                if let Some(no) = value.filter(|value| is_no(value)) {
                    return Some(Impurity(format!("pure-eval {no}")));
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impure_commands_are_seen_however_they_are_spelt() {
        for text in [
            "nix build --impure .#default",
            "nix build \\\n  --impure",
            "sh -c \"nix build '--impure'\"",
            "nix build --imp'ure'",
            "nix build --option pure-eval false .#x",
            "nix build --no-pure-eval",
            "nix build --option pure-eval no",
            "NIX_CONFIG='pure-eval = 0' nix build",
            "NIX_CONFIG='pure-eval = false' nix build",
            "export NIX_CONFIG=$'pure-eval = false\\n'; nix build",
            "(nix build --impure)",
            "x=--impure; nix build $x",
        ] {
            assert!(impurity_in_command(text).is_some(), "{text}");
        }
        for text in [
            "nix build .#default",
            "# never --impure\nnix build",
            "nix build .#not--impure-at-all",
            "nix build --option pure-eval true",
            "echo --impurely",
            "nix build --option cores 1 pure-evaluation",
        ] {
            assert_eq!(impurity_in_command(text), None, "{text}");
        }
    }

    #[test]
    fn arguments_and_settings_are_read() {
        let tokens = |tokens: &[&str]| {
            tokens
                .iter()
                .map(|token| (*token).to_owned())
                .collect::<Vec<_>>()
        };
        assert!(impurity_in_arguments(&tokens(&["nix", "build", "--impure", ""])).is_some());
        assert!(impurity_in_arguments(&tokens(&["sh", "-c", "exec nix build --impure"])).is_some());
        assert_eq!(
            impurity_in_arguments(&tokens(&["nix", "build", ".#a"])),
            None
        );
        assert!(impurity_in_settings("a = b\npure-eval = false # why\n").is_some());
        assert!(
            impurity_in_settings("pure-eval = no").is_some()
                && impurity_in_settings("pure-eval = 0").is_some()
        );
        assert_eq!(
            impurity_in_settings("pure-eval = false\npure-eval = true"),
            None
        );
        assert_eq!(impurity_in_settings("pure-eval-x = false"), None);
    }
}
