//! The metadata that Nix keeps about a valid store path. Pure; the store reads it.

use crate::hash::Sha256;
use crate::key::PublicKey;
use crate::store_path::StorePath;

/// The registered metadata of one valid store path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathInfo {
    pub path: StorePath,
    /// The hash of its NAR.
    pub nar_hash: Sha256,
    /// The size of its NAR in bytes.
    pub nar_size: u64,
    /// The paths it refers to, possibly including itself; sorted, without duplicates.
    pub references: Vec<StorePath>,
    /// The derivation that produced it.
    pub deriver: Option<StorePath>,
    /// Signatures, each `<key name>:<base64>`.
    pub signatures: Vec<String>,
    /// The content address, for paths that have one (`fixed:r:sha256:…`, `text:sha256:…`).
    pub ca: Option<String>,
    /// Whether this store built it.
    pub ultimate: bool,
}

/// The result of a query. Valid paths with unusable metadata are listed, not dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PathInfos {
    /// The paths with usable metadata.
    pub infos: Vec<PathInfo>,
    /// The valid paths with unusable metadata.
    pub unreadable: Vec<Unreadable>,
}

/// A valid path whose metadata lacks something that publishing needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// The path as it was registered.
    pub path: String,
    /// The problem as a fragment: "its size is unknown".
    pub problem: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Origin {
    /// This store built it.
    Built,
    /// It was copied from a cache or another store.
    Substituted,
    /// It was added by evaluation: a source, a text, a store derivation.
    Added,
}

impl PathInfo {
    /// Derives from the metadata how the path entered the store: builds mark their outputs as
    /// `ultimate`, paths from a cache have signatures or a deriver, and paths from evaluation have
    /// neither.
    pub fn origin(&self) -> Origin {
        if self.ultimate {
            Origin::Built
        // Derivations come from evaluation.
        } else if self.path.is_derivation()
            || (self.ca.is_some() && self.signatures.is_empty() && self.deriver.is_none())
        {
            Origin::Added
        } else {
            Origin::Substituted
        }
    }
}

impl PathInfo {
    /// Whether it is registered with a valid signature by `key`.
    pub fn signed_by(&self, key: &PublicKey) -> bool {
        let text = fingerprint(&self.path, &self.nar_hash, self.nar_size, &self.references);
        self.signatures
            .iter()
            .any(|signature| key.verifies(&text, signature))
    }
}

/// The text that a cache signs. References are sorted here, because Nix verifies a sorted list.
pub fn fingerprint(
    path: &StorePath,
    nar_hash: &Sha256,
    nar_size: u64,
    references: &[StorePath],
) -> String {
    let mut sorted: Vec<String> = references.iter().map(StorePath::to_string).collect();
    sorted.sort_unstable();
    sorted.dedup();
    format!("1;{path};{nar_hash};{nar_size};{}", sorted.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(name: &str, change: impl FnOnce(&mut PathInfo)) -> Origin {
        let mut info = PathInfo {
            path: StorePath::from_base_name(&format!("fvchbymk0m4jvldpb9m5hy0bjy2lf30k-{name}"))
                .expect("valid"),
            nar_hash: Sha256([0; 32]),
            nar_size: 120,
            references: Vec::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            ultimate: false,
        };
        change(&mut info);
        info.origin()
    }

    #[test]
    fn registration_tells_where_a_path_came_from() {
        let ca = || Some("fixed:r:sha256:x".to_owned());
        assert_eq!(origin("hello", |info| info.ultimate = true), Origin::Built);
        assert_eq!(
            origin("hello", |info| info.signatures.push("c:x".to_owned())),
            Origin::Substituted
        );
        assert_eq!(
            origin("hello", |_| ()),
            Origin::Substituted,
            "copied without a signature"
        );
        assert_eq!(origin("source", |info| info.ca = ca()), Origin::Added);
        assert_eq!(
            origin("hello.drv", |info| info.signatures.push("c:x".to_owned())),
            Origin::Added
        );
        let fetched = |info: &mut PathInfo| (info.ca, info.ultimate) = (ca(), true);
        assert_eq!(origin("fixed-output", fetched), Origin::Built);
        let from_cache =
            |info: &mut PathInfo| (info.ca, info.deriver) = (ca(), Some(info.path.clone()));
        assert_eq!(origin("fixed-output", from_cache), Origin::Substituted);
    }
}
