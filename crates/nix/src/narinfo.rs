//! The narinfo format, in which a binary cache describes a store path. Pure.

use std::fmt;

use thiserror::Error;

use crate::hash::Sha256;
use crate::key::PublicKey;
use crate::path_info::fingerprint;
use crate::store_path::StorePath;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum NarInfoError {
    #[error("the narinfo has no `{0}`")]
    Missing(&'static str),
    #[error("the narinfo has an invalid `{field}`: `{value}`")]
    Bad {
        field: &'static str,
        /// Its value, shortened.
        value: String,
    },
}

/// The content of a `<hash>.narinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NarInfo {
    /// The path described.
    pub path: StorePath,
    /// The NAR's URL, relative to the cache (`nar/…`) or absolute.
    pub url: String,
    /// How the NAR file is compressed: `none`, `xz`, `zstd`, `bzip2`, `br`, …
    pub compression: String,
    /// Hash of the compressed file; Attic sends none.
    pub file_hash: Option<Sha256>,
    /// Size of the compressed file in bytes; Attic sends none.
    pub file_size: Option<u64>,
    pub nar_hash: Sha256,
    /// Size of the NAR in bytes.
    pub nar_size: u64,
    /// References, in the given order.
    pub references: Vec<StorePath>,
    /// The derivation that produced the path.
    pub deriver: Option<StorePath>,
    /// Signatures, each `<key name>:<base64>`.
    pub signatures: Vec<String>,
    pub ca: Option<String>,
}

impl NarInfo {
    /// Parses a narinfo. Unknown fields are ignored, as in Nix.
    ///
    /// # Errors
    /// When a field that Nix needs is missing or malformed.
    pub fn parse(text: &str) -> Result<Self, NarInfoError> {
        let field = |name: &'static str| {
            fields(text)
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value)
        };
        let need = |name: &'static str| {
            field(name)
                .filter(|v| !v.is_empty())
                .ok_or(NarInfoError::Missing(name))
        };
        let references = match field("References") {
            // A path without references may lack the field.
            None => Vec::new(),
            Some(names) => names
                .split_whitespace()
                .map(|name| base_name("References", name))
                .collect::<Result<_, _>>()?,
        };
        let deriver =
            // Nix writes `unknown-deriver` where it does not know one.
            field("Deriver").filter(|name| !name.is_empty() && *name != "unknown-deriver");
        Ok(Self {
            path: need("StorePath")
                .and_then(|path| path.parse().map_err(|_| bad("StorePath", path)))?,
            url: need("URL")?.to_owned(),
            compression: field("Compression")
                .filter(|v| !v.is_empty())
                // Nix assumes bzip2 where the field is missing.
                .unwrap_or("bzip2")
                .to_owned(),
            file_hash: field("FileHash")
                .map(|value| hash("FileHash", value))
                .transpose()?,
            file_size: field("FileSize")
                .map(|value| size("FileSize", value))
                .transpose()?,
            nar_hash: hash("NarHash", need("NarHash")?)?,
            nar_size: size("NarSize", need("NarSize")?)?,
            references,
            deriver: deriver.map(|name| base_name("Deriver", name)).transpose()?,
            signatures: fields(text)
                .filter(|(key, _)| *key == "Sig")
                .map(|(_, value)| value.to_owned())
                .collect(),
            ca: field("CA").filter(|v| !v.is_empty()).map(str::to_owned),
        })
    }

    /// Whether it has a valid signature by `key`.
    pub fn signed_by(&self, key: &PublicKey) -> bool {
        let text = fingerprint(&self.path, &self.nar_hash, self.nar_size, &self.references);
        self.signatures
            .iter()
            .any(|signature| key.verifies(&text, signature))
    }
}

fn fields(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(key, value)| (key, value.trim()))
}

fn bad(field: &'static str, value: &str) -> NarInfoError {
    NarInfoError::Bad {
        field,
        value: flywheel_core::text::one_line(value, 80),
    }
}

fn base_name(field: &'static str, name: &str) -> Result<StorePath, NarInfoError> {
    StorePath::from_base_name(name).map_err(|_| bad(field, name))
}

fn hash(field: &'static str, value: &str) -> Result<Sha256, NarInfoError> {
    Sha256::parse(value).map_err(|_| bad(field, value))
}

fn size(field: &'static str, value: &str) -> Result<u64, NarInfoError> {
    value.parse().map_err(|_| bad(field, value))
}

/// The file as a cache serves it, with the fields in Nix's order.
impl fmt::Display for NarInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let references: Vec<&str> = self.references.iter().map(StorePath::base_name).collect();
        writeln!(
            f,
            "StorePath: {}\nURL: {}\nCompression: {}",
            self.path, self.url, self.compression
        )?;
        if let Some(hash) = &self.file_hash {
            writeln!(f, "FileHash: {hash}")?;
        }
        if let Some(size) = self.file_size {
            writeln!(f, "FileSize: {size}")?;
        }
        writeln!(f, "NarHash: {}\nNarSize: {}", self.nar_hash, self.nar_size)?;
        // Nix skips two characters after a field's name, so without the space it would read into
        // the next line.
        writeln!(f, "References: {}", references.join(" "))?;
        if let Some(path) = &self.deriver {
            writeln!(f, "Deriver: {}", path.base_name())?;
        }
        for signature in &self.signatures {
            writeln!(f, "Sig: {signature}")?;
        }
        if let Some(ca) = &self.ca {
            writeln!(f, "CA: {ca}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::SecretKey;

    const TEXT: &str = "StorePath: /nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello
URL: nar/x.nar.zst
Compression: zstd
NarHash: sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73
NarSize: 120
References: 
Deriver: r3f9l9f32qpzwmdgizjpbwn3ff2n6ny7-hello.drv
";

    #[test]
    fn what_is_read_is_written_again() {
        assert_eq!(NarInfo::parse(TEXT).expect("valid").to_string(), TEXT);
    }

    #[test]
    fn a_field_that_is_missing_or_malformed_is_named() {
        let without = TEXT.replace("NarSize: 120\n", "");
        assert_eq!(
            NarInfo::parse(&without),
            Err(NarInfoError::Missing("NarSize"))
        );
        let malformed = TEXT.replace("120", "-1");
        assert!(matches!(
            NarInfo::parse(&malformed),
            Err(NarInfoError::Bad {
                field: "NarSize",
                ..
            })
        ));
        assert!(NarInfo::parse("").is_err());
    }

    #[test]
    fn a_signature_holds_for_this_text_alone() {
        let key = SecretKey::generate("main").expect("random");
        let mut info = NarInfo::parse(TEXT).expect("valid");
        assert!(!info.signed_by(&key.public()));
        info.signatures.push(key.sign(&fingerprint(
            &info.path,
            &info.nar_hash,
            info.nar_size,
            &info.references,
        )));
        assert!(info.signed_by(&key.public()));
        info.nar_size += 1;
        assert!(!info.signed_by(&key.public()));
    }
}
