//! Whether a command, a program's arguments or Nix's settings ask for impure evaluation. Pure; reads text as it
//! stands and runs nothing, so that what a command computes first is seen only when the process is there.

/// What asks for it, in its own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Impurity(pub String);

/// Reads the text of a shell script or a command line, `sh -c "…"` included. Quotes and backslashes are taken
/// away first, and comments, so that neither hides or makes one.
pub fn of_command(text: &str) -> Option<Impurity> {
    let plain: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .map(|line| {
            line.trim_end()
                .strip_suffix('\\')
                .map_or_else(|| format!("{line}\n"), |line| format!("{line} "))
        })
        .collect();
    let plain = plain.replace("\\n", " ");
    let plain: String = plain
        .chars()
        .filter(|c| !matches!(c, '\'' | '"' | '\\'))
        .collect();
    let words: Vec<&str> = plain
        .split(|c: char| c.is_whitespace() || "();|&`{}=,$".contains(c))
        .collect();
    of_words(
        &words
            .into_iter()
            .filter(|word| !word.is_empty())
            .collect::<Vec<_>>(),
    )
}

/// Reads the arguments of a program that runs; each may be a whole script.
pub fn of_arguments(arguments: &[String]) -> Option<Impurity> {
    let words: Vec<&str> = arguments
        .iter()
        .map(|word| word.trim_end_matches('\0'))
        .collect();
    of_words(&words).or_else(|| {
        arguments
            .iter()
            .skip(1)
            .find_map(|argument| of_command(argument))
    })
}

/// Reads lines of Nix's configuration. The last word on a setting counts.
pub fn of_settings(text: &str) -> Option<Impurity> {
    let mut values = text.lines().filter_map(|line| {
        let (name, value) = line.split('#').next()?.split_once('=')?;
        (name.trim() == "pure-eval").then(|| value.trim())
    });
    values
        .next_back()
        .filter(|value| is_no(value))
        .map(|value| Impurity(format!("pure-eval = {value}")))
}

/// Nix's words for no (`BaseSetting<bool>::parse`).
fn is_no(word: &str) -> bool {
    matches!(word, "false" | "no" | "0")
}

fn of_words(words: &[&str]) -> Option<Impurity> {
    for (at, word) in words.iter().enumerate() {
        let rest = &words[at + 1..];
        match *word {
            "--impure" | "--no-pure-eval" => return Some(Impurity((*word).to_owned())),
            "--option" | "pure-eval" => {
                let value = if *word == "--option" {
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
            assert!(of_command(text).is_some(), "{text}");
        }
        for text in [
            "nix build .#default",
            "# never --impure\nnix build",
            "nix build .#not--impure-at-all",
            "nix build --option pure-eval true",
            "echo --impurely",
            "nix build --option cores 1 pure-evaluation",
        ] {
            assert_eq!(of_command(text), None, "{text}");
        }
    }

    #[test]
    fn arguments_and_settings_are_read() {
        let words = |words: &[&str]| {
            words
                .iter()
                .map(|word| (*word).to_owned())
                .collect::<Vec<_>>()
        };
        assert!(of_arguments(&words(&["nix", "build", "--impure", ""])).is_some());
        assert!(of_arguments(&words(&["sh", "-c", "exec nix build --impure"])).is_some());
        assert_eq!(of_arguments(&words(&["nix", "build", ".#a"])), None);
        assert!(of_settings("a = b\npure-eval = false # why\n").is_some());
        assert!(of_settings("pure-eval = no").is_some() && of_settings("pure-eval = 0").is_some());
        assert_eq!(of_settings("pure-eval = false\npure-eval = true"), None);
        assert_eq!(of_settings("pure-eval-x = false"), None);
    }
}
