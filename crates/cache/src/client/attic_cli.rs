//! Publishing by Attic's own client, the command `attic`, in place of the built-in one. It is found on the host or
//! fetched, never compiled. It gets paths in batches, and after a failed call the cache is queried for what arrived.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::Value;

use crate::client::attic::Attic;
use crate::client::batch::Batches;
use crate::client::destination::{
    BodyCheck, ByteCounter, CacheConfig, Destination, Error, Pending, Target, Uploaded,
};
use crate::client::endpoint::Endpoint;
use flywheel_core::secret::Secret;
use flywheel_core::text::one_line;
use flywheel_nix::nar::NarSource;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::netrc;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::{Nix, error_summary, on_path};
use flywheel_sys::process::capture::Tool;
use flywheel_sys::runner::env::Env;

/// The default flake reference of the client.
pub const REFERENCE: &str = "github:NixOS/nixpkgs/nixos-24.11#attic-client";
/// The client's attribute in the caller's own flake.
const OWN: &str = "attic-client";
/// Enough to fetch nixpkgs and a client of 30 MB. The job waits for it.
const FETCH_LIMIT: Duration = Duration::from_secs(90);
/// Paths in one call. Their names take a few kilobytes, far below the system's limit for arguments.
const BATCH: usize = 64;
/// The timeout of a call, besides the time for its bytes at [`RATE`]. The client itself has no timeouts.
const PUSH_LIMIT: Duration = Duration::from_secs(120);
/// Bytes per second of a slow connection.
const RATE: u64 = 250_000;
/// Concurrent look-ups where the server cannot be queried for many paths at once.
const LOOKUPS: usize = 16;
/// The server's name in the client's configuration.
const SERVER: &str = "flywheel";

/// Where to search for the client.
#[derive(Debug)]
pub struct Search<'a> {
    /// The job's environment: its `PATH` comes first.
    pub env: &'a Env,
    /// The Nix that fetches, with the fetchers' credentials in its settings.
    pub nix: &'a Nix,
    /// A flake reference with its attribute.
    pub reference: &'a str,
    /// The folder of the caller's flake.
    pub folder: &'a Path,
    /// A folder for the garbage collector roots that keep the client.
    pub links: &'a Path,
}

/// Where the client was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    Path,
    /// Substituted, by the given reference.
    Reference,
    /// Substituted, from the caller's own flake.
    OwnFlake,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// The program's absolute path.
    pub(crate) program: PathBuf,
    pub(crate) origin: Origin,
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let from = match self.origin {
            Origin::Path => "on `PATH`",
            Origin::Reference => "substituted from nixpkgs",
            Origin::OwnFlake => "substituted from the flake's own `attic-client`",
        };
        write!(f, "{} ({from})", self.program.display())
    }
}

/// Searches `PATH`, then the reference, then the caller's flake. It never compiles the client, neither here nor on a
/// remote builder.
///
/// # Errors
/// When no place has a client: the reason for each, as a sentence for people.
pub async fn find(search: &Search<'_>) -> Result<Client, String> {
    // A client on `PATH` needs no download, so it comes first.
    if let Some(program) = on_path(search.env, "attic") {
        return Ok(Client {
            program,
            origin: Origin::Path,
        });
    }
    let mut reasons = vec!["no `attic` is on `PATH`".to_owned()];
    match substituted(search, search.reference, "reference").await {
        Ok(program) => {
            return Ok(Client {
                program,
                origin: Origin::Reference,
            });
        }
        Err(reason) => reasons.push(format!(
            "`{}` cannot be substituted ({reason})",
            one_line(search.reference, 120)
        )),
    }
    if search.folder.join("flake.nix").is_file() {
        match substituted(search, &format!(".#{OWN}"), "own").await {
            Ok(program) => {
                return Ok(Client {
                    program,
                    origin: Origin::OwnFlake,
                });
            }
            Err(reason) => reasons.push(format!("`.#{OWN}` cannot be substituted ({reason})")),
        }
    } else {
        reasons.push("there is no flake to take one from".to_owned());
    }
    Err(format!(
        "Attic's own client was not found, and it is never compiled: {}",
        reasons.join("; ")
    ))
}

