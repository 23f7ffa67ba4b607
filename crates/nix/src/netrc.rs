//! The only code that writes a credential to disk: the job's netrc for its cache, and the include
//! file with access tokens for fetchers. Both have mode 0600 in a folder with mode 0700 and are
//! written completely or not at all; the folder's owner removes them.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use thiserror::Error;
use url::Url;
use zeroize::Zeroizing;

use flywheel_core::exit::{Exit, Explain};
use flywheel_core::secret::Secret;
use flywheel_core::text::one_line;
use flywheel_sys::untrusted_file::{self, Owner};

/// The user name that goes with Attic's tokens; the server checks the password only.
const LOGIN: &str = "attic";
/// The file's name in its folder.
const NETRC: &str = "netrc";
/// curl before 8.0 reads lines of up to 4,095 bytes, and later versions words of up to 4,096.
const LINE_LIMIT: usize = 4000;
/// Maximum size of an existing netrc in bytes.
const EXISTING_LIMIT: u64 = 1024 * 1024;

/// Why a credential could not be written where Nix reads it. Never shows the credential.
#[derive(Debug, Error)]
pub enum WriteError {
    /// Nix's download library (curl) could not parse it.
    #[error("the {what} {problem}, which its file cannot express")]
    Unspellable {
        what: &'static str,
        /// The problem: "holds white space".
        problem: &'static str,
    },
    #[error("`{0}` is not a host name that a netrc can hold")]
    Host(String),
    /// Other users can read the folder.
    #[error("folder `{0}` is open to other users")]
    Open(PathBuf),
    /// Nix's settings cannot express the path of a file in this folder.
    #[error("folder `{0}` has a name that Nix's settings cannot express")]
    Name(PathBuf),
    /// The netrc in use cannot be read, so its other machines would be lost.
    #[error("the netrc in use, `{file}`, could not be read")]
    Existing {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{file}` could not be written")]
    Write {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl Explain for WriteError {
    fn exit(&self) -> Exit {
        match self {
            Self::Unspellable { .. } => Exit::Usage,
            Self::Host(_) | Self::Name(_) | Self::Existing { .. } | Self::Write { .. } => {
                Exit::Host
            }
            Self::Open(_) => Exit::Bug,
        }
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Unspellable { what: TOKEN, .. } => Some(
                "Check `ATTIC_TOKEN`: a token is one word of letters, digits and `.-_=+/`."
                    .to_owned(),
            ),
            Self::Existing { file, .. } => {
                Some(format!("Let the job's user read `{}`.", file.display()))
            }
            Self::Name(_) => Some(
                "Set `TMPDIR` to a folder whose name has no white space and no `#` in it."
                    .to_owned(),
            ),
            _ => None,
        }
    }
}

/// The names of the two credentials in errors.
const TOKEN: &str = "cache token";
const ACCESS_TOKEN: &str = "access token";

/// Writes the job's netrc into `folder` (0700): first a line for `host`, since curl takes the first
/// match, then all of `existing`, the netrc in use so far, so that nothing stops working.
///
/// `host` has no port, as a netrc knows none; an IPv6 address may have brackets.
///
/// # Errors
/// When the token or host cannot be expressed in a netrc, `existing` exists but cannot be read, or
/// the file cannot be written.
pub fn write(
    folder: &Path,
    host: &str,
    token: &Secret,
    existing: Option<&Path>,
) -> Result<PathBuf, WriteError> {
    let line = line_for(host, token)?;
    let rest = existing.map(read_existing).transpose()?.unwrap_or_default();
    // This line comes first: curl uses the first machine that matches.
    write_private(
        folder,
        NETRC,
        Zeroizing::new([line.as_bytes(), &rest].concat()),
    )
}

