//! Checks workflows against the contract: each job's `runs-on` must name a lane of the contract, which offers what the
//! job uses. Pure. What only the run itself decides is a note, never a guess.

use serde::Serialize;
use serde_json::Value;

use crate::contract::{Contract, Skill};
use crate::text::{nearest, one_line};

/// Labels that GitHub gives to every self-hosted runner, so they choose no lane.
const GENERIC: [&str; 8] = [
    "self-hosted",
    "linux",
    "windows",
    "macos",
    "x64",
    "x86",
    "arm",
    "arm64",
];
/// Actions by the last part of their names, and the skill of the lane that each needs.
const ACTIONS: [(&str, Skill); 12] = [
    ("nix-job", Skill::Nix),
    ("watch-store", Skill::Nix),
    ("flake-checks", Skill::Nix),
    ("install-nix-action", Skill::Nix),
    ("nix-installer-action", Skill::Nix),
    ("nix-quick-install-action", Skill::Nix),
    ("cachix-action", Skill::Nix),
    ("magic-nix-cache-action", Skill::Nix),
    ("build-push-action", Skill::Buildkit),
    ("bake-action", Skill::Buildkit),
    ("setup-buildx-action", Skill::Docker),
    ("setup-qemu-action", Skill::Docker),
];
/// Commands at the beginning of a line, and the skill of the lane that each needs.
const COMMANDS: [(&str, Skill); 11] = [
    ("nix", Skill::Nix),
    ("nix-build", Skill::Nix),
    ("nix-shell", Skill::Nix),
    ("attic", Skill::Attic),
    ("docker", Skill::Docker),
    ("buildctl", Skill::Buildkit),
    ("node", Skill::Node),
    ("npm", Skill::Node),
    ("pnpm", Skill::Pnpm),
    ("gcc", Skill::Compiler),
    ("cc", Skill::Compiler),
];
/// Actions that install what they are for, so that the lane need not have it.
const INSTALLS: [(&str, Skill); 4] = [
    ("setup-node", Skill::Node),
    ("setup-docker-action", Skill::Docker),
    ("setup-docker-action", Skill::Buildkit),
    ("action-setup", Skill::Pnpm),
];

/// How much a finding counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Weight {
    /// The contract is broken.
    Error,
    /// The file alone does not decide it.
    Note,
}

/// A finding about a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub weight: Weight,
    /// The workflow's file.
    pub file: String,
    /// The job's line in it.
    pub line: Option<u64>,
    /// The job's id.
    pub job: String,
    /// What is wrong or undecided.
    pub text: String,
}

/// Checks the jobs of a workflow. `text` is the text of the file, in which the jobs' lines are looked up.
pub fn check(contract: &Contract, file: &str, text: &str, workflow: &Value) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (id, job) in workflow["jobs"].as_object().into_iter().flatten() {
        // A job that calls another workflow has no `runs-on`: the lanes are named there.
        if job.get("uses").is_some() {
            continue;
        }
        // A parsed document has no positions, so the job's key is looked up in the text.
        let line = text
            .lines()
            .position(|line| line.trim_end() == format!("  {id}:"))
            .map(|at| at as u64 + 1);
        let mut add = |weight, text| {
            findings.push(Finding {
                weight,
                file: file.to_owned(),
                line,
                job: id.clone(),
                text,
            });
        };
        match labels(job) {
            Err(open) => add(Weight::Note, open),
            Ok(alternatives) => {
                for labels in alternatives {
                    check_lane(contract, job, &labels, &mut add);
                }
            }
        }
    }
    findings
}

/// Checks a job against the lane that a set of labels chooses.
fn check_lane(
    contract: &Contract,
    job: &Value,
    labels: &[String],
    add: &mut impl FnMut(Weight, String),
) {
    let special: Vec<&String> = labels.iter().filter(|label| !is_generic(label)).collect();
    if special.is_empty() {
        let shown = labels.join(", ");
        return add(
            Weight::Error,
            format!("`runs-on: {}` names no lane", one_line(&shown, 100)),
        );
    }
    let known: Vec<_> = special
        .iter()
        .filter_map(|label| contract.lane(label))
        .collect();
    let Some((class_name, class, lane)) = known.first() else {
        let label = special[0];
        let all: Vec<&str> = contract
            .lanes()
            .map(|(_, _, lane)| lane.label.as_str())
            .collect();
        let advice = match nearest(label, all.iter().copied()) {
            Some(name) => format!("did you mean `{name}`?"),
            None => format!("the lanes are {}", all.join(", ")),
        };
        return add(
            Weight::Error,
            format!("there is no lane `{}`: {advice}", one_line(label, 100)),
        );
    };
    if job.get("container").is_some() {
        return add(
            Weight::Note,
            "it runs in a container, whose image brings the tools".to_owned(),
        );
    }
    for (skill, by) in needs(job) {
        if !class.offers(lane, skill) {
            let text = format!(
                "{by} needs `{skill}`, which `{}` (class `{class_name}`) does not offer",
                lane.label
            );
            add(Weight::Error, text);
        }
    }
    if !lane.publishes && asks_to_publish(job) {
        add(
            Weight::Error,
            format!("it asks to publish, and `{}` never does", lane.label),
        );
    }
}

