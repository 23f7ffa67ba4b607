//! Attic's own client in place of the built-in one: found or fetched, never compiled, fed in batches,
//! and not believed: what arrived is looked up. Owns the chain by which it is got and the calls of it.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde_json::Value;

use crate::client::attic::{Attic, Body, CacheConfig, Error, Meter, Uploaded};
use crate::client::batch::Batches;
use crate::client::destination::{Answer, Destination, Target};
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

/// Where the client comes from unless the caller says otherwise.
pub const REFERENCE: &str = "github:NixOS/nixpkgs/nixos-24.11#attic-client";
/// The attribute of the caller's own flake.
const OWN: &str = "attic-client";
/// Fetching nixpkgs and a client of 30 MB takes this long at most; the job waits meanwhile.
const FETCH_LIMIT: Duration = Duration::from_secs(90);
/// Paths in one call. Their names come to a few kilobytes, far below any limit of arguments.
const BATCH: usize = 64;
/// A call takes this long at most, and longer by its size at the rate below. The client itself has
/// no timeout of any kind.
const PUSH_LIMIT: Duration = Duration::from_secs(120);
/// Bytes per second at which even a slow line moves.
const RATE: u64 = 250_000;
/// Look-ups at once where the server cannot be asked about many paths.
const LOOKUPS: usize = 16;
/// The name that the server has in the client's configuration.
const SERVER: &str = "flywheel";

/// Where the chain looks.
#[derive(Debug)]
pub struct Search<'a> {
    /// The job's environment: its `PATH` comes first.
    pub env: &'a Env,
    /// The Nix that fetches, with the fetchers' credentials in its settings.
    pub nix: &'a Nix,
    /// What to fetch, a flake reference with its attribute.
    pub reference: &'a str,
    /// The folder of the caller's flake.
    pub folder: &'a Path,
    /// A folder for the links that keep the client from being collected.
    pub links: &'a Path,
}

/// Which part of the chain gave the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `PATH`.
    Path,
    /// The reference, substituted.
    Reference,
    /// The caller's own flake, substituted.
    OwnFlake,
}

/// The client, found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Client {
    /// The program, absolute.
    pub program: PathBuf,
    /// Where it is from.
    pub origin: Origin,
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

/// Goes along the chain. Nothing is ever compiled: neither here nor on a remote builder.
///
/// # Errors
/// When no part of it gives a client: why each did not, as a sentence for people.
pub async fn find(search: &Search<'_>) -> Result<Client, String> {
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
        "there is no stock client, and none is ever compiled: {}",
        reasons.join("; ")
    ))
}

/// Has Nix fetch the client, and build nothing for it.
async fn substituted(search: &Search<'_>, reference: &str, link: &str) -> Result<PathBuf, String> {
    let link = search.links.join(format!("attic-client-{link}"));
    let tool = search.nix.tool().in_folder(search.folder);
    // No job here and no builder elsewhere: what no cache has is not to be had.
    let tool = tool.args([
        "build",
        reference,
        "--max-jobs",
        "0",
        "--builders",
        "",
        "--json",
        "--no-write-lock-file",
    ]);
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
    let folders = outputs
        .into_iter()
        .flat_map(|outputs| outputs.values())
        .filter_map(Value::as_str);
    let mut programs = folders.map(|folder| Path::new(folder).join("bin/attic"));
    programs
        .find(|program| program.is_file())
        .ok_or_else(|| "it has no `bin/attic`".to_owned())
}

/// A cache that is written to by the stock client, and read by our own.
#[derive(Debug)]
pub struct Stock {
    push: Arc<Push>,
    line: Batches<PathInfo, Uploaded>,
}

impl Stock {
    /// Writes the client's configuration, token included, into `private` (0700).
    ///
    /// # Errors
    /// When it cannot be written, or the token cannot be spelt in it.
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
        let line = Batches::start(BATCH, move |infos| Arc::clone(&pushing).batch(infos));
        Ok(Self { push, line })
    }
}

