//! `flywheel cache`: runs the embedded binary cache, collects garbage in its folder, and hands out its tokens.

mod log;
pub(crate) mod login;
mod nix_conf;
mod reader;
mod token;

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use thiserror::Error;
use tokio::signal::unix::{SignalKind, signal};

use self::log::Log;
use self::nix_conf::{ReadCache, nix_lines};
use crate::inputs::units;
use crate::inputs::value::{Invalid, number, path, value};
use flywheel_cache::server::{self, Limits, Options, Server, Serving};
use flywheel_core::exit::{Exit, Explain, Failure, UsageError, VerbError};
use flywheel_core::progress::Sink;
use flywheel_nix::cache_name::CacheName;
use flywheel_sys::runner::env::Env;

/// Beyond this zstd level a small runner lacks the memory for several uploads at once.
const HIGHEST_LEVEL: i32 = 19;
/// A larger number is a lower priority; no cache in use has one beyond this.
const LOWEST_PRIORITY: u32 = 1000;
/// Loopback, so that only this machine reaches the server.
const DEFAULT_LISTEN: &str = "127.0.0.1:8484";

/// The embedded binary cache: one process, one folder, Attic's protocol and Nix's HTTP cache protocol;
/// and what its readers need.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel cache serve --dir ~/.cache/flywheel")]
pub(crate) struct Inputs {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    Serve(Box<Serve>),
    Gc(Gc),
    Token(token::Inputs),
    Use(reader::Inputs),
    Login(login::Inputs),
}

/// Serve a cache from a folder until SIGINT or SIGTERM.
///
/// Prints its address on stdout, for each cache `cache ADDRESS` and `public-key KEY`, then
/// `tokens-file FILE` and the lines for `nix.conf`; finished uploads and collections are logged on
/// stderr, a line each. Nix reads a cache at its whole address, name included.
///
/// Clients write with Attic's protocol (`attic push`, `flywheel publish`) or with
/// `nix copy --to 'http://127.0.0.1:8484/main?compression=zstd'`, and read it as a substituter at
/// `http://127.0.0.1:8484/main`. The token goes into `ATTIC_TOKEN`, as it stands or as its line in the
/// tokens file, or into a netrc file as `machine 127.0.0.1 login flywheel password TOKEN`.
///
/// The first start makes a write token and a signing key per cache in the folder. There is no TLS
/// here: for other machines, put a reverse proxy in front.
///
/// If another process of this user serves the folder, such as a job, this one uses that server, and
/// serves the folder itself once that one ends.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  flywheel cache serve --dir ~/.cache/flywheel --max-size 20G --max-age 30d"
)]
struct Serve {
    #[command(flatten)]
    folder: FolderInput,

    /// Address and port to listen on; port 0 takes any free one. Example: `--listen 127.0.0.1:0`.
    #[arg(
        long,
        value_name = "ADDRESS",
        value_parser = value(listen_address),
        default_value = DEFAULT_LISTEN
    )]
    listen: SocketAddr,

    /// Allow `--listen` on an address that other machines can reach (default: refused). Traffic,
    /// tokens included, is not encrypted; TLS comes from a reverse proxy.
    #[arg(long)]
    allow_remote: bool,

    /// Once the server answers, write its address to this file in one step, such as `--ready-file
    /// /tmp/cache.url` (default: none).
    #[arg(long, value_name = "FILE", value_parser = path())]
    ready_file: Option<PathBuf>,

    /// A cache to serve; may be given several times, or with commas. Example: `--cache main --cache team`.
    #[arg(
        long = "cache",
        value_name = "NAME",
        value_parser = value(served_cache),
        default_value = "main",
        value_delimiter = ','
    )]
    caches: Vec<CacheName>,

    /// Let everyone who reaches the server read without a token (the default, with
    /// `--allow-remote`, too). Undoes an earlier `--private`.
    #[arg(long, overrides_with = "private")]
    public: bool,

    /// Require a token with scope `read` or `write` for reading (default: none is needed).
    #[arg(long, overrides_with = "public")]
    private: bool,

    /// A file with one token per line, as `SCOPE TOKEN [CACHE] [until=TIME]`. The scope is `read`, or `write`,
    /// which includes reading; without a cache the token is valid for all. `cache token` writes such
    /// lines. When the file changes, it is read anew. Example: `--tokens
    /// /run/secrets/tokens` (default: `tokens` in the folder, made at the first start with one
    /// write token).
    #[arg(long, value_name = "FILE", value_parser = path())]
    tokens: Option<PathBuf>,

    /// Accept a path whose NAR the server already has without having it sent again. A client that
    /// sends `Expect: 100-continue` then sends none of it. Off by default, because a client that
    /// knows only a hash could otherwise get the NAR. Example: `--waive-proof`.
    #[arg(long)]
    waive_proof: bool,

    /// Level of zstd for stored NARs, 1 to 19. Example: `--level 8`.
    #[arg(
        long,
        value_name = "LEVEL",
        value_parser = number(1..=HIGHEST_LEVEL),
        default_value_t = server::DEFAULT_LEVEL
    )]
    level: i32,

    /// The cache's priority among Nix's substituters: the lower, the earlier. `cache.nixos.org` has 40.
    /// Example: `--priority 30`.
    #[arg(
        long,
        value_name = "NUMBER",
        value_parser = number(0..=LOWEST_PRIORITY),
        default_value_t = server::DEFAULT_PRIORITY
    )]
    priority: u32,

    #[command(flatten)]
    limits: LimitInputs,

    /// Never remove what was used within this time, even beyond `--max-size`, nor a NAR that no
    /// path uses yet. At least two minutes. Example: `--grace 10m`.
    #[arg(long, value_name = "TIME", value_parser = value(units::duration), default_value = "1h")]
    grace: Duration,

    /// Time between two garbage collections; the first is at the start. Example: `--gc-interval 1h`.
    #[arg(long, value_name = "TIME", value_parser = value(units::duration), default_value = "10m")]
    gc_interval: Duration,

    /// Stop after this time, for tests and jobs. Example: `--stop-after 20m` (default: never).
    #[arg(long, value_name = "TIME", value_parser = value(units::duration))]
    stop_after: Option<Duration>,

    /// Log only warnings when `--quiet` is given (default: a line for each upload, failure and collection).
    #[arg(long)]
    quiet: bool,
}

