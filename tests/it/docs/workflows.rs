//! The snippets of YAML: as a whole workflow each is one that GitHub's schema (of a pipeline: GitLab's) takes, and every
//! input of an action of ours is one that it has.

use std::collections::BTreeMap;
use std::process::Command;

use serde_norway::{Mapping, Value};

use super::fences::{Fence, fences};
use super::pages;
use crate::house::hold;
use crate::house::source::{Source, file, files, root};

/// How the pages name this repository.
const OURS: &str = "OWNER/flywheel";

/// What a snippet is a part of.
#[derive(Clone, Debug)]
enum Kind {
    /// A workflow, or a part of one that `workflow` makes whole.
    GitHub(Value),
    /// A pipeline.
    GitLab(Value),
    /// A part of a pod's template.
    Pod(Value),
    /// `flywheel.yml`, which has a schema of its own.
    Contract(Value),
}

fn kind(yaml: &Value) -> Option<Kind> {
    let has = |key: &str| yaml.get(key).is_some();
    if yaml.is_sequence() {
        return Some(Kind::GitHub(workflow(&job(&steps(yaml)))));
    }
    let mut values = yaml.as_mapping().into_iter().flat_map(Mapping::values);
    if has("include") || values.any(|job| job.get("script").is_some()) {
        return Some(Kind::GitLab(yaml.clone()));
    }
    if has("template") {
        return Some(Kind::Pod(yaml.clone()));
    }
    if has("jobs") {
        let mut whole = yaml.as_mapping()?.clone();
        whole.entry("on".into()).or_insert_with(|| "push".into());
        return Some(Kind::GitHub(whole.into()));
    }
    if has("runs-on") || has("steps") {
        return Some(Kind::GitHub(workflow(yaml)));
    }
    if has("with") || has("uses") || has("run") {
        let mut step = yaml.as_mapping()?.clone();
        if !has("uses") && !has("run") {
            // Inputs alone are shown of `nix-job`, and the others of that step go without saying.
            step.insert("uses".into(), format!("{OURS}/actions/nix-job@main").into());
            let with = step.get_mut("with")?.as_mapping_mut()?;
            with.entry("command".into())
                .or_insert_with(|| "true".into());
        }
        let sequence = Value::Sequence(vec![step.into()]);
        return Some(Kind::GitHub(workflow(&job(&steps(&sequence)))));
    }
    if has("on") || has("permissions") || has("env") {
        let mut whole = yaml.as_mapping()?.clone();
        let some = workflow(&job(&steps(
            &serde_norway::from_str("[{run: 'true'}]").ok()?,
        )));
        for (key, value) in some.as_mapping()? {
            whole.entry(key.clone()).or_insert_with(|| value.clone());
        }
        return Some(Kind::GitHub(whole.into()));
    }
    let contract: Value = serde_norway::from_str(&file("examples/flywheel.yml").text).ok()?;
    let keys = yaml.as_mapping()?.keys();
    let is_contract = keys
        .filter_map(Value::as_str)
        .all(|key| contract.get(key).is_some());
    is_contract.then(|| Kind::Contract(yaml.clone()))
}

fn steps(steps: &Value) -> Value {
    Mapping::from_iter([("steps".into(), steps.clone())]).into()
}

fn job(job: &Value) -> Value {
    let mut whole = job.as_mapping().cloned().unwrap_or_default();
    whole
        .entry("runs-on".into())
        .or_insert_with(|| "ubuntu-latest".into());
    whole.into()
}

fn workflow(part: &Value) -> Value {
    let jobs = Mapping::from_iter([("job".into(), job(part))]);
    Mapping::from_iter([("on".into(), "push".into()), ("jobs".into(), jobs.into())]).into()
}

/// Every mapping with a `uses` of ours: the name of the action or workflow, and the mapping.
fn uses<'a>(value: &'a Value, found: &mut Vec<(String, &'a Value)>) {
    match value {
        Value::Mapping(mapping) => {
            let name = value
                .get("uses")
                .and_then(Value::as_str)
                .unwrap_or_default();
            let name = name.split('@').next().unwrap_or_default();
            if let Some(path) = name.strip_prefix(OURS) {
                found.push((path.trim_start_matches('/').to_owned(), value));
            }
            mapping.values().for_each(|child| uses(child, found));
        }
        Value::Sequence(items) => items.iter().for_each(|item| uses(item, found)),
        _ => {}
    }
}

