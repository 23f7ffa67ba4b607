//! Every link of every page in this repository: files are there, anchors too, and addresses elsewhere have the form of
//! one. Nothing is fetched.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::house::hold;
use crate::house::source::{Source, files, root};

/// Pages of this repository; the golden files of summaries link to what no checkout has.
fn markdown() -> Vec<Source> {
    let mut pages = files("", ".md");
    pages.retain(|page| !page.name.starts_with("tests/"));
    pages
}

/// The text without what stands between fences or backticks, where brackets are no links.
fn prose(text: &str) -> String {
    let mut prose = String::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced && !line.starts_with("    ") {
            let pieces = line.split('`');
            let outside = pieces.enumerate().filter(|(at, _)| at % 2 == 0);
            prose.extend(outside.map(|(_, piece)| piece));
        }
        prose.push('\n');
    }
    prose
}

/// What follows each of `before`, up to one of `ends`.
fn after<'a>(text: &'a str, before: &'a str, ends: &'a [char]) -> impl Iterator<Item = &'a str> {
    text.match_indices(before).map(move |(at, _)| {
        let rest = &text[at + before.len()..];
        &rest[..rest.find(ends).unwrap_or(rest.len())]
    })
}

fn links(page: &Source) -> Vec<String> {
    let prose = prose(&page.text);
    let mut links: Vec<String> = Vec::new();
    links.extend(after(&prose, "](", &[')', ' ', '\n']).map(str::to_owned));
    links.extend(after(&prose, "]: ", &[' ', '\n']).map(str::to_owned));
    for attribute in ["href=\"", "src=\"", "srcset=\""] {
        links.extend(after(&prose, attribute, &['"']).map(str::to_owned));
    }
    links
}

/// The anchors of a page, as GitHub makes them of its headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        }
        let heading = line.trim_start_matches('#');
        if fenced || heading.len() == line.len() || !heading.starts_with(' ') {
            continue;
        }
        let kept: String = heading
            .trim()
            .to_lowercase()
            .chars()
            .filter(|one| one.is_alphanumeric() || matches!(one, ' ' | '-' | '_'))
            .collect();
        let anchor = kept.replace(' ', "-");
        let (mut name, mut number) = (anchor.clone(), 0);
        while !anchors.insert(name.clone()) {
            number += 1;
            name = format!("{anchor}-{number}");
        }
    }
    anchors
}

/// The path of a link, from the root, without `..`.
fn target(page: &Source, path: &str) -> PathBuf {
    let folder = Path::new(&page.name).parent().unwrap();
    let mut target = PathBuf::new();
    for part in folder.join(path).components() {
        match part {
            Component::ParentDir => {
                target.pop();
            }
            part => target.push(part),
        }
    }
    target
}

/// What is wrong with a link, if anything is.
fn complaint(page: &Source, link: &str) -> Option<String> {
    if let Some((scheme, _)) = link.split_once("://") {
        let address = url::Url::parse(link).ok();
        let host = address.as_ref().and_then(url::Url::host_str);
        return match host {
            Some(host) if scheme == "https" && host.contains('.') => None,
            _ => Some("no address that begins with https:// and a host".to_owned()),
        };
    }
    let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
    let target = if path.is_empty() {
        PathBuf::from(&page.name)
    } else {
        target(page, path)
    };
    let there = root().join(&target);
    if path.starts_with('/') || !there.exists() {
        return Some(format!("there is no {}", target.display()));
    }
    if anchor.is_empty() {
        return None;
    }
    let text = if path.is_empty() {
        page.text.clone()
    } else {
        std::fs::read_to_string(there).unwrap_or_default()
    };
    (!anchors(&text).contains(anchor)).then(|| format!("{} has no #{anchor}", target.display()))
}

#[test]
fn every_link_leads_somewhere() {
    let rule = |pages: &[Source]| {
        let mut complaints = Vec::new();
        for page in pages {
            let links = links(page);
            complaints.extend(links.iter().filter_map(|link| {
                let complaint = complaint(page, link)?;
                Some(format!("{}: `{link}`: {complaint}", page.name))
            }));
        }
        complaints
    };
    let real = markdown();
    let number: usize = real.iter().map(|page| links(page).len()).sum();
    assert!(number > 100, "only {number} links were found");
    let planted = [
        "[a](missing.md)",
        "[a](trust.md#no-such-heading)",
        "[a](#nowhere)",
        "[a](/docs/trust.md)",
        "[a](http://example.org/)",
        "[a](https://nowhere/)",
        "<img src=\"pictures/missing.png\">",
        "[a]: missing.md",
    ];
    hold(
        rule,
        real,
        &planted.map(|text| Source::planted("docs/planted.md", text)),
    );
}

#[test]
fn anchors_are_those_of_github() {
    let found = anchors("# Whose paths are the job's\n## `a b`: c\n## A\n## A\n```\n# no\n```\n");
    let wanted = ["whose-paths-are-the-jobs", "a-b-c", "a", "a-1"];
    assert_eq!(found, wanted.map(str::to_owned).into());
}