/// The line of a netrc with a host's token.
fn line_for(host: &str, token: &Secret) -> Result<Zeroizing<String>, WriteError> {
    // A netrc has IPv6 addresses without brackets.
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let plain = |c: u8| c.is_ascii_alphanumeric() || b".-_:".contains(&c);
    if host.is_empty() || host.len() > 255 || !host.bytes().all(plain) {
        return Err(WriteError::Host(one_line(host, 120)));
    }
    spellable(TOKEN, token)?;
    let line = format!("machine {host} login {LOGIN} password {}\n", token.expose());
    Ok(Zeroizing::new(line))
}

/// Keeps a token for `host` in the netrc of this user's own in `folder`, or forgets the one that is there. The folder is
/// made (0700) if it is missing. Other hosts keep theirs.
///
/// # Errors
/// As [`write`].
pub fn remember(folder: &Path, host: &str, token: Option<&Secret>) -> Result<PathBuf, WriteError> {
    let made = DirBuilder::new().mode(0o700).recursive(true).create(folder);
    made.map_err(|source| WriteError::Write {
        file: folder.to_owned(),
        source,
    })?;
    let all = read_existing(&folder.join(NETRC))?;
    let mut others = Zeroizing::new(Vec::with_capacity(all.len()));
    for line in all.split_inclusive(|byte| *byte == b'\n') {
        if !is_line_of(line, host) {
            others.extend_from_slice(line);
        }
    }
    let line = match token {
        Some(token) => line_for(host, token)?,
        None => Zeroizing::default(),
    };
    let text = Zeroizing::new([line.as_bytes(), &others].concat());
    write_private(folder, NETRC, text)
}

/// The token that [`remember`] keeps for `host`. What other users can write to is not believed.
pub fn recall(folder: &Path, host: &str) -> Option<Secret> {
    let file = folder.join(NETRC);
    let bytes = untrusted_file::read(&file, Owner::Exclusive, EXISTING_LIMIT).ok()?;
    let bytes = Zeroizing::new(bytes);
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let line = lines.find(|line| is_line_of(line, host))?;
    let text = std::str::from_utf8(line).ok()?;
    Secret::new(text.split_whitespace().nth(5)?)
}

/// Whether a line is one that [`write`] makes for this host.
fn is_line_of(line: &[u8], host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let text = String::from_utf8_lossy(line);
    let words: Vec<&str> = text.split_whitespace().collect();
    matches!(words[..], ["machine", name, "login", _, "password", _] if name == host)
}

/// Writes `extra-access-tokens = HOST=TOKEN` into a file that `NIX_CONFIG` includes, so that the
/// token is in no environment. `present` are the tokens that Nix has already. If there is another one
/// for the host among them, all are written anew: what is added to a setting does not replace it.
///
/// # Errors
/// When the token cannot be expressed in a setting, or the file cannot be written.
pub fn write_access_token(
    folder: &Path,
    host: &str,
    token: &Secret,
    present: &BTreeMap<String, Secret>,
) -> Result<PathBuf, WriteError> {
    spellable(ACCESS_TOKEN, token)?;
    let plain = |c: u8| c.is_ascii_alphanumeric() || b".-_:/".contains(&c);
    if host.is_empty() || !host.bytes().all(plain) {
        return Err(WriteError::Host(one_line(host, 120)));
    }
    let is_replaced = present.get(host).is_some_and(|other| other != token);
    let mut line = Zeroizing::new(Vec::new());
    line.extend(if is_replaced {
        &b"access-tokens ="[..]
    } else {
        b"extra-access-tokens ="
    });
    let others = present
        .iter()
        .filter(|(other, _)| is_replaced && *other != host);
    for (host, token) in others
        .map(|(host, token)| (host.as_str(), token))
        .chain([(host, token)])
    {
        line.extend([b" ", host.as_bytes(), b"=", token.expose().as_bytes()].concat());
    }
    line.push(b'\n');
    write_private(folder, "access-tokens.conf", line)
}

