//! The metadata that a client sends before a path, checked more strictly than Attic does. Pure.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use thiserror::Error;

use flywheel_core::text::one_line;
use flywheel_nix::content_address::ContentAddress;
use flywheel_nix::hash::Sha256;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::{STORE_DIR, StorePath};

const SIGNATURE_SIZE: usize = 64;
/// A NAR mentions each path that it refers to by at least the hash in its name, which has as many bytes.
const MENTION_SIZE: u64 = 32;

/// Why metadata is rejected; the text goes to the client.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum InfoError {
    /// It is not the expected JSON.
    #[error("the upload info cannot be read: {0}")]
    Json(String),
    #[error("`{field}` {problem}")]
    Field {
        /// The field's name in the JSON.
        field: &'static str,
        problem: String,
    },
}

fn field(field: &'static str, problem: impl Into<String>) -> InfoError {
    InfoError::Field {
        field,
        problem: problem.into(),
    }
}

#[derive(Deserialize)]
struct Raw {
    cache: String,
    store_path_hash: String,
    store_path: String,
    references: Vec<String>,
    deriver: Option<String>,
    sigs: Vec<String>,
    ca: Option<String>,
    nar_hash: String,
    nar_size: u64,
}

/// The metadata of one upload in Attic's protocol.
#[derive(Debug)]
pub(crate) struct UploadInfo {
    /// The cache's name as received; it may not exist here.
    pub(crate) cache: String,
    /// The path's metadata, with sorted references.
    pub(crate) path: PathInfo,
}

impl UploadInfo {
    /// Parses and checks the JSON. Unknown fields are ignored.
    ///
    /// # Errors
    /// For whatever would make a narinfo that no Nix can use.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, InfoError> {
        let raw: Raw = serde_json::from_slice(json)
            .map_err(|error| InfoError::Json(one_line(&error.to_string(), 200)))?;
        let path: StorePath = raw.store_path.parse().map_err(|_| {
            field(
                "store_path",
                format!(
                    "is not a path in `{STORE_DIR}`: `{}`",
                    one_line(&raw.store_path, 260)
                ),
            )
        })?;
        if path.hash().as_str() != raw.store_path_hash {
            return Err(field(
                "store_path_hash",
                format!("is not the hash of `{path}`"),
            ));
        }
        // Attic's clients send base names here, and a full path above.
        let deriver = raw
            .deriver
            .as_deref()
            .map(|name| base_name("deriver", name))
            .transpose()?;
        let references = raw
            .references
            .iter()
            .map(|name| base_name("references", name))
            .collect::<Result<Vec<_>, _>>()?;
        let info = PathInfo {
            path,
            nar_hash: nar_hash(&raw.nar_hash)?,
            nar_size: raw.nar_size,
            references,
            deriver,
            signatures: raw.sigs,
            ca: raw.ca,
            ultimate: false,
        };
        Ok(Self {
            cache: raw.cache,
            path: checked(info)?,
        })
    }
}

/// Checks a narinfo uploaded by `nix copy`.
///
/// # Errors
/// For whatever would make a narinfo that no Nix can use.
pub(crate) fn check_narinfo(info: NarInfo) -> Result<PathInfo, InfoError> {
    checked(PathInfo {
        path: info.path,
        nar_hash: info.nar_hash,
        nar_size: info.nar_size,
        references: info.references,
        deriver: info.deriver,
        signatures: info.signatures,
        ca: info.ca,
        ultimate: false,
    })
}

/// The checks that both protocols share: sorts what must be sorted, and rejects what no Nix could
/// use.
fn checked(mut info: PathInfo) -> Result<PathInfo, InfoError> {
    if info.nar_size == 0 {
        return Err(field("nar_size", "is 0, and no NAR is empty"));
    }
    if let Some(deriver) = info
        .deriver
        .as_ref()
        .filter(|deriver| !deriver.is_derivation())
    {
        return Err(field(
            "deriver",
            format!("is not a `.drv`: `{}`", deriver.base_name()),
        ));
    }
    if let Some(bad) = info.signatures.iter().find(|text| !is_signature(text)) {
        return Err(field(
            "sigs",
            format!("contains an invalid signature:  `{}`", one_line(bad, 120)),
        ));
    }
    if let Some(bad) = info
        .ca
        .as_ref()
        .filter(|text| ContentAddress::parse(text).is_none())
    {
        return Err(field(
            "ca",
            format!("is not a content address: `{}`", one_line(bad, 120)),
        ));
    }
    // The signature covers a sorted list, and readers verify it against the list as served.
    info.references.sort();
    info.references.dedup();
    // Where there is a content address, the path's name depends on the references.
    let mentions = info.references.len() as u64 * MENTION_SIZE;
    if info.ca.is_none() && mentions > info.nar_size {
        let (count, size) = (info.references.len(), info.nar_size);
        return Err(field(
            "references",
            format!("has {count} paths, more than a NAR of {size} bytes can mention"),
        ));
    }
    info.signatures.sort();
    info.signatures.dedup();
    Ok(info)
}

