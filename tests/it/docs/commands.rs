//! The shell snippets of the pages, and which snippets nothing runs: each has a language, the shell can read it, and every
//! `flywheel` in it names a verb and flags that there are.

use std::process::Command;

use super::fences::{Fence, LANGUAGES, MARKS, REASONS, fences};
use super::pages;
use crate::definitions::{self, Verb};
use crate::house::hold;
use crate::house::source::Source;

/// No more snippets than this say that no test runs them.
const NOT_RUN: usize = 5;

fn snippets(pages: &[Source]) -> Vec<Fence> {
    let pages = pages.iter();
    pages
        .flat_map(|page| fences(&page.name, &page.text))
        .collect()
}

#[test]
fn what_no_test_runs_is_little_and_has_a_reason() {
    let rule = |pages: &[Source]| {
        let mut complaints = Vec::new();
        let snippets = snippets(pages);
        for fence in &snippets {
            let mut complain = |what: String| complaints.push(format!("{}: {what}", fence.place()));
            if !LANGUAGES.contains(&fence.language.as_str()) {
                complain(format!(
                    "`{}` is none of the languages {LANGUAGES:?}",
                    fence.language
                ));
            }
            if let Some(mark) = &fence.mark
                && !MARKS.contains(&mark.as_str())
            {
                complain(format!("there is no test {mark}"));
            }
            if let Some(reason) = &fence.reason
                && !REASONS.contains(&reason.as_str())
            {
                complain(format!("{reason} is none of the reasons {REASONS:?}"));
            }
        }
        let not_run = snippets.iter().filter(|fence| fence.reason.is_some());
        if not_run.count() > NOT_RUN {
            complaints.push(format!("more than {NOT_RUN} snippets are run by no test"));
        }
        complaints
    };
    let exempt = format!("```sh\nx\n```\n\n{}\n\n", REASONS[0]);
    let planted = [
        "```\nflywheel\n```\n".to_owned(),
        "```bash\nflywheel\n```\n".to_owned(),
        "<!-- test: none -->\n```sh\nflywheel\n```\n".to_owned(),
        "```sh\nx\n```\n\n*No test runs this: we forgot.*\n".to_owned(),
        exempt.repeat(NOT_RUN + 1),
    ];
    hold(
        rule,
        pages(),
        &planted
            .each_ref()
            .map(|text| Source::planted("docs/x.md", text)),
    );
}

/// The words of each call of Flywheel in a snippet, without the program's own name.
fn calls(text: &str) -> Vec<Vec<String>> {
    let joined = text.replace("\\\n", " ");
    let mut calls = Vec::new();
    for line in joined.lines() {
        // What `eval "$(…)"` evaluates is the call.
        let line = line.replace("\"$(", " ").replace(")\"", " ");
        let Some(words) = shlex::split(&line) else {
            continue;
        };
        let ends =
            |word: &String| matches!(word.as_str(), "|" | "&&" | "||" | "&" | ";" | ">" | "<");
        let mut rest = words.as_slice();
        while let Some(at) = (0..rest.len()).find(|at| is_call(rest, *at)) {
            let call = &rest[at + 1..];
            let length = call.iter().position(ends).unwrap_or(call.len());
            calls.push(call[..length].to_vec());
            rest = &call[length..];
        }
    }
    calls
}

/// Whether the word there is a program that the shell starts, and ours.
fn is_call(words: &[String], at: usize) -> bool {
    let begins = |before: &String| {
        let is_assignment = before.contains('=') && !before.starts_with('-');
        is_assignment
            || matches!(
                before.as_str(),
                "exec" | "eval" | "&&" | "||" | "|" | ";" | "if" | "then"
            )
            || before.ends_with(';')
    };
    is_flywheel(&words[at])
        && at
            .checked_sub(1)
            .is_none_or(|before| begins(&words[before]))
}

fn is_flywheel(word: &str) -> bool {
    let name = word.rsplit('/').next().unwrap_or_default();
    let is_path = word.contains("dist/flywheel") || !word.contains('/');
    is_path && matches!(name, "flywheel" | "flywheel-x86_64-linux")
}

/// What a call says that the program does not know.
fn unknown(verbs: &[Verb], call: &[String]) -> Option<String> {
    let named: Vec<&str> = call
        .iter()
        .map(String::as_str)
        .take_while(|word| !word.starts_with('-'))
        .collect();
    let verb = verbs.iter().rev().find(|verb| {
        let words: Vec<&str> = verb.name.split(' ').collect();
        named.starts_with(&words)
    });
    let Some(verb) = verb else {
        // `flywheel --version` and `flywheel help VERB` are clap's own.
        let is_own = matches!(
            call.first().map(String::as_str),
            Some("--version" | "version" | "--help" | "help" | "completions" | "man")
        );
        return (!is_own).then(|| format!("there is no verb in {call:?}"));
    };
    let mut words = call.iter().take_while(|word| *word != "--").peekable();
    while let Some(word) = words.next() {
        let Some(flag) = word.strip_prefix("--") else {
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (flag, words.peek().map(|next| next.as_str())),
        };
        let input = verb
            .inputs
            .iter()
            .find(|input| input.is_flag && input.name == name);
        let Some(input) = input else {
            if name == "help" {
                continue;
            }
            return Some(format!("`{}` has no flag `--{name}`", verb.name));
        };
        // The value of a switch may be left out.
        let value = value.filter(|value| input.value_name.is_some() && !value.starts_with("--"));
        let is_allowed = |value: &str| input.allowed.iter().any(|(word, _)| word == value);
        if let Some(value) = value
            && !input.allowed.is_empty()
            && !is_allowed(value)
        {
            return Some(format!("`--{name}` does not take `{value}`"));
        }
    }
    None
}

