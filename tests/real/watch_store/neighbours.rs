//! Two jobs with `watch-store` at once on one host.

use super::{Host, good};
use crate::world::cache::Cache;

#[test]
fn two_jobs_on_one_host_publish_their_own() {
    let (host, mine, theirs) = (Host::new(), Cache::start(&[]), Cache::start(&[]));
    let (one, other) = (host.job(&mine), host.job(&theirs));
    one.start();
    other.start();
    std::thread::scope(|scope| {
        scope.spawn(|| good(&one.nix(&["build", "--no-link", "path:.#app"])));
        // It fails, after a part of its own.
        scope.spawn(|| other.nix(&["build", "--no-link", "path:.#fails"]));
    });
    good(&one.watch(&["finish"]));
    good(&other.watch(&["finish"]));
    assert_eq!(
        (one.output("built"), other.output("built")),
        ("3".to_owned(), "1".to_owned())
    );
    assert!(mine.names().contains(&"app".to_owned()) && !mine.names().contains(&"good".to_owned()));
    assert!(
        theirs.names().contains(&"good".to_owned()) && !theirs.names().contains(&"app".to_owned())
    );
}
