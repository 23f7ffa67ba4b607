//! Stores of every kind that Nix can write to (`s3://`, `file://`, `ssh-ng://`, `http(s)://`), by
//! way of `nix copy`. Owns the calls of Nix; order, retries and verification are the publisher's.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use url::Url;

use crate::client::attic::{Body, CacheConfig, Error, Meter, Uploaded};
use crate::client::batch::Batches;
use crate::client::destination::{Answer, Destination, Target};
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::text::one_line;
use flywheel_nix::nar::NarSource;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::{PathInfo, PathInfos};
use flywheel_nix::path_json;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::{Nix, error_summary};

/// Paths in one call. Their names come to a few kilobytes, far below any limit of arguments.
const BATCH: usize = 64;
/// From this NAR size on, in bytes, a path goes apart from the small ones, which it would hold back.
const LARGE: u64 = 16 * 1024 * 1024;
/// A look at a store takes this long at most.
const LOOK_LIMIT: Duration = Duration::from_secs(60);
/// A copy takes this long at most, and longer by its size at the rate below.
const COPY_LIMIT: Duration = Duration::from_secs(120);
/// Bytes per second at which even a slow line with a slow compression moves.
const RATE: u64 = 250_000;
/// The schemes that `nix copy` writes to.
const SCHEMES: [&str; 6] = ["s3", "file", "ssh-ng", "ssh", "http", "https"];

/// A text that names no store.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum StoreUrlError {
    /// It is no URL.
    #[error("`{0}` is not the URL of a store")]
    Malformed(String),
    /// Nix writes to no such store.
    #[error("`{0}` is a kind of store that nothing is published to")]
    Scheme(String),
    /// It holds a password.
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
                "Give an URL such as `s3://bucket?region=eu-west-1`, `file:///var/cache/nix` or `ssh-ng://host`.".into()
            }
        })
    }
}

/// A store's URL as Nix takes it.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreUrl(Url);

impl StoreUrl {
    /// The whole, for Nix.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// The host that a netrc would name, for HTTP.
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
        if url.password().is_some() {
            return Err(StoreUrlError::Password);
        }
        // A setting's value ends at white space, and one that begins with a dash would be an option.
        let whole =
            !url.as_str().contains(char::is_whitespace) && !text.contains(char::is_whitespace);
        let somewhere = if url.scheme() == "file" {
            url.path().len() > 1
        } else {
            url.host_str().is_some_and(|host| !host.is_empty())
        };
        if whole && somewhere {
            Ok(Self(url))
        } else {
            Err(malformed())
        }
    }
}

/// Without user and parameters, which may name keys.
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

/// A store, written to and read by Nix.
#[derive(Debug)]
pub struct Copy {
    calls: Arc<Calls>,
    small: Batches<PathInfo, Uploaded>,
    large: Batches<PathInfo, Uploaded>,
    looks: Batches<StorePath, Option<NarInfo>>,
}

impl Copy {
    /// A store for which `nix` has the credentials in its settings and environment.
    pub fn new(nix: Nix, url: StoreUrl) -> Self {
        let calls = Arc::new(Calls { nix, url });
        let line = |most| {
            let calls = Arc::clone(&calls);
            Batches::start(most, move |infos| Arc::clone(&calls).copy(infos))
        };
        let looking = Arc::clone(&calls);
        let looks = Batches::start(BATCH, move |paths| Arc::clone(&looking).look_up(paths));
        Self {
            small: line(BATCH),
            large: line(1),
            looks,
            calls,
        }
    }

    /// Looks whether the store opens, within `limit` and without trying twice.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ping(nix: &Nix, url: &StoreUrl, limit: Duration) -> Result<(), Error> {
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
        calls
            .ask(
                "nix store ping",
                &[&["store", "ping", "--store", url.as_str()][..], &quick].concat(),
                limit,
            )
            .await?;
        Ok(())
    }
}

impl From<Copy> for Target {
    fn from(copy: Copy) -> Self {
        Arc::new(copy)
    }
}

impl Destination for Copy {
    fn address(&self) -> String {
        self.calls.url.to_string()
    }

    /// `nix copy` refuses a path whose references are not in the very store.
    fn leaves_upstream_out(&self) -> bool {
        false
    }

    fn width(&self) -> Option<usize> {
        Some(BATCH)
    }

    fn describe(&self) -> Answer<'_, CacheConfig> {
        Box::pin(async { Ok(CacheConfig::default()) })
    }

    fn missing<'a>(&'a self, paths: &'a [StorePath]) -> Answer<'a, HashSet<StorePath>> {
        Box::pin(async move {
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
        meter: &'a Meter,
    ) -> Answer<'a, Uploaded> {
        Box::pin(async move {
            let line = if info.nar_size >= LARGE {
                &self.large
            } else {
                &self.small
            };
            let uploaded = line.ask(info.clone()).await?;
            meter.add(info.nar_size);
            Ok(uploaded)
        })
    }

    fn look_up<'a>(&'a self, path: &'a StorePath) -> Answer<'a, Option<NarInfo>> {
        Box::pin(self.looks.ask(path.clone()))
    }

    fn check_body<'a>(&'a self, info: &'a NarInfo) -> Answer<'a, Body> {
        Box::pin(self.calls.verify(&info.path))
    }
}

