//! Content addresses (`CA:` of a narinfo): what they say about the content, and the store path that follows from one.
//! Pure; hashing the content is up to the caller.

use sha2::{Digest as _, Sha256 as Hasher};

use crate::hash::{base32_encode, decode};
use crate::store_path::{STORE_DIR, StorePath};

/// Maximum length of a content address; no real one is as long.
const LENGTH_LIMIT: usize = 256;
/// Bytes of the hash in a store path.
const PATH_HASH_BYTES: usize = 20;

/// What the hash is a hash of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The bytes of a file, which may refer to other paths.
    Text,
    /// The bytes of a file.
    Flat,
    /// The NAR.
    Nar,
    /// The Git object.
    Git,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    Md5,
    Sha1,
    Sha256,
    Sha512,
    Blake3,
}

impl Algorithm {
    fn parse(text: &str) -> Option<(Self, usize)> {
        Some(match text {
            "md5" => (Self::Md5, 16),
            "sha1" => (Self::Sha1, 20),
            "sha256" => (Self::Sha256, 32),
            "sha512" => (Self::Sha512, 64),
            "blake3" => (Self::Blake3, 32),
            _ => return None,
        })
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
            Self::Blake3 => "blake3",
        }
    }
}

/// `text:sha256:…` or `fixed:[r:|git:]<algorithm>:…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentAddress {
    pub method: Method,
    pub algorithm: Algorithm,
    pub digest: Vec<u8>,
}

