//! SHA-256 hashes in the spellings that Nix uses (base16, Nix's base32, SRI). Pure.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use thiserror::Error;

/// Nix's base32 alphabet: no `e`, `o`, `t`, `u`.
const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// A text that is not a SHA-256 hash.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("`{0}` is not a SHA-256 hash")]
pub struct HashError(String);

/// A SHA-256 hash, most often that of a NAR.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sha256(pub [u8; 32]);

impl Sha256 {
    /// Parses `sha256:<64 hex>`, `sha256:<52 base32>`, `sha256:<44 base64>` or SRI
    /// `sha256-<base64>`.
    ///
    /// # Errors
    /// For anything else, including other algorithms.
    pub fn parse(text: &str) -> Result<Self, HashError> {
        let error = || HashError(flywheel_core::text::one_line(text, 80));
        let digits = text
            .strip_prefix("sha256:")
            .or_else(|| text.strip_prefix("sha256-"))
            .ok_or_else(error)?;
        decode(digits, 32)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(error)
    }

    /// The 52 characters used in signatures and file names.
    pub fn base32(&self) -> String {
        base32_encode(&self.0)
    }

    /// The 64 hexadecimal digits.
    pub fn base16(&self) -> String {
        hex::encode(self.0)
    }
}

/// `sha256:<base32>`, the form that Nix prints most often.
impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.base32())
    }
}

impl fmt::Debug for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Decodes the digits of a hash of `size` bytes, in base16, Nix's base32 or base64. The lengths differ, so the encoding
/// need not be named.
pub(crate) fn decode(digits: &str, size: usize) -> Option<Vec<u8>> {
    let bytes = if digits.len() == size * 2 {
        base16_decode(digits)
    } else if digits.len() == (size * 8).div_ceil(5) {
        base32_decode(digits)
    } else {
        STANDARD.decode(digits).ok()
    };
    bytes.filter(|bytes| bytes.len() == size)
}

/// Whether every character is one of Nix's base32 alphabet.
pub(crate) fn is_base32(text: &str) -> bool {
    text.bytes().all(|byte| ALPHABET.contains(&byte))
}

/// Encodes in Nix's base32, which writes the digits from the end, least significant bits first.
pub(crate) fn base32_encode(bytes: &[u8]) -> String {
    let digits = (bytes.len() * 8).div_ceil(5);
    (0..digits)
        .rev()
        .map(|n| {
            let (byte, shift) = (n * 5 / 8, n * 5 % 8);
            let low = u16::from(bytes[byte]) >> shift;
            // A digit has five bits and may span two bytes.
            let high = bytes
                .get(byte + 1)
                .map_or(0, |next| u16::from(*next) << (8 - shift));
            char::from(ALPHABET[usize::from((low | high) & 0x1f)])
        })
        .collect()
}

fn base32_decode(text: &str) -> Option<Vec<u8>> {
    let size = text.len() * 5 / 8;
    let mut bytes = vec![0_u8; size];
    // Nix writes base32 from the last digit to the first.
    for (n, character) in text.bytes().rev().enumerate() {
        let digit = u16::try_from(ALPHABET.iter().position(|known| *known == character)?).ok()?;
        let (byte, shift) = (n * 5 / 8, n * 5 % 8);
        let shifted = digit << shift;
        bytes[byte] |= (shifted & 0xff) as u8;
        let carry = (shifted >> 8) as u8;
        match bytes.get_mut(byte + 1) {
            Some(next) => *next |= carry,
            // Bits beyond the last byte must be zero, or two texts would stand for one hash.
            None if carry != 0 => return None,
            None => (),
        }
    }
    Some(bytes)
}

fn base16_decode(text: &str) -> Option<Vec<u8>> {
    let nibbles: Option<Vec<u8>> = text
        .chars()
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    Some(
        nibbles?
            .chunks(2)
            .map(|pair| pair[0] << 4 | pair[1])
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    // The output of `nix-hash --to-base32` and `--to-base16` for `sha256("")`.
    const BASE16: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const BASE32: &str = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";

    #[test]
    fn all_spellings_of_one_hash_are_equal() {
        let hash = Sha256::parse(&format!("sha256:{BASE16}")).expect("base16");
        assert_eq!(hash.base32(), BASE32);
        assert_eq!(hash.base16(), BASE16);
        assert_eq!(Sha256::parse(&format!("sha256:{BASE32}")), Ok(hash));
        assert_eq!(
            Sha256::parse("sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="),
            Ok(hash)
        );
    }

    #[test]
    fn what_is_no_hash_is_refused() {
        for text in [
            "",
            "sha256:",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            &BASE32.replace('0', "e"),
            "sha256:é",
        ] {
            assert!(Sha256::parse(text).is_err(), "{text}");
        }
        assert!(
            Sha256::parse(&format!("sha256:z{}", &BASE32[1..])).is_err(),
            "the overflowing digit"
        );
    }
}