/// Has Nix fetch the client without building anything.
async fn substituted(search: &Search<'_>, reference: &str, link: &str) -> Result<PathBuf, String> {
    let link = search.links.join(format!("attic-client-{link}"));
    let tool = search.nix.tool().in_folder(search.folder);
    // Without local jobs and remote builders Nix can only substitute.
    let tool = tool.args([
        "build",
        reference,
        "--max-jobs",
        "0",
        "--builders",
        "",
        "--json",
        // The caller's checkout must not change.
        "--no-write-lock-file",
    ]);
    // Without the link, a garbage collection during the job could delete the client.
    let output = tool
        .arg("--out-link")
        .arg(&link)
        .run(FETCH_LIMIT)
        .await
        .map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(error_summary(&output.stderr));
    }
    let answer: Value =
        serde_json::from_slice(&output.stdout).map_err(|error| error.to_string())?;
    let outputs = answer.pointer("/0/outputs").and_then(Value::as_object);
    // Not every output has the program; one may have only the manual.
    let folders = outputs
        .into_iter()
        .flat_map(|outputs| outputs.values())
        .filter_map(Value::as_str);
    let mut programs = folders.map(|folder| Path::new(folder).join("bin/attic"));
    programs
        .find(|program| program.is_file())
        .ok_or_else(|| "it has no `bin/attic`".to_owned())
}

/// A cache that Attic's own client writes to, and the built-in client reads from.
#[derive(Debug)]
pub struct AtticCli {
    push: Arc<Push>,
    batches: Batches<PathInfo, Uploaded>,
}

impl AtticCli {
    /// Writes the client's configuration, token included, into `private` (0700).
    ///
    /// # Errors
    /// When the configuration cannot be written, or cannot hold the token.
    pub fn new(
        client: &Client,
        nix: &Nix,
        attic: Attic,
        token: &Secret,
        private: &Path,
    ) -> Result<Self, netrc::WriteError> {
        let home = netrc::write_attic_home(private, SERVER, &attic.endpoint().server, token)?;
        let push = Arc::new(Push {
            program: client.program.clone(),
            nix: nix.clone(),
            home,
            attic,
        });
        let pushing = Arc::clone(&push);
        let batches = Batches::start(BATCH, move |infos| Arc::clone(&pushing).batch(infos));
        Ok(Self { push, batches })
    }
}

impl From<AtticCli> for Target {
    fn from(cli: AtticCli) -> Self {
        Arc::new(cli)
    }
}

impl Destination for AtticCli {
    fn address(&self) -> String {
        self.push.attic.endpoint().to_string()
    }

    fn endpoint(&self) -> Option<&Endpoint> {
        Some(self.push.attic.endpoint())
    }

    fn concurrency(&self) -> Option<usize> {
        Some(BATCH)
    }

    fn describe(&self) -> Pending<'_, CacheConfig> {
        Box::pin(self.push.attic.cache_config())
    }

    fn missing<'a>(&'a self, paths: &'a [StorePath]) -> Pending<'a, HashSet<StorePath>> {
        Box::pin(self.push.missing(paths))
    }

    fn send<'a>(
        &'a self,
        info: &'a PathInfo,
        _: NarSource,
        counter: &'a ByteCounter,
    ) -> Pending<'a, Uploaded> {
        Box::pin(async move {
            let uploaded = self.batches.submit(info.clone()).await?;
            // The client reports no progress, so a path's bytes count once it has arrived.
            counter.add(info.nar_size);
            Ok(uploaded)
        })
    }

    fn look_up<'a>(&'a self, path: &'a StorePath) -> Pending<'a, Option<NarInfo>> {
        self.push.attic.look_up(path)
    }

    fn shows_progress(&self) -> bool {
        false
    }

    fn check_body<'a>(
        &'a self,
        info: &'a NarInfo,
        received: &'a ByteCounter,
    ) -> Pending<'a, BodyCheck> {
        Destination::check_body(&self.push.attic, info, received)
    }
}

