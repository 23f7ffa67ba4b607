//! Installs Nix from a release archive of upstream's: `nix-VERSION-SYSTEM.tar.xz`, from a URL, a file or a folder. Its sum is
//! checked before anything gets its place in the store. Finding it is here; `unpack` reads it.

mod unpack;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::LOCATION;
use reqwest::{Client, Response};
use thiserror::Error;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use url::Url;

use self::unpack::{Packed, Unpacked, unpack};
use crate::bootstrap::closure::{Entered, Staging, StagingError};
use crate::bootstrap::install::Parts;
use crate::bootstrap::plan::Mirror;
use crate::bootstrap::releases;
use flywheel_core::progress::Sink;
use flywheel_sys::http::{self, Roots, chain, redact};

/// The first answer has to be there within this time: there are other ways.
const FIRST_CONTACT: Duration = Duration::from_secs(3);
/// Nothing may come for this long.
const STALL: Duration = Duration::from_secs(8);
/// So many storages behind a mirror.
const REDIRECTS: usize = 5;
/// Blocks between the connection and the thread that unpacks.
const BLOCKS: usize = 16;
/// A sum is 64 digits; some files have the name of the archive behind it.
const SUM_LIMIT: usize = 4096;

/// What is asked for.
pub(super) struct ArchiveSource<'a> {
    pub(super) mirror: Option<&'a Mirror>,
    /// The version that the input names, if it does.
    pub(super) version: Option<&'a str>,
    /// Whether an archive will do that Flywheel does not know the sum of.
    pub(super) takes_unknown: bool,
    pub(super) roots: &'a Roots,
}

impl ArchiveSource<'_> {
    /// A mirror may name one archive, whatever its name, and so whatever its version.
    fn check_version(&self, place: &Place, unpacked: &Unpacked) -> Result<(), Error> {
        let mut parts = unpacked.nix.name().split('-');
        let found = parts.find(|part| part.starts_with(|first: char| first.is_ascii_digit()));
        match (self.version, found) {
            // `2.31` asks for any of that series.
            (Some(wanted), Some(found))
                if found != wanted && !found.starts_with(&format!("{wanted}.")) =>
            {
                Err(Error::OtherVersion {
                    place: place.shown(),
                    found: found.to_owned(),
                    wanted: wanted.to_owned(),
                })
            }
            _ => Ok(()),
        }
    }
}

/// Why nothing was installed from an archive. Nothing of it is left.
#[derive(Debug, Error)]
pub(super) enum Error {
    #[error("`{0}` could not be read: {1}")]
    Fetch(String, String),
    #[error("`{0}` does not answer: nothing came for {n} s", n = .1.as_secs())]
    Stalled(String, Duration),
    #[error("there is no archive `{0}` in `{1}`")]
    Missing(String, PathBuf),
    #[error("the sum of `{place}` is {found} instead of {wanted}")]
    Sum {
        place: String,
        found: String,
        wanted: String,
    },
    #[error(
        "nothing that can be trusted has the sum of `{0}`: Flywheel knows those of Nix {known}, and another one has to come \
         over TLS or from this machine",
        known = releases::archives_known()
    )]
    Unverified(String),
    #[error(
        "the sum of `{place}` is not known: it has to lie beside the archive, and `{beside}` could not be read: {problem} \
         (Flywheel itself knows the sums of Nix {known})",
        known = releases::archives_known()
    )]
    NoSum {
        place: String,
        beside: String,
        problem: String,
    },
    #[error("`{0}` is no release archive of Nix: {1}")]
    Malformed(String, String),
    #[error("`{place}` is Nix {found}, and `nix-version` asks for {wanted}")]
    OtherVersion {
        place: String,
        found: String,
        wanted: String,
    },
    #[error("it did not end in time")]
    Deadline,
    #[error(transparent)]
    Client(#[from] http::Error),
    #[error(transparent)]
    Staging(#[from] StagingError),
}

/// Where an archive is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Url(Url),
    File(PathBuf),
}