/// The folder of a cache.
#[derive(Args, Debug)]
struct FolderInput {
    /// The folder that holds everything: NARs, narinfos, keys, tokens. `serve` makes it if it is not there;
    /// several processes of one user may share it. Required. Example: `--dir /var/lib/flywheel-cache`.
    #[arg(long, value_name = "FOLDER", value_parser = path())]
    dir: PathBuf,
}

/// Remove what the limits do not allow from a folder that no server uses.
///
/// Paths go by their last use, and never one that a kept path refers to. A folder with a server is
/// refused with exit code 69: the server collects by itself.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel cache gc --dir ~/.cache/flywheel --max-size 10G")]
struct Gc {
    #[command(flatten)]
    folder: FolderInput,

    #[command(flatten)]
    limits: LimitInputs,
}

#[derive(Args, Debug)]
struct LimitInputs {
    /// Remove paths that have not been used, nor anything that refers to them, for this long. Example:
    /// `--max-age 30d` (default: no limit).
    #[arg(long, value_name = "TIME", value_parser = value(units::duration))]
    max_age: Option<Duration>,

    /// Remove the least recently used paths beyond this size of compressed NARs. Example:
    /// `--max-size 20G` (default: no limit).
    #[arg(long, value_name = "SIZE", value_parser = value(units::size))]
    max_size: Option<u64>,
}

impl LimitInputs {
    fn with_grace(&self, grace: Duration) -> Limits {
        Limits {
            max_age: self.max_age,
            max_size: self.max_size,
            grace,
        }
    }
}

