//! `watch-store` in a shell of a person's, which outlives every watch: what it was given ends with the watch.

use super::{Host, good};
use crate::world::{PATH, flake, flywheel, folders, need, with_private_nix};

const SHELL: &str = r#"
set -eu
config() { nix show-config 2>/dev/null || nix config show; }
names_the_cache() { config | grep -q '^substituters.*127\.0\.0\.1'; }
# With `set -e`, `!` before a command would hide what it says.
names_none() { if names_the_cache; then echo 'the cache is still named'; exit 1; fi; }
start() { eval "$("$FLYWHEEL" watch-store start --publish --embedded-cache "$PWD/../cache")"; }

start
names_the_cache
nix build --no-link path:.#app
"$FLYWHEEL" watch-store finish >../undo
names_none
nix build --no-link path:.#slow 2>&1 --dry-run
eval "$(cat ../undo)"
[ "$NIX_CONFIG" = "$OWN" ]

unset NIX_CONFIG
start
names_the_cache
eval "$("$FLYWHEEL" watch-store finish)"
[ -z "${NIX_CONFIG+set}" ]

export NIX_CONFIG=$OWN
start
names_the_cache
kill -9 "$("$FLYWHEEL" watch-store status --format json | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')"
for _ in $(seq 100); do names_the_cache || break; sleep 0.1; done
names_none
# Its settings that are not about the cache stay.
nix build --no-link path:.#lib
eval "$("$FLYWHEEL" watch-store finish --publish --embedded-cache "$PWD/../cache")"
echo over
"#;

#[test]
fn a_shell_never_names_a_cache_that_is_gone() {
    let host = Host::new();
    let folder = host.folder.path();
    let work = folder.join("work");
    std::fs::create_dir(&work).unwrap();
    flake::write(&work);
    need("nix", "apt-get install nix-bin");
    let own = "build-users-group =\nexperimental-features = nix-command flakes\nsandbox = false";
    let mut shell = with_private_nix(&folder.join("nix"), &need("bash", "apt-get install bash"));
    let output = folders::isolate(&mut shell, folder)
        .args(["-c", SHELL])
        .current_dir(&work)
        .env("PATH", PATH)
        .env("FLYWHEEL", flywheel())
        .env("OWN", own)
        .env("NIX_CONFIG", own)
        .output()
        .unwrap();
    let text = good(&output);
    assert!(text.contains("over"), "{text}");
    assert_eq!(host.journals(), 0, "{text}");
}
