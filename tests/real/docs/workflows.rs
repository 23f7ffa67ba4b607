//! The workflows of the pages that are marked `<!-- test: act -->`, as they stand there; those of docs/migration/ are in
//! `migration`.

use super::fences::Fence;
use super::{OURS, flake, migration, pages};
use crate::world::act::{Caller, Ran};
use crate::world::cache::Cache;

/// The snippet as a whole workflow, with the names that act knows.
pub fn whole(snippet: &str) -> String {
    let indented = |by: usize| -> String {
        let lines = snippet.lines();
        lines
            .map(|line| format!("{}{line}\n", " ".repeat(by)))
            .collect()
    };
    let job = "jobs:\n  build:\n    runs-on: ubuntu-latest\n";
    let text = if snippet.starts_with("- ") {
        let checkout = "      - uses: actions/checkout@v4\n";
        format!("{job}    steps:\n{checkout}{}", indented(6))
    } else if snippet.starts_with("steps:") {
        format!("{job}{}", indented(4))
    } else {
        snippet.to_owned()
    };
    let on = if text.contains("\non:") || text.starts_with("on:") {
        ""
    } else {
        "on: push\n"
    };
    format!("{on}{text}").replace(OURS.0, OURS.1)
}

fn marked() -> Vec<Fence> {
    let pages = pages().into_iter();
    pages
        .filter(|(name, _)| !name.starts_with(migration::FOLDER))
        .flat_map(|(_, fences)| fences)
        .filter(|fence| fence.mark.as_deref() == Some("act"))
        .collect()
}

pub fn caller(cache: &Cache, fence: &Fence, carried: &std::path::Path) -> Caller {
    Caller::new(&whole(&fence.text))
        .with_flake(&flake())
        .with_secret("ATTIC_TOKEN", &cache.token)
        .with_variable("ATTIC_SERVER", &format!("{}/", cache.url))
        .with_variable("ATTIC_PUBLIC_KEY", &cache.key)
        // A machine's hint, where the page names the server nowhere.
        .with_env("ATTIC_SERVER", &format!("{}/", cache.url))
        .with_folder_cache("actions/cache@v4", carried)
}

pub fn run(caller: &Caller, place: &str) -> Ran {
    let ran = caller.run(&caller.push("refs/heads/main"));
    assert_eq!(ran.code, 0, "{place}: {}", ran.log());
    let none = Vec::<String>::new();
    assert_eq!(ran.left_processes, none, "{place}: {}", ran.log());
    let log = ran.log();
    // The last account, in a job of several steps.
    let account = log.lines().rev().find(|line| line.contains(" lost"));
    let account = account.unwrap_or_else(|| panic!("{place}: no account in:\n{log}"));
    assert!(
        account.contains(", 0 lost") && !account.contains("not publishing"),
        "{place}: {account}\n{log}"
    );
    ran
}

/// How many workflows run at once, each in a world of its own. Nine take half the time that they take one by one.
const AT_ONCE: usize = 3;

/// Checks every snippet, some at once.
pub fn each(snippets: &[Fence], check: impl Fn(&Fence) + Sync) {
    for some in snippets.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            for fence in some {
                scope.spawn(|| check(fence));
            }
        });
    }
}

fn loses_and_rebuilds_nothing(fence: &Fence) {
    let (cache, carried) = (Cache::start(&[]), tempfile::tempdir().unwrap());
    let mut caller = caller(&cache, fence, carried.path());
    let place = fence.place();
    let first = run(&caller, &place).log();
    assert!(
        first.contains(" 3 built, ") || first.contains(" 2 built, "),
        "{place}: it builds the flake:\n{first}"
    );
    caller.forget_store();
    let second = run(&caller, &place).log();
    let accounts = second.lines().filter(|line| line.contains(" verified"));
    for account in accounts.filter(|line| line.contains(" built, ")) {
        assert!(account.contains(" 0 built, "), "{place}:\n{second}");
    }
}

#[test]
fn every_workflow_that_is_marked_loses_nothing_and_the_next_run_builds_nothing() {
    let marked = marked();
    assert!(marked.len() >= 5, "only {} are marked", marked.len());
    each(&marked, loses_and_rebuilds_nothing);
}
