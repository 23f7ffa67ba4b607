//! Parses the output of `nix path-info --json` in each of its formats. Pure.
//!
//! Up to about Nix 2.18 it is an array of objects with `path`; from 2.19 on an object keyed by
//! path; under `--json-format 2` (2.33) an object with `info`, keyed by base name, where hashes and
//! content addresses are objects too
//! (<https://nix.dev/manual/nix/2.33/protocols/json/store-object-info>).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::hash::{Sha256, base32_encode};
use crate::path_info::{PathInfo, PathInfos, Unreadable};
use crate::store_path::{STORE_DIR, StorePath};
use flywheel_core::text::one_line;

#[derive(Debug, Error)]
pub enum JsonError {
    #[error("this is not JSON")]
    Syntax(#[from] serde_json::Error),
    /// It is neither an array nor an object of path infos.
    #[error("this is not a list of store paths")]
    Shape,
}

/// Parses the output. Invalid paths are left out; valid ones with unusable metadata are listed as
/// such.
///
/// # Errors
/// When the output as a whole has an unknown format.
pub fn parse(json: &[u8]) -> Result<PathInfos, JsonError> {
    let mut found = PathInfos::default();
    for (name, facts) in entries(serde_json::from_slice(json)?)? {
        // Newer versions print null for an invalid path, older ones `"valid": false`.
        if facts.is_null() || facts.get("valid") == Some(&Value::Bool(false)) {
            continue;
        }
        match path_info(&name, &facts) {
            Ok(info) => found.infos.push(info),
            Err(problem) => found.unreadable.push(Unreadable {
                path: one_line(&name, 260),
                problem,
            }),
        }
    }
    found.infos.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

fn entries(whole: Value) -> Result<Vec<(String, Value)>, JsonError> {
    match whole {
        Value::Array(list) => list.into_iter().map(named).collect(),
        // Older formats have store paths as keys, which are never called `info`.
        Value::Object(mut object) => match object.remove("info") {
            Some(Value::Object(infos)) => Ok(infos.into_iter().collect()),
            Some(_) => Err(JsonError::Shape),
            None => Ok(object.into_iter().collect()),
        },
        _ => Err(JsonError::Shape),
    }
}

fn named(facts: Value) -> Result<(String, Value), JsonError> {
    let name = facts
        .get("path")
        .and_then(Value::as_str)
        .ok_or(JsonError::Shape)?
        .to_owned();
    Ok((name, facts))
}

fn path_info(name: &str, facts: &Value) -> Result<PathInfo, String> {
    let facts = facts
        .as_object()
        .ok_or("its description is not an object")?;
    let deriver = facts
        .get("deriver")
        .and_then(Value::as_str)
        // Some versions print this text instead of null.
        .filter(|name| *name != "unknown-deriver");
    Ok(PathInfo {
        path: store_path(name)?,
        nar_hash: nar_hash(facts.get("narHash"))?,
        nar_size: facts
            .get("narSize")
            .and_then(Value::as_u64)
            .filter(|size| *size > 0)
            .ok_or("its size is unknown")?,
        references: references(facts)?,
        deriver: deriver.map(store_path).transpose()?,
        signatures: list(facts, "signatures")
            .iter()
            .filter_map(signature)
            .collect(),
        ca: facts
            .get("ca")
            .filter(|ca| !ca.is_null())
            .map(content_address)
            .transpose()?,
        ultimate: facts.get("ultimate") == Some(&Value::Bool(true)),
    })
}

fn references(facts: &Map<String, Value>) -> Result<Vec<StorePath>, String> {
    let names = list(facts, "references")
        .iter()
        .map(|name| store_path(name.as_str().unwrap_or_default()));
    let mut references = names.collect::<Result<Vec<_>, _>>()?;
    references.sort_unstable();
    references.dedup();
    Ok(references)
}

fn list<'a>(facts: &'a Map<String, Value>, name: &str) -> &'a [Value] {
    facts
        .get(name)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

/// Parses a full path, or a base name as in newer formats.
fn store_path(name: &str) -> Result<StorePath, String> {
    let read = if name.starts_with(STORE_DIR) {
        name.parse()
    } else {
        StorePath::from_base_name(name)
    };
    read.map_err(|error| error.to_string())
}

/// Parses `sha256-…`, `sha256:…`, or an object with algorithm, format and digits.
fn nar_hash(value: Option<&Value>) -> Result<Sha256, String> {
    let text = match value {
        None | Some(Value::Null) => return Err("its hash is unknown".to_owned()),
        Some(Value::String(text)) => text.clone(),
        Some(hash) => hash_text(hash)?,
    };
    Sha256::parse(&text).map_err(|error| error.to_string())
}

/// Returns `<algorithm>:<digits>` of a hash object; base64 digits stay as they are.
fn hash_text(hash: &Value) -> Result<String, String> {
    let part = |name| hash.get(name).and_then(Value::as_str);
    let (algorithm, digits) = (part("algorithm"), part("hash"));
    match (algorithm, digits) {
        (Some(algorithm), Some(digits)) => Ok(format!("{algorithm}:{digits}")),
        _ => Err("one of its hashes is in an unknown format".to_owned()),
    }
}

/// Parses `<key name>:<base64>`, or an object with the two parts.
fn signature(value: &Value) -> Option<String> {
    let part = |name| value.get(name).and_then(Value::as_str);
    value
        .as_str()
        .map(str::to_owned)
        .or_else(|| Some(format!("{}:{}", part("keyName")?, part("sig")?)))
}

/// Parses `fixed:r:sha256:<base32>` as in a narinfo, or an object with method and hash.
fn content_address(value: &Value) -> Result<String, String> {
    let unknown = || "its content address is in an unknown format".to_owned();
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    let method = match value
        .get("method")
        .and_then(Value::as_str)
        .ok_or_else(unknown)?
    {
        "flat" => "fixed:",
        "nar" => "fixed:r:",
        "git" => "fixed:git:",
        "text" => "text:",
        _ => return Err(unknown()),
    };
    let text = match value.get("hash").ok_or_else(unknown)? {
        // An SRI hash separates the algorithm by a dash.
        Value::String(sri) => sri.replacen('-', ":", 1),
        hash => hash_text(hash)?,
    };
    // A narinfo has base32 digits, so convert from base64.
    let (algorithm, digits) = text.split_once(':').ok_or_else(unknown)?;
    let bytes = STANDARD.decode(digits).map_err(|_| unknown())?;
    let digits = base32_encode(&bytes);
    Ok(format!("{method}{algorithm}:{digits}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The same four paths, as Nix 2.8 (which leaves out what is empty), 2.26 and 2.34 (format 2) print them.
    const ARRAY: &str = r#"[
      {"path":"/nix/store/4hivvj5k2gza6kvh7ii2m6chw3fmg113-a","narHash":"sha256-EFUdrtf6Rn0LWIJufrmg8q99aT3jGfLvd1//zaJEufY=","narSize":120,"references":[],"ca":"fixed:sha1:fd540npwk7x370s4s2jzpx74wf365jjm","registrationTime":1795223772},
      {"path":"/nix/store/d3v2zgdgmw8a1ja7d098isx4mdd7jf0g-x","narHash":"sha256-2PNF8sp6JG1nf+S+xUt53bVOl8AqrJ5Fpp7GmMcXdFw=","narSize":120,"references":["/nix/store/j8k9rrv5dcx16j3hsg6s6pi10czyz6ld-s","/nix/store/4hivvj5k2gza6kvh7ii2m6chw3fmg113-a"],"deriver":"/nix/store/70aia2cap0q375yn9vna7r6bkz4lf044-x.drv","registrationTime":1795223772,"ultimate":true,"signatures":["t:8tI3tA=="]},
      {"path":"/nix/store/j8k9rrv5dcx16j3hsg6s6pi10czyz6ld-s","narHash":"sha256:19l59z9nbs59axnhw6iqsz5bdagqb22kf0dp2zhkiq5m4b6k5247","narSize":288,"references":[],"ca":"fixed:r:sha256:19l59z9nbs59axnhw6iqsz5bdagqb22kf0dp2zhkiq5m4b6k5247","registrationTime":1795223772},
      {"path":"/nix/store/00000000000000000000000000000000-gone","valid":false}
    ]"#;
    const KEYED: &str = r#"{
      "/nix/store/4hivvj5k2gza6kvh7ii2m6chw3fmg113-a":{"ca":"fixed:sha1:fd540npwk7x370s4s2jzpx74wf365jjm","deriver":null,"narHash":"sha256-EFUdrtf6Rn0LWIJufrmg8q99aT3jGfLvd1//zaJEufY=","narSize":120,"references":[],"registrationTime":1795223772,"signatures":[],"ultimate":false},
      "/nix/store/d3v2zgdgmw8a1ja7d098isx4mdd7jf0g-x":{"ca":null,"deriver":"/nix/store/70aia2cap0q375yn9vna7r6bkz4lf044-x.drv","narHash":"sha256-2PNF8sp6JG1nf+S+xUt53bVOl8AqrJ5Fpp7GmMcXdFw=","narSize":120,"references":["/nix/store/4hivvj5k2gza6kvh7ii2m6chw3fmg113-a","/nix/store/j8k9rrv5dcx16j3hsg6s6pi10czyz6ld-s"],"registrationTime":1795223772,"signatures":["t:8tI3tA=="],"ultimate":true},
      "/nix/store/j8k9rrv5dcx16j3hsg6s6pi10czyz6ld-s":{"ca":"fixed:r:sha256:19l59z9nbs59axnhw6iqsz5bdagqb22kf0dp2zhkiq5m4b6k5247","deriver":null,"narHash":"sha256-h4gyzSK14DjhF7cBN4VY+Km2ytc4Gg5tV6noZdNPhaY=","narSize":288,"references":[],"registrationTime":1795223772,"signatures":[],"ultimate":false},
      "/nix/store/00000000000000000000000000000000-gone":null
    }"#;
    const FORMAT_2: &str = r#"{"info":{
      "4hivvj5k2gza6kvh7ii2m6chw3fmg113-a":{"ca":{"hash":"sha1-VcpihuPk9Pul0ESDM/qZ/FpASnM=","method":"flat"},"deriver":null,"narHash":"sha256-EFUdrtf6Rn0LWIJufrmg8q99aT3jGfLvd1//zaJEufY=","narSize":120,"references":[],"registrationTime":1795223772,"signatures":[],"storeDir":"/nix/store","ultimate":false,"version":2},
      "d3v2zgdgmw8a1ja7d098isx4mdd7jf0g-x":{"ca":null,"deriver":"70aia2cap0q375yn9vna7r6bkz4lf044-x.drv","narHash":{"algorithm":"sha256","format":"base64","hash":"2PNF8sp6JG1nf+S+xUt53bVOl8AqrJ5Fpp7GmMcXdFw="},"narSize":120,"references":["4hivvj5k2gza6kvh7ii2m6chw3fmg113-a","j8k9rrv5dcx16j3hsg6s6pi10czyz6ld-s"],"registrationTime":1795223772,"signatures":[{"keyName":"t","sig":"8tI3tA=="}],"ultimate":true},
      "j8k9rrv5dcx16j3hsg6s6pi10czyz6ld-s":{"ca":{"hash":{"algorithm":"sha256","format":"base64","hash":"h4gyzSK14DjhF7cBN4VY+Km2ytc4Gg5tV6noZdNPhaY="},"method":"nar"},"deriver":null,"narHash":"sha256-h4gyzSK14DjhF7cBN4VY+Km2ytc4Gg5tV6noZdNPhaY=","narSize":288,"references":[],"registrationTime":1795223772,"signatures":[],"ultimate":false},
      "00000000000000000000000000000000-gone":null
    },"storeDir":"/nix/store","version":2}"#;

    #[test]
    fn all_shapes_say_the_same() {
        let found = parse(ARRAY.as_bytes()).expect("an array");
        let names: Vec<&str> = found.infos.iter().map(|info| info.path.name()).collect();
        assert_eq!((names, found.unreadable.len()), (vec!["a", "x", "s"], 0));
        let built = &found.infos[1];
        assert!(built.ultimate && built.references.is_sorted() && built.references.len() == 2);
        assert_eq!(built.deriver.as_ref().map(StorePath::name), Some("x.drv"));
        assert_eq!(built.signatures, ["t:8tI3tA=="]);
        assert_eq!(parse(KEYED.as_bytes()).expect("an object"), found);
        assert_eq!(parse(FORMAT_2.as_bytes()).expect("format 2"), found);
    }

    #[test]
    fn a_path_that_cannot_be_described_is_named() {
        let json = br#"{"/nix/store/d3v2zgdgmw8a1ja7d098isx4mdd7jf0g-x":{"narHash":"sha256-2PNF8sp6JG1nf+S+xUt53bVOl8AqrJ5Fpp7GmMcXdFw=","narSize":0},
            "/nix/store/4hivvj5k2gza6kvh7ii2m6chw3fmg113-a":{"narHash":null,"narSize":120}}"#;
        let found = parse(json).expect("an object");
        assert_eq!(found.infos, []);
        let problems: Vec<&str> = found
            .unreadable
            .iter()
            .map(|path| path.problem.as_str())
            .collect();
        assert_eq!(problems, ["its hash is unknown", "its size is unknown"]);
    }

    #[test]
    fn strangers_are_refused() {
        for text in ["", "null", "3", "[3]", "[{}]", r#"{"info":3}"#] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
