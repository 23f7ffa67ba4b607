//! Small files that show whether they are whole: the first line is a sum of the rest. A power cut may cut such a file
//! anywhere, and what is left of a narinfo would often still be a narinfo, with fewer references.

use sha2::{Digest as _, Sha256};

const FIELD: &str = "Sum: ";
/// Bytes of SHA-256 in a sum, which is against accidents.
const SUM_BYTES: usize = 8;

/// Puts the sum before a text.
pub(crate) fn seal(text: &str) -> String {
    format!("{FIELD}{}\n{text}", sum(text))
}

/// Returns the text after its sum; `None` if it is not whole.
pub(crate) fn unseal(bytes: &[u8]) -> Option<&str> {
    let (first, text) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
    (first.strip_prefix(FIELD)? == sum(text)).then_some(text)
}

fn sum(text: &str) -> String {
    let digest = Sha256::digest(text);
    hex::encode(&digest[..SUM_BYTES])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_change_of_one_bit_and_no_cut_goes_unnoticed() {
        let whole = seal("StorePath: a\nReferences: b\nEpoch: 3\n");
        let bytes = whole.as_bytes();
        assert_eq!(
            unseal(bytes),
            Some("StorePath: a\nReferences: b\nEpoch: 3\n")
        );
        for end in 0..bytes.len() {
            assert_eq!(unseal(&bytes[..end]), None, "cut at {end}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(unseal(&flipped), None, "bit {bit}");
        }
    }
}