impl Place {
    /// For messages.
    fn shown(&self) -> String {
        match self {
            Self::Url(url) => redact(url),
            Self::File(file) => file.display().to_string(),
        }
    }

    /// The last part of the name.
    fn name(&self) -> String {
        match self {
            Self::Url(url) => url.path().rsplit('/').next().unwrap_or_default().to_owned(),
            Self::File(file) => {
                let name = file.file_name().unwrap_or_default();
                name.to_string_lossy().into_owned()
            }
        }
    }

    /// The file with its sum, as upstream publishes it beside each archive.
    fn sum(&self) -> Self {
        match self {
            Self::Url(url) => {
                let mut url = url.clone();
                url.set_path(&format!("{}.sha256", url.path()));
                Self::Url(url)
            }
            Self::File(file) => {
                let mut name = file.as_os_str().to_owned();
                name.push(".sha256");
                Self::File(name.into())
            }
        }
    }

    /// Whether a sum from here can be believed: it came over TLS, from this machine, or from one of its files.
    fn is_trusted(&self) -> bool {
        match self {
            Self::Url(url) => {
                let host = url.host_str().unwrap_or_default();
                url.scheme() == "https" || matches!(host, "127.0.0.1" | "[::1]" | "localhost")
            }
            Self::File(_) => true,
        }
    }
}

/// The archive's name for this system.
fn archive_name(version: &str) -> String {
    format!("nix-{version}-{}.tar.xz", releases::SYSTEM)
}

/// Where the archive is.
fn place(source: &ArchiveSource<'_>) -> Result<Place, Error> {
    let version = source.version.unwrap_or(releases::ARCHIVE_VERSION);
    let name = archive_name(version);
    let below = |base: &Url| {
        let mut base = base.clone();
        let path = base.path().trim_end_matches('/').to_owned();
        base.set_path(&format!("{path}/nix-{version}/{name}"));
        Place::Url(base)
    };
    match source.mirror {
        None => Ok(below(
            &releases::ARCHIVES.parse().expect("the constant is a URL"),
        )),
        Some(Mirror::Url(url)) if url.path().ends_with(".tar.xz") => Ok(Place::Url(url.clone())),
        Some(Mirror::Url(url)) => Ok(below(url)),
        Some(Mirror::Path(path)) if path.is_dir() => in_folder(path, &name, source.version),
        Some(Mirror::Path(path)) => Ok(Place::File(path.clone())),
    }
}

/// The archive of that name in a folder; without a wish for a version, the only one for this system.
fn in_folder(folder: &Path, name: &str, version: Option<&str>) -> Result<Place, Error> {
    let release = name.split("-x86_64").next().unwrap_or(name);
    let release = release.split("-aarch64").next().unwrap_or(release);
    let named = [folder.join(name), folder.join(release).join(name)];
    if let Some(file) = named.into_iter().find(|file| file.is_file()) {
        return Ok(Place::File(file));
    }
    let end = format!("-{}.tar.xz", releases::SYSTEM);
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_one = |entry: &fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("nix-") && name.ends_with(&end)
    };
    let all: Vec<PathBuf> = entries.filter(is_one).map(|entry| entry.path()).collect();
    match all.as_slice() {
        [only] if version.is_none() => Ok(Place::File(only.clone())),
        _ => Err(Error::Missing(name.to_owned(), folder.to_owned())),
    }
}

/// The version in an archive's name.
fn version_in(name: &str) -> Option<&str> {
    let end = format!("-{}.tar.xz", releases::SYSTEM);
    name.strip_prefix("nix-")?.strip_suffix(end.as_str())
}