impl ContentAddress {
    /// Parses one as Nix writes it; `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > LENGTH_LIMIT {
            return None;
        }
        let (method, rest) = match text.split_once(':')? {
            ("text", rest) => (Method::Text, rest),
            ("fixed", rest) => match rest.split_once(':')? {
                ("r", rest) => (Method::Nar, rest),
                ("git", rest) => (Method::Git, rest),
                _ => (Method::Flat, rest),
            },
            _ => return None,
        };
        let (algorithm, digits) = rest.split_once(':')?;
        let (algorithm, size) = Algorithm::parse(algorithm)?;
        Some(Self {
            method,
            algorithm,
            digest: decode(digits, size)?,
        })
    }

    /// The store path with this content, name and references; `path` itself among them is a reference to itself.
    /// `None` if no content of this kind can have them.
    pub fn store_path(&self, path: &StorePath, references: &[StorePath]) -> Option<StorePath> {
        let (own, mut others): (Vec<_>, Vec<_>) =
            references.iter().partition(|reference| *reference == path);
        others.sort_unstable();
        others.dedup();
        let others: String = others.iter().map(|other| format!(":{other}")).collect();
        let hex = hex::encode(&self.digest);
        let (kind, digest) = match (self.method, self.algorithm) {
            (Method::Text, Algorithm::Sha256) if own.is_empty() => (format!("text{others}"), hex),
            (Method::Nar, Algorithm::Sha256) => {
                let own = if own.is_empty() { "" } else { ":self" };
                (format!("source{others}{own}"), hex)
            }
            (Method::Flat | Method::Nar | Method::Git, _) if references.is_empty() => {
                let method = match self.method {
                    Method::Nar => "r:",
                    Method::Git => "git:",
                    Method::Flat | Method::Text => "",
                };
                let output = format!("fixed:out:{method}{}:{hex}:", self.algorithm.as_str());
                ("output:out".to_owned(), hex::encode(Hasher::digest(output)))
            }
            _ => return None,
        };
        let name = path.name();
        let text = format!("{kind}:sha256:{digest}:{STORE_DIR}:{name}");
        let mut folded = [0; PATH_HASH_BYTES];
        for (n, byte) in Hasher::digest(text).iter().enumerate() {
            folded[n % PATH_HASH_BYTES] ^= byte;
        }
        StorePath::from_base_name(&format!("{}-{name}", base32_encode(&folded))).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ca: &str, path: &str, references: &[&str]) -> bool {
        let parse = |name: &str| StorePath::from_base_name(name).expect("a path");
        let (path, references): (_, Vec<_>) = (
            parse(path),
            references.iter().map(|name| parse(name)).collect(),
        );
        let ca = ContentAddress::parse(ca).expect("a content address");
        ca.store_path(&path, &references).as_ref() == Some(&path)
    }

    #[test]
    fn the_paths_are_those_that_nix_makes() {
        for (ca, path, references) in NIX {
            assert!(check(ca, path, references), "{ca}");
            let other = path.replacen("-f", "-g", 1);
            assert!(!check(ca, &other, references), "another name for {ca}");
        }
    }

    #[test]
    fn what_cannot_refer_to_others_has_no_path_with_references() {
        let flat = NIX[1].0;
        assert!(!check(flat, NIX[1].1, &[NIX[0].1]));
    }

    #[test]
    fn what_is_no_content_address_is_none() {
        let digits = "0".repeat(52);
        for text in [
            "",
            "source",
            "fixed:sha256",
            "fixed:sha256:abc",
            "fixed:r:sha3:abc",
            &format!("other:sha256:{digits}"),
            &format!("fixed:x:sha256:{digits}"),
            &format!("fixed:sha1:{digits}"),
            &format!("fixed:sha256:{digits}\nSig: y"),
            &format!("fixed:sha256:{}", "0".repeat(300)),
        ] {
            assert_eq!(ContentAddress::parse(text), None, "{text}");
        }
        for text in [
            format!("fixed:git:sha256:{digits}"),
            format!("text:sha256:{digits}"),
        ] {
            assert!(ContentAddress::parse(&text).is_some(), "{text}");
        }
    }

    /// Content addresses, paths and references as Nix 2.8 registered them.
    #[rustfmt::skip]
    const NIX: [(&str, &str, &[&str]); 9] = [
        ("fixed:r:sha256:04zwf782yjwnh3q6hz5izfd6jyip8kgw6g6yj43fiqhbyhdd0dqw", "kc6j97s74i9f7h7lb31bmqzb2r7jfdil-f1.txt", &[]),
        ("fixed:sha256:00xyyr3fi8l6hb839bv3f7yb86yjv7xi1cgh1xnhipym4asvb4aq", "14y6k41ag3zv5l5f1sl00pmz0shzyhpf-f1.txt", &[]),
        ("fixed:r:sha1:wbv3ss2q8mj6jxdz5aa3r5qwpn7xkdk2", "5v5qds9ky07l4r0i2pn58cavs74qy691-fdir", &[]),
        ("fixed:sha1:iwjz551fyw0cxcjgf4l6c879zabd6wpm", "icf8y9crdzdwdddbvyyhcdvfmxbf02ya-f1.txt", &[]),
        ("fixed:md5:4425hx5d1mc9y39llj4k4nm55i", "irhzmz9yif6n65qyv9zj5wj3mb1rxmjg-f1.txt", &[]),
        ("fixed:sha512:0lrc0dwnvipqviibf7qfm1y492qvjwb1zhkcyi05cndmva1mr5gjcgrnz1x36djmk0sfg8djd2n0qv68vib2jg590mwznar9jcjphp7",
         "gsm4pm0jvphfd6b7w985hc64pcmlsvq0-f1.txt", &[]),
        ("fixed:r:sha256:0rs5kg809pch8azbjqj5zga7sixhmz58ya0zysvmmgdl5b8x8hpx", "6fq1yag2gqpwrh6ly64dj1vggcjzm671-fself",
         &["6fq1yag2gqpwrh6ly64dj1vggcjzm671-fself"]),
        ("text:sha256:04ydmr59iy3cik5x6zl6l9bvxsn561zjjqpza4b4j20idsbc854n", "6b9wjhp3lh9f66qcnvk3nw4kqbkwyaqx-fself.drv", &[]),
        ("text:sha256:1llfy71fs4ymrk4cpi89m1pq8q134ki5lq3q14jxs6p9x1bpakj0", "1fqq4hlxsyc67y0ls81r83j1aqm1b8bv-ftwo.drv",
         &["wq4i5qfb91dkqqy9xi5cnrzb4w49grcd-fsrc"]),
    ];
}
