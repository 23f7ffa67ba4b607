//! Finds the stores that a command names for itself: `--store`, `--eval-store`, `NIX_REMOTE=` and the setting `store`.
//! Pure: it reads text as it stands and runs nothing, so that what a command computes, and what a program that it
//! calls does, is not seen.

use std::path::Path;

/// Programs that work on a store.
const PROGRAMS: [&str; 6] = [
    "nix",
    "nix-build",
    "nix-env",
    "nix-instantiate",
    "nix-shell",
    "nix-store",
];
/// Subcommands of `nix` that add nothing to a store. Unknown ones count as adding.
const READING: [&str; 18] = [
    "cat",
    "config",
    "copy",
    "copy-sigs",
    "derivation",
    "doctor",
    "dump-path",
    "hash",
    "key",
    "log",
    "ls",
    "path-info",
    "ping-store",
    "registry",
    "search",
    "show-config",
    "show-derivation",
    "why-depends",
];
/// The same below `nix store`.
const READING_STORE: [&str; 13] = [
    "cat",
    "copy-log",
    "copy-sigs",
    "delete",
    "diff-closures",
    "dump-path",
    "gc",
    "info",
    "ls",
    "optimise",
    "ping",
    "sign",
    "verify",
];
/// Operations of `nix-store` that add to the store.
const ADDING: [&str; 7] = [
    "-r",
    "--realise",
    "--realize",
    "--add",
    "--add-fixed",
    "--import",
    "--load-db",
];
/// Options of Nix with one value that may come before the subcommand.
const WITH_VALUE: [&str; 11] = [
    "--store",
    "--eval-store",
    "--extra-experimental-features",
    "--experimental-features",
    "--log-format",
    "--max-jobs",
    "-j",
    "--cores",
    "-I",
    "--include",
    "--builders",
];
/// Scripts within scripts are followed this far.
const DEPTH: usize = 8;

/// Returns the stores that a shell script names, each as it is written, once.
pub fn stores_in_script(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    search_script(text, DEPTH, &mut found);
    found
}

/// Returns the stores that a program's arguments name; an argument may itself be a script.
pub fn stores_in_words(words: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    search_command(words, DEPTH, &mut found);
    found
}

/// Returns the stores that arguments of Nix itself name, without the program and the subcommand.
pub fn stores_in_nix_arguments(arguments: &[String]) -> Vec<String> {
    let mut found = Vec::new();
    search_options(arguments, DEPTH, &mut found);
    found
}

fn search_script(text: &str, depth: usize, found: &mut Vec<String>) {
    let Some(depth) = depth.checked_sub(1) else {
        return;
    };
    for words in Splitter::new(text, depth).commands() {
        search_command(&words, depth, found);
    }
}

/// Searches one simple command, with what is set before it and the wrappers around it (`sudo`, `env`, `time`).
fn search_command(words: &[String], depth: usize, found: &mut Vec<String>) {
    let is_shell = |word: &String| matches!(base_name(word), "sh" | "bash" | "dash" | "zsh");
    let is_nix = |word: &String| PROGRAMS.contains(&base_name(word));
    let program = words.iter().position(|word| is_nix(word) || is_shell(word));
    let before = &words[..program.unwrap_or(words.len())];
    let set: Vec<&String> = before
        .iter()
        .take_while(|word| is_before_program(word))
        .collect();
    let arguments = program.map_or(&[][..], |at| &words[at + 1..]);
    // The words before a program that is not Nix's may be arguments of something else, such as `echo nix`.
    let is_called = program.is_some() && set.len() == before.len();
    if is_called && program.is_some_and(|at| is_nix(&words[at])) {
        let name = base_name(&words[program.expect("just seen")]);
        if !adds(name, arguments) {
            return;
        }
        search_options(arguments, depth, found);
    } else if is_called {
        // `sh -c 'nix build --store /dir'`.
        for script in arguments {
            search_script(script, depth, found);
        }
    }
    for word in set {
        search_assignment(word, found);
    }
}

/// Whether this word can stand before the name of a program: an assignment, a wrapper, a shell's own word or an option
/// of one of these.
fn is_before_program(word: &str) -> bool {
    const WORDS: [&str; 22] = [
        "!", "builtin", "command", "declare", "do", "elif", "else", "env", "eval", "exec",
        "export", "if", "nice", "nohup", "stdbuf", "sudo", "then", "time", "timeout", "until",
        "while", "{",
    ];
    WORDS.contains(&base_name(word))
        || is_assignment(word)
        || word.starts_with('-')
        // The time of `timeout`.
        || word.starts_with(|c: char| c.is_ascii_digit())
}

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_')
    })
}

