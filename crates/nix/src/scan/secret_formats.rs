//! Recognises secrets by their format. A format has a fixed prefix, which the scanner searches for;
//! what follows is then verified by its checksum where the format has one, otherwise by length,
//! alphabet and entropy.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde::Deserialize;

/// Bytes after the prefix that the verification of any format needs at most.
pub(super) const LOOKAHEAD: usize = 8192;
/// Minimum entropy in bits per character: random base64 of 20 characters has more than 3.5, words
/// have less.
const MIN_ENTROPY: f64 = 3.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SecretFormat {
    /// GitHub's tokens and npm's: 36 characters of base62, of which the last six are a checksum.
    Checksummed(&'static str),
    /// GitHub's fine-grained token.
    GithubFineGrained,
    Gitlab,
    AwsKeyId,
    GoogleApiKey,
    SlackToken,
    SlackWebhook,
    Jwt,
    PrivateKey,
    Netrc,
}

impl SecretFormat {
    /// Each prefix with the format it may begin.
    pub(super) const PREFIXES: [(&'static str, Self); 20] = [
        ("ghp_", Self::Checksummed("a GitHub token")),
        ("gho_", Self::Checksummed("a GitHub token")),
        ("ghu_", Self::Checksummed("a GitHub token")),
        ("ghs_", Self::Checksummed("a GitHub token")),
        ("ghr_", Self::Checksummed("a GitHub token")),
        ("npm_", Self::Checksummed("an npm token")),
        ("github_pat_", Self::GithubFineGrained),
        ("glpat-", Self::Gitlab),
        ("AKIA", Self::AwsKeyId),
        ("ASIA", Self::AwsKeyId),
        ("AIza", Self::GoogleApiKey),
        ("xoxb-", Self::SlackToken),
        ("xoxp-", Self::SlackToken),
        ("xoxa-", Self::SlackToken),
        ("xoxr-", Self::SlackToken),
        ("hooks.slack.com/services/T", Self::SlackWebhook),
        ("eyJ", Self::Jwt),
        ("-----BEGIN ", Self::PrivateKey),
        ("machine ", Self::Netrc),
        ("machine\t", Self::Netrc),
    ];

    /// Returns the name of the secret if `text`, which begins with the prefix, is one. `before` is
    /// the byte in front of it, `now` the time in seconds since 1970.
    pub(super) fn identify(
        self,
        before: Option<u8>,
        text: &[u8],
        now: u64,
    ) -> Option<&'static str> {
        // In the middle of a longer word, the prefix is a coincidence.
        if before.is_some_and(|byte| byte.is_ascii_alphanumeric()) && self != Self::PrivateKey {
            return None;
        }
        match self {
            Self::Checksummed(what) => is_checksummed(text.get(4..)?).then_some(what),
            Self::GithubFineGrained => is_fine_grained(text).then_some("a GitHub token"),
            Self::Gitlab => is_token(text.get(6..)?, 20..=64, b"-_.").then_some("a GitLab token"),
            Self::AwsKeyId => is_aws_key_id(text).then_some("an AWS access key"),
            Self::GoogleApiKey => {
                is_token(text.get(4..)?, 35..=35, b"-_").then_some("a Google API key")
            }
            Self::SlackToken => is_slack_token(text.get(5..)?).then_some("a Slack token"),
            Self::SlackWebhook => is_slack_webhook(text.get(25..)?).then_some("a Slack webhook"),
            Self::Jwt => is_live_jwt(text, now).then_some("a token (JWT)"),
            Self::PrivateKey => is_private_key(text).then_some("a private key"),
            Self::Netrc => is_netrc(text).then_some("a password of a netrc"),
        }
    }
}

/// The number of leading bytes that `fits` accepts.
fn prefix_length(text: &[u8], fits: impl Fn(&u8) -> bool) -> usize {
    text.iter()
        .position(|byte| !fits(byte))
        .unwrap_or(text.len())
}

fn is_varied(text: &[u8]) -> bool {
    let mut counts = [0_u32; 256];
    text.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    let length = text.len().max(1) as f64;
    let bits = |count: &u32| f64::from(*count) / length * (length / f64::from(*count)).log2();
    counts
        .iter()
        .filter(|count| **count > 0)
        .map(bits)
        .sum::<f64>()
        >= MIN_ENTROPY
}

/// Whether a token of this length, over letters, digits and `more`, follows: of high entropy and
/// with a digit in it.
fn is_token(text: &[u8], length: std::ops::RangeInclusive<usize>, more: &[u8]) -> bool {
    let token = &text[..prefix_length(text, |byte| {
        byte.is_ascii_alphanumeric() || more.contains(byte)
    })];
    length.contains(&token.len()) && is_varied(token) && token.iter().any(u8::is_ascii_digit)
}

/// Thirty random characters followed by their CRC-32 in six base62 digits, padded with `0`
/// (GitHub's blog of April 2021 on its token formats; npm uses the same).
fn is_checksummed(text: &[u8]) -> bool {
    if prefix_length(text, u8::is_ascii_alphanumeric) != 36 {
        return false;
    }
    let (random, sum) = text[..36].split_at(30);
    sum == base62(crc32(random))
}

fn base62(mut number: u32) -> [u8; 6] {
    const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut text = [b'0'; 6];
    for digit in text.iter_mut().rev() {
        *digit = DIGITS[(number % 62) as usize];
        number /= 62;
    }
    text
}

/// CRC-32 as in zip and Ethernet, bit by bit: it runs seldom and over thirty bytes, so a table
/// would not pay.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ (0xEDB8_8320 & (sum & 1).wrapping_neg())
        })
    })
}

