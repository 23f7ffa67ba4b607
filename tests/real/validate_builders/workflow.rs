//! The canary in workflows, under real act: what needs it runs only if the builder is healthy.

use super::{FLAKE, NIX_CONFIG, SMALL};
use crate::world::act::Caller;
use crate::world::cache::Cache;

/// The action that the reusable workflow checks out with.
const CHECKOUT: &str = "actions/checkout@de0fac2e4500dabe0009e67214ff5f5447ce83dd";

const BY_ACTION: &str = r#"
on: push
jobs:
  canary:
    runs-on: ubuntu-latest
    outputs:
      cold: ${{ steps.canary.outputs.cold-start-seconds }}
    steps:
      - uses: actions/checkout@v6
      - id: canary
        uses: octo-org/flywheel/actions/validate-builders@main
        with: { package: ".#default" }
  deploy:
    needs: canary
    runs-on: ubuntu-latest
    steps:
      - id: deploy
        env: { COLD: "${{ needs.canary.outputs.cold }}" }
        run: echo "deployed after $COLD s"
"#;

const BY_WORKFLOW: &str = r#"
on: push
jobs:
  canary:
    uses: octo-org/flywheel/.github/workflows/canary.yml@main
    with:
      runs-on: ubuntu-latest
      package: .#default
      required: cache
      push-cache: "true"
      flywheel-repository: octo-org/flywheel
      flywheel-ref: main
    secrets:
      ATTIC_TOKEN: ${{ secrets.ATTIC_TOKEN }}
  deploy:
    needs: canary
    runs-on: ubuntu-latest
    steps:
      - env: { COLD: "${{ needs.canary.outputs.cold-start-seconds }}" }
        run: echo "deployed after $COLD s"
"#;

/// A builder with so much memory, as its class wants.
fn caller(workflow: &str, memory: &str) -> Caller {
    let caller = Caller::new(workflow)
        .with_flake(FLAKE)
        .with_env("NIX_CONFIG", NIX_CONFIG);
    caller.with_file("flywheel.yml", &SMALL.replace("64MiB", memory))
}

#[test]
fn a_deployment_waits_for_the_canary() {
    for (healthy, memory) in [(true, "64MiB"), (false, "900TiB")] {
        let caller = caller(BY_ACTION, memory);
        let ran = caller.run(&caller.push("refs/heads/main"));
        let canary = ran.step("canary", "canary");
        assert_eq!(
            canary.outputs["healthy"],
            healthy.to_string(),
            "{}",
            ran.log()
        );
        assert_eq!(
            canary.outputs["broken-layer"],
            if healthy { "" } else { "memory" },
            "{}",
            ran.log()
        );
        assert_eq!(
            ran.jobs["canary"],
            if healthy { "success" } else { "failure" },
            "{}",
            ran.log()
        );
        assert_eq!(
            ran.log().contains("deployed after"),
            healthy,
            "{}",
            ran.log()
        );
        assert_eq!(ran.code == 0, healthy);
        assert!(
            canary.summary.contains("Builder health"),
            "{}",
            canary.summary
        );
    }
}

#[test]
fn a_deployment_waits_for_the_reusable_workflow() {
    for healthy in [true, false] {
        let mut cache = Cache::start(&[]);
        if !healthy {
            cache.kill();
        }
        let caller = caller(BY_WORKFLOW, "64MiB")
            .with_checkout(CHECKOUT)
            .with_secret("ATTIC_TOKEN", &cache.token);
        let caller = caller
            .with_env("ATTIC_SERVER", &cache.url)
            .with_env("ATTIC_PUBLIC_KEY", &cache.key);
        let ran = caller.run(&caller.push("refs/heads/main"));
        assert_eq!(ran.code == 0, healthy, "{}", ran.raw);
        // Act prints no number where the output was not handed on.
        let deployed = ran
            .log()
            .lines()
            .any(|line| line.contains("deployed after 0.") || line.contains("deployed after 1."));
        assert_eq!(deployed, healthy, "{}", ran.log());
        if healthy {
            assert_eq!(
                cache.names().len(),
                1,
                "the canary wrote and read back: {:?}",
                cache.names()
            );
        } else {
            assert!(
                ran.log().contains("is broken at `cache-connect`"),
                "{}",
                ran.log()
            );
        }
    }
}
