//! `flywheel cache use`: what Nix and a workflow need to read a cache, printed or written into a `nix.conf`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use thiserror::Error;
use tokio::time::timeout;

use crate::command::cache::login;
use crate::command::cache::nix_conf::{ReadCache, nix_lines, replace, with_block};
use crate::inputs::roots::roots;
use crate::inputs::value::{Invalid, path, value};
use crate::inputs::{cache_name, http_address, public_key};
use flywheel_cache::client::attic::Attic;
use flywheel_cache::client::endpoint::Endpoint;
use flywheel_core::exit::{Exit, Explain, UsageError, VerbError, named_file_error};
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::PublicKey;
use flywheel_sys::http::Clients;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::{Workflow, data};
use flywheel_sys::untrusted_file::{self, FileError, Owner};

/// How long the server has to name its key.
const KEY_LIMIT: Duration = Duration::from_secs(10);
/// A `nix.conf` is smaller, in bytes.
const CONF_LIMIT: u64 = 1 << 20;

/// Print the lines by which Nix and a workflow read a cache, or write Nix's into its settings.
///
/// The key is asked of the server, unless it is given. With `--write` the lines go into a `nix.conf`
/// as a block of their own, once, however often this is called; `--undo` takes the block out.
///
/// Where `flywheel cache login` has kept a token for the host, the lines name its netrc.
///
/// Nix's daemon lets only users in its `trusted-users` add caches. For all users of the machine,
/// write as root: `--file /etc/nix/nix.conf`, and start the daemon again.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  flywheel cache use http://127.0.0.1:8484/main\n  flywheel cache use http://127.0.0.1:8484/main --write\n  flywheel cache use http://127.0.0.1:8484/main --undo"
)]
pub(super) struct Inputs {
    /// The cache's whole address, with its name at the end (default: `http://127.0.0.1:8484/main`,
    /// where `cache serve` is).
    #[arg(value_name = "ADDRESS", value_parser = value(cache_address), default_value = "http://127.0.0.1:8484/main")]
    address: CacheAddress,

    /// The key that signs the cache's paths, such as `main:6NCHdD59X431…=` (default: what the server
    /// announces).
    #[arg(long, value_name = "KEY", value_parser = value(key))]
    public_key: Option<PublicKey>,

    /// Write the lines into the settings when `--write` is given (default: print them).
    #[arg(long, conflicts_with = "undo")]
    write: bool,

    /// Take the lines out of the settings when `--undo` is given (default: print them).
    #[arg(long)]
    undo: bool,

    /// The settings to write to, such as `/etc/nix/nix.conf` (default: this user's,
    /// `~/.config/nix/nix.conf`).
    #[arg(long, value_name = "FILE", value_parser = path())]
    file: Option<PathBuf>,
}

/// An address with the cache's name behind it.
#[derive(Clone, Debug)]
pub(super) struct CacheAddress {
    /// As it was written, without a `/` at the end.
    text: String,
    server: String,
    name: CacheName,
    endpoint: Endpoint,
    /// Without a port.
    pub(super) host: String,
}

pub(super) fn cache_address(text: &str) -> Result<CacheAddress, Invalid> {
    let address = http_address(text)?;
    let hint = "Write the address as `flywheel cache serve` prints it behind `cache`, such as \
                `http://127.0.0.1:8484/main`.";
    let lacks = || Invalid::new("lacks the cache's name at its end").with_hint(hint);
    let whole = address.text.trim_end_matches('/');
    let (server, name) = whole.rsplit_once('/').ok_or_else(lacks)?;
    if server.ends_with('/') || server.ends_with(':') {
        return Err(lacks());
    }
    let name = cache_name(name).map_err(|problem| Invalid::new(problem).with_hint(hint))?;
    let url = http_address(server)?.url;
    let host = url.host_str().unwrap_or_default().to_owned();
    Ok(CacheAddress {
        text: whole.to_owned(),
        server: server.to_owned(),
        name: name.clone(),
        endpoint: Endpoint::new(url, name),
        host,
    })
}

fn key(text: &str) -> Result<PublicKey, Invalid> {
    public_key(text).map_err(Invalid::from)
}

/// The key is not known.
#[derive(Debug, Error)]
#[error("`{address}` does not name its key: {problem}")]
struct NoKey {
    address: String,
    problem: String,
}

