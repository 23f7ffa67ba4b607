//! Publishing by `nix copy`, to every kind of store that Nix can write to (`s3://`, `file://`, `ssh-ng://`,
//! `http(s)://`). It owns the calls of Nix; the publisher decides order, retries and verification.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use url::Url;

use crate::client::batch::Batches;
use crate::client::destination::{
    BodyCheck, ByteCounter, CacheConfig, Destination, Error, Pending, Target, Uploaded,
};
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::text::one_line;
use flywheel_nix::nar::NarSource;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::{PathInfo, PathInfos};
use flywheel_nix::path_json;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::{self, Nix, error_summary};
use flywheel_sys::process::capture::Output;

/// Paths in one call. Their names take a few kilobytes, far below the system's limit for arguments.
const BATCH: usize = 64;
/// From this NAR size on, in bytes, a path is copied alone: in a batch it would hold back the small ones.
const LARGE: u64 = 16 * 1024 * 1024;
/// The timeout of calls that only read.
const LOOK_LIMIT: Duration = Duration::from_secs(60);
/// The timeout of a copy, besides the time for its bytes at [`RATE`].
const COPY_LIMIT: Duration = Duration::from_secs(120);
/// Bytes per second of a slow connection with a slow compression.
const RATE: u64 = 250_000;
/// The schemes that `nix copy` writes to.
const SCHEMES: [&str; 6] = ["s3", "file", "ssh-ng", "ssh", "http", "https"];

/// Why a text is not a store's URL.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StoreUrlError {
    #[error("`{0}` is not the URL of a store")]
    Malformed(String),
    /// Nix cannot write to this kind of store.
    #[error("`{0}` is a kind of store that nothing is published to")]
    Scheme(String),
    #[error("a store's URL must not carry a password")]
    Password,
}

impl Explain for StoreUrlError {
    fn exit(&self) -> Exit {
        Exit::Usage
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Password => "Give credentials in the environment: `ATTIC_TOKEN` for HTTP, `AWS_…` for S3.".into(),
            _ => {
                "Give a URL such as `s3://bucket?region=eu-west-1`, `file:///var/cache/nix` or `ssh-ng://host`.".into()
            }
        })
    }
}

/// A store's URL that Nix accepts.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreUrl(Url);

impl StoreUrl {
    /// The complete URL, with user and parameters.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// Whether Nix takes paths from it without a signature (`?trusted=true`).
    pub fn is_trusted(&self) -> bool {
        let mut parameters = self.0.query_pairs();
        parameters.any(|(name, value)| name == "trusted" && matches!(&*value, "true" | "1" | "yes"))
    }

    /// The host for a netrc entry; `None` unless the scheme is HTTP or HTTPS.
    pub fn http_host(&self) -> Option<&str> {
        self.0
            .host_str()
            .filter(|_| matches!(self.0.scheme(), "http" | "https"))
    }
}

impl FromStr for StoreUrl {
    type Err = StoreUrlError;

    fn from_str(text: &str) -> Result<Self, StoreUrlError> {
        let malformed = || StoreUrlError::Malformed(one_line(text, 120));
        let url: Url = text.parse().map_err(|_| malformed())?;
        if !SCHEMES.contains(&url.scheme()) {
            return Err(StoreUrlError::Scheme(one_line(url.scheme(), 40)));
        }
        // The URL becomes an argument of `nix`, which any user of the machine can read.
        if url.password().is_some() || url.query_pairs().any(|(_, value)| has_password(&value)) {
            return Err(StoreUrlError::Password);
        }
        // Nix separates a setting's values by white space, so a URL with white space would be two.
        let is_one_word =
            !url.as_str().contains(char::is_whitespace) && !text.contains(char::is_whitespace);
        let has_location = if url.scheme() == "file" {
            url.path().len() > 1
        } else {
            url.host_str().is_some_and(|host| !host.is_empty())
        };
        if is_one_word && has_location {
            Ok(Self(url))
        } else {
            Err(malformed())
        }
    }
}

/// Whether a parameter such as `endpoint` holds a user with a password, with or without a scheme.
fn has_password(value: &str) -> bool {
    let authority = value.split_once("://").map_or(value, |(_, rest)| rest);
    let user = authority.rsplit_once('@').map(|(user, _)| user);
    user.is_some_and(|user| user.contains(':'))
}

/// Without user and parameters, which may hold keys.
impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&flywheel_sys::http::redact(&self.0))
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StoreUrl({self})")
    }
}

/// A store that Nix writes to and reads from.
#[derive(Debug)]
pub struct StoreCopy {
    calls: Arc<Calls>,
    small: Batches<PathInfo, Uploaded>,
    large: Batches<PathInfo, Uploaded>,
    looks: Batches<StorePath, Option<NarInfo>>,
}

