//! The house rules for actions and workflows: inputs become variables and nothing else, and no
//! expression stands where a shell would read it.

use serde_norway::Value;

use super::hold;
use super::source::{Source, file, files, root};
use crate::world::Flywheel;

/// The actions of this repository; the root's is `setup`.
fn actions() -> Vec<Source> {
    let mut actions = files("actions", "action.yml");
    if root().join("action.yml").is_file() {
        actions.push(file("action.yml"));
    }
    actions
}

fn yaml(file: &Source) -> Value {
    serde_norway::from_str(&file.text).unwrap_or_else(|error| panic!("{}: {error}", file.name))
}

/// The keys of a mapping; none if there is no such mapping.
fn keys(value: &Value) -> Vec<String> {
    let mapping = value.as_mapping().into_iter().flatten();
    mapping
        .filter_map(|(key, _)| key.as_str())
        .map(str::to_owned)
        .collect()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// Calls `visit` with every mapping in a document.
fn mappings(value: &Value, visit: &mut impl FnMut(&Value)) {
    match value {
        Value::Mapping(mapping) => {
            visit(value);
            mapping.iter().for_each(|(_, child)| mappings(child, visit));
        }
        Value::Sequence(items) => items.iter().for_each(|item| mappings(item, visit)),
        _ => {}
    }
}

#[test]
fn no_shell_reads_an_expression() {
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        for file in files {
            mappings(&yaml(file), &mut |mapping| {
                for key in ["run", "description", "shell"] {
                    if text(mapping, key).contains("${{") {
                        complaints.push(format!(
                            "{}: an expression in `{key}`: {}",
                            file.name,
                            text(mapping, key)
                        ));
                    }
                }
            });
        }
        complaints
    };
    let real = [
        actions(),
        files(".github", ".yml"),
        files("examples", ".yml"),
    ]
    .concat();
    let planted = [
        Source::planted(
            ".github/workflows/x.yml",
            "jobs: { a: { steps: [ { run: 'echo ${{ github.ref }}' } ] } }",
        ),
        Source::planted(
            "actions/x/action.yml",
            "inputs: { a: { description: 'like ${{ secrets.X }}' } }",
        ),
    ];
    hold(rule, real, &planted);
}

#[test]
fn an_action_is_one_step_that_becomes_the_binary() {
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        for file in files {
            let mut complain = |what: &str| complaints.push(format!("{}: {what}", file.name));
            let action = yaml(file);
            let runs = action.get("runs").cloned().unwrap_or_default();
            let steps = runs
                .get("steps")
                .and_then(Value::as_sequence)
                .cloned()
                .unwrap_or_default();
            if text(&runs, "using") != "composite" || steps.is_empty() {
                complain("is no composite action");
            }
            for step in &steps {
                if step.get("uses").is_some() {
                    complain("uses another action");
                }
                if text(step, "shell") != "bash" {
                    complain("a step without `shell: bash`");
                }
            }
            // The runner signals only the entry process, so the shell must `exec` the binary.
            let last = steps
                .last()
                .map_or("", |step| text(step, "run"))
                .lines()
                .last()
                .unwrap_or_default();
            if !last.starts_with("exec \"$GITHUB_ACTION_PATH/") {
                complain("does not `exec` a program of its own checkout");
            }
        }
        complaints
    };
    let planted = [
        "runs: { using: composite, steps: [ { uses: a/b@c } ] }",
        "runs: { using: composite, steps: [ { shell: bash, run: '\"$GITHUB_ACTION_PATH/x\"' } ] }",
        "runs: { using: composite, steps: [ { shell: sh, run: 'exec \"$GITHUB_ACTION_PATH/x\"' } ] }",
        "runs: { using: node20, main: x.js }",
    ];
    hold(
        rule,
        actions(),
        &planted.map(|text| Source::planted("actions/x/action.yml", text)),
    );
}

/// The verb that an action runs.
fn verb(file: &Source) -> &str {
    file.name
        .strip_prefix("actions/")
        .and_then(|name| name.split('/').next())
        .unwrap_or("setup")
}