fn base_name(name: &'static str, text: &str) -> Result<StorePath, InfoError> {
    StorePath::from_base_name(text).map_err(|_| {
        field(
            name,
            format!(
                "contains an invalid store path name:  `{}`",
                one_line(text, 260)
            ),
        )
    })
}

/// Attic accepts `sha256:` in base16 or base32 and rejects SRI. So does this server, or a client
/// tested here would fail there.
fn nar_hash(text: &str) -> Result<Sha256, InfoError> {
    let known = text
        .strip_prefix("sha256:")
        .is_some_and(|digits| matches!(digits.len(), 52 | 64));
    let hash = known.then(|| Sha256::parse(text).ok()).flatten();
    hash.ok_or_else(|| {
        field(
            "nar_hash",
            format!(
                "is not `sha256:` with base16 or base32: `{}`",
                one_line(text, 100)
            ),
        )
    })
}

/// `<key name>:<base64 of 64 bytes>`.
fn is_signature(text: &str) -> bool {
    text.split_once(':').is_some_and(|(name, digits)| {
        let named = !name.is_empty() && name.bytes().all(|c| c.is_ascii_graphic());
        named
            && STANDARD
                .decode(digits)
                .is_ok_and(|bytes| bytes.len() == SIGNATURE_SIZE)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const A: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-a";
    const B: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb-b";

    fn good() -> Value {
        json!({
            "cache": "main", "store_path_hash": &A[..32], "store_path": format!("/nix/store/{A}"),
            "references": [B, A, B], "deriver": null, "sigs": [], "ca": null, "extra": 1,
            "nar_hash": format!("sha256:{}", "0".repeat(64)), "nar_size": 120,
        })
    }

    fn check(name: &str, value: Value) -> Result<UploadInfo, InfoError> {
        let mut json = good();
        json[name] = value;
        UploadInfo::parse(json.to_string().as_bytes())
    }

    #[test]
    fn references_come_out_sorted_and_once() {
        let info = check("sigs", json!([])).expect("good");
        let names: Vec<&str> = info
            .path
            .references
            .iter()
            .map(StorePath::base_name)
            .collect();
        assert_eq!(names, [A, B]);
    }

    #[test]
    fn what_would_make_an_unusable_narinfo_is_refused_by_name() {
        let long = "x".repeat(300);
        let cases = [
            ("store_path_hash", json!(&B[..32])),
            ("store_path", json!(A)),
            ("store_path", json!(format!("/nix/store/{A}/bin"))),
            ("references", json!([format!("/nix/store/{A}")])),
            ("references", json!([""])),
            ("deriver", json!("")),
            ("deriver", json!(format!("/nix/store/{A}.drv"))),
            ("deriver", json!(A)),
            (
                "nar_hash",
                json!("sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="),
            ),
            ("nar_hash", json!("sha256:zz")),
            ("nar_size", json!(0)),
            ("sigs", json!(["main:AAAA"])),
            ("sigs", json!(["a\nb:AAAA"])),
            ("ca", json!("fixed:r:sha256:x\nSig: y")),
            ("ca", json!("source")),
            ("ca", json!(format!("fixed:sha256:{long}"))),
        ];
        for (name, value) in cases {
            match check(name, value.clone()) {
                Err(InfoError::Field { field, .. }) => assert_eq!(field, name, "{value}"),
                other => panic!("{name} = {value}: {other:?}"),
            }
        }
        for (name, value) in [
            ("nar_size", json!(-1)),
            ("references", json!(null)),
            ("sigs", json!(null)),
        ] {
            assert!(
                matches!(check(name, value), Err(InfoError::Json(_))),
                "{name}"
            );
        }
    }

    #[test]
    fn known_content_addresses_pass() {
        let digits = "0".repeat(52);
        for ca in [
            "text:sha256",
            "fixed:sha256",
            "fixed:r:sha256",
            "fixed:git:sha256",
        ] {
            let ca = format!("{ca}:{digits}");
            assert!(check("ca", json!(ca)).is_ok(), "{ca}");
        }
    }

    #[test]
    fn a_nar_cannot_mention_more_than_it_has_room_for() {
        let names = |count: usize| -> Vec<String> {
            (0..count).map(|n| format!("{}-{n}", &A[..32])).collect()
        };
        // The NAR has 120 bytes.
        assert!(check("references", json!(names(3))).is_ok());
        assert!(check("references", json!(names(4))).is_err());
    }
}
