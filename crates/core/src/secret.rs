//! Values that must never be printed. This module owns the type; `runner/` has the runner mask them.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom as _, SystemRandom};
use zeroize::Zeroizing;

/// A secret text. It has no `Display`, its `Debug` shows nothing, and its memory is wiped when it is dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Removes surrounding white space, such as the line break at the end of a file. `None` if nothing is left.
    pub fn new(text: &str) -> Option<Self> {
        let text = text.trim();
        (!text.is_empty()).then(|| Self(Zeroizing::new(text.to_owned())))
    }

    /// An unguessable token: 128 random bits in hexadecimal.
    pub fn random() -> Self {
        // Not `fastrand`: its earlier numbers allow guessing the next ones.
        let mut bytes = [0_u8; 16];
        SystemRandom::new()
            .fill(&mut bytes)
            .expect("Linux always has random bytes once it has booted");
        Self(Zeroizing::new(hex::encode(bytes)))
    }

    /// The secret itself. Only for the place that hands it to its recipient.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// The value of an `Authorization: Basic` header for `user`, which is a secret, too.
    #[must_use]
    pub fn basic(&self, user: &str) -> Self {
        Self(Zeroizing::new(
            STANDARD.encode(format!("{user}:{}", self.expose())),
        ))
    }

    /// Every form of this secret that a log could show: the secret, each of its lines, and the base64 of the secret and
    /// of `user:secret` for the users that Flywheel and Nix send.
    pub fn forms(&self) -> Vec<Self> {
        let mut forms = vec![self.clone()];
        // A log shows a secret with several lines line by line. Very short lines occur everywhere and are left out.
        if self.expose().contains(['\n', '\r']) {
            forms.extend(
                self.expose()
                    .lines()
                    .filter_map(Self::new)
                    .filter(|line| line.0.len() > 3),
            );
        }
        forms.push(Self(Zeroizing::new(STANDARD.encode(self.expose()))));
        forms.extend(["attic", ""].map(|user| self.basic(user)));
        forms
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Text with what stands before the `@` of a URL taken out, whether or not the URL is well formed: an error quotes what
/// somebody wrote, and that may be a URL with a password in the wrong place.
pub fn without_credentials(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        clean.push_str(before);
        clean.push_str("://");
        let url_ends = |c: char| c.is_whitespace() || matches!(c, '`' | '"' | '\'');
        let url = &after[..after.find(url_ends).unwrap_or(after.len())];
        let authority = &url[..url.find(['/', '?', '#']).unwrap_or(url.len())];
        // A password may hold an unescaped `@`, so the last one counts; and it may hold a `/`, where what seems to be
        // the port is no number.
        let is_cut = authority
            .rsplit_once(':')
            .is_some_and(|(_, port)| !port.ends_with(']') && port.parse::<u16>().is_err());
        let within = if is_cut { url } else { authority };
        rest = match within.rfind('@') {
            Some(at) => {
                clean.push_str("…@");
                &after[at + 1..]
            }
            None => after,
        };
    }
    clean.push_str(rest);
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_taken_out_of_any_text() {
        for (text, clean) in [
            ("not `https://user:pw@host/a b`", "not `https://…@host/a b`"),
            ("http://u:p@w@[::1/", "http://…@[::1/"),
            (
                "s3://b?endpoint=http://u:pw@h:1&x and https://t@h",
                "s3://b?endpoint=http://…@h:1&x and https://…@h",
            ),
            ("http://u:a/b+c==@h/x", "http://…@h/x"),
            (
                "http://[::1]:80/@x http://h:443/@x",
                "http://[::1]:80/@x http://h:443/@x",
            ),
            ("https://host/@scope a@b", "https://host/@scope a@b"),
            ("no address", "no address"),
        ] {
            assert_eq!(without_credentials(text), clean);
        }
    }

    #[test]
    fn debug_shows_nothing_of_it() {
        let secret = Secret::new("hunter22").expect("not empty");
        assert_eq!(format!("{secret:?} {secret:#?}"), "Secret(…) Secret(…)");
    }

    #[test]
    fn white_space_alone_is_no_secret() {
        assert!(Secret::new(" \n").is_none());
    }

    #[test]
    fn forms_hold_lines_and_basic_auth() {
        let secret = Secret::new("line-one\nline-two").expect("not empty");
        let forms: Vec<String> = secret
            .forms()
            .iter()
            .map(|form| form.expose().to_owned())
            .collect();
        assert!(forms.contains(&"line-two".to_owned()));
        assert!(forms.contains(&STANDARD.encode("attic:line-one\nline-two")));
    }
}
