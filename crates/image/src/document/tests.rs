//! The check of a document and its JSON Schema agree, for every way in which a document can be wrong.

use serde_json::{Value, json};

use super::*;

const INNER: Record = Record {
    name: "Inner",
    about: "A part.",
    fields: &[Field {
        name: "word",
        shape: Shape::Choice(&["one", "two"]),
        is_required: true,
        about: "A word.",
    }],
    rules: &[],
};

const OUTER: Record = Record {
    name: "Outer",
    about: "A whole.",
    fields: &[
        Field {
            name: "name",
            shape: Shape::Name,
            is_required: true,
            about: "A name.",
        },
        Field {
            name: "text",
            shape: Shape::Text,
            is_required: false,
            about: "A text.",
        },
        Field {
            name: "count",
            shape: Shape::Whole(2, 9),
            is_required: false,
            about: "A count.",
        },
        Field {
            name: "share",
            shape: Shape::Positive(3),
            is_required: false,
            about: "A share.",
        },
        Field {
            name: "flag",
            shape: Shape::Flag,
            is_required: false,
            about: "A flag.",
        },
        Field {
            name: "inner",
            shape: Shape::Record(&INNER),
            is_required: false,
            about: "A part.",
        },
        Field {
            name: "list",
            shape: Shape::List(&Shape::Record(&INNER)),
            is_required: false,
            about: "Parts.",
        },
    ],
    rules: &[
        Rule::Together("count", "share"),
        Rule::Needed {
            field: "text",
            by: "name",
            words: &["told"],
        },
    ],
};

/// The field that the check names, if the value is wrong.
fn named(value: &Value) -> Option<String> {
    let checked: Result<Value, DocumentError> = accept("f", value, &OUTER);
    checked
        .err()
        .map(|error| error.field.unwrap_or_else(|| "the whole".into()))
}

#[test]
fn the_check_names_the_field_and_the_schema_agrees() {
    let schema = jsonschema::validator_for(&json_schema(&OUTER)).expect("a sound schema");
    let long = "x".repeat(501);
    for (value, field) in [
        (json!({"name": "a"}), None),
        (
            json!({"name": "a.b-c_9", "text": "x y", "count": 2, "share": 0.5, "flag": false, "inner": {"word": "two"}, "list": [{"word": "one"}, {"word": "two"}]}),
            None,
        ),
        (json!({"name": "a", "count": 9.0, "share": 3}), None),
        (json!({}), Some("name")),
        (json!({"nmae": "a"}), Some("nmae")),
        (json!({"name": "a", "list": {}}), Some("list")),
        (json!({"name": "A"}), Some("name")),
        (json!({"name": "a--b"}), Some("name")),
        (json!({"name": "-a"}), Some("name")),
        (json!({"name": ""}), Some("name")),
        (json!({"name": "../a"}), Some("name")),
        (json!({"name": "a\n"}), Some("name")),
        (json!({"name": null}), Some("name")),
        (json!({"name": "a".repeat(64)}), Some("name")),
        (json!({"name": "a", "text": ""}), Some("text")),
        (json!({"name": "a", "text": " "}), Some("text")),
        (json!({"name": "a", "text": "a\u{1b}b"}), Some("text")),
        (json!({"name": "a", "text": long}), Some("text")),
        (json!({"name": "a", "text": 7}), Some("text")),
        (json!({"name": "told"}), Some("text")),
        (json!({"name": "told", "text": "x"}), None),
        (json!({"name": "a", "count": 2}), Some("share")),
        (json!({"name": "a", "share": 2}), Some("count")),
        (json!({"name": "a", "count": 1}), Some("count")),
        (json!({"name": "a", "count": 10}), Some("count")),
        (json!({"name": "a", "count": 2.5}), Some("count")),
        (json!({"name": "a", "count": "2"}), Some("count")),
        (json!({"name": "a", "share": 0}), Some("share")),
        (json!({"name": "a", "share": 3.1}), Some("share")),
        (json!({"name": "a", "flag": "true"}), Some("flag")),
        (json!({"name": "a", "inner": {}}), Some("inner.word")),
        (
            json!({"name": "a", "inner": {"word": "tow"}}),
            Some("inner.word"),
        ),
        (
            json!({"name": "a", "inner": {"word": "two", "wrod": 1}}),
            Some("inner.wrod"),
        ),
        (json!({"name": "a", "inner": []}), Some("inner")),
        (
            json!({"name": "a", "list": [{"word": "one"}, {"word": 3}]}),
            Some("list[1].word"),
        ),
        (
            json!({"name": "a", "list": vec![json!({"word": "one"}); 101]}),
            Some("list"),
        ),
        (json!("a"), Some("the whole")),
    ] {
        assert_eq!(named(&value).as_deref(), field, "{value}");
        assert_eq!(schema.is_valid(&value), field.is_none(), "{value}");
    }
}

#[test]
fn a_slip_gets_the_word_that_was_meant() {
    let hint = |value: Value| {
        let checked: Result<Value, DocumentError> = accept("f", &value, &OUTER);
        checked.expect_err("it is refused").hint.unwrap_or_default()
    };
    assert_eq!(hint(json!({"nmae": "a"})), "Did you mean `name`?");
    assert_eq!(
        hint(json!({"name": "a", "inner": {"word": "tow"}})),
        "Did you mean `two`?"
    );
    assert_eq!(
        hint(json!({"name": "a", "inner": {"colour": 1}})),
        "The fields here are `word`."
    );
}

#[test]
fn a_text_that_is_not_in_its_format_is_refused_with_the_formats_name() {
    for (format, text, begins) in [
        (Format::Json, "{", "f: is no JSON: "),
        (
            Format::Json,
            r#"{"name": "a", "name": "b"}"#,
            "f: is no JSON: `name` stands there twice",
        ),
        (
            Format::Json,
            r#"{"list": [{"word": "one", "word": "two"}]}"#,
            "f: is no JSON: `word` stands there twice",
        ),
        (Format::Toml, "name = ", "f: is no TOML: "),
        (Format::Toml, "name = 'a'\nname = 'b'", "f: is no TOML: "),
        (Format::Yaml, "name: a\nname: b", "f: is no YAML: "),
        (Format::Yaml, "name: [", "f: is no YAML: "),
    ] {
        let read: Result<Value, DocumentError> = read("f", format, text, &OUTER);
        let error = read.expect_err(text).to_string();
        assert!(error.starts_with(begins), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn a_format_follows_from_the_ending() {
    for (name, format) in [
        ("a.json", Some(Format::Json)),
        ("a.b.toml", Some(Format::Toml)),
        ("a.yml", Some(Format::Yaml)),
        ("a.yaml", Some(Format::Yaml)),
        ("a.ncl", Some(Format::Nickel)),
        ("a", None),
        ("a.txt", None),
    ] {
        assert_eq!(Format::of(Path::new(name)), format, "{name}");
    }
}
