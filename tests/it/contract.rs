//! `flywheel contract` through the front door: the print, the published schema, files and workflows.

use std::path::Path;

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::world::{Flywheel, Ran};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    std::fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn contract(arguments: &[&str]) -> Ran {
    Flywheel::new(&[&["contract"], arguments].concat()).run()
}

/// A run in a folder that has these files.
fn with_files(arguments: &[&str], files: &[(&str, &str)]) -> Ran {
    let run = Flywheel::new(&[&["contract"], arguments].concat());
    for (name, text) in files {
        std::fs::write(run.path(name), text).unwrap();
    }
    run.run()
}

fn printed(arguments: &[&str]) -> String {
    let ran = contract(arguments);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{arguments:?}");
    ran.stdout
}

fn example(arguments: &[&str]) -> String {
    let file = root().join("examples/flywheel.yml");
    printed(&[&["--contract-file", file.to_str().unwrap()], arguments].concat())
}

#[test]
fn the_page_is_what_the_binary_prints() {
    let page = printed(&["--format", "markdown"]);
    let file = root().join("docs/contract.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    let written = std::fs::read_to_string(file).unwrap_or_default();
    assert!(
        written == page,
        "docs/contract.md is out of date: UPDATE_DOCS=1 cargo test --test it contract"
    );
}

#[test]
fn the_example_reproduces_every_table_of_the_fleet() {
    let page = example(&["--format", "markdown"]);
    for row in FLEET.lines().filter(|line| !line.is_empty()) {
        assert!(
            page.lines().any(|line| line == row),
            "no line\n{row}\nin\n{page}"
        );
    }
}

const FLEET: &str = "
| `nix-builder` | `gh-nix` (label `tinyland-nix`) | ghcr.io/tinyland-inc/actions-runner-nix | Determinate Nix, Attic client, cache and runtime hints | nix, attic, git | flake builds, checks, NixOS tests, OCI images by nix2container, FlakeHub release |
| `general` | `gh-docker` (label `tinyland-docker`) | like ubuntu-latest | standard CI tools, pnpm, Node.js | git, node, pnpm | unit tests, linting, type checks, `tofu validate`, Markdown and link checks |
| `container` | `gh-dind` (label `tinyland-dind`) | docker:dind | Docker BuildKit, multi-stage builds, registry cache | docker, buildkit, git | OCI images, container integration tests |
| `kernel` | `linux-xr-docker` | rockylinux:10 | GCC toolchain, kernel headers, at most 2 runners at once | compiler, kernel-headers, git | kernel module builds |
| `tinyland-nix` | `nix-builder` | 8GiB |  | if the trust gate allows |  |  |
| `tinyland-nix-heavy` | `nix-builder` | 64GiB | 2 | if the trust gate allows |  |  |
| `tinyland-nix-kvm` | `nix-builder` |  |  | never, reads only | kvm |  |
| `tinyland-nix-gpu` | `nix-builder` |  |  | if the trust gate allows | gpu |  |
| `tinyland-nix-compute-expansion` | `nix-builder` |  |  | if the trust gate allows |  | a `/nix` and work volume per pod |
| FlakeHub | public flake distribution | released versions, rolling main | outside users, downstream flakes | the publication workflow | OIDC |
| Attic | internal Nix artifacts (acceleration, not publication) | what CI built, development shells | CI runners, developers' machines | nix-builder, while and after building | key per machine, token for writes; public reads of the shared cache need none |
| Bazel remote cache | action results and CAS (acceleration) | outputs, test results, validated configurations | CI runners, local development | any Bazel build that may upload | mTLS or token, inside the cluster |
| BuildKit registry cache | container layers | layers | container builders | image builds | registry |
| container registry | deployment artifacts, no cache | final images | deployments | image builds | registry |
| any derivation | Attic |
| released flake | FlakeHub |
| Bazel action output | Bazel remote cache |
| container layers | BuildKit registry cache |
| final image | container registry |
| Attic | builds from source and publishes the result | 5 to 10 minutes for a full closure |
| FlakeHub | serves the older version |  |
| Bazel remote cache | executes the action again | 30 s to 2 min |
| BuildKit registry cache | rebuilds all layers | 10 to 30 min |
| outside user | yes | no | no |
| CI runner | no, uses Attic | yes | yes, inside the cluster |
| developer's machine | yes, as a flake input | yes, with the signing key | yes, with remote configuration |
| dashboard | no | no | no |
| push to main | rolling | all outputs |
| tag `v*` | versioned | all outputs |
| pull request | no | no, reads only |
| local build | no | optional, by hand |
- it builds without `--impure`
- it passes `nix flake check` in CI
- it refers to no store path of the local machine
- it embeds no secret, token or machine-specific path
- Trusted writes need a token and an explicit `push-cache` and a trusted event.
";

#[test]
fn a_section_can_be_had_alone_and_a_slip_gets_a_hint() {
    let section = printed(&["--section", "exposure", "--format", "markdown"]);
    assert!(
        section.starts_with("## Exposure\n") && !section.contains("## Caches"),
        "{section}"
    );
    let text = printed(&["--section", "on-miss"]);
    assert!(
        text.starts_with("ON A MISS\n") && text.contains("what it costs  5 to 10 minutes"),
        "{text}"
    );
    let json: Value =
        serde_json::from_str(&printed(&["--section", "classes", "--format", "json"])).unwrap();
    assert_eq!(json["nix-builder"]["lanes"][0]["label"], "nix-builder");
    let wrong = contract(&["--section", "exposre"]);
    assert_eq!(wrong.code, 64);
    assert!(
        wrong.stderr.contains("Did you mean `exposure`?"),
        "{}",
        wrong.stderr
    );
}

#[test]
fn a_file_of_the_repository_is_found_and_a_wrong_one_is_64() {
    let ran = with_files(
        &["--section", "classes"],
        &[(
            "flywheel.yml",
            "classes: {mine: {lanes: [{label: my-lane}]}}\n",
        )],
    );
    assert!(
        ran.code == 0 && ran.stdout.contains("`my-lane`"),
        "{}",
        ran.stdout
    );
    for arguments in [&[][..], &["check", "flywheel.yml"]] {
        let wrong = "version: 1\nclasses:\n  mine:\n    lanez: []\n";
        let ran = with_files(arguments, &[("flywheel.yml", wrong)]);
        assert_eq!((ran.code, ran.stdout.as_str()), (64, ""));
        assert!(
            ran.stderr
                .contains("flywheel.yml:4: `lanez`: there is no such key here"),
            "{}",
            ran.stderr
        );
        assert!(
            ran.stderr.contains("Did you mean `lanes`?"),
            "{}",
            ran.stderr
        );
    }
    assert_eq!(contract(&["check", "nowhere.yml"]).code, 64);
}

#[test]
fn workflows_are_held_against_the_contract() {
    let good = "on: push\njobs:\n  a:\n    runs-on: general\n    steps: [{run: pnpm test}]\n";
    let bad = "on: push\njobs:\n  a:\n    runs-on: ${{ inputs.lane }}\n    steps: []\n  b:\n    runs-on: [self-hosted, linux]\n    steps: []\n  c:\n    runs-on: general\n    steps: [{run: nix build}]\n";
    let ran = with_files(&["check", "--workflows", "good.yml"], &[("good.yml", good)]);
    assert_eq!(
        (ran.code, ran.stdout.as_str()),
        (0, "1 workflow, 0 errors, 0 notes\n")
    );
    let ran = with_files(
        &["check", "--workflows", "good.yml", "bad.yml"],
        &[("good.yml", good), ("bad.yml", bad)],
    );
    assert_eq!(ran.code, 1);
    insta::assert_snapshot!(ran.stdout, @r"
    bad.yml:3: note: job `a`: `runs-on: ${{ inputs.lane }}` is decided when it runs
    bad.yml:6: error: job `b`: `runs-on: self-hosted, linux` names no lane
    bad.yml:9: error: job `c`: `run: nix build` needs `nix`, which `general` (class `general`) does not offer
    2 workflows, 2 errors, 1 note
    ");
    let ran = with_files(
        &["check", "--format", "json", "--workflows", "bad.yml"],
        &[("bad.yml", bad)],
    );
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (
            report["holds"].as_bool(),
            report["findings"][1]["line"].as_u64()
        ),
        (Some(false), Some(6))
    );
}

#[test]
fn the_repositorys_own_workflows_keep_the_built_in_contract() {
    let folder = root().join(".github/workflows");
    let files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    let files: Vec<&str> = files.iter().map(|file| file.to_str().unwrap()).collect();
    let ran = contract(&[&["check", "--workflows"], files.as_slice()].concat());
    assert_eq!(ran.code, 0, "{}", ran.stdout);
}

fn schema() -> (Value, Validator) {
    let schema: Value = serde_json::from_str(&read("docs/flywheel.schema.json")).unwrap();
    let validator = jsonschema::draft202012::new(&schema).unwrap();
    (schema, validator)
}

fn yaml(text: &str) -> Value {
    serde_norway::from_str(text).unwrap()
}

#[test]
fn the_published_schema_accepts_what_the_binary_accepts() {
    let (_, validator) = schema();
    jsonschema::draft202012::meta::validate(&schema().0).unwrap();
    for (name, file) in [
        (
            "the built-in contract",
            yaml(&read("crates/core/src/contract/default.yml")),
        ),
        ("the example", yaml(&read("examples/flywheel.yml"))),
        (
            "the print",
            serde_json::from_str(&printed(&["--format", "json"])).unwrap(),
        ),
        ("nothing", json!({})),
        ("null", json!({ "classes": { "kernel": null } })),
    ] {
        let complaints: Vec<String> = validator
            .iter_errors(&file)
            .map(|error| error.to_string())
            .collect();
        assert!(complaints.is_empty(), "{name}: {complaints:#?}");
    }
}

#[test]
fn the_published_schema_refuses_what_the_binary_refuses() {
    let (_, validator) = schema();
    for wrong in [
        "clases: {}",
        "version: 2",
        "classes: {a: {lanez: []}}",
        "classes: {a: {lanes: [{memory: 8GiB}]}}",
        "classes: {a: {lanes: [{label: x, memory: 8GB}]}}",
        "classes: {a: {lanes: [{label: Self-Hosted}]}}",
        "classes: {a: {provides: [dokcer]}}",
        "classes: {a: {tools: {node: latest}}}",
        "caches: {a: {titel: x}}",
        "placement: [{what: x}]",
        "exposure: {us: {attic: maybe}}",
        "publication: {trigger: []}",
        "publication: {triggers: [{event: x, attic: y}]}",
        "shared-cache: {mode: on}",
        "shared-cache: {allow-localhost: 1}",
    ] {
        assert!(
            !validator.is_valid(&yaml(wrong)),
            "the schema accepts {wrong}"
        );
        let ran = with_files(&["check", "flywheel.yml"], &[("flywheel.yml", wrong)]);
        assert_eq!(ran.code, 64, "the binary accepts {wrong}");
    }
}

#[test]
fn an_empty_list_of_workflows_is_no_check_that_passed() {
    for arguments in [
        &["check", "--workflows", ""][..],
        &["check", "--workflows", "", "x.yml"],
    ] {
        assert_eq!(contract(arguments).code, 64, "{arguments:?}");
    }
}
