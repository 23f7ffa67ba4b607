//! The records in the cache's folder: narinfos as stored, and notes on what `nix copy` has uploaded under which name.

use std::io;
use std::path::Path;

use crate::server::folder::{nar_name, read_small};
use crate::server::sealed::{seal, unseal};
use crate::server::sound;
use crate::server::store::StoredNar;
use flywheel_nix::hash::Sha256;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::PathInfo;

/// Facts about a NAR that `nix copy` has uploaded. Its narinfo follows, and the client keeps the name for a month.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Upload {
    pub(crate) nar_hash: Sha256,
    /// Size of the NAR in bytes.
    pub(crate) nar_size: u64,
    /// Hash of the uploaded file, which may be compressed differently from ours.
    pub(crate) received_hash: Sha256,
    /// Size of the uploaded file in bytes.
    pub(crate) received_size: u64,
}

impl Upload {
    pub(crate) fn to_record(self) -> String {
        let Self {
            nar_hash,
            nar_size,
            received_hash,
            received_size,
        } = self;
        seal(&format!(
            "NarHash: {nar_hash}\nNarSize: {nar_size}\nFileHash: {received_hash}\nFileSize: {received_size}\n"
        ))
    }

    /// `None` if the record is not whole.
    pub(crate) fn from_record(bytes: &[u8]) -> Option<Self> {
        parse_upload(unseal(bytes)?)
    }
}

/// Reads a stored narinfo; `None` if there is none, or none that is whole.
///
/// # Errors
/// When the disk fails, and not only this file.
pub(crate) fn read_narinfo(file: &Path) -> io::Result<Option<NarInfo>> {
    let bytes = match read_small(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound || sound::is_damage(&error) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    Ok(unseal(&bytes).and_then(|text| NarInfo::parse(text).ok()))
}

/// The narinfo with the NAR's file as it is now: it may have been replaced by one that was compressed differently.
pub(crate) fn with_file(mut info: NarInfo, nar: StoredNar) -> NarInfo {
    info.file_hash = Some(nar.file_hash);
    info.file_size = Some(nar.file_size);
    info
}

/// The narinfo as stored, without our own signature: keys may change, and signing is cheap.
pub(crate) fn narinfo(path: &PathInfo, nar: StoredNar) -> NarInfo {
    NarInfo {
        path: path.path.clone(),
        url: format!("nar/{}", nar_name(&path.nar_hash)),
        compression: "zstd".to_owned(),
        file_hash: Some(nar.file_hash),
        file_size: Some(nar.file_size),
        nar_hash: path.nar_hash,
        nar_size: path.nar_size,
        references: path.references.clone(),
        deriver: path.deriver.clone(),
        signatures: path.signatures.clone(),
        ca: path.ca.clone(),
    }
}

fn parse_upload(text: &str) -> Option<Upload> {
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    };
    Some(Upload {
        nar_hash: Sha256::parse(field("NarHash")?).ok()?,
        nar_size: field("NarSize")?.parse().ok()?,
        received_hash: Sha256::parse(field("FileHash")?).ok()?,
        received_size: field("FileSize")?.parse().ok()?,
    })
}