fn is_generic(label: &str) -> bool {
    GENERIC
        .iter()
        .any(|generic| label.eq_ignore_ascii_case(generic))
}

/// The sets of labels that a job may run with, one for each value of its matrix; or why these are not known.
fn labels(job: &Value) -> Result<Vec<Vec<String>>, String> {
    let runs_on = &job["runs-on"];
    let labels = match runs_on {
        Value::String(one) => vec![one.clone()],
        Value::Array(several) => several
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        Value::Object(group) => match &group.get("labels") {
            Some(Value::String(one)) => vec![one.clone()],
            Some(Value::Array(several)) => several
                .iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            _ => {
                return Err(
                    "`runs-on` names a group, and who is in it is not known here".to_owned(),
                );
            }
        },
        _ => return Err("it has no `runs-on`".to_owned()),
    };
    let Some(at) = labels.iter().position(|label| label.contains("${{")) else {
        return Ok(vec![labels]);
    };
    let open = || {
        format!(
            "`runs-on: {}` is decided when it runs",
            one_line(&labels[at], 100)
        )
    };
    let values = matrix_key(&labels[at])
        .and_then(|key| matrix_values(job, key))
        .ok_or_else(open)?;
    let mut all = Vec::new();
    for value in values {
        let mut one = labels.clone();
        one[at] = value;
        if one.iter().any(|label| label.contains("${{")) {
            return Err(open());
        }
        all.push(one);
    }
    Ok(all)
}

/// `x` of `${{ matrix.x }}`, if that is all there is.
fn matrix_key(text: &str) -> Option<&str> {
    let key = text
        .trim()
        .strip_prefix("${{")?
        .strip_suffix("}}")?
        .trim()
        .strip_prefix("matrix.")?;
    key.chars()
        .all(|c| c.is_ascii_alphanumeric() || "-_".contains(c))
        .then_some(key)
}

/// Every value that a key of the matrix can have; `None` if one of them is only known when the workflow runs.
fn matrix_values(job: &Value, key: &str) -> Option<Vec<String>> {
    let matrix = job["strategy"]["matrix"].as_object()?;
    let own = matrix
        .get(key)
        .map(|list| list.as_array().cloned().ok_or(()))
        .transpose()
        .ok()?
        .unwrap_or_default();
    let included = match matrix.get("include") {
        None => Vec::new(),
        Some(list) => list
            .as_array()?
            .iter()
            .filter_map(|entry| entry.get(key))
            .cloned()
            .collect(),
    };
    let all: Option<Vec<String>> = own
        .iter()
        .chain(&included)
        .map(|value| value.as_str().map(str::to_owned))
        .collect();
    all.filter(|all| !all.is_empty() && all.iter().all(|value| !value.contains("${{")))
}

/// The skills that a job's steps need of the lane, each once, with the line that needs it.
fn needs(job: &Value) -> Vec<(Skill, String)> {
    let mut needs: Vec<(Skill, String)> = Vec::new();
    let mut brought: Vec<Skill> = Vec::new();
    for step in job["steps"].as_array().into_iter().flatten() {
        if let Some(action) = step["uses"].as_str() {
            let path = action.split('@').next().unwrap_or_default();
            let name = path.rsplit('/').next().unwrap_or_default();
            let of = |table: &[(&str, Skill)]| -> Vec<Skill> {
                table
                    .iter()
                    .filter(|(known, _)| *known == name)
                    .map(|(_, skill)| *skill)
                    .collect()
            };
            brought.extend(of(&INSTALLS));
            needs.extend(
                of(&ACTIONS)
                    .into_iter()
                    .map(|skill| (skill, format!("`uses: {}`", one_line(path, 80)))),
            );
        }
        let script = step["run"]
            .as_str()
            .or_else(|| step["with"]["command"].as_str())
            .unwrap_or_default();
        for line in script.lines() {
            let first = line.split_whitespace().next().unwrap_or_default();
            let found = COMMANDS
                .iter()
                .find(|(command, _)| *command == first)
                .map(|(_, skill)| *skill);
            // The commands of a `nix-job` are Nix's to provide, and not the lane's.
            let inside = step.get("run").is_none();
            if let Some(skill) = found.filter(|skill| !brought.contains(skill) && !inside) {
                needs.push((skill, format!("`run: {}`", one_line(line, 60))));
            }
        }
    }
    let mut seen: Vec<Skill> = Vec::new();
    needs.retain(|(skill, _)| {
        !brought.contains(skill) && !seen.contains(skill) && {
            seen.push(*skill);
            true
        }
    });
    needs
}