impl StoreCopy {
    /// `nix` must have the store's credentials in its settings and environment.
    pub fn new(nix: Nix, url: StoreUrl) -> Self {
        // The publisher tries again itself. Nix 2.34 waits a minute after a 429, 2.8's second try sends no body, and 2.26's
        // cannot succeed.
        let config = format!("{}\ndownload-attempts = 1\n", nix.config().trim_end());
        let nix = nix.with_config(&config);
        let calls = Arc::new(Calls { nix, url });
        let copies = |limit| {
            let calls = Arc::clone(&calls);
            Batches::start(limit, move |infos| Arc::clone(&calls).copy(infos))
        };
        let looking = Arc::clone(&calls);
        let looks = Batches::start(BATCH, move |paths| Arc::clone(&looking).look_up(paths));
        Self {
            small: copies(BATCH),
            large: copies(1),
            looks,
            calls,
        }
    }

    /// Checks that the store opens, within `limit` and without retries.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ping(nix: &Nix, url: &StoreUrl, limit: Duration) -> Result<(), Error> {
        // Nix's own retries would use up the limit.
        let quick = [
            "--option",
            "download-attempts",
            "1",
            "--option",
            "connect-timeout",
            "3",
        ];
        let calls = Calls {
            nix: nix.clone(),
            url: url.clone(),
        };
        let arguments = [&["--store", url.as_str()][..], &quick].concat();
        let pinged = nix.ping_store(&arguments, limit).await;
        calls.succeeded("nix store ping", pinged)?;
        Ok(())
    }
}

impl From<StoreCopy> for Target {
    fn from(copy: StoreCopy) -> Self {
        Arc::new(copy)
    }
}

impl Destination for StoreCopy {
    fn address(&self) -> String {
        self.calls.url.to_string()
    }

    /// `nix copy` refuses a path unless the same store has all its references.
    fn omits_upstream_paths(&self) -> bool {
        false
    }

    fn concurrency(&self) -> Option<usize> {
        Some(BATCH)
    }

    fn describe(&self) -> Pending<'_, CacheConfig> {
        Box::pin(async { Ok(CacheConfig::default()) })
    }

    fn missing<'a>(&'a self, paths: &'a [StorePath]) -> Pending<'a, HashSet<StorePath>> {
        Box::pin(async move {
            // An empty query checks the store itself.
            if paths.is_empty() {
                Self::ping(&self.calls.nix, &self.calls.url, LOOK_LIMIT).await?;
            }
            let mut missing: HashSet<StorePath> = paths.iter().cloned().collect();
            for chunk in paths.chunks(BATCH * 4) {
                for info in self.calls.infos(chunk).await?.infos {
                    missing.remove(&info.path);
                }
            }
            Ok(missing)
        })
    }

    fn send<'a>(
        &'a self,
        info: &'a PathInfo,
        _: NarSource,
        counter: &'a ByteCounter,
    ) -> Pending<'a, Uploaded> {
        Box::pin(async move {
            let batches = if info.nar_size >= LARGE {
                &self.large
            } else {
                &self.small
            };
            let uploaded = batches.submit(info.clone()).await?;
            // Nix reports no progress here, so a path's bytes count once it has been copied.
            counter.add(info.nar_size);
            Ok(uploaded)
        })
    }

    fn look_up<'a>(&'a self, path: &'a StorePath) -> Pending<'a, Option<NarInfo>> {
        Box::pin(self.looks.submit(path.clone()))
    }

    fn shows_progress(&self) -> bool {
        false
    }

    fn check_body<'a>(
        &'a self,
        info: &'a NarInfo,
        received: &'a ByteCounter,
    ) -> Pending<'a, BodyCheck> {
        Box::pin(async move {
            let check = self.calls.verify(&info.path).await?;
            received.add(info.nar_size);
            Ok(check)
        })
    }
}

/// The calls of Nix.
#[derive(Debug)]
struct Calls {
    nix: Nix,
    url: StoreUrl,
}

impl Calls {
    /// One call for all paths. When it fails and the store itself still opens, each path is copied alone, so that one
    /// bad path does not fail the others.
    async fn copy(self: Arc<Self>, infos: Vec<PathInfo>) -> Vec<Result<Uploaded, Error>> {
        let together = match self.copy_once(&infos).await {
            Ok(()) => return infos.iter().map(|_| Ok(Uploaded::Stored)).collect(),
            Err(error) => error,
        };
        let opens = infos.len() > 1 && Self::opens(&self).await;
        let mut results = Vec::new();
        let mut failed = 0;
        for info in &infos {
            // When two paths fail even alone, the store is at fault. The publisher retries the rest later.
            let result = if opens && failed < 2 {
                self.copy_once(std::slice::from_ref(info)).await
            } else {
                Err(clone_error(&together))
            };
            failed += u32::from(result.is_err());
            results.push(result.map(|()| Uploaded::Stored));
        }
        results
    }

    async fn opens(&self) -> bool {
        StoreCopy::ping(&self.nix, &self.url, LOOK_LIMIT)
            .await
            .is_ok()
    }

