//! What the daemon of a shared builder really does, whatever the settings of the job say.

use serde_json::Value;

use crate::world::versions::{VERSIONS, run};

/// Starts one daemon after the other, with the settings of a line, and has an ordinary user of it run the canary with
/// settings that say the opposite of the sandbox's.
const DAEMONS: &str = r#"
settings() { printf '%s\n' 'build-users-group = nixbld' 'substituters =' 'sandbox-fallback = false' "$@" >/etc/nix/nix.conf; }
canary() {
  settings "sandbox = $2" "experimental-features = nix-command flakes $3"
  nix-daemon --daemon >/tmp/daemon 2>&1 &
  daemon=$!
  for _ in $(seq 400); do [ -S /nix/var/nix/daemon-socket/socket ] && break; sleep 0.02; done
  (cd /area && setpriv --reuid 1000 --regid 1000 --clear-groups --inh-caps=-all \
    env HOME=/home/alice USER=alice NIX_REMOTE=daemon NIX_CONFIG="sandbox = $4
extra-experimental-features = nix-command flakes" /fly/flywheel validate-builders --report-file /area/$1.json) || :
  cp /area/$1.json /out/
  kill $daemon; wait $daemon || :
  rm -f /nix/var/nix/daemon-socket/socket
}
unset NIX_CONFIG
canary strict true '' false
canary relaxed relaxed ca-derivations true
canary off false '' true
"#;

#[test]
fn a_daemon_is_named_by_what_its_builds_show() {
    for version in VERSIONS {
        let ran = run(version, DAEMONS);
        let line = |name: &str| {
            let report: Value = serde_json::from_str(&ran.file(name)).unwrap();
            let checks = report["checks"].as_array().unwrap();
            let found = checks.iter().find(|check| check["name"] == "store-writers");
            found.unwrap()["text"].as_str().unwrap().to_owned()
        };
        let strict = line("strict.json");
        assert!(!strict.contains("the daemon"), "{version}: {strict}");
        assert!(!strict.contains("did not show"), "{version}: {strict}");
        let relaxed = line("relaxed.json");
        for words in ["(`sandbox = relaxed`)", "has `ca-derivations` on"] {
            assert!(relaxed.contains(words), "{version}: {relaxed}");
        }
        let off = line("off.json");
        assert!(
            off.contains("the daemon builds without a sandbox, "),
            "{version}: {off}\n{}",
            ran.log
        );
        assert!(!off.contains("ca-derivations"), "{version}: {off}");
    }
}