/// Why the server could not be started.
#[derive(Debug, Error)]
enum ServeError {
    #[error("cannot listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot write the ready file `{}`", file.display())]
    Ready {
        file: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the signal handlers cannot be installed")]
    Signals(#[source] std::io::Error),
}

impl Explain for ServeError {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        match self {
            Self::Listen { .. } => {
                Some("Give another port with `--listen`; port 0 takes a free one.".into())
            }
            Self::Ready { .. } => {
                Some("Give a file in a folder that exists with `--ready-file`.".into())
            }
            Self::Signals(_) => None,
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// For wrong input; when the folder cannot be opened, or the address is taken.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    match inputs.task {
        Task::Serve(inputs) => serve(*inputs).await,
        Task::Gc(inputs) => gc(&inputs),
        Task::Login(inputs) => login::run(&inputs, env),
        Task::Use(inputs) => reader::run(inputs, env).await,
        Task::Token(inputs) => token::run(inputs, env),
    }
}

async fn serve(inputs: Serve) -> Result<Exit, VerbError> {
    check_reach(inputs.listen, inputs.allow_remote)?;
    let log = Log::start();
    let sink = log.sink(inputs.quiet);
    warn_of_reach(&inputs, &sink);
    let ended = serve_until_stopped(inputs, sink).await;
    log.flush().await;
    Ok(ended?)
}

async fn serve_until_stopped(inputs: Serve, log: Sink) -> Result<Exit, Failure> {
    let address = inputs.listen;
    let server = Server::open(&inputs.folder.dir, options(&inputs, log)).await?;
    let listener =
        server::listen(address).map_err(|source| ServeError::Listen { address, source })?;
    // Before the server starts: from here on a signal lets it stop in order.
    let mut interrupts = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
    let mut terminations = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
    let serving = server
        .serve(listener)
        .map_err(|source| ServeError::Listen { address, source })?;
    let lines = first_lines(&serving, inputs.private && !inputs.public);
    // A closed stdout is no reason to stop.
    let _ = std::io::stdout().write_all(lines.as_bytes());
    let _ = std::io::stdout().flush();
    if let Some(file) = inputs.ready_file {
        write_whole(&file, &format!("{}\n", serving.url()))
            .map_err(|source| ServeError::Ready { file, source })?;
    }
    tokio::select! {
        _ = interrupts.recv() => (),
        _ = terminations.recv() => (),
        () = sleep_or_never(inputs.stop_after) => (),
    }
    tokio::select! {
        () = serving.stop() => (),
        // A second signal ends uploads that are under way, too.
        _ = interrupts.recv() => (),
        _ = terminations.recv() => (),
    }
    Ok(Exit::Ok)
}

/// What is printed at the start: the server's address, those of its caches and their keys with a word in front of each,
/// and lines for Nix to copy.
fn first_lines(serving: &Serving, is_private: bool) -> String {
    let url = serving.url();
    let caches: Vec<ReadCache> = serving
        .public_keys()
        .iter()
        .map(|(name, key)| ReadCache::new(format!("{url}/{name}"), Some(key.clone())))
        .collect();
    let mut lines = format!("{url}\n");
    for cache in &caches {
        lines.push_str(&format!("cache {}\n", cache.address()));
    }
    for (_, key) in serving.public_keys() {
        lines.push_str(&format!("public-key {key}\n"));
    }
    let tokens = serving.tokens_file().display();
    lines.push_str(&format!("tokens-file {tokens}\n\n"));
    lines.push_str("# Nix reads it with these lines in nix.conf:\n");
    lines.push_str(&nix_lines(&caches));
    if is_private {
        lines.push_str("# and with a token: flywheel help cache login\n");
    }
    lines
}

fn options(inputs: &Serve, log: Sink) -> Options {
    let mut caches = Vec::new();
    for name in &inputs.caches {
        if !caches.contains(name) {
            caches.push(name.clone());
        }
    }
    Options {
        caches,
        public: inputs.public || !inputs.private,
        tokens: inputs.tokens.clone(),
        require_proof: !inputs.waive_proof,
        level: inputs.level,
        priority: inputs.priority,
        limits: inputs.limits.with_grace(inputs.grace),
        gc_interval: inputs.gc_interval,
        log,
        ..Options::default()
    }
}

fn served_cache(text: &str) -> Result<CacheName, Invalid> {
    text.parse()
        .map_err(|error| Invalid::new(format!("is wrong: {error}")))
}

fn listen_address(text: &str) -> Result<SocketAddr, Invalid> {
    // `SocketAddr` reads no names, and this one needs no look-up.
    let literal = text
        .strip_prefix("localhost:")
        .map(|port| format!("127.0.0.1:{port}"));
    literal.as_deref().unwrap_or(text).parse().map_err(|_| {
        let shown = flywheel_core::text::one_line(text, 80);
        Invalid::new(format!("must be an address and a port, not `{shown}`"))
            .with_hint("Write it as `127.0.0.1:8484`.")
    })
}

fn check_reach(address: SocketAddr, allow_remote: bool) -> Result<(), UsageError> {
    if address.ip().is_loopback() || allow_remote {
        return Ok(());
    }
    Err(UsageError::new("listen", format!("names {}, which other machines may reach", address.ip())).with_hint(
        "Listen on `127.0.0.1` and put a reverse proxy with TLS in front; or add `--allow-remote` to serve \
         without encryption.",
    ))
}

/// Says at the start, whatever is logged otherwise, what other machines can do here.
fn warn_of_reach(inputs: &Serve, log: &Sink) {
    let address = inputs.listen;
    if address.ip().is_loopback() {
        return;
    }
    if inputs.public || !inputs.private {
        let text = format!(
            "whoever reaches {address} can read every path of this cache without a token; add `--private` to require one"
        );
        log.degraded("remote", text);
    }
    let text = format!(
        "what passes through {address} is not encrypted, tokens included; put a reverse proxy with TLS in front"
    );
    log.degraded("remote", text);
}

fn gc(inputs: &Gc) -> Result<Exit, VerbError> {
    let limits = inputs.limits.with_grace(Duration::ZERO);
    let folder = &inputs.folder.dir;
    // Collecting removes files, and the name may be a slip of the finger.
    if !folder.join("nars").is_dir() {
        let problem = format!("is no cache's folder: `{}`", folder.display());
        return Err(UsageError::new("dir", problem)
            .with_hint("Name the folder that `flywheel cache serve` uses.")
            .into());
    }
    let done = server::collect(folder, &limits)?;
    // A closed stdout is no reason to fail.
    let _ = writeln!(std::io::stdout(), "{done}");
    Ok(Exit::Ok)
}

async fn sleep_or_never(time: Option<Duration>) {
    match time {
        Some(time) => tokio::time::sleep(time).await,
        None => std::future::pending().await,
    }
}

fn write_whole(file: &Path, text: &str) -> std::io::Result<()> {
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    // A process that waits for the file must not read half of it, so it is renamed into its place.
    let mut temporary = tempfile::NamedTempFile::new_in(folder)?;
    temporary.write_all(text.as_bytes())?;
    temporary.persist(file)?;
    Ok(())
}
