//! docs/migration/ and other pages with actions of others: what a workflow gives such an action is what it takes, as
//! `tests/fixtures/peers.yml` has it recorded, and the page says what becomes of each of its inputs. The workflows "after"
//! run under act, in `tests/real/docs/migration.rs`.

use std::collections::BTreeSet;

use serde_norway::Value;

use super::fences::{Fence, fences};
use super::pages;
use crate::definitions;
use crate::house::hold;
use crate::house::source::{Source, file};

const FOLDER: &str = "docs/migration/";

/// An action or a program of others, as it was at a commit.
#[derive(serde::Deserialize)]
struct Peer {
    page: String,
    uses: Option<String>,
    command: Option<String>,
    commit: String,
    required: Vec<String>,
    optional: Vec<String>,
}

impl Peer {
    fn knows(&self, input: &str) -> bool {
        self.required
            .iter()
            .chain(&self.optional)
            .any(|name| name == input)
    }
}

fn peers() -> Vec<Peer> {
    serde_norway::from_str(&file("tests/fixtures/peers.yml").text).unwrap()
}

/// The steps of every job of a workflow, or of what is a list of steps itself.
fn steps(yaml: &Value) -> Vec<Value> {
    let list = |value: &Value| value.as_sequence().cloned().unwrap_or_default();
    let jobs = yaml.get("jobs").and_then(Value::as_mapping);
    let of_jobs = jobs.into_iter().flat_map(|jobs| jobs.values());
    of_jobs
        .flat_map(|job| job.get("steps").map(list).unwrap_or_default())
        .chain(list(yaml))
        .collect()
}

/// What a step gives an action that the action does not take, or leaves out that it needs.
fn misfits(peers: &[Peer], step: &Value) -> Vec<String> {
    let text = |key: &str| step.get(key).and_then(Value::as_str).unwrap_or_default();
    let name = text("uses").split('@').next().unwrap_or_default();
    let mut misfits = Vec::new();
    if let Some(peer) = peers.iter().find(|peer| peer.uses.as_deref() == Some(name)) {
        let with = step.get("with").and_then(Value::as_mapping);
        let given: Vec<&str> = with
            .into_iter()
            .flat_map(|with| with.keys())
            .filter_map(Value::as_str)
            .collect();
        let unknown = given.iter().filter(|input| !peer.knows(input));
        misfits.extend(unknown.map(|input| format!("`{name}` has no input `{input}`")));
        let missing = peer
            .required
            .iter()
            .filter(|input| !given.contains(&input.as_str()));
        misfits.extend(missing.map(|input| format!("`{name}` needs the input `{input}`")));
    } else if !matches!(name.split('/').next(), Some("" | "." | "actions" | "OWNER")) {
        misfits.push(format!("`{name}` is not in tests/fixtures/peers.yml"));
    }
    for line in text("run").lines() {
        let peer = peers.iter().find(|peer| {
            let command = peer.command.as_deref();
            command.is_some_and(|command| line.contains(command))
        });
        let flags = line
            .split_whitespace()
            .filter(|word| word.starts_with("--") && *word != "--");
        if let Some(peer) = peer {
            let unknown = flags.filter(|flag| !peer.knows(flag));
            misfits.extend(unknown.map(|flag| format!("`{line}`: there is no `{flag}`")));
        }
    }
    misfits
}

/// The fence of YAML below a heading.
fn below(page: &Source, heading: &str) -> Option<Fence> {
    let lines: Vec<&str> = page.text.lines().collect();
    let at = lines.iter().position(|line| *line == heading)? + 1;
    let rest = lines[at..].iter();
    let end = rest.take_while(|line| !line.starts_with("## ")).count();
    let found = fences(&page.name, &page.text).into_iter();
    found
        .filter(|fence| fence.language == "yaml")
        .find(|fence| (at..=at + end).contains(&fence.line))
}

/// What stands between backticks in a text.
fn quoted(text: &str) -> BTreeSet<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// The rows of the page's first table, without its head.
fn rows(page: &str) -> Vec<(&str, &str)> {
    let table = page.lines().skip_while(|line| !line.starts_with("| "));
    table
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .filter_map(|line| line.trim_matches(['|', ' ']).split_once(" | "))
        .collect()
}