fn is_fine_grained(text: &[u8]) -> bool {
    let Some(rest) = text.get(11..) else {
        return false;
    };
    let first = prefix_length(rest, u8::is_ascii_alphanumeric);
    let second = rest
        .get(first + 1..)
        .map_or(0, |rest| prefix_length(rest, u8::is_ascii_alphanumeric));
    (first, rest.get(first), second) == (22, Some(&b'_'), 59) && is_varied(rest)
}

/// The identifier of a key pair. Examples in documentation end in `EXAMPLE`.
fn is_aws_key_id(text: &[u8]) -> bool {
    let length = prefix_length(text, |byte| {
        byte.is_ascii_uppercase() || (b'2'..=b'7').contains(byte)
    });
    // `+` and `/` would continue a base64 text, in which the prefix is a coincidence.
    let ends = text
        .get(length)
        .is_none_or(|byte| !byte.is_ascii_alphanumeric() && *byte != b'+' && *byte != b'/');
    let token = &text[..length];
    length == 20
        && ends
        && !token.ends_with(b"EXAMPLE")
        && is_varied(&token[4..])
        && token.iter().any(u8::is_ascii_digit)
}

/// The numbers of the workspace and the application, then random characters.
fn is_slack_token(text: &[u8]) -> bool {
    let token = &text[..prefix_length(text, |byte| byte.is_ascii_alphanumeric() || *byte == b'-')];
    let parts: Vec<&[u8]> = token.split(|byte| *byte == b'-').collect();
    let is_number = |part: &&[u8]| part.len() >= 9 && part.iter().all(u8::is_ascii_digit);
    parts.len() >= 3
        && parts.first().is_some_and(is_number)
        && parts
            .last()
            .is_some_and(|last| last.len() >= 20 && is_varied(last))
}

fn is_slack_webhook(text: &[u8]) -> bool {
    let token = &text[..prefix_length(text, |byte| byte.is_ascii_alphanumeric() || *byte == b'/')];
    let parts: Vec<&[u8]> = token.split(|byte| *byte == b'/').collect();
    let id = |part: &[u8]| {
        part.len() >= 8
            && part
                .iter()
                .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit())
    };
    matches!(parts[..], [team, bot, key, ..] if id(team) && id(bot) && key.len() == 24 && is_varied(key))
}

/// The claims that decide whether a token is live.
#[derive(Deserialize)]
struct Claims {
    exp: Option<f64>,
    iss: Option<String>,
    #[serde(rename = "https://jwt.attic.rs/v1")]
    attic: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
}

