//! `docs/troubleshooting.md`: each message that it quotes is one that the program has.

use crate::house::hold;
use crate::house::source::{Source, file, files};

/// The headings of the page are the messages, between backticks; `…` stands for what differs.
fn messages(page: &str) -> Vec<Vec<String>> {
    page.lines()
        .filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'))
        .map(|message| {
            // A message that has backticks itself stands between two of them.
            let inner = message
                .strip_prefix("` ")
                .and_then(|rest| rest.strip_suffix(" `"));
            let parts = inner.unwrap_or(message).split('…').map(str::trim);
            parts
                .filter(|part| !part.is_empty())
                .map(str::to_owned)
                .collect()
        })
        .collect()
}

/// The program's text: literal ones that go over several lines in one, and what is filled in as `…`.
fn program() -> String {
    let sources = [files("src", ".rs"), files("crates", ".rs")].concat();
    let mut text = String::new();
    for source in sources {
        let mut lines = source.text.lines();
        while let Some(line) = lines.next() {
            match line.strip_suffix('\\') {
                Some(begun) => text.push_str(begun),
                None => {
                    text.push_str(line);
                    text.push('\n');
                }
            }
            // What goes on in the next line begins at its first word.
            if line.ends_with('\\')
                && let Some(next) = lines.next()
            {
                let next = next.trim_start();
                text.push_str(next.strip_suffix('\\').unwrap_or(next));
                if !next.ends_with('\\') {
                    text.push('\n');
                }
            }
        }
    }
    text.replace("\\\"", "\"")
        .replace("{{", "{")
        .replace("}}", "}")
}

#[test]
fn every_message_that_is_explained_is_one_of_the_program() {
    let program = program();
    let rule = |pages: &[Source]| {
        let mut complaints = Vec::new();
        for page in pages {
            for message in messages(&page.text) {
                let missing = message.iter().filter(|part| !program.contains(*part));
                complaints.extend(
                    missing.map(|part| format!("{}: the program never says {part:?}", page.name)),
                );
            }
        }
        complaints
    };
    let page = file("docs/troubleshooting.md");
    assert!(
        messages(&page.text).len() >= 15,
        "few messages are explained"
    );
    let planted = [Source::planted(
        "docs/troubleshooting.md",
        "### `the cache is made of … cheese and of no other milk`\n",
    )];
    hold(rule, vec![page], &planted);
}
