//! A record as a JSON Schema, for editors and for checks outside of this program.

use serde_json::{Map, Value, json};

use super::shape::{LIST_LIMIT, NAME_LIMIT, NAME_PATTERN, Record, Rule, Shape, TEXT_LIMIT};

/// The JSON Schema (draft 2020-12) of a document.
pub fn json_schema(record: &Record) -> Value {
    let mut schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": record.name,
    });
    merge(&mut schema, of_record(record));
    schema
}

fn of_record(record: &Record) -> Value {
    let properties = record.fields.iter().map(|field| {
        let mut schema = of_shape(&field.shape);
        merge(&mut schema, json!({ "description": field.about }));
        (field.name.to_owned(), schema)
    });
    let properties: Map<String, Value> = properties.collect();
    let required = record.fields.iter().filter(|field| field.is_required);
    let required: Vec<&str> = required.map(|field| field.name).collect();
    let mut schema = json!({
        "description": record.about,
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    });
    if !record.rules.is_empty() {
        let rules = record.rules.iter().map(of_rule);
        merge(&mut schema, json!({ "allOf": rules.collect::<Value>() }));
    }
    schema
}

fn of_rule(rule: &Rule) -> Value {
    match rule {
        Rule::Together(one, other) => json!({
            "dependentRequired": { *one: [other], *other: [one] },
        }),
        Rule::Needed { field, by, words } => json!({
            "if": { "properties": { *by: { "enum": words } }, "required": [by] },
            "then": { "required": [field] },
        }),
    }
}

fn of_shape(shape: &Shape) -> Value {
    match shape {
        // A line that is not blank, without control characters.
        Shape::Text => json!({
            "type": "string", "maxLength": TEXT_LIMIT, "pattern": "^[^\\x00-\\x1f\\x7f-\\x9f]*[^\\s\\x00-\\x1f\\x7f-\\x9f][^\\x00-\\x1f\\x7f-\\x9f]*$",
        }),
        Shape::Name => json!({
            "type": "string", "maxLength": NAME_LIMIT, "pattern": NAME_PATTERN,
        }),
        Shape::Choice(words) => json!({ "enum": words }),
        Shape::Whole(least, most) => json!({
            "type": "integer", "minimum": least, "maximum": most,
        }),
        Shape::Positive(most) => json!({
            "type": "number", "exclusiveMinimum": 0, "maximum": most,
        }),
        Shape::Flag => json!({ "type": "boolean" }),
        Shape::Record(record) => of_record(record),
        Shape::List(shape) => json!({
            "type": "array", "maxItems": LIST_LIMIT, "items": of_shape(shape),
        }),
    }
}

fn merge(schema: &mut Value, more: Value) {
    if let (Some(schema), Value::Object(more)) = (schema.as_object_mut(), more) {
        schema.extend(more);
    }
}