impl Explain for NoKey {
    fn hint(&self) -> Option<String> {
        Some("Give the key with the input `public-key`, or look whether the server is up.".into())
    }
}

/// Runs the verb.
///
/// # Errors
/// For wrong input; when the server names no key, or the settings cannot be read or written.
pub(super) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let workflow = Workflow::new(env.in_github_actions());
    let address = &inputs.address;
    if inputs.undo {
        return write(&inputs, None, env, &workflow);
    }
    let key = match &inputs.public_key {
        Some(key) => key.clone(),
        None => announced_key(address, env).await?,
    };
    let mut lines = nix_lines(&[ReadCache::new(address.text.clone(), Some(key.clone()))]);
    if let Some(netrc) = login::netrc_for(env, &address.host) {
        lines.push_str(&format!("netrc-file = {}\n", netrc.display()));
    }
    if inputs.write {
        return write(&inputs, Some(&lines), env, &workflow);
    }
    data(&format!(
        "# nix.conf\n{lines}\n# a workflow: `with:` of nix-job, flake-checks or watch-store\nattic-server: {}\nattic-cache: \
         {}\nattic-public-key: {key}",
        address.server, address.name
    ));
    Ok(Exit::Ok)
}

async fn announced_key(address: &CacheAddress, env: &Env) -> Result<PublicKey, VerbError> {
    let no_key = |problem: String| NoKey {
        address: address.text.clone(),
        problem,
    };
    let clients = Clients::new(&roots(env))?;
    // Without a token: one in the environment may be for another server.
    let attic = Attic::new(address.endpoint.clone(), None, clients);
    let config = timeout(KEY_LIMIT, attic.cache_config()).await;
    let config = config.map_err(|_| no_key("it does not answer".to_owned()))?;
    let config = config.map_err(|error| no_key(error.to_string()))?;
    let key = config.public_key;
    Ok(key.ok_or_else(|| no_key("its answer has none".to_owned()))?)
}

/// Writes the lines into the settings, or takes them out.
fn write(
    inputs: &Inputs,
    lines: Option<&str>,
    env: &Env,
    workflow: &Workflow,
) -> Result<Exit, VerbError> {
    let file = match &inputs.file {
        Some(file) => file.clone(),
        None => settings_of_user(env)?,
    };
    let hint = "Name another file with the input `file`, or let this user write to it. Where Nix's settings are made by \
                NixOS or Home Manager, put the lines that this verb prints into their configuration.";
    let failed = |what: &'static str| {
        let file = file.clone();
        move |error: std::io::Error| named_file_error("file", &file, what, error, hint)
    };
    let before = read(&file).map_err(failed("be read"))?;
    let after = with_block(&before, &inputs.address.text, lines);
    let shown = file.display();
    if after == before {
        let state = if lines.is_some() {
            "has"
        } else {
            "does not have"
        };
        workflow.log(&format!("`{shown}` {state} the lines already"));
        return Ok(Exit::Ok);
    }
    replace(&file, &after).map_err(failed("be written"))?;
    match lines {
        Some(lines) => workflow.log(&format!("written to `{shown}`:\n{}", lines.trim_end())),
        None => workflow.log(&format!("taken out of `{shown}`")),
    }
    Ok(Exit::Ok)
}

fn settings_of_user(env: &Env) -> Result<PathBuf, UsageError> {
    let config = env
        .path("XDG_CONFIG_HOME")
        .filter(|folder| folder.is_absolute())
        .or_else(|| Some(env.path("HOME")?.join(".config")));
    let config = config.ok_or_else(|| {
        UsageError::new("file", "is not given, and there is no `HOME`")
            .with_hint("Name the settings, such as `/etc/nix/nix.conf`.")
    })?;
    Ok(config.join("nix/nix.conf"))
}

fn read(file: &Path) -> std::io::Result<String> {
    match untrusted_file::read(file, Owner::Any, CONF_LIMIT) {
        Ok(bytes) => String::from_utf8(bytes)
            .map_err(|_| std::io::Error::new(std::io::ErrorKind::InvalidData, "it is not UTF-8")),
        Err(error) if FileError::is_absence(&error) => Ok(String::new()),
        Err(error) => Err(error.into()),
    }
}