    async fn copy_once(&self, infos: &[PathInfo]) -> Result<(), Error> {
        let size: u64 = infos.iter().map(|info| info.nar_size).sum();
        let paths: Vec<String> = infos.iter().map(|info| info.path.to_string()).collect();
        // Paths that this host built usually have no signature. A remote daemon still checks what it requires.
        let mut arguments = vec![
            "copy",
            "--to",
            self.url.as_str(),
            // The publisher has already sent the references.
            "--no-recursive",
            "--no-check-sigs",
        ];
        arguments.extend(paths.iter().map(String::as_str));
        self.run(
            "nix copy",
            &arguments,
            COPY_LIMIT + Duration::from_secs(size / RATE),
        )
        .await
        .map(|_| ())
    }

    async fn look_up(
        self: Arc<Self>,
        paths: Vec<StorePath>,
    ) -> Vec<Result<Option<NarInfo>, Error>> {
        let mut found: HashMap<StorePath, NarInfo> = match self.infos(&paths).await {
            Ok(found) => found
                .infos
                .into_iter()
                .map(|info| (info.path.clone(), nar_info(info)))
                .collect(),
            // The call failed as a whole, so each path gets the error.
            Err(error) => return paths.iter().map(|_| Err(clone_error(&error))).collect(),
        };
        paths.iter().map(|path| Ok(found.remove(path))).collect()
    }

    /// The registered facts of those paths that the store has.
    async fn infos(&self, paths: &[StorePath]) -> Result<PathInfos, Error> {
        match self.infos_once(paths).await {
            // Some versions of Nix fail as a whole when one of several paths is absent.
            Err(error) if paths.len() > 1 && is_absence(&error) => {
                let mut all = PathInfos::default();
                for path in paths {
                    let found = self.infos_once(std::slice::from_ref(path)).await;
                    match found {
                        Err(error) if is_absence(&error) => (),
                        found => all.infos.extend(found?.infos),
                    }
                }
                Ok(all)
            }
            Err(error) if is_absence(&error) => Ok(PathInfos::default()),
            found => found,
        }
    }

    async fn infos_once(&self, paths: &[StorePath]) -> Result<PathInfos, Error> {
        let paths: Vec<String> = paths.iter().map(StorePath::to_string).collect();
        let mut arguments = self.nix.version.path_info_as_json().to_vec();
        arguments.extend([
            "--store",
            self.url.as_str(),
            "--option",
            "substitute",
            "false",
        ]);
        // Nix remembers that a path was absent; here the path may have been published since.
        for ttl in ["narinfo-cache-negative-ttl", "narinfo-cache-positive-ttl"] {
            arguments.extend(["--option", ttl, "0"]);
        }
        arguments.extend(paths.iter().map(String::as_str));
        let json = self.run("nix path-info", &arguments, LOOK_LIMIT).await?;
        path_json::parse(&json).map_err(|error| Error::Foreign(error.to_string()))
    }

    /// Has Nix fetch the NAR and compare its hash.
    async fn verify(&self, path: &StorePath) -> Result<BodyCheck, Error> {
        let path = path.to_string();
        let arguments = [
            "store",
            "verify",
            // Signatures are checked by `client::verify`; here only the content counts.
            "--no-trust",
            "--store",
            self.url.as_str(),
            &path,
        ];
        match self.run("nix store verify", &arguments, LOOK_LIMIT).await {
            Ok(_) => Ok(BodyCheck::Good),
            // Nix's message for a NAR with another hash than the registered one.
            Err(Error::Tool { text, .. }) if text.contains("was modified") => {
                Ok(BodyCheck::Bad(text))
            }
            Err(error) => Err(error),
        }
    }

    async fn run(
        &self,
        call: &'static str,
        arguments: &[&str],
        limit: Duration,
    ) -> Result<Vec<u8>, Error> {
        self.succeeded(call, self.nix.run(arguments, limit).await)
    }

    /// What a call printed, or why it failed.
    fn succeeded(
        &self,
        call: &'static str,
        ran: Result<Output, tool::Error>,
    ) -> Result<Vec<u8>, Error> {
        let failed = |text: String| Error::Tool { call, text };
        let output = ran.map_err(|error| failed(with_causes(&error)))?;
        if output.status.success() {
            Ok(output.stdout)
        } else {
            Err(Error::from_tool(call, error_summary(&output.stderr)))
        }
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The same failure for another path; `Error` cannot be cloned.
fn clone_error(error: &Error) -> Error {
    match error {
        Error::Tool { call, text } => Error::Tool {
            call,
            text: text.clone(),
        },
        Error::Rejected { status, text } => Error::Rejected {
            status: *status,
            text: text.clone(),
        },
        other => Error::Foreign(other.to_string()),
    }
}

fn is_absence(error: &Error) -> bool {
    matches!(error, Error::Tool { text, .. } if text.contains("is not valid"))
}

/// A path's facts as a narinfo. The URL and the compression stay empty, because Nix itself fetches the NAR.
fn nar_info(info: PathInfo) -> NarInfo {
    NarInfo {
        path: info.path,
        url: String::new(),
        compression: String::new(),
        file_hash: None,
        file_size: None,
        nar_hash: info.nar_hash,
        nar_size: info.nar_size,
        references: info.references,
        deriver: info.deriver,
        signatures: info.signatures,
        ca: info.ca,
    }
}

#[cfg(test)]
mod tests;