/// Creates a configuration home for Attic's own client in `folder` (0700), with one server and its
/// token. Returns the folder for `XDG_CONFIG_HOME`.
///
/// # Errors
/// When the token cannot be expressed there, or the file cannot be written.
pub fn write_attic_home(
    folder: &Path,
    name: &str,
    server: &Url,
    token: &Secret,
) -> Result<PathBuf, WriteError> {
    spellable(TOKEN, token)?;
    // Attic's client reads `attic/config.toml` below `XDG_CONFIG_HOME`.
    let home = folder.join("attic-home");
    let own = home.join("attic");
    let made = DirBuilder::new().mode(0o700).recursive(true).create(&own);
    made.map_err(|source| WriteError::Write {
        file: own.clone(),
        source,
    })?;
    // A URL is percent-encoded, so it contains no quote and no backslash.
    let text = format!(
        "default-server = \"{name}\"\n\n[servers.{name}]\nendpoint = \"{server}\"\ntoken = \"{}\"\n",
        token.expose()
    );
    write_private(&own, "config.toml", Zeroizing::new(text.into_bytes()))?;
    Ok(home)
}

/// Checks that curl and Nix parse the token as one word. curl ends a word at white space; quotes
/// and a leading `#` have meanings that differ between its versions, and `#` begins a comment in
/// Nix's settings.
fn spellable(what: &'static str, token: &Secret) -> Result<(), WriteError> {
    let text = token.expose();
    let problem = if text.contains(char::is_whitespace) {
        "holds white space or a line break"
    } else if text.contains(['"', '\'', '\\', '#']) {
        "holds a quote, a backslash or a `#`"
    } else if !text.bytes().all(|c| c.is_ascii_graphic()) {
        "holds characters that are not plain ASCII"
    } else if text.len() > LINE_LIMIT - 300 {
        "is longer than 3,700 characters"
    } else {
        return Ok(());
    };
    Err(WriteError::Unspellable { what, problem })
}

/// Reads the netrc in use, with a final line break; empty if there is none.
/// Whether this netrc may have a credential for `host`. Errs on the side of yes.
pub fn may_name(file: &Path, host: &str) -> bool {
    if !file.exists() {
        return false;
    }
    let Ok(content) = read_existing(file) else {
        return true;
    };
    let content = String::from_utf8_lossy(&content);
    content
        .split_whitespace()
        .any(|word| word == "default" || word.eq_ignore_ascii_case(host))
}

fn read_existing(file: &Path) -> Result<Zeroizing<Vec<u8>>, WriteError> {
    let error = |source| WriteError::Existing {
        file: file.to_owned(),
        source,
    };
    // The netrc in use may be the system's, which belongs to root.
    let mut bytes = match untrusted_file::read(file, Owner::Any, EXISTING_LIMIT) {
        Err(missing) if missing.is_absence() => return Ok(Zeroizing::default()),
        read => Zeroizing::new(read.map_err(|refused| error(refused.into()))?),
    };
    if bytes.last().is_some_and(|last| *last != b'\n') {
        bytes.push(b'\n');
    }
    Ok(bytes)
}

