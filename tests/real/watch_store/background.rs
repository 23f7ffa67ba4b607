//! `watch-store` as the background step of docs/watch-store.md: the steps of the page one after the other, under the rules of
//! GitHub's runner for `background` and `cancel`.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_norway::Value;

use super::{Host, Job, good};
use crate::world::cache::Cache;
use crate::world::{PATH, flywheel, processes, root};

/// The steps of the page's workflow that has a step in the background.
fn steps() -> Vec<Value> {
    let page = fs::read_to_string(root().join("docs/watch-store.md")).unwrap();
    let snippets = page.split("```yaml\n").skip(1);
    let snippet = snippets
        .filter_map(|rest| rest.split("```").next())
        .find(|snippet| snippet.contains("background: true"))
        .expect("the page has a background step");
    let yaml: Value = serde_norway::from_str(snippet).unwrap();
    yaml["steps"].as_sequence().unwrap().clone()
}

/// What a step is given, as the action hands it on.
fn inputs(step: &Value) -> Vec<(String, String)> {
    let with = step["with"].as_mapping().unwrap().iter();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    // What the repository has set; here the machine has it.
    let own = with.filter(|(_, value)| !text(value).starts_with("${{"));
    own.map(|(name, value)| {
        let name = text(name).to_uppercase().replace('-', "_");
        (format!("FLYWHEEL_{name}"), text(value))
    })
    .collect()
}

/// A step's shell, with the binary on `PATH` and the settings of a machine that has Nix.
fn shell(job: &Job<'_>, script: &str) -> Command {
    let mut step = job.step(Path::new("/bin/sh"), &["-ec", script]);
    let bin = job.folder.join("bin");
    let config = "experimental-features = nix-command flakes\nbuild-users-group =\nsubstituters =";
    step.env("PATH", format!("{}:{PATH}", bin.display()))
        .env("NIX_CONFIG", config);
    step
}

/// Signals a step as `cancel` does; whether it ended well before the runner would have killed it.
fn cancel(step: &mut Child) -> bool {
    let began = Instant::now();
    processes::signal(i32::try_from(step.id()).unwrap(), Signal::INT);
    let ended = processes::ended(step, Duration::from_millis(7500));
    ended.is_some_and(|status| status.success()) && began.elapsed() < Duration::from_secs(6)
}

#[test]
fn a_background_step_publishes_until_it_is_cancelled() {
    let (host, cache) = (Host::new(), Cache::start(&[]));
    let job = host.job(&cache);
    fs::create_dir(job.folder.join("bin")).unwrap();
    std::os::unix::fs::symlink(flywheel(), job.folder.join("bin/flywheel")).unwrap();
    let mut background = None;
    for step in steps() {
        let is_watch = step["uses"]
            .as_str()
            .is_some_and(|uses| uses.contains("watch-store"));
        if is_watch {
            assert_eq!(step["background"], Value::Bool(true));
            let mut watch = job.step(&flywheel(), &["watch-store"]);
            let watch = watch
                .envs(inputs(&step))
                .env("ATTIC_TOKEN", &cache.token)
                .stdout(fs::File::create(job.folder.join("log")).unwrap());
            background = Some((step["id"].clone(), watch.spawn().unwrap()));
        } else if let Some(script) = step["run"].as_str() {
            good(&shell(&job, script).output().unwrap());
        } else if let Some(id) = step.get("cancel") {
            let (of, mut watch) = background.take().expect("a step that was started");
            assert_eq!(*id, of);
            let log = || fs::read_to_string(job.folder.join("log")).unwrap();
            assert!(cancel(&mut watch), "{}", log());
        }
    }
    assert!(background.is_none(), "the last step ends it");
    for name in ["app", "lib", "base"] {
        assert!(
            cache.names().contains(&name.to_owned()),
            "{name}: {:?}",
            cache.names()
        );
    }
    assert_eq!(job.output("lost"), "0");
}