/// What is wrong with a page that leads from a peer to this.
fn page_misfits(page: &Source, peer: &Peer, ours: &BTreeSet<String>) -> Vec<String> {
    let mut misfits = Vec::new();
    if !page.text.contains(&format!("`{}`", &peer.commit[..12])) {
        misfits.push(format!("names no commit `{}`", &peer.commit[..12]));
    }
    let rows = rows(&page.text);
    let left: BTreeSet<&str> = rows.iter().flat_map(|row| quoted(row.0)).collect();
    let missing = peer.required.iter().chain(&peer.optional);
    let missing = missing.filter(|input| !left.contains(input.as_str()));
    misfits.extend(missing.map(|input| format!("does not say what becomes of `{input}`")));
    let unknown = left.iter().filter(|input| !peer.knows(input));
    misfits.extend(unknown.map(|input| format!("`{input}` is no input of the peer")));
    // A name in small letters is an input of ours, perhaps with its value.
    for word in rows.iter().flat_map(|row| quoted(row.1)) {
        let name = word.split(':').next().unwrap_or_default();
        let is_name =
            name.contains('-') && name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
        if is_name && !ours.contains(name) {
            misfits.push(format!(
                "`{name}` is neither an input nor an action of ours"
            ));
        }
    }
    match (below(page, "## Before"), below(page, "## After")) {
        (Some(before), Some(after)) => {
            let name = peer.uses.as_ref().or(peer.command.as_ref()).unwrap();
            if !before.text.contains(name) {
                misfits.push(format!("does not use `{name}` before"));
            }
            if after.mark.as_deref() != Some("act") || after.text.contains(name) {
                misfits.push("the workflow after is run under act, and needs no peer".to_owned());
            }
        }
        _ => misfits.push("has no workflow before or none after".to_owned()),
    }
    misfits
}

fn complaints(pages: &[Source]) -> Vec<String> {
    let (peers, verbs) = (peers(), definitions::verbs());
    let inputs = verbs.iter().flat_map(|verb| &verb.inputs);
    let mut ours: BTreeSet<String> = inputs.map(|input| input.name.clone()).collect();
    ours.extend(verbs.iter().map(|verb| verb.name.clone()));
    // A value of `evaluator`, and settings of Nix's own.
    let others = [
        "nix-eval-jobs",
        "extra-substituters",
        "extra-trusted-public-keys",
    ];
    ours.extend(others.map(str::to_owned));
    let mut complaints = Vec::new();
    for page in pages {
        let mut complain = |what: &str| complaints.push(format!("{}: {what}", page.name));
        for fence in fences(&page.name, &page.text) {
            if fence.language != "yaml" {
                continue;
            }
            let yaml: Value = serde_norway::from_str(&fence.text).unwrap_or_default();
            for misfit in steps(&yaml).iter().flat_map(|step| misfits(&peers, step)) {
                complain(&misfit);
            }
        }
        if page.name.starts_with(FOLDER) {
            match peers.iter().find(|peer| peer.page == page.name) {
                Some(peer) => page_misfits(page, peer, &ours)
                    .iter()
                    .for_each(|misfit| complain(misfit)),
                None => complain("is of no peer in tests/fixtures/peers.yml"),
            }
        }
    }
    complaints
}

#[test]
fn every_page_of_migration_leads_from_what_the_peer_really_has() {
    let real = pages();
    for peer in peers() {
        let page = real.iter().find(|page| page.name == peer.page);
        assert!(page.is_some(), "there is no {}", peer.page);
    }
    let page = file("docs/migration/cachix-action.md");
    let changed = |from: &str, to: &str| {
        assert!(page.text.contains(from), "{from}");
        Source::planted(&page.name, &page.text.replacen(from, to, 1))
    };
    let fast = file("docs/migration/nix-fast-build.md").text;
    let planted = [
        changed("033248a6b8f7", "000000000000"),
        changed("          name: my-team\n", ""),
        changed("          skipPush: ", "          skip-push: "),
        changed("| `useDaemon` |", "| `usesDaemon` |"),
        changed("`push-cache`; its", "`push-to`; its"),
        changed("<!-- test: act -->\n", ""),
        changed("## Before", "## Once"),
        changed(
            "uses: cachix/cachix-action@v16",
            "uses: cachix/another-action@v16",
        ),
        Source::planted(
            "docs/x.md",
            &fast.replace("--no-nom --skip", "--no-such --skip"),
        ),
        Source::planted("docs/migration/x.md", "# From nowhere\n"),
    ];
    hold(complaints, real, &planted);
}
