//! Builds the needles: the values of the job's secrets in every form they may take, and the paths
//! of this machine. Values are held, never shown.

use std::path::Path;

use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};

use flywheel_core::secret::Secret;

/// Minimum length of a secret in bytes; a shorter value occurs everywhere by chance.
const MIN_LENGTH: usize = 8;
/// Bytes of a longer value to search for; its beginning is enough.
const MAX_LENGTH: usize = 512;
/// Minimum number of different characters: `11111111` and `xxxxxxxx` are no secrets.
const MIN_DISTINCT: usize = 5;
/// Minimum length of a path; a shorter one (`/root`, `/work`) exists on other machines too.
const MIN_PLACE_LENGTH: usize = 9;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NeedleKind {
    /// The value of a variable, encoded in some form.
    Value {
        name: String,
        /// The form for reports: `as it is`, `in base64`, …
        form: &'static str,
    },
    /// A path of this machine, by its description (`the workspace`).
    Place(String),
}

/// Bytes to search for.
#[derive(Clone)]
pub(super) struct Needle {
    pub(crate) bytes: Vec<u8>,
    pub(crate) kind: NeedleKind,
}

/// Whether the variable's name suggests a secret. Names of public keys do not.
pub fn is_secret_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    let has_word = |word: &str| {
        name.split(|c: char| !c.is_ascii_alphanumeric())
            .any(|part| part == word)
    };
    let ends = [
        "token",
        "secret",
        "password",
        "passwd",
        "passphrase",
        "credential",
        "credentials",
    ];
    let within = ends.iter().any(|word| name.contains(word));
    let is_key = has_word("key")
        || has_word("apikey")
        || name.ends_with("_key")
        || name.contains("private_key");
    (within || is_key) && !name.contains("public")
}

/// Whether a value is long and varied enough to be a secret, and is not obviously a word, a path,
/// an URL or a number.
pub fn is_secret_value(value: &str) -> bool {
    let mut seen: Vec<char> = value.chars().collect();
    seen.sort_unstable();
    seen.dedup();
    // `production` or `true` are settings, even under a name like `SECRET_MODE`.
    let is_word = value.chars().all(|c| c.is_ascii_alphabetic()) && value.len() < 16;
    let is_place = value.starts_with('/')
        || value.starts_with("./")
        || value.contains("://") && !value.contains('@');
    let is_number = value.chars().all(|c| c.is_ascii_digit()) && value.len() < 16;
    value.len() >= MIN_LENGTH && seen.len() >= MIN_DISTINCT && !is_word && !is_place && !is_number
}

/// Returns a needle for every form of a secret that a file could contain.
pub(super) fn needles_for_secret(name: &str, secret: &Secret) -> Vec<Needle> {
    let whole = secret.expose();
    let lines = whole
        .lines()
        .map(str::trim)
        .filter(|line| line.len() >= 2 * MIN_LENGTH && whole.contains('\n'));
    let mut needles = Vec::new();
    let mut add = |bytes: Vec<u8>, form| {
        let long_enough = bytes.len() >= MIN_LENGTH;
        if long_enough && !needles.iter().any(|needle: &Needle| needle.bytes == bytes) {
            needles.push(Needle {
                bytes,
                kind: NeedleKind::Value {
                    name: name.to_owned(),
                    form,
                },
            });
        }
    };
    for text in std::iter::once(whole)
        .chain(lines)
        // PEM headers and footers are the same in every key.
        .filter(|text| !text.starts_with("-----"))
    {
        // The beginning of a long value identifies it and keeps the matcher small.
        let bytes = &text.as_bytes()[..text.len().min(MAX_LENGTH)];
        add(bytes.to_vec(), "as it is");
        // The encoded text depends on the value's position modulo 3 in what was encoded.
        for before in 0..3 {
            add(base64(bytes, before, &STANDARD_NO_PAD), "in base64");
            add(base64(bytes, before, &URL_SAFE_NO_PAD), "in base64");
        }
        add(url_encoded(bytes), "URL-encoded");
    }
    needles
}

