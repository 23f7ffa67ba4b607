//! The greedy topology under real act: what overlaps, what is kept, and what waits.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use crate::bazel::{Answer, Server};
use crate::world::act::{Caller, Ran};
use crate::world::cache::Cache;
use crate::world::flake::FLAKE;

/// The action that the workflow checks Flywheel out with.
const CHECKOUT: &str = "actions/checkout@de0fac2e4500dabe0009e67214ff5f5447ce83dd";

/// A caller whose build and validation each wait for the other to have begun, for half a minute: one
/// after the other they would both fail.
fn caller(cache: &Cache, meet: &Path, validated: &str) -> Caller {
    let meets = |own: &str, other: &str| {
        format!(
            "touch $MEET/{own}; n=0; until [ -e $MEET/{other} ]; do n=$((n+1)); [ $n -lt 300 ] || exit 9; sleep 0.1; done"
        )
    };
    let workflow = format!(
        r#"
on: push
jobs:
  greedy:
    uses: octo-org/flywheel/.github/workflows/greedy.yml@main
    with:
      flywheel: octo-org/flywheel
      build: |
        {}
        nix build .#default
        touch $MEET/built
      validate: |
        {}
        {validated}
      deploy: ls $MEET > $MEET/deployed
    secrets:
      ATTIC_TOKEN: ${{{{ secrets.ATTIC_TOKEN }}}}
"#,
        meets("build", "validate"),
        meets("validate", "build")
    );
    Caller::new(&workflow)
        .with_flake(FLAKE)
        .with_checkout(CHECKOUT)
        .with_secret("ATTIC_TOKEN", &cache.token)
        .with_env("ATTIC_SERVER", &cache.url)
        .with_env("ATTIC_PUBLIC_KEY", &cache.key)
        .with_env("MEET", meet.to_str().unwrap())
}

fn run(caller: &Caller) -> Ran {
    caller.run(&caller.push("refs/heads/main"))
}

#[test]
fn build_and_validation_overlap_and_deployment_waits_for_both() {
    let (cache, meet) = (Cache::start(&[]), tempfile::tempdir().unwrap());
    let ran = run(&caller(&cache, meet.path(), "touch $MEET/validated"));
    assert_eq!(ran.code, 0, "{}", ran.raw);
    let deployed = std::fs::read_to_string(meet.path().join("deployed")).expect("it was deployed");
    assert!(
        deployed.contains("built\n") && deployed.contains("validated\n"),
        "{deployed}"
    );
    for name in ["app", "lib", "base"] {
        assert!(
            cache.names().contains(&name.to_owned()),
            "{name} is not among {:?}",
            cache.names()
        );
    }
}

#[test]
fn a_failed_validation_keeps_what_was_built_and_deploys_nothing() {
    let (cache, meet) = (Cache::start(&[]), tempfile::tempdir().unwrap());
    let ran = run(&caller(&cache, meet.path(), "exit 3"));
    assert_ne!(ran.code, 0, "{}", ran.raw);
    assert!(
        meet.path().join("built").exists(),
        "the build ended well:\n{}",
        ran.raw
    );
    assert!(!meet.path().join("deployed").exists(), "{}", ran.raw);
    for name in ["app", "lib", "base"] {
        assert!(
            cache.names().contains(&name.to_owned()),
            "{name} is not among {:?}",
            cache.names()
        );
    }
}

/// Writes down what it is called with. A real Bazel 4.2 was tried by hand: docs/bazel.md.
const BAZEL: &str = r#"#!/bin/sh
cp "${1#--bazelrc=}" "$MEET/bazelrc"
shift
echo "$*" >"$MEET/bazel"
"#;

/// A caller that has Bazel build against a cache as well.
fn with_bazel(cache: &Cache, meet: &Path, endpoint: &str) -> Caller {
    let workflow = format!(
        r#"
on: push
jobs:
  greedy:
    uses: octo-org/flywheel/.github/workflows/greedy.yml@main
    with:
      flywheel: octo-org/flywheel
      build: nix build .#lib
      validate: "true"
      deploy: ls $MEET > $MEET/deployed
      bazel-targets: //... -//slow/...
      bazel-remote-cache: {endpoint}
    secrets:
      ATTIC_TOKEN: ${{{{ secrets.ATTIC_TOKEN }}}}
"#
    );
    let bazel = meet.join("bin/bazel");
    std::fs::create_dir(meet.join("bin")).unwrap();
    std::fs::write(&bazel, BAZEL).unwrap();
    std::fs::set_permissions(&bazel, std::fs::Permissions::from_mode(0o755)).unwrap();
    let on_path = meet.join("on-path");
    std::fs::write(&on_path, format!("PATH={}/bin:$PATH\n", meet.display())).unwrap();
    Caller::new(&workflow)
        .with_flake(FLAKE)
        .with_file(
            "flywheel.yml",
            "version: 1\nshared-cache:\n  allow-localhost: true\n",
        )
        .with_checkout(CHECKOUT)
        .with_secret("ATTIC_TOKEN", &cache.token)
        .with_env("ATTIC_SERVER", &cache.url)
        .with_env("ATTIC_PUBLIC_KEY", &cache.key)
        .with_env("MEET", meet.to_str().unwrap())
        // Bash reads it before a script.
        .with_env("BASH_ENV", on_path.to_str().unwrap())
}

#[test]
fn bazel_reads_the_shared_cache_and_deployment_waits_for_it() {
    let (cache, meet) = (Cache::start(&[]), tempfile::tempdir().unwrap());
    let endpoint = Server::start(Answer::Http(404, "")).url("http");
    let ran = run(&with_bazel(&cache, meet.path(), &endpoint));
    assert_eq!(ran.code, 0, "{}", ran.raw);
    let read = |name: &str| std::fs::read_to_string(meet.path().join(name)).unwrap();
    assert_eq!(read("bazel"), "build -- //... -//slow/...\n");
    for line in [
        &format!("build --remote_cache={endpoint}\n"),
        "build --remote_upload_local_results=false\n",
        "build --disk_cache=\n",
    ] {
        assert!(
            read("bazelrc").contains(line),
            "{line}: {}",
            read("bazelrc")
        );
    }
    assert!(read("deployed").contains("bazel\n"), "{}", read("deployed"));
}

#[test]
fn without_its_shared_cache_bazel_does_not_begin_and_nothing_is_deployed() {
    let (cache, meet) = (Cache::start(&[]), tempfile::tempdir().unwrap());
    let endpoint = Server::start(Answer::Http(500, "")).url("http");
    let ran = run(&with_bazel(&cache, meet.path(), &endpoint));
    assert_ne!(ran.code, 0, "{}", ran.raw);
    for name in ["bazel", "deployed"] {
        assert!(!meet.path().join(name).exists(), "{name}: {}", ran.raw);
    }
    assert!(
        cache.names().contains(&"lib".to_owned()),
        "{:?}",
        cache.names()
    );
}
