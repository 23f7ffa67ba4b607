//! Good directives in every format, each of their fields mutated in turn, and that no declaration differs from its type.

use serde_json::{Value, json};

use super::*;
use crate::document::{DocumentError, Format, accept, json_schema, read};

fn good() -> Value {
    json!({
        "workspace": "web",
        "artifact": { "image": "registry.example.org/team/web:1", "target": "final" },
        "compute_provider": "docker_local",
        "registry_provider": "zot",
        "cache_policy": { "actor": "agent", "actor_id": "bot-7", "disposition": "rollback" },
        "runner_override": { "cpu": 4, "memory_gb": 6.5, "time_budget_min": 30 },
        "nats_events": { "prefix": "ci.images" },
    })
}

/// Every good document: each word of each choice, each optional field there and not.
fn all_good() -> Vec<Value> {
    let mut all = vec![good()];
    for (field, words) in [
        (
            "compute_provider",
            &["hcloud", "proxmox", "docker_local", "ssh", "http"][..],
        ),
        ("registry_provider", &["zot", "harbor", "ghcr", "dockerhub"]),
    ] {
        all.extend(words.iter().map(|word| {
            let mut value = good();
            value[field] = json!(word);
            value
        }));
    }
    for policy in [
        json!({"actor": "ci", "disposition": "export"}),
        json!({"actor": "ci", "disposition": "discard"}),
        json!({"actor": "human", "actor_id": "ann", "disposition": "export"}),
        json!({"actor": "ci_aux", "workspaces": ["api", "web"], "disposition": "export"}),
    ] {
        let mut value = good();
        value["cache_policy"] = policy;
        all.push(value);
    }
    for field in ["runner_override", "nats_events"] {
        let mut value = good();
        value.as_object_mut().expect("an object").remove(field);
        all.push(value);
    }
    all
}

/// The paths of all fields, with those of records within.
fn paths(value: &Value, at: &str) -> Vec<String> {
    let fields = value.as_object().into_iter().flatten();
    let paths = fields.flat_map(|(name, value)| {
        let path = format!("{at}/{name}");
        let below = paths(value, &path);
        [vec![path], below].concat()
    });
    paths.collect()
}

fn accepted(value: &Value) -> Result<Directives, DocumentError> {
    accept("d", value, &BUILD_DIRECTIVES)
}

#[test]
fn good_directives_are_taken_and_a_mutated_field_is_named() {
    let schema = json_schema(&BUILD_DIRECTIVES);
    let schema = jsonschema::validator_for(&schema).expect("a sound schema");
    let mut mutations = 0;
    for value in all_good() {
        assert!(accepted(&value).is_ok(), "{:?}", accepted(&value));
        assert!(schema.is_valid(&value), "{value}");
        for path in paths(&value, "") {
            let named = path.trim_start_matches('/').replace('/', ".");
            // Another type, and a slip in the name.
            let mut wrong = value.clone();
            *wrong.pointer_mut(&path).expect("the field") = json!(false);
            let mut misspelt = value.clone();
            let (above, name) = path.rsplit_once('/').expect("a path");
            let above = misspelt.pointer_mut(above).expect("the record");
            let above = above.as_object_mut().expect("a record");
            let held = above.remove(name).expect("the field");
            above.insert(format!("{name}x"), held);
            for (value, named) in [(wrong, named.clone()), (misspelt, format!("{named}x"))] {
                let error = accepted(&value).expect_err("it is mutated");
                assert_eq!(error.field, Some(named), "{value}");
                assert!(!schema.is_valid(&value), "{value}");
                mutations += 1;
            }
        }
    }
    assert!(mutations > 300, "{mutations}");
}

#[test]
fn what_an_actor_needs_is_missed() {
    for (policy, field) in [
        (
            json!({"actor": "human", "disposition": "export"}),
            "cache_policy.actor_id",
        ),
        (
            json!({"actor": "agent", "disposition": "export"}),
            "cache_policy.actor_id",
        ),
        (
            json!({"actor": "ci_aux", "disposition": "export"}),
            "cache_policy.workspaces",
        ),
        (
            json!({"actor": "ci", "disposition": "exprot"}),
            "cache_policy.disposition",
        ),
    ] {
        let mut value = good();
        value["cache_policy"] = policy;
        assert_eq!(
            accepted(&value).expect_err("it lacks one").field.as_deref(),
            Some(field)
        );
    }
}

#[test]
fn every_format_gives_the_same_directives() {
    let expected = accepted(&good()).expect("good ones");
    let toml = r#"
workspace = "web"
compute_provider = "docker_local"
registry_provider = "zot"
artifact = { image = "registry.example.org/team/web:1", target = "final" }
nats_events.prefix = "ci.images"
[cache_policy]
actor = "agent"
actor_id = "bot-7"
disposition = "rollback"
[runner_override]
cpu = 4
memory_gb = 6.5
time_budget_min = 30
"#;
    let yaml = "
workspace: web
compute_provider: docker_local
registry_provider: zot
artifact: { image: 'registry.example.org/team/web:1', target: final }
nats_events: { prefix: ci.images }
cache_policy: { actor: agent, actor_id: bot-7, disposition: rollback }
runner_override: { cpu: 4, memory_gb: 6.5, time_budget_min: 30 }
";
    let json = good().to_string();
    for (format, text) in [
        (Format::Json, json.as_str()),
        (Format::Toml, toml),
        (Format::Yaml, yaml),
    ] {
        let read: Result<Directives, _> = read("d", format, text, &BUILD_DIRECTIVES);
        assert_eq!(read.as_ref(), Ok(&expected), "{format:?}");
    }
    assert_eq!(
        expected.cache_policy.actor(),
        Actor::Agent(ActorId::new("bot-7"))
    );
}

#[test]
fn the_nickel_file_has_every_field_and_word_of_the_schema() {
    let text = nickel();
    let mut records = vec![&BUILD_DIRECTIVES, &CACHE_POLICY, &BUILD_SPEC];
    while let Some(record) = records.pop() {
        for field in record.fields {
            assert!(
                text.contains(&format!("{} | ", field.name)),
                "{}",
                field.name
            );
            match &field.shape {
                Shape::Choice(words) => {
                    let tags: Vec<String> = words.iter().map(|word| format!("'{word}")).collect();
                    assert!(text.contains(&format!("[| {} |]", tags.join(", "))));
                }
                Shape::Record(inner) => records.push(inner),
                _ => {}
            }
        }
    }
    for name in [
        "BuildSpec",
        "CachePolicy",
        "BuildDirectives",
        "make_ci_build",
        "make_session_build",
        "ci_cache_policy",
    ] {
        assert!(text.contains(&format!("{name} ")), "{name}");
    }
    // Nothing is left to Nickel's own dynamic type.
    assert!(!text.contains("Dyn"));
}
