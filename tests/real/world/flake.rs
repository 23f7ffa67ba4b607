//! A flake that builds without a network, sandboxed, with a static busybox from its own tree.

use std::fs;
use std::path::Path;

use super::need;

/// `default` (three outputs in a chain), `partial` (a part that builds and a part that fails),
/// `slow` (a quick output, then one that takes ten minutes).
pub const FLAKE: &str = r#"{
  outputs = { self }: let
    system = "x86_64-linux";
    bin = builtins.path { path = ./bin; name = "bin"; };
    run = name: script: derivation {
      inherit name system;
      builder = "${bin}/busybox";
      args = [ "sh" "-euc" script ];
    };
    base = run "base" "echo base > $out";
    lib = run "lib" "echo ${base} > $out";
    app = run "app" "echo ${lib} > $out";
    good = run "good" "echo good > $out";
    fails = run "fails" "echo ${good}; exit 1";
    quick = run "quick" "echo quick > $out";
    slow = run "slow" "echo ${quick}; echo 'slow has begun'; ${bin}/busybox sleep 600; echo slow > $out";
  in {
    packages.${system} = { inherit lib app fails slow; default = app; };
  };
}
"#;

/// Writes the flake and its busybox into `folder`.
pub fn write(folder: &Path) {
    fs::write(folder.join("flake.nix"), FLAKE).unwrap();
    fs::create_dir_all(folder.join("bin")).unwrap();
    fs::copy(
        need("busybox", "apt-get install busybox-static"),
        folder.join("bin/busybox"),
    )
    .unwrap();
}

/// The same with a check of the flake that takes ten minutes.
pub fn write_slow_check(folder: &Path) {
    write(folder);
    let checks = "checks.${system} = { inherit slow; };\n    packages.";
    let text = FLAKE.replacen("packages.", checks, 1);
    fs::write(folder.join("flake.nix"), text).unwrap();
}
