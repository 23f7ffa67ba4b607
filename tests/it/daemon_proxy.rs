//! `flywheel daemon-proxy` through the front door. With the daemon it is in the real suite.

use std::path::Path;

use crate::world::Flywheel;

#[test]
fn it_is_for_jobs_and_not_in_the_help() {
    let help = Flywheel::new(&["--help"]).run();
    assert_eq!(help.code, 0);
    assert!(help.stdout.contains("watch-store") && !help.stdout.contains("daemon-proxy"));
}

#[test]
fn by_hand_it_ends_at_once_and_touches_nothing() {
    let run = Flywheel::new(&["daemon-proxy", "/link", "/daemon", "socket"]);
    let socket = run.path("socket");
    std::fs::write(&socket, "a file").unwrap();
    let ran = run.run();
    assert_eq!(ran.code, 69, "{}{}", ran.stdout, ran.stderr);
    assert!(socket.exists() && !Path::new("/link").exists());
    assert_eq!(Flywheel::new(&["daemon-proxy"]).run().code, 64);
}