/// The calls of Nix.
#[derive(Debug)]
struct Calls {
    nix: Nix,
    url: StoreUrl,
}

impl Calls {
    /// One call for all. Where it fails, each is tried alone if the store as a whole still opens:
    /// then one path's fault is not the others'.
    async fn copy(self: Arc<Self>, infos: Vec<PathInfo>) -> Vec<Result<Uploaded, Error>> {
        let together = match self.copy_once(&infos).await {
            Ok(()) => return infos.iter().map(|_| Ok(Uploaded::Stored)).collect(),
            Err(error) => error,
        };
        let opens = infos.len() > 1 && Self::opens(&self).await;
        let mut results = Vec::new();
        let mut failed = 0;
        for info in &infos {
            // Two that fail alone, too: it is the store after all, and the publisher waits for it.
            let result = if opens && failed < 2 {
                self.copy_once(std::slice::from_ref(info)).await
            } else {
                Err(again(&together))
            };
            failed += u32::from(result.is_err());
            results.push(result.map(|()| Uploaded::Stored));
        }
        results
    }

    async fn opens(&self) -> bool {
        Copy::ping(&self.nix, &self.url, LOOK_LIMIT).await.is_ok()
    }

    async fn copy_once(&self, infos: &[PathInfo]) -> Result<(), Error> {
        let size: u64 = infos.iter().map(|info| info.nar_size).sum();
        let paths: Vec<String> = infos.iter().map(|info| info.path.to_string()).collect();
        // The paths are this store's own, unsigned as a rule; what a foreign daemon demands it demands.
        let mut arguments = vec![
            "copy",
            "--to",
            self.url.as_str(),
            "--no-recursive",
            "--no-check-sigs",
        ];
        arguments.extend(paths.iter().map(String::as_str));
        self.ask(
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
            Err(error) => return paths.iter().map(|_| Err(again(&error))).collect(),
        };
        paths.iter().map(|path| Ok(found.remove(path))).collect()
    }

    /// What the store says of these; what it does not have is left out.
    async fn infos(&self, paths: &[StorePath]) -> Result<PathInfos, Error> {
        match self.infos_once(paths).await {
            // Some versions end with an error where one of several is not there.
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
        let mut arguments = vec![
            "path-info",
            "--store",
            self.url.as_str(),
            "--json",
            "--option",
            "substitute",
            "false",
        ];
        // What was absent a minute ago is what this is about.
        for ttl in ["narinfo-cache-negative-ttl", "narinfo-cache-positive-ttl"] {
            arguments.extend(["--option", ttl, "0"]);
        }
        arguments.extend(paths.iter().map(String::as_str));
        let answer = self.ask("nix path-info", &arguments, LOOK_LIMIT).await?;
        path_json::parse(&answer).map_err(|error| Error::Foreign(error.to_string()))
    }

    /// Nix fetches the body and compares its hash.
    async fn verify(&self, path: &StorePath) -> Result<Body, Error> {
        let path = path.to_string();
        let arguments = [
            "store",
            "verify",
            "--no-trust",
            "--store",
            self.url.as_str(),
            &path,
        ];
        match self.ask("nix store verify", &arguments, LOOK_LIMIT).await {
            Ok(_) => Ok(Body::Good),
            // Nix's own word for a NAR whose hash is not the registered one.
            Err(Error::Tool { text, .. }) if text.contains("was modified") => Ok(Body::Bad(text)),
            Err(error) => Err(error),
        }
    }

    async fn ask(
        &self,
        call: &'static str,
        arguments: &[&str],
        limit: Duration,
    ) -> Result<Vec<u8>, Error> {
        let failed = |text: String| Error::Tool { call, text };
        let output = self
            .nix
            .run(arguments, limit)
            .await
            .map_err(|error| failed(with_causes(&error)))?;
        if output.status.success() {
            Ok(output.stdout)
        } else {
            Err(failed(error_summary(&output.stderr)))
        }
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// The same failure, for another path.
fn again(error: &Error) -> Error {
    match error {
        Error::Tool { call, text } => Error::Tool {
            call,
            text: text.clone(),
        },
        other => Error::Foreign(other.to_string()),
    }
}

fn is_absence(error: &Error) -> bool {
    matches!(error, Error::Tool { text, .. } if text.contains("is not valid"))
}

/// What Nix tells of a path there, in the words of a cache. Where the body lies is Nix's business.
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