/// The inputs of an action or a workflow of this repository, and whether each is required.
fn inputs(path: &str) -> Option<BTreeMap<String, bool>> {
    let name = match path {
        "" => "action.yml".to_owned(),
        path if path.ends_with(".yml") => path.to_owned(),
        path => format!("{path}/action.yml"),
    };
    let text = std::fs::read_to_string(root().join(name)).ok()?;
    let yaml: Value = serde_norway::from_str(&text).ok()?;
    let called = || yaml.get("on")?.get("workflow_call")?.get("inputs");
    let inputs = yaml.get("inputs").or_else(called)?;
    let inputs = inputs.as_mapping()?.iter().map(|(name, input)| {
        let is_required = input.get("required").and_then(Value::as_bool) == Some(true);
        (name.as_str().unwrap_or_default().to_owned(), is_required)
    });
    Some(inputs.collect())
}

/// What of the `with` of a step does not fit the action.
fn misfits(path: &str, step: &Value, has_hint: bool) -> Vec<String> {
    let Some(inputs) = inputs(path) else {
        return vec![format!("there is no action `{path}`")];
    };
    let given: Vec<&str> = step
        .get("with")
        .and_then(Value::as_mapping)
        .into_iter()
        .flat_map(Mapping::keys)
        .filter_map(Value::as_str)
        .collect();
    let unknown = given.iter().filter(|name| !inputs.contains_key(**name));
    let mut misfits: Vec<String> = unknown
        .map(|name| format!("`{path}` has no input `{name}`"))
        .collect();
    let missing = inputs
        .iter()
        .filter(|(name, is_required)| **is_required && !given.contains(&name.as_str()));
    misfits.extend(missing.map(|(name, _)| format!("`{path}` needs the input `{name}`")));
    // Without the key Nix refuses every hit, and everything is built again. On some machines a hint has it.
    let has_token = step
        .get("env")
        .is_some_and(|env| env.get("ATTIC_TOKEN").is_some());
    let needs_key = inputs.contains_key("attic-public-key") && !has_hint;
    if has_token && needs_key && !given.contains(&"attic-public-key") {
        misfits.push(format!("`{path}` has a token and no `attic-public-key`"));
    }
    misfits
}

/// What of a pod's template does not fit: a mount without its volume, a container without a name.
fn pod_misfits(yaml: &Value) -> Vec<String> {
    let spec = &yaml["template"]["spec"];
    let list = |value: &Value, key: &str| {
        let items = value.get(key).and_then(Value::as_sequence);
        items.cloned().unwrap_or_default()
    };
    let name = |value: &Value| value.get("name").and_then(Value::as_str).map(str::to_owned);
    let volumes: Vec<_> = list(spec, "volumes").iter().filter_map(name).collect();
    let containers = list(spec, "containers");
    let mut misfits = Vec::new();
    if containers.is_empty() || containers.iter().any(|one| name(one).is_none()) {
        misfits.push("a pod has containers, and each has a name".to_owned());
    }
    for container in containers {
        for mount in list(&container, "volumeMounts") {
            if !name(&mount).is_some_and(|name| volumes.contains(&name)) {
                misfits.push(format!("{mount:?} mounts no volume of this pod"));
            }
            if mount.get("mountPath").is_none() {
                misfits.push(format!("{mount:?} has no `mountPath`"));
            }
        }
    }
    misfits
}

/// Which built-in schema of `check-jsonschema` the snippets of a folder have to keep to.
fn schema_complaints(schema: &[&str], snippets: &[(String, Value)]) -> Vec<String> {
    if snippets.is_empty() {
        return Vec::new();
    }
    let folder = tempfile::tempdir().unwrap();
    let files = snippets.iter().enumerate().map(|(number, (_, yaml))| {
        let file = folder.path().join(format!("{number}.yml"));
        std::fs::write(&file, serde_norway::to_string(yaml).unwrap()).unwrap();
        file
    });
    let checked = Command::new(root().join("target/tools/bin/check-jsonschema"))
        .args(schema)
        .args(files)
        .output()
        .expect("check-jsonschema is there: scripts/bootstrap.sh runner installs it");
    if checked.status.success() {
        return Vec::new();
    }
    let mut printed = String::from_utf8_lossy(&checked.stdout).into_owned();
    printed.push_str(&String::from_utf8_lossy(&checked.stderr));
    for (number, (place, _)) in snippets.iter().enumerate() {
        let file = folder.path().join(format!("{number}.yml"));
        printed = printed.replace(&file.display().to_string(), place);
    }
    vec![printed]
}

