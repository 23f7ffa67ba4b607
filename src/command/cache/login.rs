//! `flywheel cache login`: keeps a token for this user, in a netrc that Nix can be pointed to and `publish` finds.

use std::io::{self, IsTerminal as _, Read as _};
use std::path::PathBuf;

use clap::Args;

use crate::command::cache::reader::{CacheAddress, cache_address};
use crate::inputs::value::value;
use flywheel_cache::client::endpoint::Endpoint;
use flywheel_core::exit::{Exit, UsageError, VerbError};
use flywheel_core::secret::Secret;
use flywheel_nix::netrc;
use flywheel_sys::runner::context;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::Workflow;

/// A token is shorter, in bytes; a tokens file with one may be longer than a line.
const TOKEN_LIMIT: u64 = 64 * 1024;

/// Keep a token for this user: `flywheel publish` finds it, and `flywheel cache use` points Nix to it.
///
/// The token is read from standard input, or from `ATTIC_TOKEN`; never from an argument, which every
/// process could read. It is kept in `~/.config/flywheel/login/netrc` (0600 in a folder 0700), by the
/// host's name, as a netrc knows no port. In a job of a CI it is not used.
#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  flywheel cache login https://attic.example.org/main < token.txt\n  flywheel cache login https://attic.example.org/main --undo"
)]
pub(super) struct Inputs {
    /// The cache's whole address, with its name at the end.
    #[arg(value_name = "ADDRESS", value_parser = value(cache_address), default_value = "http://127.0.0.1:8484/main")]
    address: CacheAddress,

    /// Forget the token of the address's host when `--undo` is given (default: keep one).
    #[arg(long)]
    undo: bool,
}

/// Runs the verb.
///
/// # Errors
/// Without a token, or when it cannot be kept.
pub(super) fn run(inputs: &Inputs, env: &Env) -> Result<Exit, VerbError> {
    let workflow = Workflow::new(env.in_github_actions());
    let host = &inputs.address.host;
    let folder = folder(env).ok_or_else(|| {
        UsageError::new(
            "HOME",
            "is not set, so that there is no place for the token",
        )
        .with_hint("Set `HOME`, or give the token as `ATTIC_TOKEN`.")
    })?;
    if inputs.undo {
        let file = netrc::remember(&folder, host, None)?;
        workflow.log(&format!("`{}` has no token for `{host}`", file.display()));
        return Ok(Exit::Ok);
    }
    let token = context::cache_token(env).or_else(piped_token);
    let token = token.ok_or_else(|| {
        UsageError::new("ATTIC_TOKEN", "is not set, and standard input has no token")
            .with_hint("Pipe the token in: `flywheel cache login ADDRESS < FILE`.")
    })?;
    workflow.mask(&token);
    let file = netrc::remember(&folder, host, Some(&token))?;
    workflow.log(&format!(
        "the token for `{host}` is kept in `{}`",
        file.display()
    ));
    Ok(Exit::Ok)
}

/// The token that is piped in. A terminal would show what is typed.
fn piped_token() -> Option<Secret> {
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return None;
    }
    let mut text = zeroize::Zeroizing::new(String::new());
    stdin
        .lock()
        .take(TOKEN_LIMIT)
        .read_to_string(&mut text)
        .ok()?;
    context::token_in_text(&text)
}

/// The netrc of this user's logins, if it has a token for this host.
pub(super) fn netrc_for(env: &Env, host: &str) -> Option<PathBuf> {
    let folder = folder(env)?;
    netrc::recall(&folder, host).map(|_| folder.join("netrc"))
}

/// The token that this user keeps for the cache's host. A job of a CI has its own.
pub(crate) fn token_for(env: &Env, endpoint: &Endpoint) -> Option<Secret> {
    if context::in_ci(env) {
        return None;
    }
    let address = endpoint.read("nix-cache-info");
    netrc::recall(&folder(env)?, address.host_str()?)
}

fn folder(env: &Env) -> Option<PathBuf> {
    let config = env
        .path("XDG_CONFIG_HOME")
        .filter(|folder| folder.is_absolute())
        .or_else(|| Some(env.path("HOME")?.join(".config")))?;
    Some(config.join("flywheel/login"))
}
