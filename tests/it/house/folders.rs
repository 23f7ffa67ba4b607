//! No test shares a folder with another one, or with a `flywheel` that runs on the same machine.

use std::ffi::OsStr;

use super::source::{Source, files};
use super::{banned, hold};
use crate::world::{Flywheel, folders};

#[test]
fn a_run_is_given_no_folder_of_the_machine() {
    for run in [Flywheel::new(&[]), Flywheel::in_job(&[])] {
        let command = run.command();
        let variables: Vec<(&OsStr, &OsStr)> = command
            .get_envs()
            .filter_map(|(name, value)| Some((name, value?)))
            .collect();
        let top = run.folder.path();
        assert_eq!(
            folders::shared(variables.clone(), top),
            Vec::<String>::new()
        );
        let machine = [(OsStr::new("TMPDIR"), OsStr::new("/tmp"))];
        assert_eq!(
            folders::shared(variables.into_iter().chain(machine), top),
            ["TMPDIR=/tmp"],
            "a folder of the machine is noticed"
        );
    }
}

#[test]
fn only_the_harness_clears_the_environment_of_a_child() {
    let real: Vec<Source> = [files("tests", ".rs"), files("benches", ".rs")].concat();
    let rule = |files: &[Source]| {
        banned(
            files,
            &["env_clear", "temp_dir"],
            |file| file.name == "tests/it/world/folders.rs",
            "`folders::isolate` clears the environment, and gives the child folders of its own",
        )
    };
    let planted = [
        Source::planted("tests/real/x.rs", "command.env_clear();"),
        Source::planted("tests/it/x.rs", "let folder = std::env::temp_dir();"),
    ];
    hold(rule, real, &planted);
}
