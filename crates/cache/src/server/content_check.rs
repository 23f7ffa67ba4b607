//! Whether a stored NAR is what the content address of a path says. Nix takes a path whose address fits its name without
//! any signature, and not every version looks at the content again.

use std::io::{self, Read};

use ring::digest::{self, SHA1_FOR_LEGACY_USE_ONLY, SHA256, SHA512};

use crate::server::store::Store;
use flywheel_nix::content_address::{Algorithm, ContentAddress, Method};
use flywheel_nix::nar_validator::{NarValidator, Root};
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::PathHash;

const BUFFER: usize = 64 * 1024;

/// What is wrong with a path's content address; `None` if nothing is, or it has none. Reads the NAR only if its own hash
/// is not the one in the address. An address by MD5, BLAKE3 or Git is held against the path's name alone.
///
/// # Errors
/// When the disk fails.
pub(crate) fn contradiction(store: &Store, path: &PathInfo) -> io::Result<Option<&'static str>> {
    let Some(text) = &path.ca else {
        return Ok(None);
    };
    let Some(address) = ContentAddress::parse(text) else {
        return Ok(Some("is not a content address"));
    };
    if address.store_path(&path.path, &path.references).as_ref() != Some(&path.path) {
        return Ok(Some(
            "is not that of a path with this name and these references",
        ));
    }
    let algorithm = match address.algorithm {
        Algorithm::Sha1 => &SHA1_FOR_LEGACY_USE_ONLY,
        Algorithm::Sha256 => &SHA256,
        Algorithm::Sha512 => &SHA512,
        Algorithm::Md5 | Algorithm::Blake3 => return Ok(None),
    };
    let refers_to_itself = path.references.contains(&path.path);
    let found = match address.method {
        Method::Git => return Ok(None),
        Method::Nar if address.algorithm == Algorithm::Sha256 && !refers_to_itself => {
            Some(path.nar_hash.0.to_vec())
        }
        Method::Nar => {
            let own = refers_to_itself.then(|| path.path.hash());
            let mut hash = NarHash::new(algorithm, own.as_ref());
            let nar = store.read_nar(&path.nar_hash, path.nar_size)?;
            for_each_piece(nar, |piece| hash.update(piece))?;
            Some(hash.finish())
        }
        Method::Flat | Method::Text => {
            file_hash(store.read_nar(&path.nar_hash, path.nar_size)?, algorithm)?
        }
    };
    Ok((found.as_deref() != Some(address.digest.as_slice()))
        .then_some("is not that of the received NAR"))
}

/// The hash of the one file in a NAR; `None` if the NAR is something else.
fn file_hash(nar: impl Read, algorithm: &'static digest::Algorithm) -> io::Result<Option<Vec<u8>>> {
    let (mut validator, mut hash) = (NarValidator::default(), digest::Context::new(algorithm));
    for_each_piece(nar, |piece| {
        // What is no NAR is noticed at the end.
        let _ = validator.take_with(piece, |contents| hash.update(contents));
    })?;
    let is_file = matches!(validator.finish(), Ok(Root::File { executable: false }));
    Ok(is_file.then(|| hash.finish().as_ref().to_vec()))
}

fn for_each_piece(mut from: impl Read, mut take: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => take(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
}

/// The hash of a NAR in which a path's references to itself do not count, as Nix computes it: each is replaced by zeros,
/// and their offsets follow the NAR.
struct NarHash {
    hash: digest::Context,
    own: Vec<u8>,
    /// Bytes at the end of what has come in which a reference may begin.
    rest: Vec<u8>,
    /// Offset of `rest` in the NAR.
    offset: u64,
    found: Vec<u64>,
}

impl NarHash {
    fn new(algorithm: &'static digest::Algorithm, own: Option<&PathHash>) -> Self {
        Self {
            hash: digest::Context::new(algorithm),
            own: own.map_or_else(Vec::new, |own| own.as_str().as_bytes().to_vec()),
            rest: Vec::new(),
            offset: 0,
            found: Vec::new(),
        }
    }

    fn update(&mut self, piece: &[u8]) {
        if self.own.is_empty() {
            return self.hash.update(piece);
        }
        self.rest.extend_from_slice(piece);
        let mut done = 0;
        while let Some(at) = find(&self.rest[done..], &self.own) {
            let begin = done + at;
            self.rest[begin..begin + self.own.len()].fill(0);
            self.found.push(self.offset + begin as u64);
            done = begin + self.own.len();
        }
        // A reference may begin in the last bytes and end in the next piece.
        let sure = self.rest.len().saturating_sub(self.own.len() - 1).max(done);
        self.hash.update(&self.rest[..sure]);
        self.rest.drain(..sure);
        self.offset += sure as u64;
    }

    fn finish(mut self) -> Vec<u8> {
        self.hash.update(&self.rest);
        for offset in &self.found {
            self.hash.update(format!("|{offset}").as_bytes());
        }
        self.hash.finish().as_ref().to_vec()
    }
}

fn find(text: &[u8], what: &[u8]) -> Option<usize> {
    let first = *what.first()?;
    let mut from = 0;
    loop {
        let at = from + text[from..].iter().position(|byte| *byte == first)?;
        if text[at..].starts_with(what) {
            return Some(at);
        }
        from = at + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flywheel_nix::store_path::StorePath;

    #[test]
    fn references_to_itself_do_not_count() {
        // Built by Nix 2.8 with a floating content address: `echo me $out > $out`.
        let path = "6fq1yag2gqpwrh6ly64dj1vggcjzm671-fself";
        let address = "fixed:r:sha256:0rs5kg809pch8azbjqj5zga7sixhmz58ya0zysvmmgdl5b8x8hpx";
        let mut nar = Vec::new();
        let content = format!("me /nix/store/{path}\n");
        for word in [
            "nix-archive-1",
            "(",
            "type",
            "regular",
            "contents",
            &content,
            ")",
        ] {
            nar.extend((word.len() as u64).to_le_bytes());
            nar.extend(word.as_bytes());
            nar.resize(nar.len().next_multiple_of(8), 0);
        }
        let own = StorePath::from_base_name(path).expect("a path").hash();
        let expected = ContentAddress::parse(address).expect("an address").digest;
        for size in [1, 7, 31, 32, 33, nar.len()] {
            let mut hash = NarHash::new(&SHA256, Some(&own));
            nar.chunks(size).for_each(|piece| hash.update(piece));
            assert_eq!(hash.finish(), expected, "in pieces of {size}");
        }
    }
}
