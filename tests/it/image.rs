//! `flywheel image` through the front door: plans and their reasons, what is wrong with documents, approvals, schemas.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use serde_json::{Value, json};

use crate::explain::events::{event, push};
use crate::explain::job_of;
use crate::world::{Flywheel, Ran};

/// The platform that the default sizes are for.
const ARM: &str = "--platform=linux/arm64";

/// A run with a context `web` that has these files.
fn with_files(run: Flywheel, files: &[(&str, &str)]) -> Flywheel {
    fs::create_dir_all(run.path("web")).unwrap();
    for (name, text) in files {
        fs::write(run.path(name), text).unwrap();
    }
    run
}

fn plan(arguments: &[&str], files: &[(&str, &str)]) -> Flywheel {
    let arguments = [&["image", "plan", "web"], arguments].concat();
    with_files(Flywheel::new(&arguments), files)
}

fn json_of(ran: &Ran) -> Value {
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    serde_json::from_str(&ran.stdout).unwrap()
}

fn planned(arguments: &[&str], files: &[(&str, &str)]) -> Value {
    json_of(&plan(&[&["--format=json"], arguments].concat(), files).run())
}

/// A line of a history: a run of the last stage without its dependencies.
fn run_line(mem_p95: f64) -> String {
    let run = json!({
        "at": 1, "target": "", "dependencies": "miss", "cpu_p95": 3.2, "mem_p95": mem_p95, "minutes": 10.0,
    });
    format!("{}\n", json!({ "run": run }))
}

