//! The pictures of the summaries in `docs/pictures` are of the golden Markdown, and GitHub shows all that this Markdown
//! holds. `scripts/pictures.sh` makes the pictures and has the real sanitiser; these tests need no browser.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use sha2::{Digest as _, Sha256};

const GOLDEN: &str = "tests/fixtures/summaries";
const PICTURES: &str = "docs/pictures";
/// All pictures together: a checkout is downloaded by each `uses:`.
const LIMIT_BYTES: usize = 1_500_000;
/// A run of each kind has to have its picture.
const RUNS: [&str; 9] = [
    "success",
    "failure",
    "out-of-memory",
    "cancelled",
    "read-only",
    "lost",
    "withheld",
    "flake-checks",
    "canary-broken",
];
/// What a summary may hold of HTML. GitHub lets these through, in this form.
const TAGS: [&str; 5] = ["<details>", "<details open>", "<summary>", "<code>", "<br>"];

/// The files of a folder of the repository, by their name from its root.
fn read(folder: &str, extension: &str) -> BTreeMap<String, Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let entries = std::fs::read_dir(root.join(folder)).unwrap();
    let files = entries.map(|entry| entry.unwrap().path());
    files
        .filter(|file| file.extension().is_some_and(|found| found == extension))
        .map(|file| {
            let name = file
                .strip_prefix(root)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned();
            (name, std::fs::read(file).unwrap())
        })
        .collect()
}

/// What `sha256sum` writes of the files.
fn sums(files: &BTreeMap<String, Vec<u8>>) -> String {
    let line = |(name, bytes): (&String, &Vec<u8>)| {
        let sum = Sha256::digest(bytes);
        let digits: String = sum.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("{digits}  {name}\n")
    };
    files.iter().map(line).collect()
}

#[test]
fn pictures_are_of_the_golden_summaries() {
    let (golden, pictures) = (read(GOLDEN, "md"), read(PICTURES, "png"));
    let kept = std::fs::read_to_string(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join(PICTURES)
            .join("SHA256SUMS"),
    );
    assert_eq!(
        kept.unwrap_or_default(),
        sums(&golden) + &sums(&pictures),
        "`just pictures` makes the pictures of other summaries; then look at them"
    );
    let names = golden.keys().flat_map(|name| {
        let name = Path::new(name).file_stem().unwrap().to_str().unwrap();
        ["light", "dark"].map(|colours| format!("{PICTURES}/{name}-{colours}.png"))
    });
    let names: BTreeSet<String> = names.collect();
    assert_eq!(names, pictures.keys().cloned().collect());
    for run in RUNS {
        assert!(golden.contains_key(&format!("{GOLDEN}/{run}.md")), "{run}");
    }
    let size: usize = pictures.values().map(Vec::len).sum();
    assert!(size < LIMIT_BYTES, "{size} bytes of pictures");
}

/// The HTML tags of a Markdown text that GitHub would not show as they are written, those in code left out.
fn dropped_tags(markdown: &str) -> Vec<String> {
    let mut dropped = Vec::new();
    let mut fence = None;
    for line in markdown.lines() {
        let ticks = &line[..line.len() - line.trim_start_matches('`').len()];
        match fence {
            Some(open) if line == open => fence = None,
            None if ticks.len() >= 3 => fence = Some(ticks),
            None => {
                // Every second part is a span of code.
                let text: String = line.split('`').step_by(2).collect();
                let tags = text.match_indices('<').map(|(at, _)| {
                    let end = text[at..].find('>').map_or(text.len(), |end| at + end + 1);
                    text[at..end].to_owned()
                });
                dropped.extend(
                    tags.filter(|tag| !TAGS.contains(&tag.replacen("</", "<", 1).as_str())),
                );
            }
            Some(_) => {}
        }
    }
    dropped
}

#[test]
fn summaries_hold_no_tag_that_github_drops() {
    for (name, text) in read(GOLDEN, "md") {
        let text = String::from_utf8(text).unwrap();
        assert_eq!(dropped_tags(&text), Vec::<String>::new(), "{name}");
        assert_eq!(
            text.matches("<details").count(),
            text.matches("</details>").count(),
            "{name}: what is unfolded and not closed takes the rest of the page with it"
        );
    }
    let planted = "<details><b style=\"x\">a</b>\n```\n<i>\n```\n`<u>` <em>";
    assert_eq!(
        dropped_tags(planted),
        ["<b style=\"x\">", "</b>", "<em>"],
        "what GitHub drops is noticed"
    );
}