/// Creates the file with mode 0600 under another name and renames it.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the credential ends here, and its memory is wiped"
)]
fn write_private(
    folder: &Path,
    name: &str,
    bytes: Zeroizing<Vec<u8>>,
) -> Result<PathBuf, WriteError> {
    let file = folder.join(name);
    let error = |source| WriteError::Write {
        file: file.clone(),
        source,
    };
    let facts = fs::metadata(folder).map_err(error)?;
    // Others could list or replace files in such a folder, whatever the mode of the file.
    if facts.mode() & 0o077 != 0 {
        return Err(WriteError::Open(folder.to_owned()));
    }
    // An `include` line has exactly two words, and `#` begins a comment.
    if folder
        .to_str()
        .is_none_or(|name| name.contains(|c: char| c.is_whitespace() || c == '#'))
    {
        return Err(WriteError::Name(folder.to_owned()));
    }
    let draft = folder.join(format!(".{name}.{:016x}", fastrand::u64(..)));
    let written = OpenOptions::new()
        .write(true)
        // Fail if the name exists, which protects against a planted file or link.
        .create_new(true)
        .mode(0o600)
        .open(&draft)
        .and_then(|mut open| open.write_all(&bytes).and_then(|()| open.sync_all()))
        .and_then(|()| fs::rename(&draft, &file));
    if written.is_err() {
        // The draft may not exist; what matters is that no part of a credential stays.
        let _ = fs::remove_file(&draft);
    }
    written.map_err(error)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};

    use super::*;

    fn private() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("temporary folder");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).expect("private");
        folder
    }

    fn secret(text: &str) -> Secret {
        Secret::new(text).expect("not empty")
    }

    fn read(file: &Path) -> String {
        fs::read_to_string(file).expect("readable")
    }

    #[test]
    fn a_remembered_token_is_for_its_host_alone_and_can_be_forgotten() {
        let base = tempfile::tempdir().expect("temporary folder");
        let folder = base.path().join("login");
        let token = |text: &str| Secret::new(text).expect("not empty");
        let kept = |host: &str| recall(&folder, host).map(|token| token.expose().to_owned());
        assert_eq!(kept("a.example"), None);
        remember(&folder, "a.example", Some(&token("first-token"))).expect("written");
        remember(&folder, "[::1]", Some(&token("local-token"))).expect("written");
        let file = remember(&folder, "a.example", Some(&token("a-token"))).expect("written");
        let text = fs::read_to_string(&file).expect("readable");
        assert_eq!(text.lines().count(), 2, "{text}");
        assert_eq!(fs::metadata(&file).expect("there").mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&folder).expect("there").mode() & 0o777, 0o700);
        assert_eq!(kept("a.example").as_deref(), Some("a-token"));
        assert_eq!(kept("[::1]").as_deref(), Some("local-token"));
        assert_eq!(kept("a.example.org"), None);
        remember(&folder, "a.example", None).expect("written");
        assert_eq!((kept("a.example"), kept("::1").is_some()), (None, true));
    }

    #[test]
    fn the_cache_comes_first_and_the_other_machines_stay() {
        let folder = private();
        let old = folder.path().join("old");
        fs::write(
            &old,
            "machine a.example login x password y\ndefault login z password w",
        )
        .expect("written");
        let file = write(
            folder.path(),
            "cache.example",
            &secret("eyJh.b-c_d"),
            Some(&old),
        )
        .expect("written");
        assert_eq!(
            read(&file),
            "machine cache.example login attic password eyJh.b-c_d\nmachine a.example login x password y\ndefault login z password w\n"
        );
        assert_eq!(fs::metadata(&file).expect("there").mode() & 0o7777, 0o600);
        let names: Vec<_> = fs::read_dir(folder.path())
            .expect("there")
            .flatten()
            .map(|e| e.file_name())
            .collect();
        assert_eq!(names.len(), 2, "no draft stays: {names:?}");
    }

    #[test]
    fn a_second_write_replaces_the_first_even_through_a_link() {
        let folder = private();
        let elsewhere = folder.path().join("elsewhere");
        std::os::unix::fs::symlink(&elsewhere, folder.path().join("netrc")).expect("linked");
        let missing = folder.path().join("no-such-netrc");
        let file = write(folder.path(), "[::1]", &secret("t"), Some(&missing)).expect("written");
        assert_eq!(read(&file), "machine ::1 login attic password t\n");
        assert!(!elsewhere.exists() && !fs::symlink_metadata(file).expect("there").is_symlink());
    }

    #[test]
    fn a_netrc_in_use_that_is_a_pipe_or_huge_is_refused_at_once() {
        let folder = private();
        let (pipe, large) = (folder.path().join("pipe"), folder.path().join("large"));
        let mode = rustix::fs::Mode::from(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, mode).expect("made");
        fs::File::create(&large)
            .and_then(|file| file.set_len(10_000_000_000))
            .expect("a sparse file");
        for (file, said) in [(pipe, "is a named pipe"), (large, "is larger than")] {
            let error = write(folder.path(), "h", &secret("t"), Some(&file)).expect_err("refused");
            let source = std::error::Error::source(&error).expect("a source");
            assert!(source.to_string().contains(said), "{source}");
        }
    }

    #[test]
    fn a_credential_that_cannot_be_spelt_is_refused_and_not_shown() {
        let folder = private();
        for text in [
            "two words",
            "line\nbreak",
            "quo\"te",
            "#comment",
            "back\\slash",
            "täg",
            &"x".repeat(5000),
        ] {
            let error = write(folder.path(), "cache.example", &secret(text), None)
                .expect_err("unspellable");
            assert!(matches!(error, WriteError::Unspellable { .. }), "{error}");
            assert!(
                !format!("{error} {error:?} {:?}", error.hint()).contains(text),
                "{error}"
            );
            assert!(
                write_access_token(folder.path(), "github.com", &secret(text), &BTreeMap::new())
                    .is_err()
            );
        }
        for host in ["", "a b", "a\nmachine b", "a\"b"] {
            assert!(
                matches!(
                    write(folder.path(), host, &secret("t"), None),
                    Err(WriteError::Host(_))
                ),
                "{host}"
            );
        }
    }

    #[test]
    fn an_open_folder_or_an_unreadable_netrc_is_refused() {
        let folder = private();
        let unreadable =
            write(folder.path(), "c", &secret("t"), Some(folder.path())).expect_err("a folder");
        assert!(
            matches!(unreadable, WriteError::Existing { .. }),
            "{unreadable}"
        );
        let spaced = folder.path().join("a b");
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&spaced)
            .expect("made");
        assert!(matches!(
            write(&spaced, "c", &secret("t"), None),
            Err(WriteError::Name(_))
        ));
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).expect("opened");
        assert!(matches!(
            write(folder.path(), "c", &secret("t"), None),
            Err(WriteError::Open(_))
        ));
    }

    #[test]
    fn attics_client_gets_a_home_of_its_own() {
        let folder = private();
        let server: Url = "http://h:1/a\"b/".parse().expect("URL");
        let home =
            write_attic_home(folder.path(), "x", &server, &secret("eyJ.a-b")).expect("written");
        let file = home.join("attic/config.toml");
        let text = "default-server = \"x\"\n\n[servers.x]\nendpoint = \"http://h:1/a%22b/\"\ntoken = \"eyJ.a-b\"\n";
        assert_eq!(read(&file), text);
        assert_eq!(fs::metadata(&file).expect("there").mode() & 0o7777, 0o600);
        assert_eq!(fs::metadata(&home).expect("there").mode() & 0o7777, 0o700);
        assert!(write_attic_home(folder.path(), "x", &server, &secret("a\"b")).is_err());
    }

    #[test]
    fn an_access_token_is_a_setting_in_a_file() {
        let folder = private();
        let file = write_access_token(
            folder.path(),
            "github.com",
            &secret("ghp_x"),
            &BTreeMap::new(),
        )
        .expect("written");
        assert_eq!(read(&file), "extra-access-tokens = github.com=ghp_x\n");
        assert_eq!(fs::metadata(&file).expect("there").mode() & 0o7777, 0o600);
    }

    #[test]
    fn another_token_for_the_host_gives_way_and_those_for_other_hosts_stay() {
        let folder = private();
        let present = [("github.com", "old"), ("gitlab.example", "x")];
        let present = present.map(|(host, token)| (host.to_owned(), secret(token)));
        let present = BTreeMap::from(present);
        let file = write_access_token(folder.path(), "github.com", &secret("new"), &present);
        assert_eq!(
            read(&file.expect("written")),
            "access-tokens = gitlab.example=x github.com=new\n"
        );
    }

    #[test]
    fn a_netrc_may_name_a_host_or_all_of_them() {
        let folder = private();
        let file = folder.path().join("netrc");
        assert!(!may_name(&file, "h.example"));
        fs::write(&file, "machine other.example\n login a password b\n").expect("written");
        assert!(may_name(&file, "other.example") && !may_name(&file, "h.example"));
        fs::write(&file, "default login a password b\n").expect("written");
        assert!(may_name(&file, "h.example"));
    }
}
