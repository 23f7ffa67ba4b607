//! `flywheel namespace-trial` through the front door. What it finds on each machine is in `tests/machines`.

use crate::world::Flywheel;

#[test]
fn it_says_nothing_or_what_forbids_namespaces_and_makes_nothing() {
    let help = Flywheel::new(&["--help"]).run();
    assert!(!help.stdout.contains("namespace-trial"));
    let tools = tempfile::tempdir().unwrap();
    let ran = Flywheel::new(&["namespace-trial"])
        .env("RUNNER_TOOL_CACHE", tools.path().to_str().unwrap())
        .run();
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    let lines = ran.stdout.lines().count();
    assert!(matches!(lines, 0 | 2), "{}", ran.stdout);
    assert_eq!(std::fs::read_dir(tools.path()).unwrap().count(), 0);
}