/// Complaints about an action whose inputs are not handed on to its verb, or have no flag there.
fn inputs_of(file: &Source) -> Vec<String> {
    let mut complaints = Vec::new();
    let action = yaml(file);
    let help = Flywheel::new(&[verb(file), "--help"]).run().stdout;
    // The help is wrapped to the width of a terminal.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let inputs = action.get("inputs").cloned().unwrap_or_default();
    let mut mapped = Vec::new();
    mappings(&action["runs"], &mut |mapping| {
        mapped.extend(keys(mapping.get("env").unwrap_or(&Value::Null)));
    });
    let mut wanted: Vec<String> = Vec::new();
    for input in keys(&inputs) {
        let variable = format!("FLYWHEEL_{}", input.to_uppercase().replace('-', "_"));
        let line = format!("{variable}: ${{{{ inputs.{input} }}}}");
        if !file.text.contains(&line) {
            complaints.push(format!("input `{input}` is not handed on as `{line}`"));
        }
        let reads = ["=", "]"]
            .iter()
            .any(|end| help.contains(&format!("[env: {variable}{end}")));
        // A switch may stand alone on a command line: `--strict[=<BOOL>]`.
        let is_flag = [" <", "[=<"]
            .iter()
            .any(|start| help.contains(&format!("--{input}{start}")));
        if !is_flag || !reads {
            complaints.push(format!(
                "input `{input}` is no flag of `flywheel {}`",
                verb(file)
            ));
        }
        if text(&inputs[&input], "description").is_empty() {
            complaints.push(format!("input `{input}` has no description"));
        }
        wanted.push(variable);
    }
    for variable in mapped
        .iter()
        .filter(|name| name.starts_with("FLYWHEEL_") && !wanted.contains(name))
    {
        complaints.push(format!("`{variable}` belongs to no input"));
    }
    complaints
}

/// Complaints about the outputs of an action.
fn outputs_of(file: &Source) -> Vec<String> {
    let action = yaml(file);
    let outputs = keys(action.get("outputs").unwrap_or(&Value::Null)).into_iter();
    outputs
        .map(|output| action["outputs"][&output].clone())
        .filter(|output| {
            text(output, "description").is_empty()
                || !text(output, "value").starts_with("${{ steps.")
        })
        .map(|output| format!("an output without description or value: {output:?}"))
        .collect()
}

#[test]
fn every_input_is_a_variable_and_a_flag() {
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        for file in files {
            let found = [inputs_of(file), outputs_of(file)].concat();
            complaints.extend(found.iter().map(|what| format!("{}: {what}", file.name)));
        }
        complaints
    };
    let real = actions();
    let action = real
        .iter()
        .find(|file| file.name == "actions/nix-job/action.yml")
        .expect("actions/nix-job");
    let change = |from: &str, to: &str| {
        assert!(action.text.contains(from), "{from}");
        Source::planted(&action.name, &action.text.replacen(from, to, 1))
    };
    let planted = [
        change("${{ inputs.heavy-lane }}", "heavy"),
        change("  heavy-lane:\n", "  heavy-line:\n"),
        change(
            "        FLYWHEEL_HEAVY_LANE",
            "        FLYWHEEL_UNHEARD_OF: x\n        FLYWHEEL_HEAVY_LANE",
        ),
        change("    description: The command's exit code.\n", ""),
    ];
    hold(rule, real.clone(), &planted);
}

#[test]
fn workflows_ask_for_little() {
    let rule = |files: &[Source]| {
        let mut complaints = Vec::new();
        for file in files {
            let mut complain = |what: &str| complaints.push(format!("{}: {what}", file.name));
            let workflow = yaml(file);
            if workflow
                .get("permissions")
                .and_then(Value::as_mapping)
                .is_none_or(|granted| !granted.is_empty())
            {
                complain("`permissions: {}` must stand on top");
            }
            // A workflow that is only called runs in the concurrency group of its caller.
            let is_called = keys(&workflow["on"]) == ["workflow_call"];
            if workflow.get("concurrency").is_none() && !is_called {
                complain("no concurrency group");
            }
            for name in keys(&workflow["jobs"]) {
                if workflow["jobs"][&name].get("timeout-minutes").is_none() {
                    complain(&format!("job `{name}` has no `timeout-minutes`"));
                }
            }
            mappings(&workflow, &mut |mapping| {
                let uses = text(mapping, "uses");
                let pinned = uses.split_once('@').is_some_and(|(_, at)| at.len() == 40);
                if !uses.is_empty() && !uses.starts_with("./") && !pinned {
                    complain(&format!("`{uses}` is not pinned by its commit"));
                }
                let keeps = mapping
                    .get("with")
                    .and_then(|with| with.get("persist-credentials"));
                if uses.starts_with("actions/checkout@") && keeps != Some(&Value::Bool(false)) {
                    complain("a checkout without `persist-credentials: false`");
                }
            });
        }
        complaints
    };
    let planted = [
        "permissions: { contents: read }\nconcurrency: x\njobs: {}",
        "permissions: {}\njobs: {}",
        "permissions: {}\nconcurrency: x\njobs: { a: {} }",
        "permissions: {}\nconcurrency: x\njobs: { a: { timeout-minutes: 1, steps: [ { uses: a/b@v1 } ] } }",
    ];
    hold(
        rule,
        files(".github/workflows", ".yml"),
        &planted.map(|text| Source::planted(".github/workflows/x.yml", text)),
    );
}