fn search_assignment(word: &str, found: &mut Vec<String>) {
    match word.split_once('=') {
        Some(("NIX_REMOTE", store)) => push(store, found),
        Some(("NIX_CONFIG", lines)) => {
            // `$'store = /dir\n'` has its line breaks as two characters.
            let lines = lines.replace("\\n", "\n");
            for line in lines.lines() {
                if let Some((name, store)) =
                    line.split('#').next().and_then(|it| it.split_once('='))
                    && matches!(name.trim(), "store" | "eval-store")
                {
                    push(store.trim(), found);
                }
            }
        }
        _ => (),
    }
}

/// Searches the arguments of a program of Nix. What follows `--` belongs to another program, and what follows `-c` or
/// `--run` is one.
fn search_options(arguments: &[String], depth: usize, found: &mut Vec<String>) {
    let mut rest = arguments;
    while let [word, after @ ..] = rest {
        rest = after;
        match (word.as_str(), after) {
            ("--", _) => return,
            ("--store" | "--eval-store", [store, ..]) => push(store, found),
            ("--option", [name, store, ..]) if matches!(name.as_str(), "store" | "eval-store") => {
                push(store, found);
            }
            ("-c" | "--command", command) => {
                if let Some(depth) = depth.checked_sub(1) {
                    search_command(command, depth, found);
                }
                return;
            }
            ("--run", [script, ..]) => search_script(script, depth, found),
            _ => (),
        }
    }
}

/// Whether a program of Nix with these arguments may add paths to its store.
fn adds(program: &str, arguments: &[String]) -> bool {
    if program == "nix-store" {
        return arguments.iter().any(|word| ADDING.contains(&word.as_str()));
    }
    if program != "nix" {
        return true;
    }
    let mut plain = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if WITH_VALUE.contains(&word.as_str()) {
            words.next();
        } else if word == "--option" {
            words.nth(1);
        } else if !word.starts_with('-') {
            plain.push(word.as_str());
        }
    }
    match plain.as_slice() {
        ["store", task, ..] => !READING_STORE.contains(task),
        [task, ..] => !READING.contains(task),
        [] => false,
    }
}

fn push(store: &str, found: &mut Vec<String>) {
    if !found.iter().any(|known| known == store) {
        found.push(store.to_owned());
    }
}

fn base_name(word: &str) -> &str {
    Path::new(word)
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or(word)
}

/// Splits a script into simple commands, and these into words without their quotes. Variables stay as they are written.
struct Splitter<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    word: Option<String>,
    words: Vec<String>,
    commands: Vec<Vec<String>>,
    depth: usize,
}

impl<'a> Splitter<'a> {
    /// Follows substitutions within quotes `depth` levels deep.
    fn new(text: &'a str, depth: usize) -> Self {
        Self {
            rest: text.chars().peekable(),
            word: None,
            words: Vec::new(),
            commands: Vec::new(),
            depth,
        }
    }

    fn commands(mut self) -> Vec<Vec<String>> {
        while let Some(c) = self.rest.next() {
            match c {
                '\'' => self.single_quoted(),
                '"' => self.double_quoted(),
                '\\' => self.escaped(),
                '#' if self.word.is_none() => {
                    // A comment ends before its line break, which also ends the command.
                    while self.rest.next_if(|c| *c != '\n').is_some() {}
                }
                // `$(…)`, `(…)` and `` `…` `` hold commands of their own.
                ';' | '&' | '|' | '\n' | '(' | ')' | '`' => self.end_command(),
                c if c.is_whitespace() => self.end_word(),
                '$' if matches!(self.rest.peek(), Some('(' | '\'')) => (),
                c => self.push(c),
            }
        }
        self.end_command();
        self.commands
    }

    fn push(&mut self, c: char) {
        self.word.get_or_insert_default().push(c);
    }

    fn single_quoted(&mut self) {
        self.word.get_or_insert_default();
        while let Some(c) = self.rest.next_if(|c| *c != '\'') {
            self.push(c);
        }
        self.rest.next();
    }

