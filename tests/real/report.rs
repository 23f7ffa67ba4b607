//! What a job's page shows of a build that failed. The three versions of Nix keep its log, whatever they print.

use crate::world::versions::{VERSIONS, run};

/// A good build, one that fails, and one that needs that. The log of what failed is long, and not all ASCII.
const SCRIPT: &str = r#"
cat >flake.nix <<'X'
{
  outputs = { self }:
    let
      make = name: script: derivation {
        inherit name;
        system = "x86_64-linux";
        builder = "/bin/bash";
        args = [ "-c" script ];
      };
      bad = make "bad-1.0" "i=0; while [ $i -lt 90 ]; do i=$((i+1)); echo line $i; done; echo '``` é <b>'; exit 3";
    in {
      packages.x86_64-linux = {
        good = make "good" "echo > $out";
        inherit bad;
        needs = make "needs" "echo ${bad} > $out";
      };
    };
}
X
export GITHUB_ACTIONS=true GITHUB_STEP_SUMMARY=/out/summary GITHUB_OUTPUT=/out/outputs
nix build path:.#bad 2>/dev/null
sleep 0.1
/fly/flywheel nix-job --command 'nix build --keep-going --no-link path:.#good path:.#needs'
echo "exit $?"
"#;

#[test]
fn a_build_that_failed_is_named_with_the_end_of_its_log() {
    for version in VERSIONS {
        let ran = run(version, SCRIPT);
        assert!(ran.log.contains("\nexit 1\n"), "{version}\n{}", ran.log);
        let errors: Vec<&str> = ran
            .log
            .lines()
            .filter(|line| line.starts_with("::error "))
            .collect();
        let [error] = errors[..] else {
            panic!("{version}: {errors:#?}\n{}", ran.log);
        };
        assert!(
            error.starts_with("::error title=bad-1.0::the build of /nix/store/"),
            "{error}"
        );
        assert!(
            error.ends_with("-bad-1.0.drv failed; its log ends: ``` é <b>"),
            "{error}"
        );
        let summary = ran.file("summary");
        let heading = "### ❌ Flywheel: the build of `bad-1.0` failed (exit code 1)\n";
        assert!(summary.starts_with(heading), "{version}\n{summary}");
        for text in [
            "\nline 90\n``` é <b>\n````\n",
            "`nix log /nix/store/",
            "Not publishing: ",
        ] {
            assert!(summary.contains(text), "{version}: {text}\n{summary}");
        }
        assert!(!summary.contains("\nline 60\n"), "{version}\n{summary}");
        assert!(
            !summary.contains("needs"),
            "{version}: it was not built\n{summary}"
        );
    }
}