impl From<Stock> for Target {
    fn from(stock: Stock) -> Self {
        Arc::new(stock)
    }
}

impl Destination for Stock {
    fn address(&self) -> String {
        self.push.attic.endpoint().to_string()
    }

    fn endpoint(&self) -> Option<&Endpoint> {
        Some(self.push.attic.endpoint())
    }

    fn width(&self) -> Option<usize> {
        Some(BATCH)
    }

    fn describe(&self) -> Answer<'_, CacheConfig> {
        Box::pin(self.push.attic.cache_config())
    }

    fn missing<'a>(&'a self, paths: &'a [StorePath]) -> Answer<'a, HashSet<StorePath>> {
        Box::pin(self.push.missing(paths))
    }

    fn send<'a>(
        &'a self,
        info: &'a PathInfo,
        _: NarSource,
        meter: &'a Meter,
    ) -> Answer<'a, Uploaded> {
        Box::pin(async move {
            let uploaded = self.line.ask(info.clone()).await?;
            meter.add(info.nar_size);
            Ok(uploaded)
        })
    }

    fn look_up<'a>(&'a self, path: &'a StorePath) -> Answer<'a, Option<NarInfo>> {
        self.push.attic.look_up(path)
    }

    fn check_body<'a>(&'a self, info: &'a NarInfo) -> Answer<'a, Body> {
        Destination::check_body(&self.push.attic, info)
    }
}

/// The calls of the client.
#[derive(Debug)]
struct Push {
    program: PathBuf,
    nix: Nix,
    home: PathBuf,
    attic: Attic,
}

impl Push {
    /// The server's own answer to many; where it knows no such question, each is looked up.
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

    /// One call for all of them. Whatever it says, what has become of each is looked up, so that one
    /// path that fails does not take the others' success with it.
    async fn batch(self: Arc<Self>, infos: Vec<PathInfo>) -> Vec<Result<Uploaded, Error>> {
        let problem = match self.call(&infos).await {
            Ok(()) => return infos.iter().map(|_| Ok(Uploaded::Stored)).collect(),
            Err(text) => text,
        };
        let paths: Vec<StorePath> = infos.iter().map(|info| info.path.clone()).collect();
        let missing = self
            .missing(&paths)
            .await
            .unwrap_or_else(|_| paths.iter().cloned().collect());
        let mut results = Vec::new();
        for info in &infos {
            let lost = missing.contains(&info.path);
            results.push(if lost {
                Err(failed(&problem, &info.path))
            } else {
                Ok(Uploaded::Stored)
            });
        }
        results
    }

    /// The paths' order, and what upstream has, is the publisher's affair: the client gets neither to decide.
    async fn call(&self, infos: &[PathInfo]) -> Result<(), String> {
        let size: u64 = infos.iter().map(|info| info.nar_size).sum();
        let cache = format!("{SERVER}:{}", self.attic.endpoint().cache);
        let tool = Tool::new(&self.program)
            .envs(self.nix.variables())
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

/// What the client said of this path, or else its last words.
fn failed(stderr: &str, path: &StorePath) -> Error {
    let own = stderr.lines().find(|line| line.contains(path.base_name()));
    let last = stderr.lines().rfind(|line| !line.trim().is_empty());
    let text = own.or(last).map_or_else(
        || "it said nothing".to_owned(),
        |line| one_line(line.trim(), 300),
    );
    Error::Tool {
        call: "attic push",
        text,
    }
}

/// Whether the server does not know what it was asked, which says nothing of the paths.
fn is_unknown(error: &Error) -> bool {
    matches!(
        error,
        Error::Refused { status: 404, .. } | Error::Rejected { .. } | Error::Foreign(_)
    )
}

/// Whether the server speaks the built-in client's protocol, as far as one question can tell. One
/// that is away or refuses us speaks it until the contrary is seen.
pub async fn speaks_attic(attic: &Attic) -> bool {
    match attic.missing_paths(&[]).await {
        Ok(_) => true,
        Err(error) => !is_unknown(&error),
    }
}

#[cfg(test)]
mod tests;