/// The calls of `attic push`.
#[derive(Debug)]
struct Push {
    program: PathBuf,
    nix: Nix,
    home: PathBuf,
    attic: Attic,
}

impl Push {
    /// Queries the server for all paths at once; a server without that query is asked for each narinfo.
    async fn missing(&self, paths: &[StorePath]) -> Result<HashSet<StorePath>, Error> {
        match Destination::missing(&self.attic, paths).await {
            Err(error) if is_unknown(&error) => (),
            answer => return answer,
        }
        let absent = stream::iter(paths.to_vec())
            .map(|path| async move {
                Ok::<_, Error>(self.attic.look_up(&path).await?.is_none().then_some(path))
            })
            .buffer_unordered(LOOKUPS);
        absent
            .try_filter_map(|path| async { Ok(path) })
            .try_collect()
            .await
    }

    /// One call for all paths. When it fails the cache is queried for each, so that the paths that did arrive count as
    /// published.
    async fn batch(self: Arc<Self>, infos: Vec<PathInfo>) -> Vec<Result<Uploaded, Error>> {
        let problem = match self.call(&infos).await {
            Ok(()) => return infos.iter().map(|_| Ok(Uploaded::Stored)).collect(),
            Err(text) => text,
        };
        // The client's exit code covers the batch as a whole; the server knows about each path.
        let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
        // If the cache cannot be queried, no path counts as published, and all are tried again.
        let missing = self
            .missing(&paths)
            .await
            .unwrap_or_else(|_| paths.iter().cloned().collect());
        let mut results = Vec::new();
        for info in &infos {
            results.push(if missing.contains(&info.path) {
                Err(failed(&problem, &info.path))
            } else {
                Ok(Uploaded::Stored)
            });
        }
        results
    }

    /// The publisher decides the order of the paths and what an upstream cache has, so the client's own logic for both
    /// is switched off.
    async fn call(&self, infos: &[PathInfo]) -> Result<(), String> {
        let size: u64 = infos.iter().map(|info| info.nar_size).sum();
        let cache = format!("{SERVER}:{}", self.attic.endpoint().cache);
        let tool = Tool::new(&self.program)
            .envs(self.nix.variables())
            // The client finds its configuration here, so the token is in no argument and in no variable.
            .env("HOME", &self.home)
            .env("XDG_CONFIG_HOME", &self.home)
            .args([
                "push",
                "--no-closure",
                "--ignore-upstream-cache-filter",
                &cache,
            ])
            .args(infos.iter().map(|info| info.path.to_string()));
        let ran = tool
            .run(PUSH_LIMIT + Duration::from_secs(size / RATE))
            .await;
        let output = ran.map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(())
        } else {
            Err(output.stderr)
        }
    }
}

/// The client's error message about this path, or else the last line of its output.
fn failed(stderr: &str, path: &StorePath) -> Error {
    let own = stderr.lines().find(|line| line.contains(path.base_name()));
    let last = stderr.lines().rfind(|line| !line.trim().is_empty());
    let text = own.or(last).map_or_else(
        || "it printed no error".to_owned(),
        |line| one_line(line.trim(), 300),
    );
    Error::from_tool("attic push", text)
}

/// Whether the server does not know the query. That allows no conclusion about the paths.
fn is_unknown(error: &Error) -> bool {
    matches!(
        error,
        Error::Refused { status: 404, .. } | Error::Rejected { .. } | Error::Foreign(_)
    )
}

/// Whether the server has the built-in client's protocol, judged by one query. A server that is unavailable or refuses
/// the token is assumed to have it.
pub async fn has_attic_api(attic: &Attic) -> bool {
    match attic.missing_paths(&[]).await {
        Ok(_) => true,
        Err(error) => !is_unknown(&error),
    }
}

#[cfg(test)]
mod tests;
