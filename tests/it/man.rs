//! `flywheel man`: a page for each verb.

use crate::cli::{flags, help, verbs};
use crate::world::Flywheel;

#[test]
fn every_verb_has_a_man_page_with_its_flags_and_the_exit_codes() {
    let run = Flywheel::new(&["man", "share/man1"]);
    let ran = run.run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    for verb in verbs() {
        let name = [&["flywheel".to_owned()], &verb[..]].concat().join("-");
        // Roff writes a hyphen as `\-`.
        let page = run.read(&format!("share/man1/{name}.1")).replace('\\', "");
        assert!(page.contains("Exit codes:"), "{name}");
        for flag in flags(&help(&verb)) {
            assert!(page.contains(&flag.name), "{name} {}", flag.name);
        }
    }
    let ran = Flywheel::new(&["man", "/dev/null/x"]).run();
    assert_eq!(ran.code, 64, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("argument `FOLDER` names"),
        "{}",
        ran.stderr
    );
}