/// A signed token that is still valid: it expires in the future, or is of a kind that never expires
/// (Attic's without an expiry, and those of old Kubernetes service accounts). Test suites are full
/// of tokens that expired long ago.
fn is_live_jwt(text: &[u8], now: u64) -> bool {
    let token = &text[..prefix_length(text, |byte| {
        byte.is_ascii_alphanumeric() || b"-_.".contains(byte)
    })];
    let parts: Vec<&[u8]> = token.split(|byte| *byte == b'.').collect();
    let [header, claims, signature] = parts[..] else {
        return false;
    };
    let decode = |part: &[u8]| URL_SAFE_NO_PAD.decode(part).ok();
    let header: Option<Header> = decode(header).and_then(|json| serde_json::from_slice(&json).ok());
    let claims: Option<Claims> = decode(claims).and_then(|json| serde_json::from_slice(&json).ok());
    let (Some(header), Some(claims)) = (header, claims) else {
        return false;
    };
    let lives = match claims.exp {
        Some(end) => end > now as f64,
        None => {
            claims.attic.is_some() || claims.iss.as_deref() == Some("kubernetes/serviceaccount")
        }
    };
    // A token without a signature opens nothing.
    lives
        && !header.alg.eq_ignore_ascii_case("none")
        && signature.len() >= 40
        && is_varied(signature)
}

/// The header, complete body and footer of an unencrypted key. Line breaks may be written as `\n`.
/// A PEM body contains its own length, so a key shortened for documentation does not count;
/// OpenSSH's body begins with its format's name.
fn is_private_key(text: &[u8]) -> bool {
    let head = &text[..text.len().min(60)];
    let find = |part: &[u8]| {
        head.windows(part.len())
            .position(|window| window == part)
            .map(|at| (at, at + part.len()))
    };
    let pgp = find(b"PGP PRIVATE KEY BLOCK-----");
    let Some((name, end)) = pgp.or_else(|| find(b"PRIVATE KEY-----")) else {
        return false;
    };
    let kind = &head[11..name];
    if !kind
        .iter()
        .all(|byte| byte.is_ascii_uppercase() || *byte == b' ')
        || kind.starts_with(b"ENCRYPTED")
    {
        return false;
    }
    let mut body = Vec::new();
    let mut rest = &text[end..];
    if pgp.is_some() {
        rest = after_armour_headers(rest);
    }
    while let [byte, more @ ..] = rest {
        rest = match (byte, more) {
            (b'-', _) => break,
            // A key in JSON or in a shell string has escaped line breaks.
            (b'\\', [b'n' | b'r', more @ ..]) => more,
            (b'\n' | b'\r' | b' ' | b'\t' | b'"' | b',', _) => more,
            (byte, _) if byte.is_ascii_alphanumeric() || b"+/=".contains(byte) => {
                body.push(*byte);
                more
            }
            _ => return false,
        };
    }
    if pgp.is_some() {
        // A key ring may be longer than the lookahead, so its end is not required.
        return body.len() >= 64 && is_varied(&body);
    }
    let whole = STANDARD
        .decode(&body)
        .is_ok_and(|key| is_open_openssh(&key) || is_whole_der(&key));
    rest.starts_with(b"-----END") && whole && is_varied(&body)
}

/// Skips headers such as `Comment: x` between the armour's first line and an empty line (RFC 9580,
/// 6.2).
fn after_armour_headers(text: &[u8]) -> &[u8] {
    let first = text
        .iter()
        .skip_while(|byte| b"\r\n".contains(byte))
        .take_while(|byte| **byte != b'\n');
    // Without headers, the key begins right away.
    if !first.into_iter().any(|byte| *byte == b':') {
        return text;
    }
    let ends = |end: &[u8]| {
        text.windows(end.len())
            .position(|window| window == end)
            .map(|at| at + end.len())
    };
    ends(b"\n\n")
        .or_else(|| ends(b"\r\n\r\n"))
        .map_or(&[], |at| &text[at..])
}