#[test]
fn every_call_of_flywheel_is_one_that_it_knows() {
    let verbs = definitions::verbs();
    let rule = |pages: &[Source]| {
        let mut complaints = Vec::new();
        for fence in snippets(pages) {
            if fence.language != "sh" {
                continue;
            }
            let wrong = calls(&fence.text)
                .iter()
                .filter_map(|call| unknown(&verbs, call))
                .collect::<Vec<_>>();
            complaints.extend(
                wrong
                    .iter()
                    .map(|what| format!("{}: {what}", fence.place())),
            );
        }
        complaints
    };
    let real = pages();
    let number: usize = snippets(&real)
        .iter()
        .map(|fence| calls(&fence.text).len())
        .sum();
    assert!(number > 30, "only {number} calls were found");
    let planted = [
        "flywheel no-such-verb",
        "dist/flywheel explain --no-such-flag",
        "eval \"$(flywheel watch-store begin)\" --x",
        "flywheel nix-job \\\n  --push-cache sometimes --command x",
        "true && flywheel scan --quickly ./result",
    ];
    hold(
        rule,
        real,
        &planted.map(|call| Source::planted("docs/x.md", &format!("```sh\n{call}\n```\n"))),
    );
}

#[test]
fn every_shell_snippet_can_be_read_by_a_shell() {
    let rule = |pages: &[Source]| {
        let mut complaints = Vec::new();
        for fence in snippets(pages) {
            if fence.language != "sh" {
                continue;
            }
            let read = Command::new("sh")
                .args(["-n", "-c", &fence.text])
                .output()
                .unwrap();
            if !read.status.success() {
                let reason = String::from_utf8_lossy(&read.stderr).into_owned();
                complaints.push(format!("{}: {reason}", fence.place()));
            }
        }
        complaints
    };
    let planted = [Source::planted("docs/x.md", "```sh\nif true; then\n```\n")];
    hold(rule, pages(), &planted);
}

/// What GitHub shows and MkDocs does not: a fence within a list, a list right below a paragraph, a table likewise.
fn shown_by_github_alone(page: &Source) -> Vec<String> {
    let mut complaints = Vec::new();
    let (mut is_fenced, mut in_block, mut before) = (false, false, "");
    for (number, line) in page.text.lines().enumerate() {
        let mut complain =
            |what: &str| complaints.push(format!("{}:{}: {what}", page.name, number + 1));
        if line.trim_start().starts_with("```") {
            is_fenced = !is_fenced;
            if line.starts_with(' ') {
                complain("a fence begins in the first column");
            }
        }
        let begins = ["- ", "* ", "1. ", "| "]
            .iter()
            .any(|mark| line.starts_with(mark));
        if begins && !is_fenced && !in_block && !before.is_empty() && !before.starts_with("<!--") {
            complain("a list or a table has an empty line above it");
        }
        in_block = !line.is_empty() && (begins || in_block);
        before = line;
    }
    complaints
}

#[test]
fn a_page_looks_the_same_on_github_and_as_a_part_of_the_site() {
    let rule = |pages: &[Source]| pages.iter().flat_map(shown_by_github_alone).collect();
    let planted = [
        "1. A\n\n   ```sh\n   x\n   ```\n",
        "A:\n- b\n",
        "A\n| b |\n|---|\n",
    ];
    hold(
        rule,
        pages(),
        &planted.map(|text| Source::planted("docs/x.md", text)),
    );
}

#[test]
fn no_command_hides_outside_of_a_fence() {
    let rule = |pages: &[Source]| {
        let mut complaints = Vec::new();
        for page in pages {
            let mut fenced = false;
            for (number, line) in page.text.lines().enumerate() {
                if line.trim_start().starts_with("```") {
                    fenced = !fenced;
                }
                let is_code = line.starts_with("    ") || line.starts_with('\t');
                if !fenced && is_code && line.split_whitespace().any(is_flywheel) {
                    complaints.push(format!(
                        "{}:{}: a command belongs between fences",
                        page.name,
                        number + 1
                    ));
                }
            }
        }
        complaints
    };
    let planted = [Source::planted(
        "docs/x.md",
        "Try this:\n\n    flywheel explain\n",
    )];
    hold(rule, pages(), &planted);
}
