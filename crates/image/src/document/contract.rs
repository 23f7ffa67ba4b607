//! A record as a Nickel contract. Enum words are Nickel's tags (`'export`), which it exports as text.

use std::fmt::Write as _;

use super::shape::{LIST_LIMIT, NAME_LIMIT, NAME_PATTERN, Record, Rule, Shape, TEXT_LIMIT};

/// What the contracts of all records stand on, as `let` bindings.
pub fn nickel_definitions() -> String {
    format!(
        r#"let Text = std.contract.from_predicate (fun value =>
  std.is_string value
  && std.string.length value <= {TEXT_LIMIT}
  && std.string.trim value != ""
  && !(std.string.is_match "[\\x00-\\x1f\\x7f-\\x9f]" value))
in
let Name = std.contract.from_predicate (fun value =>
  std.is_string value
  && std.string.length value <= {NAME_LIMIT}
  && std.string.is_match "{NAME_PATTERN}" value)
in
let Whole = fun least most => std.contract.from_predicate (fun value =>
  std.is_number value && std.number.is_integer value && value >= least && value <= most)
in
let Positive = fun most => std.contract.from_predicate (fun value =>
  std.is_number value && value > 0 && value <= most)
in
let Together = fun one other => std.contract.from_validator (fun record =>
  let has = fun name => std.record.has_field name record in
  if has one == has other then
    'Ok
  else
    'Error {{ message = "`%{{if has one then other else one}}` is missing: `%{{one}}` and `%{{other}}` stand together" }})
in
let Needed = fun field by words => std.contract.from_validator (fun record =>
  if std.record.has_field field record || !(std.record.has_field by record) || !(std.array.elem record."%{{by}}" words) then
    'Ok
  else
    'Error {{ message = "`%{{field}}` is missing: `%{{by}}` needs it" }})
in
let Short = std.contract.from_predicate (fun value =>
  std.is_array value && std.array.length value <= {LIST_LIMIT})
in
"#
    )
}

/// The contract of a record, as an expression that uses [`nickel_definitions`].
pub fn nickel_contract(record: &Record) -> String {
    let mut text = String::new();
    of_record(&mut text, record, 0);
    text
}

fn of_record(text: &mut String, record: &Record, depth: usize) {
    if record.rules.is_empty() {
        return of_fields(text, record, depth);
    }
    text.push_str("(std.contract.Sequence [");
    of_fields(text, record, depth);
    for rule in record.rules {
        let _ = match rule {
            Rule::Together(one, other) => write!(text, r#", Together "{one}" "{other}""#),
            Rule::Needed { field, by, words } => {
                let tags = tags(words);
                write!(text, r#", Needed "{field}" "{by}" [{tags}]"#)
            }
        };
    }
    text.push_str("])");
}

fn tags(words: &[&str]) -> String {
    let tags: Vec<String> = words.iter().map(|word| format!("'{word}")).collect();
    tags.join(", ")
}

fn of_fields(text: &mut String, record: &Record, depth: usize) {
    let indent = "  ".repeat(depth + 1);
    text.push_str("{\n");
    for field in record.fields {
        // Writing to a string cannot fail.
        let _ = write!(text, "{indent}# {}\n{indent}{} | ", field.about, field.name);
        of_shape(text, &field.shape, depth + 1);
        text.push_str(if field.is_required {
            ",\n"
        } else {
            " | optional,\n"
        });
    }
    text.push_str(&"  ".repeat(depth));
    text.push('}');
}

fn of_shape(text: &mut String, shape: &Shape, depth: usize) {
    match shape {
        Shape::Text => text.push_str("Text"),
        Shape::Name => text.push_str("Name"),
        Shape::Choice(words) => {
            let _ = write!(text, "[| {} |]", tags(words));
        }
        Shape::Whole(least, most) => {
            let _ = write!(text, "(Whole {least} {most})");
        }
        Shape::Positive(most) => {
            let _ = write!(text, "(Positive {most})");
        }
        Shape::Flag => text.push_str("Bool"),
        Shape::Record(record) => of_record(text, record, depth),
        Shape::List(shape) => {
            text.push_str("Short | Array (");
            of_shape(text, shape, depth);
            text.push(')');
        }
    }
}
