//! The names under which `nix copy` uploads NARs: `<file hash>.nar[.<compression>]`. Pure.

use crate::server::error::ErrorResponse;
use crate::server::ingest::Format;
use flywheel_nix::hash::Sha256;

/// Advice for a compression that this server does not take.
const ADVICE: &str = "this cache takes NARs uncompressed or compressed with xz or zstd; add `?compression=zstd` to the \
                      store's URL";
/// How files of other compressions begin. Nix gives some of them the name of an uncompressed NAR.
const SIGNATURES: [(&[u8], &str); 7] = [
    (b"\x1f\x8b", "gzip"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"LZIP", "lzip"),
    (b"\x04\x22\x4d\x18", "lz4"),
];
/// Bytes that are enough to recognise each of them.
pub(crate) const SIGNATURE_LENGTH: usize = 6;

/// The parts of such a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct UploadName {
    /// Hash of the file as it was sent.
    pub(crate) file_hash: Sha256,
    pub(crate) format: Format,
}

impl UploadName {
    /// # Errors
    /// 400 if it is no such name, 415 for a compression that this server does not take.
    pub(crate) fn parse(file: &str) -> Result<Self, ErrorResponse> {
        let (stem, packing) = file.split_once('.').unwrap_or((file, ""));
        let file_hash = base32(stem).ok_or_else(|| {
            ErrorResponse::bad_request("a NAR's name is `<file hash in base32>.nar…`")
        })?;
        let format = match packing {
            "nar" => Format::None,
            "nar.xz" => Format::Xz,
            "nar.zst" => Format::Zstd,
            _ => return Err(unsupported(None)),
        };
        Ok(Self { file_hash, format })
    }
}

/// Reads a SHA-256 hash without its algorithm.
pub(crate) fn base32(text: &str) -> Option<Sha256> {
    // A SHA-256 hash in Nix's base32 has 52 characters.
    (text.len() == 52)
        .then(|| Sha256::parse(&format!("sha256:{text}")).ok())
        .flatten()
}

/// The compression of a file that begins like this.
pub(crate) fn compression(beginning: &[u8]) -> Option<&'static str> {
    SIGNATURES
        .iter()
        .find(|(signature, _)| beginning.starts_with(signature))
        .map(|(_, name)| *name)
}

/// 415, naming the compression if it is known.
pub(crate) fn unsupported(compression: Option<&str>) -> ErrorResponse {
    let text = match compression {
        Some(name) => {
            format!("the NAR is compressed with {name}, which its name does not say; {ADVICE}")
        }
        None => ADVICE.to_owned(),
    };
    ErrorResponse::unsupported_media_type(text)
}