/// Installs Nix below `nix`, which is `/nix` but for tests.
///
/// # Errors
/// When the archive cannot be had or is not what its sum says, or the machine does not take it.
pub(super) async fn install(
    source: &ArchiveSource<'_>,
    nix: &Path,
    sink: &Sink,
    deadline: Instant,
) -> Result<Parts, Error> {
    let begun = Instant::now();
    let place = place(source)?;
    let fetcher = Fetcher {
        client: http::client(source.roots)?,
        deadline,
    };
    let wanted = wanted_sum(&place, source.takes_unknown, &fetcher, sink).await?;
    let body = fetcher.open(&place).await?;
    let staging = match Staging::enter(nix, sink, deadline).await? {
        // Another job has installed Nix in the same moment.
        Entered::Installed(_) => return Ok(Vec::new()),
        Entered::Staging(staging) => staging,
    };
    sink.note(format!(
        "Nix is not installed: unpacking `{}`",
        place.shown()
    ));
    let unpacked = match unpack_body(body, &place, &staging, &fetcher).await {
        Ok(unpacked) if wanted.as_ref().is_none_or(|wanted| *wanted == unpacked.sum) => unpacked,
        Ok(unpacked) => {
            staging.abandon().await;
            return Err(Error::Sum {
                place: place.shown(),
                found: unpacked.sum,
                wanted: wanted.unwrap_or_default(),
            });
        }
        Err(error) => {
            staging.abandon().await;
            return Err(error);
        }
    };
    if let Err(error) = source.check_version(&place, &unpacked) {
        staging.abandon().await;
        return Err(error);
    }
    for one in &unpacked.registrations {
        // What is in the store already stays as it is.
        if staging.has_path(&one.path, one.nar_hash).await? {
            staging.discard(&one.path).await?;
        }
    }
    let fetched = Instant::now();
    let (_, times) = staging
        .complete(
            &unpacked.nix,
            place.shown(),
            unpacked.registrations,
            deadline,
        )
        .await?;
    Ok(vec![
        ("fetch and unpack", fetched.duration_since(begun)),
        ("register", times.registered.duration_since(fetched)),
    ])
}

/// The sum that the archive has to have; `None` for a file of this machine that nothing says the sum of.
async fn wanted_sum(
    place: &Place,
    takes_unknown: bool,
    fetcher: &Fetcher,
    sink: &Sink,
) -> Result<Option<String>, Error> {
    let name = place.name();
    if let Some(sum) = version_in(&name).and_then(releases::archive_sum) {
        return Ok(Some(sum.to_owned()));
    }
    let beside = place.sum();
    let shown = place.shown();
    if !takes_unknown {
        return Err(Error::Unverified(shown));
    }
    if let Place::File(file) = &beside
        && !file.is_file()
    {
        sink.note(format!(
            "`{shown}` is trusted as a file of this machine: no sum of it is known"
        ));
        return Ok(None);
    }
    if !beside.is_trusted() {
        return Err(Error::Unverified(shown));
    }
    let text = fetcher.text(&beside).await.map_err(|error| match error {
        Error::Fetch(beside, problem) => Error::NoSum {
            place: shown.clone(),
            beside,
            problem,
        },
        other => other,
    })?;
    let sum = text.split_whitespace().next().unwrap_or_default();
    if sum.len() != 64 || !sum.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Error::Malformed(beside.shown(), "it holds no sum".into()));
    }
    sink.note(format!(
        "`{shown}` is checked against the sum beside it: Flywheel knows none of this release"
    ));
    Ok(Some(sum.to_ascii_lowercase()))
}

/// The bytes of an archive.
enum Body {
    Coming(Response),
    File(File),
}