fn asks_to_publish(job: &Value) -> bool {
    let steps = job["steps"].as_array().into_iter().flatten();
    steps
        .into_iter()
        .any(|step| match &step["with"]["push-cache"] {
            Value::Bool(asks) => *asks,
            Value::String(text) => ["true", "auto"]
                .iter()
                .any(|name| text.eq_ignore_ascii_case(name)),
            _ => false,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::read::document;

    fn check_job(job: &str, expected: &[(Weight, &str)]) {
        let text = format!(
            "on: push\njobs:\n  it:\n{}",
            job.lines()
                .map(|line| format!("    {line}\n"))
                .collect::<String>()
        );
        let workflow = document("ci.yml", &text).expect("YAML");
        let found = check(&Contract::built_in(), "ci.yml", &text, &workflow);
        let fits = found.len() == expected.len()
            && found
                .iter()
                .zip(expected)
                .all(|(one, (weight, part))| one.weight == *weight && one.text.contains(part));
        assert!(fits, "{job}\n{found:#?}");
        assert!(found.iter().all(|one| one.line == Some(3)), "{found:?}");
    }

    #[test]
    fn a_lane_must_exist_and_have_a_name_of_its_own() {
        check_job("runs-on: general", &[]);
        check_job("runs-on: [self-hosted, Linux, nix-builder]", &[]);
        check_job("runs-on: {group: g, labels: [kernel]}", &[]);
        check_job(
            "runs-on: nix-bilder",
            &[(Weight::Error, "did you mean `nix-builder`?")],
        );
        check_job("runs-on: self-hosted", &[(Weight::Error, "names no lane")]);
        check_job(
            "runs-on: [self-hosted, linux, x64]",
            &[(Weight::Error, "names no lane")],
        );
        check_job("uses: ./.github/workflows/other.yml", &[]);
    }

    #[test]
    fn what_only_the_run_decides_is_a_note_and_a_plain_matrix_is_not() {
        check_job(
            "runs-on: ${{ inputs.lane }}",
            &[(Weight::Note, "is decided when it runs")],
        );
        check_job("runs-on: {group: g}", &[(Weight::Note, "a group")]);
        let matrix = "runs-on: ${{ matrix.os }}\nstrategy:\n  matrix:\n    os: [general, generall]\n    include: [{os: kernel}]";
        check_job(matrix, &[(Weight::Error, "there is no lane `generall`")]);
        let open =
            "runs-on: ${{ matrix.os }}\nstrategy:\n  matrix: ${{ fromJSON(needs.x.outputs.y) }}";
        check_job(open, &[(Weight::Note, "is decided when it runs")]);
    }

    #[test]
    fn a_lane_must_offer_what_the_job_uses() {
        let nix = "runs-on: general\nsteps:\n  - uses: a/flywheel/actions/nix-job@v1\n    with: {command: pnpm test}";
        check_job(nix, &[(Weight::Error, "needs `nix`, which `general`")]);
        check_job(
            "runs-on: general\nsteps:\n  - run: |\n      echo\n      nix build .#x",
            &[(Weight::Error, "`run: nix build .#x`")],
        );
        check_job(
            "runs-on: nix-builder\nsteps:\n  - run: docker build .",
            &[(Weight::Error, "needs `docker`")],
        );
        check_job(
            "runs-on: ubuntu-latest\nsteps:\n  - run: docker build .",
            &[],
        );
        check_job(
            "runs-on: kernel\nsteps:\n  - uses: actions/setup-node@v4\n  - run: node x.js",
            &[],
        );
        check_job(
            "runs-on: kernel\ncontainer: node:22\nsteps:\n  - run: node x.js",
            &[(Weight::Note, "container")],
        );
    }

    #[test]
    fn a_lane_that_only_reads_is_not_asked_to_publish() {
        let job = |lane: &str| {
            format!(
                "runs-on: {lane}\nsteps:\n  - uses: a/b/actions/nix-job@v1\n    with: {{push-cache: auto}}"
            )
        };
        check_job(&job("nix-builder-kvm"), &[(Weight::Error, "never does")]);
        check_job(&job("nix-builder"), &[]);
    }
}
