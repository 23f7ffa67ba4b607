//! The house rules for actions and workflows: inputs become variables and nothing else, and no
//! expression stands where a shell would read it.

use serde_norway::Value;

use super::hold;
use super::source::{Source, file, files, root};
use crate::definitions::{self, Input, Verb};

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
                // The image of a job's `container:` need not have bash.
                if text(step, "shell") != "sh" {
                    complain("a step without `shell: sh`");
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
        "runs: { using: composite, steps: [ { shell: sh, run: '\"$GITHUB_ACTION_PATH/x\"' } ] }",
        "runs: { using: composite, steps: [ { shell: bash, run: 'exec \"$GITHUB_ACTION_PATH/x\"' } ] }",
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

/// The file as the definitions have it: inputs, outputs and variables anew, everything else as it is.
fn generated(text: &str, verb: &Verb) -> String {
    let (head, rest) = text.split_once("\ninputs:\n").expect("inputs:");
    let (_, runs) = rest.split_once("\nruns:\n").expect("runs:");
    let (before, rest) = runs.split_once("      env:\n").expect("env:");
    let run = rest.find("      run:").expect("run:");
    let step: Value = serde_norway::from_str(&format!("runs:\n{runs}")).expect("YAML");
    let step = text_of(&step["runs"]["steps"][0]["id"]);
    format!(
        "{head}\ninputs:\n{}\noutputs:\n{}\nruns:\n{before}      env:\n{}{}",
        inputs(verb),
        outputs(verb, &step),
        variables(verb),
        &rest[run..]
    )
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// What an action hands on to its verb.
fn of_action(verb: &Verb) -> impl Iterator<Item = &Input> {
    let inputs = verb.inputs.iter();
    inputs.filter(|input| input.is_flag && !input.is_by_hand)
}

fn inputs(verb: &Verb) -> String {
    let mut block = String::new();
    for input in of_action(verb) {
        block.push_str(&format!(
            "  {}:\n{}",
            input.name,
            description(&about(input))
        ));
        // An action has no arguments, which on a command line are the other way.
        if input.is_required || input.is_required_in_action {
            block.push_str("    required: true\n");
            continue;
        }
        // With a default of its own the new name would always win over the former one.
        let default = input
            .default
            .as_deref()
            .filter(|_| input.former_names.is_empty());
        block.push_str(&format!(
            "    required: false\n    default: {:?}\n",
            default.unwrap_or_default()
        ));
        for former in &input.former_names {
            let about = description(&format!("The former name of `{}`.", input.name));
            block.push_str(&format!(
                "  {former}:\n{about}    required: false\n    default: \"\"\n    deprecationMessage: Use `{}`.\n",
                input.name
            ));
        }
    }
    block
}

/// Help, and what else the command line shows of a flag.
fn about(input: &Input) -> String {
    let words = input.allowed.iter();
    let words: Vec<String> = words
        .map(|(word, about)| match about {
            Some(about) => format!("`{word}`: {about}"),
            None => format!("`{word}`"),
        })
        .collect();
    let mut about = input.help.clone();
    match words.iter().any(|word| word.contains(": ")) {
        _ if words.is_empty() => {}
        true => about.push_str(&format!(" {}.", words.join("; "))),
        false => about.push_str(&format!(" One of {}.", words.join(", "))),
    }
    if let Some(default) = input
        .default
        .as_ref()
        .filter(|_| !input.former_names.is_empty())
    {
        about.push_str(&format!(" Default: `{default}`."));
    }
    about
}

fn outputs(verb: &Verb, step: &str) -> String {
    let outputs = verb.outputs.iter();
    let outputs = outputs.map(|output| {
        format!(
            "  {name}:\n{}    value: ${{{{ steps.{step}.outputs.{name} }}}}\n",
            description(&output.about),
            name = output.name
        )
    });
    outputs.collect()
}

fn variables(verb: &Verb) -> String {
    let variables = of_action(verb).map(|input| {
        let names = [&input.name].into_iter().chain(&input.former_names);
        let names: Vec<String> = names.map(|name| format!("inputs.{name}")).collect();
        format!(
            "        {}: ${{{{ {} }}}}\n",
            input.variable.as_deref().expect("a flag has a variable"),
            names.join(" || ")
        )
    });
    let variables: String = variables.collect();
    // The trust gate compares the payload, which every earlier step can write, with what the server sent the runner.
    let is_judged =
        verb.name != "setup" && verb.inputs.iter().any(|input| input.name == "push-cache");
    let event = if is_judged {
        "        FLYWHEEL_EVENT_DEFAULT_BRANCH: ${{ github.event.repository.default_branch }}\n"
    } else {
        ""
    };
    format!("{variables}{event}")
}

/// A description as a folded text, which takes every character literally.
fn description(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last_mut().expect("one at least");
        if last.is_empty() {
            last.push_str(word);
        } else if last.chars().count() + 1 + word.chars().count() <= 110 {
            last.push(' ');
            last.push_str(word);
        } else {
            lines.push(word.to_owned());
        }
    }
    let lines = lines.iter().map(|line| format!("      {line}\n"));
    format!("    description: >-\n{}", lines.collect::<String>())
}

#[test]
fn each_action_is_what_its_verb_defines() {
    if std::env::var_os("UPDATE_DOCS").is_some() {
        for file in actions() {
            let text = generated(&file.text, &definitions::verb(verb(&file)));
            std::fs::write(root().join(&file.name), text).unwrap();
        }
    }
    let rule = |files: &[Source]| {
        let differs = files.iter().filter(|file| {
            yaml(file);
            generated(&file.text, &definitions::verb(verb(file))) != file.text
        });
        differs
            .map(|file| {
                format!(
                    "{}: not what `flywheel {}` defines: UPDATE_DOCS=1 cargo test --test it actions",
                    file.name,
                    verb(file)
                )
            })
            .collect()
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
            "        FLYWHEEL_UNKNOWN: x\n        FLYWHEEL_HEAVY_LANE",
        ),
        change(
            "        FLYWHEEL_HEAVY_LANE: ${{ inputs.heavy-lane }}\n",
            "",
        ),
        change("      The exit code of the step.\n", ""),
        change("outputs.exit-code }}", "outputs.code }}"),
    ];
    hold(rule, real.clone(), &planted);
    // The other direction: the program has an input less, or more, than the file.
    let defined = definitions::verb("nix-job");
    for at in 0..defined.inputs.len() {
        let (mut less, mut more) = (defined.clone(), defined.clone());
        let input = less.inputs.remove(at);
        if of_action(&defined).any(|handed_on| *handed_on == input) {
            more.inputs.push(input);
            assert_ne!(generated(&action.text, &less), action.text);
            assert_ne!(generated(&action.text, &more), action.text);
        }
    }
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