fn complaints(pages: &[Source]) -> Vec<String> {
    let snippets = pages
        .iter()
        .flat_map(|page| fences(&page.name, &page.text))
        .filter(|fence| fence.language == "yaml");
    // Pages that give the machine the hint `ATTIC_PUBLIC_KEY`.
    let hints: Vec<String> = pages
        .iter()
        .filter(|page| page.text.contains("- name: ATTIC_PUBLIC_KEY\n"))
        .map(|page| page.name.clone())
        .collect();
    let mut complaints = Vec::new();
    let (mut github, mut gitlab, mut contracts) = (Vec::new(), Vec::new(), Vec::new());
    for fence in snippets {
        let place = fence.place();
        let Some(kind) = parsed(&fence, &mut complaints) else {
            continue;
        };
        let misfits = match &kind {
            Kind::Pod(yaml) => pod_misfits(yaml),
            Kind::GitHub(yaml) | Kind::GitLab(yaml) | Kind::Contract(yaml) => {
                let mut found = Vec::new();
                uses(yaml, &mut found);
                let steps = found.iter();
                steps
                    .flat_map(|(path, step)| misfits(path, step, hints.contains(&fence.page)))
                    .collect()
            }
        };
        complaints.extend(misfits.iter().map(|what| format!("{place}: {what}")));
        match kind {
            Kind::GitHub(yaml) => github.push((place, yaml)),
            Kind::GitLab(yaml) => gitlab.push((place, yaml)),
            Kind::Contract(yaml) => contracts.push((place, yaml)),
            Kind::Pod(_) => {}
        }
    }
    let builtin = |name| ["--builtin-schema", name];
    complaints.extend(schema_complaints(
        &builtin("vendor.github-workflows"),
        &github,
    ));
    complaints.extend(schema_complaints(&builtin("vendor.gitlab-ci"), &gitlab));
    let own = root().join("docs/flywheel.schema.json");
    let own = ["--schemafile", own.to_str().unwrap()];
    complaints.extend(schema_complaints(&own, &contracts));
    complaints
}

fn parsed(fence: &Fence, complaints: &mut Vec<String>) -> Option<Kind> {
    let yaml: Value = match serde_norway::from_str(&fence.text) {
        Ok(yaml) => yaml,
        Err(error) => {
            complaints.push(format!("{}: {error}", fence.place()));
            return None;
        }
    };
    let kind = kind(&yaml);
    if kind.is_none() {
        complaints.push(format!(
            "{}: neither a part of a workflow, of a pipeline or of a pod, nor a `flywheel.yml`",
            fence.place()
        ));
    }
    kind
}

#[test]
fn every_workflow_is_valid_and_its_inputs_are_there() {
    let step = |more: &str| format!("- uses: OWNER/flywheel/actions/nix-job@main\n{more}");
    let planted = [
        "jobs: { a: { runs-on: x, steps: [ { rum: x } ] } }".to_owned(),
        "jobs: [".to_owned(),
        "nothing: known".to_owned(),
        step("  with: { command: x, no-such-input: y }"),
        step("  with: { push-cache: auto }"),
        step("  env: { ATTIC_TOKEN: x }\n  with: { command: x }"),
        "- uses: OWNER/flywheel/actions/no-such-action@main".to_owned(),
        "steps: [ { uses: OWNER/flywheel/.github/workflows/greedy.yml@main, with: { builds: x } } ]".to_owned(),
        "build: { script: { a: b } }".to_owned(),
        "template: { spec: { containers: [ { name: a, volumeMounts: [ { name: b, mountPath: /b } ] } ] } }".to_owned(),
    ];
    hold(
        complaints,
        pages(),
        &planted
            .each_ref()
            .map(|yaml| Source::planted("docs/x.md", &format!("```yaml\n{yaml}\n```\n"))),
    );
}

#[test]
fn the_template_for_gitlab_gets_the_inputs_that_it_has() {
    let specification: Value = {
        let text = file("gitlab/greedy.yml").text;
        let (head, _) = text.split_once("\n---\n").unwrap();
        serde_norway::from_str(head).unwrap()
    };
    let inputs = &specification["spec"]["inputs"];
    let examples = files("docs", ".md")
        .iter()
        .flat_map(|page| fences(&page.name, &page.text))
        .filter(|fence| fence.language == "yaml")
        .filter_map(|fence| serde_norway::from_str::<Value>(&fence.text).ok())
        .filter_map(|yaml| yaml.get("include")?.get(0)?.get("inputs").cloned())
        .collect::<Vec<_>>();
    assert!(!examples.is_empty(), "no page shows the template");
    for example in examples {
        for name in example.as_mapping().unwrap().keys() {
            assert!(inputs.get(name).is_some(), "no input {name:?}");
        }
        for (name, input) in inputs.as_mapping().unwrap() {
            let is_given = example.get(name).is_some() || input.get("default").is_some();
            assert!(is_given, "the input {name:?} is missing");
        }
    }
}
