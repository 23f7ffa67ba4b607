//! What the command line defines, as `flywheel reference --format json` prints it: the files of the actions follow
//! from it.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::house::hold;
use crate::house::source::{Source, files};
use crate::world::Flywheel;

/// A verb, or a verb of a verb.
#[derive(Clone, Debug, Deserialize)]
pub struct Verb {
    /// Such as `cache serve`.
    pub name: String,
    pub inputs: Vec<Input>,
    /// The step outputs; none for a verb that is not an action.
    pub outputs: Vec<Output>,
}

/// A step output.
#[derive(Clone, Debug, Deserialize)]
pub struct Output {
    pub name: String,
    pub about: String,
}

/// A flag, or an argument without one.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Input {
    /// Without the dashes; of an argument what stands for it.
    pub name: String,
    pub is_flag: bool,
    pub value_name: Option<String>,
    pub variable: Option<String>,
    pub help: String,
    pub default: Option<String>,
    /// The words that are allowed, if there are only a few, each with its meaning.
    pub allowed: Vec<(String, Option<String>)>,
    pub is_required: bool,
    /// Whether the action has no input for it.
    pub is_by_hand: bool,
    pub is_required_in_action: bool,
    /// The names that it had before and that still work.
    pub former_names: Vec<String>,
    /// The type that its text is parsed to.
    pub parsed_to: String,
}

/// Every verb that the help shows.
pub fn verbs() -> Vec<Verb> {
    let printed = Flywheel::new(&["reference", "--format", "json"])
        .run()
        .stdout;
    let verbs: Vec<Verb> = serde_json::from_str(&printed).unwrap();
    assert!(verbs.len() > 10, "{verbs:?}");
    verbs
}

/// The verb of this name.
pub fn verb(name: &str) -> Verb {
    let mut verbs = verbs().into_iter();
    verbs
        .find(|verb| verb.name == name)
        .unwrap_or_else(|| panic!("no verb `{name}`"))
}

#[test]
fn a_variable_means_the_same_in_all_verbs() {
    let complaints = conflicts(&verbs());
    assert!(complaints.is_empty(), "\n{}", complaints.join("\n"));
}

fn conflicts(verbs: &[Verb]) -> Vec<String> {
    let all: Vec<(&str, &Input)> = verbs
        .iter()
        .flat_map(|verb| verb.inputs.iter().map(|input| (verb.name.as_str(), input)))
        .collect();
    let mut complaints = Vec::new();
    for (at, (verb, input)) in all.iter().enumerate() {
        for (other_verb, other) in &all[..at] {
            // Which action has an input for it is that action's business.
            let input = Input {
                is_by_hand: other.is_by_hand,
                ..(*input).clone()
            };
            if input.variable.is_some() && input.variable == other.variable && input != **other {
                complaints.push(format!(
                    "`{}` is declared twice: for `{other_verb}` and for `{verb}`",
                    input.variable.as_deref().unwrap_or_default()
                ));
            }
        }
    }
    complaints
}

#[test]
fn a_second_meaning_of_a_variable_is_noticed() {
    for another in [
        |input: &mut Input| input.help.push_str(" Or so."),
        |input: &mut Input| input.default = Some("main".to_owned()),
        |input: &mut Input| input.parsed_to = "text".to_owned(),
    ] {
        let mut verbs = verbs();
        let verb = verbs.iter_mut().find(|verb| verb.name == "publish");
        let mut inputs = verb.unwrap().inputs.iter_mut();
        another(inputs.find(|input| input.name == "attic-cache").unwrap());
        assert_ne!(conflicts(&verbs), Vec::<String>::new());
    }
}

#[test]
fn no_help_text_stands_twice() {
    let rule = |files: &[Source]| {
        let mut known: BTreeMap<String, &str> = BTreeMap::new();
        let mut complaints = Vec::new();
        for file in files {
            for help in help_texts(&file.text) {
                if let Some(other) = known.insert(help.clone(), &file.name) {
                    complaints.push(format!(
                        "{other} and {}: share the declaration, whose help is: {help}",
                        file.name
                    ));
                }
            }
        }
        complaints
    };
    let real = [
        files("src/command", ".rs"),
        files("src/inputs", ".rs"),
        files("src/job", ".rs"),
    ]
    .concat();
    let texts: usize = real.iter().map(|file| help_texts(&file.text).len()).sum();
    assert!(texts > 80, "{texts}");
    let flag = "    /// The folder\n    /// to use.\n    #[arg(long)]\n    dir: PathBuf,\n";
    let planted = Source::planted("src/command/x.rs", &flag.repeat(2));
    hold(rule, real, &[planted]);
}

/// The doc comments of the flags and arguments that a file declares.
fn help_texts(source: &str) -> Vec<String> {
    let mut texts = Vec::new();
    let mut lines: Vec<&str> = Vec::new();
    for line in source.lines().map(str::trim) {
        if let Some(line) = line.strip_prefix("///") {
            lines.push(line.trim());
        } else if line.starts_with("#[arg(") && !lines.is_empty() {
            texts.push(lines.join(" "));
            lines.clear();
        } else if !line.starts_with("//") {
            lines.clear();
        }
    }
    texts
}