#[test]
fn a_plan_says_which_source_decided_and_why() {
    let spec = "cpu = 4\nmemory_gb = 6.5\ntime_budget_min = 20\n";
    let ran = plan(
        &[ARM],
        &[("web/Cargo.toml", ""), ("web/.build-spec.toml", spec)],
    )
    .run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    insta::assert_snapshot!(ran.stdout, @r"
    workspace web, the last stage, linux/arm64
    size: cax21 (4 CPU, 8 GB, linux/arm64)
    because: `.build-spec.toml` asks for 4 CPU, 7 GB (explicit)
    history: history has 0 runs that are alike, and 5 are needed
    time: 20 min at most
    ");
    let by_language = planned(&[ARM], &[("web/go.mod", "")]);
    assert_eq!(by_language["source"], "language");
    assert_eq!(by_language["size"]["name"], "cax11");
    assert_eq!(by_language["time_budget_min"], 30);
}

#[test]
fn each_format_of_a_build_spec_means_the_same() {
    for (name, text) in [
        ("web/.build-spec.json", r#"{"runner_type": "cax31"}"#),
        ("web/.build-spec.toml", "runner_type = 'cax31'"),
        ("web/.build-spec.yml", "runner_type: cax31"),
    ] {
        let plan = planned(&[ARM], &[(name, text)]);
        assert_eq!(plan["size"]["name"], "cax31", "{name}");
        assert_eq!(plan["source"], "explicit", "{name}");
    }
}

#[test]
fn nickel_is_the_users_own_program() {
    let files = [("web/.build-spec.ncl", "{ runner_type = \"cax41\" }")];
    let ran = plan(&[ARM], &files).env("PATH", "/nowhere").run();
    assert_eq!(ran.code, 64, "{}", ran.stdout);
    assert!(
        ran.stderr.contains("no `nickel` on `PATH`") && ran.stderr.contains("`.json`"),
        "{}",
        ran.stderr
    );
    let run = plan(&[ARM, "--format=json"], &files);
    let nickel = run.path("nickel");
    fs::write(
        &nickel,
        "#!/bin/sh\nsed 's/ = /: /; s/runner_type/\"&\"/' \"$4\"\n",
    )
    .unwrap();
    fs::set_permissions(&nickel, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", run.folder.path().display());
    let plan = json_of(&run.env("PATH", &path).run());
    assert_eq!(plan["size"]["name"], "cax41");
}

#[test]
fn what_is_wrong_is_refused_with_its_name() {
    let sizes = r#"{"sizes": [{"name": "big", "cpu": 8, "memory_gb": 16, "architecture": "amd46", "price": 1}]}"#;
    for (arguments, files, says) in [
        (
            &[ARM][..],
            &[("web/.build-spec.yml", "runner_typ: cax21")][..],
            &[
                "`runner_typ` is no field here",
                "Did you mean `runner_type`?",
            ][..],
        ),
        (
            &[ARM],
            &[("web/.build-spec.yml", "cpu: 4")],
            &["`memory_gb` is missing"],
        ),
        (
            &[ARM],
            &[("web/.build-spec.yml", "runner_type: cax99")],
            &["there is no size `cax99`", "`cax11` (linux/arm64)"],
        ),
        (
            &["--platform=linux/amd64"],
            &[("web/.build-spec.yml", "runner_type: cax21")],
            &[
                "`cax21` is linux/arm64 and the image is for linux/amd64",
                "--emulate linux/arm64",
            ],
        ),
        (
            &[ARM],
            &[
                ("web/.build-spec.yml", "{}"),
                ("web/.build-spec.json", "{}"),
            ],
            &[".build-spec.json, .build-spec.yml: stand beside each other"],
        ),
        (
            &[ARM, "--sizes=sizes.json"],
            &[("sizes.json", sizes)],
            &[
                "`sizes[0].architecture` must be one of",
                "Did you mean `amd64`?",
            ],
        ),
        (
            &[ARM, "--directives=d.txt"],
            &[("d.txt", "")],
            &["`--directives`", "ending"],
        ),
        (
            &[ARM, "--workspace=We b"],
            &[],
            &["`--workspace` must be a name"],
        ),
        (
            &[ARM, "--policy=p59"],
            &[],
            &["`--policy`", "Did you mean `p95`?"],
        ),
    ] {
        let ran = plan(arguments, files).run();
        assert_eq!(ran.code, 64, "{}{}", ran.stdout, ran.stderr);
        for text in says {
            assert!(ran.stderr.contains(text), "{text}: {}", ran.stderr);
        }
    }
    let ran = Flywheel::new(&["image", "plan", "nowhere"]).run();
    assert_eq!(ran.code, 64);
    assert!(ran.stderr.contains("argument `CONTEXT`"), "{}", ran.stderr);
}

#[test]
fn a_link_in_a_context_shows_no_other_file() {
    let run = plan(&[ARM], &[("other", "the words of another file")]);
    std::os::unix::fs::symlink("../other", run.path("web/.build-spec.yml")).unwrap();
    let ran = run.run();
    assert_eq!(ran.code, 64);
    assert!(
        ran.stderr.contains("is a symbolic link") && !ran.stderr.contains("the words"),
        "{}",
        ran.stderr
    );
}

#[test]
fn an_image_for_amd64_gets_no_arm_runner_unless_emulation_is_named() {
    let plan = planned(&["--platform=linux/amd64"], &[]);
    assert_eq!(plan["size"], Value::Null);
    let reason = plan["no_size"].as_str().unwrap();
    assert!(reason.starts_with("no size is linux/amd64"), "{reason}");
    let emulated = ["--platform=linux/amd64", "--emulate=linux/arm64"];
    assert_eq!(planned(&emulated, &[])["size"]["name"], "cax11");
    let sizes =
        "sizes = [{ name = 'big', cpu = 8, memory_gb = 16, architecture = 'amd64', price = 3 }]";
    let arguments = ["--platform=linux/amd64", "--sizes=sizes.toml"];
    let plan = planned(&arguments, &[("sizes.toml", sizes)]);
    assert_eq!(plan["size"]["name"], "big");
}

#[test]
fn history_is_advice_until_it_is_approved_and_then_the_cap_holds() {
    let lines = run_line(6.1).repeat(5);
    let files = [("web/go.mod", ""), ("h/web.jsonl", lines.as_str())];
    let run = |arguments: &[&str]| Flywheel::new(&[arguments, &["--history=h"]].concat());
    let plan = run(&["image", "plan", "web", ARM, "--format=json"]);
    fs::create_dir(plan.path("h")).unwrap();
    let plan = with_files(plan, &files);
    let before = json_of(&plan.run());
    assert_eq!(before["source"], "language");
    let advice = before["history"].as_str().unwrap();
    assert!(
        advice.contains("4 CPU, 8 GB") && advice.contains("image sizing approve"),
        "{advice}"
    );
    assert_eq!(before["choices"].as_array().unwrap().len(), 4);

    let approve = |cpu: &str, memory: &str| {
        let history = format!("--history={}", plan.path("h").display());
        let approve = ["image", "sizing", "approve", "--workspace=web", &history];
        let most = ["--cpu", cpu, "--memory-gb", memory];
        let ran = Flywheel::new(&[&approve[..], &most].concat()).run();
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    };
    approve("16", "32");
    let approved = json_of(&plan.run());
    assert_eq!(approved["source"], "history");
    // The numbers of the contract: 3.2 and 6.1 give 4 and 8.
    assert_eq!(approved["need"], json!({"cpu": 4, "memory_gb": 8}));
    assert_eq!(approved["size"]["name"], "cax21");
    approve("2", "4");
    let capped = json_of(&plan.run());
    assert_eq!(capped["size"]["name"], "cax11");
    assert!(
        capped["reason"]
            .as_str()
            .unwrap()
            .contains("at most 2 CPU, 4 GB is approved")
    );
}

#[test]
fn sizing_shows_what_it_knows_and_approves_no_less_than_the_floor() {
    let show = Flywheel::new(&["image", "sizing", "show", "--workspace=web", "--history=h"]);
    fs::create_dir(show.path("h")).unwrap();
    assert_eq!(show.run().stdout, "web: no build has a history yet\n");
    let text = format!("{}torn", run_line(6.1).repeat(5));
    fs::write(show.path("h/web.jsonl"), text).unwrap();
    insta::assert_snapshot!(show.run().stdout, @r"
    web, the last stage
      dependencies hit: 0 runs, and 5 are needed
      dependencies miss: P95 of 5 runs is 3.2 CPU, 6.1 GB; with a fifth more, rounded up, and at least 2 CPU, 4 GB: 4 CPU, 8 GB
      approved: nothing; what history says is advice
    1 line of `h/web.jsonl` could not be read
    ");
    let approve = [
        "image",
        "sizing",
        "approve",
        "--workspace=web",
        "--history=h",
    ];
    let low = Flywheel::new(&[&approve[..], &["--cpu=1", "--memory-gb=4"]].concat()).run();
    assert_eq!(low.code, 64);
    assert!(low.stderr.contains("`--cpu`"), "{}", low.stderr);
    let nowhere = [
        "image",
        "sizing",
        "approve",
        "--workspace=web",
        "--history=/proc/x",
    ];
    let nowhere = Flywheel::new(&[&nowhere[..], &["--cpu=2", "--memory-gb=4"]].concat()).run();
    assert_eq!(nowhere.code, 64);
    assert!(
        nowhere
            .stderr
            .contains("`--history` names `/proc/x/web.jsonl`, which cannot be written"),
        "{}",
        nowhere.stderr
    );
    let nameless = Flywheel::new(&["image", "sizing", "show", "--history=h"]).run();
    assert_eq!(nameless.code, 64);
}

#[test]
fn a_history_that_cannot_be_read_costs_a_warning_and_not_the_plan() {
    let run = plan(&[ARM, "--history=h", "--format=json"], &[]);
    fs::create_dir_all(run.path("h/web.jsonl")).unwrap();
    let ran = run.run();
    assert!(ran.stderr.contains("no history is used"), "{}", ran.stderr);
    assert_eq!(json_of(&ran)["source"], "language");
}

#[test]
fn only_a_job_that_may_publish_writes_the_caches_of_ci() {
    let directives = |actor: &str| {
        format!(
            "workspace: web\nartifact: {{ image: r.example/web }}\ncompute_provider: docker_local\nregistry_provider: zot\ncache_policy: {{ actor: {actor}, disposition: export }}\n"
        )
    };
    let arguments = [
        "image",
        "plan",
        "web",
        ARM,
        "--format=json",
        "--directives=d.yml",
    ];
    let caches = |run: Flywheel, actor: &str| {
        let run = with_files(run, &[("d.yml", &directives(actor))]);
        let plan = json_of(&run.run());
        let written = plan["caches"]["export"]["namespace"].as_str();
        let read = plan["caches"]["imports"].to_string();
        (read, written.unwrap_or("-").to_owned())
    };
    let here = || Flywheel::new(&arguments);
    let agent = "agent, actor_id: octo-cat";
    let ci = r#"["ci/web"]"#.to_owned();
    let both = r#"["ci/web","dev/octo__cat-web"]"#.to_owned();
    assert_eq!(
        caches(job_of(&push(), &arguments), "ci"),
        (ci.clone(), "ci/web".into())
    );
    assert_eq!(
        caches(job_of(&push(), &arguments), agent),
        (ci.clone(), "-".into())
    );
    let request = event("pull_request", &json!({ "pull_request": {} })).on("refs/pull/7/merge");
    // With a registry's login at hand, too.
    let request = || job_of(&request, &arguments).env("DOCKER_CONFIG", "/x");
    let doubtful = || Flywheel::in_job(&arguments);
    for actor in ["ci", agent] {
        assert_eq!(caches(request(), actor), (ci.clone(), "-".into()));
        assert_eq!(caches(doubtful(), actor), (ci.clone(), "-".into()));
    }
    assert_eq!(caches(here(), "ci"), (ci, "-".into()));
    assert_eq!(caches(here(), agent), (both, "dev/octo__cat-web".into()));
}

#[test]
fn schemas_are_json_and_nickel() {
    for name in ["build-directives", "build-spec", "cache-policy", "sizes"] {
        let schema = json_of(&Flywheel::new(&["image", "schema", name]).run());
        assert_eq!(schema["additionalProperties"], false, "{name}");
        assert!(jsonschema::validator_for(&schema).is_ok(), "{name}");
    }
    let nickel = Flywheel::new(&["image", "schema", "--nickel"]).run();
    assert!(nickel.stdout.contains("make_ci_build | not_exported"));
    let wrong = Flywheel::new(&["image", "schema", "build-spek"]).run();
    assert_eq!(wrong.code, 64);
    assert!(wrong.stderr.contains("build-spec"), "{}", wrong.stderr);
}