    fn double_quoted(&mut self) {
        self.word.get_or_insert_default();
        while let Some(c) = self.rest.next_if(|c| *c != '"') {
            match c {
                '\\' => {
                    if let Some(c) = self.rest.next_if(|c| matches!(c, '"' | '\\' | '$' | '`')) {
                        self.push(c);
                    } else if self.rest.next_if_eq(&'\n').is_none() {
                        self.push('\\');
                    }
                }
                // The text of a substitution is taken for a command by itself: the words around it name no program.
                '$' if self.rest.peek() == Some(&'(') => {
                    self.rest.next();
                    let inside = self.until_closed();
                    if let Some(depth) = self.depth.checked_sub(1) {
                        let inside = Splitter::new(&inside, depth).commands();
                        self.commands.extend(inside);
                    }
                }
                c => self.push(c),
            }
        }
        self.rest.next();
    }

    /// The text up to the parenthesis that closes one that has been read.
    fn until_closed(&mut self) -> String {
        let (mut text, mut open) = (String::new(), 1);
        for c in self.rest.by_ref() {
            match c {
                '(' => open += 1,
                ')' => open -= 1,
                _ => (),
            }
            if open == 0 {
                break;
            }
            text.push(c);
        }
        text
    }

    fn escaped(&mut self) {
        match self.rest.next() {
            // The line goes on.
            Some('\n') | None => (),
            Some(c) => self.push(c),
        }
    }

    fn end_word(&mut self) {
        self.words.extend(self.word.take());
    }

    fn end_command(&mut self) {
        self.end_word();
        if !self.words.is_empty() {
            self.commands.push(std::mem::take(&mut self.words));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, stores: &[&str]) {
        assert_eq!(stores_in_script(text), stores, "{text}");
    }

    #[test]
    fn each_way_to_name_a_store_is_seen() {
        for text in [
            "nix build --store /s .#x",
            "nix --store /s build",
            "nix build \\\n  --store '/s'",
            "cd a && nix-build --store \"/s\" x.nix",
            "NIX_REMOTE=/s nix build",
            "export NIX_REMOTE=/s\nmake",
            "NIX_REMOTE=/s make",
            "env -i NIX_REMOTE=/s nix-build",
            "sudo /usr/bin/nix build --store /s",
            "timeout 60 nix build --store /s",
            "if nix build --store /s; then echo yes; fi",
            "x=$(nix build --store /s --print-out-paths)",
            "echo \"built $(nix build --store /s)\"",
            "(nix build --store /s)",
            "bash -ec 'nix build --store /s'",
            "nix-shell --run 'nix build --store /s'",
            "nix develop -c nix build --store /s",
            "nix build --eval-store /s",
            "nix build --option store /s",
            "NIX_CONFIG='store = /s' nix build",
            "export NIX_CONFIG=$'cores = 1\\nstore = /s # why'",
            "nix-store --store /s --add x",
            "nix store add-path --store /s x",
        ] {
            check(text, &["/s"]);
        }
    }

    #[test]
    fn a_store_that_is_only_read_is_none_to_watch() {
        for text in [
            "nix build .#x",
            "nix path-info --store https://cache.example x",
            "nix store ping --store ssh-ng://host",
            "nix --store /s store info",
            "NIX_REMOTE=/s nix log x",
            "nix copy --to /s ./result",
            "nix-store --store /s -q --references x",
            "# nix build --store /s",
            "echo nix build --store /s",
            "echo 'nix build --store /s' >x",
            "nix run .#tool -- --store /s",
            "nix shell .#tool -c tool --store /s",
            "echo NIX_REMOTE=/s >>\"$GITHUB_ENV\"",
            "other --store /s",
            "MY_NIX_REMOTE=/s nix build",
        ] {
            check(text, &[]);
        }
    }

    #[test]
    fn all_stores_are_named_as_they_are_written() {
        let text =
            "nix build --store \"$PWD/root\" --eval-store auto\nnix build --store ssh-ng://h";
        check(text, &["$PWD/root", "auto", "ssh-ng://h"]);
        let words = ["sh", "-c", "nix build --store /s"].map(str::to_owned);
        assert_eq!(stores_in_words(&words), ["/s"]);
        let words = ["--option", "store", "/s", "-L"].map(str::to_owned);
        assert_eq!(stores_in_nix_arguments(&words), ["/s"]);
    }

    #[test]
    fn quotes_that_do_not_end_are_no_fault() {
        for text in [
            "nix build --store",
            "'",
            "\"$(",
            "\\",
            "nix build --store '/s",
        ] {
            stores_in_script(text);
        }
        // Nothing follows a script without a bound.
        stores_in_script(&"\"$(".repeat(100_000));
        stores_in_script(&"sh -c '".repeat(100_000));
    }
}