/// Base64 encodes three bytes at a time, so the text depends on the `before` bytes in front.
/// Returns the characters that `bytes` alone determine.
fn base64(bytes: &[u8], before: usize, alphabet: &impl base64::Engine) -> Vec<u8> {
    let text = alphabet.encode([&vec![0; before][..], bytes].concat());
    let (from, until) = ((before * 8).div_ceil(6), (before + bytes.len()) * 8 / 6);
    text.as_bytes()[from..until].to_vec()
}

fn url_encoded(bytes: &[u8]) -> Vec<u8> {
    let mut text = String::new();
    for byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(byte) {
            text.push(char::from(*byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text.into_bytes()
}

/// Home folders common to countless machines. Things built there name them and are no worse for it.
const COMMON_HOMES: [&str; 6] = [
    "/home/runner",
    "/home/ubuntu",
    "/home/debian",
    "/home/vscode",
    "/home/nonroot",
    "/homeless-shelter",
];

/// Returns a needle for a path of this machine, if it is specific enough.
pub(super) fn needle_for_place(what: &str, folder: &Path) -> Option<Needle> {
    let text = folder.to_str()?.trim_end_matches('/');
    let deep =
        text.matches('/').count() >= 2 && text.starts_with('/') && !text.starts_with("/nix/store");
    let is_sole = deep && text.len() >= MIN_PLACE_LENGTH && !COMMON_HOMES.contains(&text);
    is_sole.then(|| Needle {
        bytes: text.as_bytes().to_vec(),
        kind: NeedleKind::Place(what.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;

    use super::*;

    #[test]
    fn names_say_what_is_a_secret() {
        for name in [
            "ATTIC_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "MY_PASSWORD",
            "DEPLOY_KEY",
            "GPG_PRIVATE_KEY",
            "api-key",
        ] {
            assert!(is_secret_name(name), "{name}");
        }
        for name in [
            "ATTIC_PUBLIC_KEY",
            "PATH",
            "KEYBOARD",
            "HOME",
            "MONKEY_BUSINESS",
        ] {
            assert!(!is_secret_name(name), "{name}");
        }
    }

    #[test]
    fn values_that_are_plainly_none_are_left_alone() {
        for value in [
            "true",
            "11111111",
            "development",
            "/run/secrets/token",
            "https://example.org/x",
            "123456789012",
        ] {
            assert!(!is_secret_value(value), "{value}");
        }
        for value in [
            "hunter22x",
            "correct horse battery",
            "postgres://me:pw1234@host/db",
            "a8f5f167f44f4964e6c998de",
        ] {
            assert!(is_secret_value(value), "{value}");
        }
    }

    #[test]
    fn base64_is_found_wherever_in_a_text_it_begins() {
        let secret = Secret::new("s3cr3t-v4lue/with+signs").expect("not empty");
        let needles = needles_for_secret("X", &secret);
        for before in 0..7 {
            for after in 0..4 {
                let text = [
                    &vec![b'u'; before],
                    secret.expose().as_bytes(),
                    &vec![b'v'; after],
                ]
                .concat();
                for hay in [STANDARD_NO_PAD.encode(&text), URL_SAFE_NO_PAD.encode(&text)] {
                    let found = needles.iter().any(|needle| {
                        hay.as_bytes()
                            .windows(needle.bytes.len())
                            .any(|part| part == needle.bytes)
                    });
                    assert!(found, "{before} {after} {hay}");
                }
            }
        }
        let encoded = b"s3cr3t-v4lue%2Fwith%2Bsigns".to_vec();
        assert!(needles.iter().any(|needle| needle.bytes == encoded));
    }

    #[test]
    fn a_place_that_is_everywhere_is_no_place_of_this_machine() {
        for (folder, is_one) in [
            ("/root", false),
            ("/home", false),
            ("/srv/x", false),
            ("/home/runner", false),
            ("/home/builder-7", true),
            ("/home/runner/checkouts/app", true),
            ("/nix/store/x", false),
        ] {
            assert_eq!(
                needle_for_place("it", Path::new(folder)).is_some(),
                is_one,
                "{folder}"
            );
        }
    }
}
