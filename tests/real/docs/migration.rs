//! The workflows "after" of docs/migration/, each once, and what docs/flakehub.md publishes, with stand-ins for the actions
//! of others.

use super::fences::Fence;
use super::workflows::{caller, each, run, whole};
use super::{flake, pages};
use crate::world::act::{CALLER, Caller, Event};
use crate::world::cache::Cache;

/// The folder of these pages.
pub const FOLDER: &str = "docs/migration/";

fn fences_of(page: &str) -> Vec<Fence> {
    let pages = pages().into_iter();
    pages
        .filter(|(name, _)| name.starts_with(page))
        .flat_map(|(_, fences)| fences)
        .collect()
}

fn loses_nothing(fence: &Fence) {
    let (cache, carried) = (Cache::start(&[]), tempfile::tempdir().unwrap());
    let place = fence.place();
    let log = run(&caller(&cache, fence, carried.path()), &place).log();
    // Most build the package, and the checks are a part of it.
    let built = [" 3 built, ", " 2 built, "];
    assert!(
        built.iter().any(|built| log.contains(built)),
        "{place}:\n{log}"
    );
}

#[test]
fn every_workflow_after_migration_loses_nothing() {
    let after = fences_of(FOLDER).into_iter();
    let after: Vec<Fence> = after
        .filter(|fence| fence.mark.as_deref() == Some("act"))
        .collect();
    assert!(after.len() >= 9, "only {} are marked", after.len());
    each(&after, loses_nothing);
}

/// Stands in for an action that this machine cannot run; what it is given is in the log.
fn stand_in(inputs: &[&str]) -> String {
    let declared: String = inputs
        .iter()
        .map(|input| format!("  {input}: {{ description: of the real one }}\n"))
        .collect();
    let printed: String = inputs
        .iter()
        .map(|input| format!(" {input}=[${{{{ inputs.{input} }}}}]"))
        .collect();
    let inputs = if declared.is_empty() {
        String::new()
    } else {
        format!("inputs:\n{declared}")
    };
    format!(
        "name: stand-in\ndescription: Shows what it is given.\n{inputs}runs:\n  using: composite\n  steps:\n    \
         - shell: sh\n      env: {{ GIVEN: \"{printed}\" }}\n      run: echo \"stand-in:$GIVEN\"\n"
    )
}

/// What the page's workflow gives FlakeHub's action for an event, if it comes to that.
fn published(event: impl Fn(&Caller) -> Event) -> Option<String> {
    let workflow = &fences_of("docs/flakehub.md")[0];
    let cache = Cache::start(&[]);
    let push = stand_in(&["visibility", "rolling", "tag"]);
    let caller = Caller::new(&whole(&workflow.text))
        .with_flake(&flake())
        .with_secret("ATTIC_TOKEN", &cache.token)
        .with_variable("ATTIC_SERVER", &cache.url)
        .with_variable("ATTIC_PUBLIC_KEY", &cache.key)
        .with_repository(
            "DeterminateSystems/nix-installer-action@v21",
            &[("action.yml", &stand_in(&[]))],
        )
        .with_repository(
            "DeterminateSystems/flakehub-push@v5",
            &[("action.yml", &push)],
        );
    let ran = caller.run(&event(&caller));
    assert_eq!(ran.code, 0, "{}", ran.log());
    let log = ran.log();
    let mut lines = log.lines();
    let given = lines.find_map(|line| line.strip_prefix("stand-in: visibility="));
    given.map(str::to_owned)
}

#[test]
fn the_workflow_for_flakehub_publishes_what_the_output_allows() {
    std::thread::scope(|scope| {
        let rolling = scope.spawn(|| published(|caller| caller.push("refs/heads/main")));
        let versioned = scope.spawn(|| published(|caller| caller.push("refs/tags/v1.0.0")));
        let nothing = scope.spawn(|| published(|caller| caller.pull_request(CALLER)));
        let expected = "[unlisted] rolling=[true] tag=[]";
        assert_eq!(rolling.join().unwrap().as_deref(), Some(expected));
        let expected = "[unlisted] rolling=[false] tag=[v1.0.0]";
        assert_eq!(versioned.join().unwrap().as_deref(), Some(expected));
        assert_eq!(nothing.join().unwrap(), None);
    });
}