/// Unpacks on a thread of its own what comes on this one.
async fn unpack_body(
    body: Body,
    place: &Place,
    staging: &Staging,
    fetcher: &Fetcher,
) -> Result<Unpacked, Error> {
    let malformed = |problem: String| Error::Malformed(place.shown(), problem);
    let judged =
        |ended: Result<Result<Unpacked, unpack::Problem>, tokio::task::JoinError>| match ended
            .map_err(|panic| malformed(panic.to_string()))?
        {
            Ok(unpacked) => Ok(unpacked),
            Err(unpack::Problem::Disk(error)) => Err(error.into()),
            Err(unpack::Problem::Archive(problem)) => Err(malformed(problem)),
        };
    let into = staging.folder();
    let mut response = match body {
        Body::File(file) => {
            let work = tokio::task::spawn_blocking(move || unpack(Packed::File(file), &into));
            return judged(work.await);
        }
        Body::Coming(response) => response,
    };
    let (send, receive) = mpsc::channel(BLOCKS);
    let packed = Packed::Coming(receive, Bytes::new());
    // The thread ends with the channel.
    let work = tokio::task::spawn_blocking(move || unpack(packed, &into));
    let broken = loop {
        match fetcher.next_block(&mut response, place).await {
            Ok(Some(block)) => {
                if send.send(block).await.is_err() {
                    break None;
                }
            }
            Ok(None) => break None,
            Err(error) => break Some(error),
        }
    };
    drop(send);
    let unpacked = judged(work.await);
    match broken {
        Some(error) => Err(error),
        None => unpacked,
    }
}

/// Fetches archives and sums.
struct Fetcher {
    client: Client,
    deadline: Instant,
}

impl Fetcher {
    async fn open(&self, place: &Place) -> Result<Body, Error> {
        let failed = |problem: String| Error::Fetch(place.shown(), problem);
        match place {
            Place::File(file) => {
                let facts = fs::metadata(file).map_err(|error| failed(error.to_string()))?;
                if !facts.is_file() {
                    return Err(failed("it is no file".into()));
                }
                let opened = File::open(file).map_err(|error| failed(error.to_string()))?;
                Ok(Body::File(opened))
            }
            Place::Url(url) => {
                let stalled = || Error::Stalled(place.shown(), FIRST_CONTACT);
                let got = timeout(FIRST_CONTACT, self.get(url, place)).await;
                Ok(Body::Coming(got.map_err(|_| stalled())??))
            }
        }
    }

    async fn get(&self, url: &Url, place: &Place) -> Result<Response, Error> {
        let failed = |problem: String| Error::Fetch(place.shown(), problem);
        let mut url = url.clone();
        for _ in 0..=REDIRECTS {
            let sent = self.client.get(url.clone()).send().await;
            let response = sent.map_err(|error| failed(chain(error)))?;
            let status = response.status();
            if status.is_success() {
                return Ok(response);
            }
            let target = response.headers().get(LOCATION);
            let target = target
                .and_then(|value| url.join(value.to_str().ok()?).ok())
                // A redirection must not take the protection of TLS away.
                .filter(|target| target.scheme() == "https" || url.scheme() == "http")
                .filter(|_| status.is_redirection());
            match target {
                Some(target) => url = target,
                None => return Err(failed(format!("HTTP status {}", status.as_u16()))),
            }
        }
        Err(failed(format!("it redirects more than {REDIRECTS} times")))
    }

    async fn next_block(
        &self,
        response: &mut Response,
        place: &Place,
    ) -> Result<Option<Bytes>, Error> {
        let limit = self.deadline.min(Instant::now() + STALL);
        match timeout_at(limit, response.chunk()).await {
            Ok(Ok(block)) => Ok(block),
            Ok(Err(error)) => Err(Error::Fetch(place.shown(), chain(error))),
            Err(_) if Instant::now() >= self.deadline => Err(Error::Deadline),
            Err(_) => Err(Error::Stalled(place.shown(), STALL)),
        }
    }

    /// A file of a few bytes.
    async fn text(&self, place: &Place) -> Result<String, Error> {
        let mut bytes = Vec::new();
        match self.open(place).await? {
            Body::File(file) => {
                let limited = &mut io::Read::take(file, SUM_LIMIT as u64);
                io::Read::read_to_end(limited, &mut bytes)
                    .map_err(|error| Error::Fetch(place.shown(), error.to_string()))?;
            }
            Body::Coming(mut response) => {
                while let Some(block) = self.next_block(&mut response, place).await? {
                    bytes.extend_from_slice(&block);
                    if bytes.len() > SUM_LIMIT {
                        return Err(Error::Malformed(place.shown(), "it is no sum".into()));
                    }
                }
            }
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

#[cfg(test)]
mod tests;