/// OpenSSH's own format without a passphrase: the cipher is `none` (OpenSSH's `PROTOCOL.key`).
fn is_open_openssh(key: &[u8]) -> bool {
    key.starts_with(b"openssh-key-v1\0\0\0\0\x04none")
}

/// An ASN.1 sequence that is exactly as long as its header states (X.690, 8.1.3).
fn is_whole_der(bytes: &[u8]) -> bool {
    let [0x30, length, rest @ ..] = bytes else {
        return false;
    };
    // The short form: lengths below 128 are one byte.
    if *length < 0x80 {
        return rest.len() == usize::from(*length);
    }
    // The long form: the first byte counts the bytes of the length.
    let octets = usize::from(*length & 0x7F);
    let Some((number, content)) = rest
        .split_at_checked(octets)
        .filter(|_| (1..=3).contains(&octets))
    else {
        return false;
    };
    content.len()
        == number
            .iter()
            .fold(0, |sum, octet| sum << 8 | usize::from(*octet))
}

/// `machine HOST login NAME password WORD`, on one or several lines, where the password is neither
/// a placeholder nor a variable.
fn is_netrc(text: &[u8]) -> bool {
    // An entry is short, so this much is enough.
    let text = String::from_utf8_lossy(&text[..text.len().min(400)]);
    let mut words = text.split_ascii_whitespace().skip(1);
    let Some(host) = words.next() else {
        return false;
    };
    let mut next = words.next();
    // The login is optional, and its value is not the secret.
    if matches!(next, Some("login")) {
        words.next();
        next = words.next();
    }
    let (Some("password"), Some(token)) = (next, words.next()) else {
        return false;
    };
    let plain = token
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && !b"<>${}[]()\"'`%*".contains(&byte));
    // Prose such as "machine that has password" has no host name here.
    let host_like = host.contains('.') || host == "localhost" || host.contains("127.");
    host_like
        && plain
        && token.len() >= 12
        && is_varied(token.as_bytes())
        && token.bytes().any(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
pub(in crate::scan) mod tests {
    use super::*;

    const NOW: u64 = 1_767_225_600;

    fn judged(text: &str) -> Option<&'static str> {
        SecretFormat::PREFIXES
            .iter()
            .find(|(beginning, _)| text.starts_with(beginning))?
            .1
            .identify(None, text.as_bytes(), NOW)
    }

    fn checksummed(beginning: &str, random: &str) -> String {
        let sum = base62(crc32(random.as_bytes()));
        format!(
            "{beginning}{random}{}",
            std::str::from_utf8(&sum).expect("ASCII")
        )
    }

    fn jwt(claims: &str) -> String {
        let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
        let signature = "Kx3tQ0vB7yM1nZ8wR5cD2fG9hJ4kL6pS0aE7uT3iO1Y";
        format!(
            "{}.{}.{signature}",
            part(r#"{"alg":"HS256","typ":"JWT"}"#),
            part(claims)
        )
    }

    /// Texts in the format of a key that open nothing.
    pub(in crate::scan) fn pem() -> String {
        let mut der = vec![0x30, 0x81, 200];
        der.extend((0..200_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8));
        let body = STANDARD.encode(der);
        let lines: Vec<&str> = body
            .as_bytes()
            .chunks(64)
            .map(|line| std::str::from_utf8(line).expect("ASCII"))
            .collect();
        format!(
            "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----\n",
            lines.join("\n")
        )
    }

    fn pgp(headers: &str) -> String {
        let pem = pem().replace("RSA PRIVATE KEY", "PGP PRIVATE KEY BLOCK");
        pem.replacen("-\n", &format!("-\n{headers}\n"), 1)
    }

    fn openssh(cipher: &str) -> String {
        let mut key = b"openssh-key-v1\0\0\0\0".to_vec();
        key.push(u8::try_from(cipher.len()).expect("short"));
        key.extend(
            cipher
                .bytes()
                .chain((0..150_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)),
        );
        let body = STANDARD.encode(key);
        format!("-----BEGIN OPENSSH PRIVATE KEY-----\n{body}\n-----END OPENSSH PRIVATE KEY-----\n")
    }

    #[test]
    fn the_checksum_is_the_usual_one() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
        assert_eq!(&base62(0), b"000000");
        assert_eq!(&base62(62), b"000010");
    }

    #[test]
    fn what_has_the_shape_of_a_secret_is_one() {
        let key = pem();
        for (text, what) in [
            (
                checksummed("ghp_", "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1"),
                "a GitHub token",
            ),
            (
                checksummed("npm_", "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1"),
                "an npm token",
            ),
            (
                format!(
                    "github_pat_{}_{}",
                    "11ABCDEFG0aBcDeFgHiJkL",
                    "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3fG5hJ7kL9mN1pQ3rS5tU7vW9xY"
                ),
                "a GitHub token",
            ),
            ("glpat-x7Rk2Lm9Qs4Tv6Wz1Yb3".to_owned(), "a GitLab token"),
            ("AKIA2E7GQ5ZLXN4RTBWM\n".to_owned(), "an AWS access key"),
            (
                "AIzaSyD4x7Rk2Lm9Qs4Tv6Wz1Yb3Nc5Pf8Hj0q7".to_owned(),
                "a Google API key",
            ),
            (
                "xoxb-123456789012-1234567890123-x7Rk2Lm9Qs4Tv6Wz1Yb3Nc5P".to_owned(),
                "a Slack token",
            ),
            (
                "hooks.slack.com/services/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".to_owned(),
                "a Slack webhook",
            ),
            (jwt(r#"{"sub":"ci","exp":4102444800}"#), "a token (JWT)"),
            (
                jwt(r#"{"sub":"ci","https://jwt.attic.rs/v1":{"caches":{}}}"#),
                "a token (JWT)",
            ),
            (key.clone(), "a private key"),
            (key.replace('\n', "\\n"), "a private key"),
            (pgp(""), "a private key"),
            (pgp("Comment: x\nVersion: 1\n"), "a private key"),
            (openssh("none"), "a private key"),
            (
                "machine cache.example.org login attic password x7Rk2Lm9Qs4Tv6Wz".to_owned(),
                "a password of a netrc",
            ),
            (
                "machine cache.example.org\n  password x7Rk2Lm9Qs4Tv6Wz\n".to_owned(),
                "a password of a netrc",
            ),
        ] {
            assert_eq!(judged(&text), Some(what), "{text}");
        }
    }

    #[test]
    fn what_only_looks_like_one_is_none() {
        let good = checksummed("ghp_", "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1");
        for text in [
            good.replace("aB3d", "aB3e"),
            format!("{good}x"),
            "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx".to_owned(),
            "npm_config_registry".to_owned(),
            "glpat-xxxxxxxxxxxxxxxxxxxx".to_owned(),
            "AKIAIOSFODNN7EXAMPLE".to_owned(),
            "AKIAAAAAAAAAAAAAAAAA".to_owned(),
            "xoxb-your-token-goes-here-please".to_owned(),
            jwt(r#"{"sub":"1234567890","name":"John Doe","iat":1516239022}"#),
            jwt(r#"{"sub":"ci","exp":1300819380}"#),
            "-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAu1SU1LfVLPHCozMxH2Mo4l".to_owned(),
            "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----".to_owned(),
            "-----BEGIN PRIVATE KEY-----\0-----END".to_owned(),
            pem().replacen("\n", "\nMII", 2),
            pem().replace("-----END", "...-----END"),
            pem().replace("RSA PRIVATE", "ENCRYPTED PRIVATE"),
            openssh("aes256-ctr"),
            pem().replacen("-\n", "-\nProc-Type: 4,ENCRYPTED\n", 1),
            "machine translation of a password reset page".to_owned(),
            "machine example.org login me password <your-password-1>".to_owned(),
        ] {
            assert_eq!(judged(&text), None, "{text}");
        }
        assert_eq!(
            SecretFormat::Gitlab.identify(Some(b'x'), b"glpat-x7Rk2Lm9Qs4Tv6Wz1Yb3", NOW),
            None,
            "within a token"
        );
    }
}
