//! `flywheel cache token`: makes, lists and revokes tokens of the embedded cache.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use crate::inputs::units;
use crate::inputs::value::{Invalid, name, one_of, path, value};
use flywheel_cache::server::{ListedToken, Scope, TokenFile};
use flywheel_core::exit::{Exit, UsageError, VerbError, named_file_error};
use flywheel_nix::cache_name::CacheName;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::{Workflow, data, shell_data};

/// Make, list and revoke tokens of the embedded cache.
///
/// A server on the folder reads the file anew within a second or two. One that was started with
/// `--tokens` while another process serves the folder has to be started again.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  flywheel cache token new --dir ~/.cache/flywheel --cache main --expires 30d\n  flywheel cache token list --dir ~/.cache/flywheel"
)]
pub(super) struct Inputs {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    New(New),
    List(List),
    Revoke(Revoke),
}

#[derive(Args, Debug)]
struct FileInputs {
    /// The folder of the cache, whose file `tokens` is meant. Required without `--tokens`. Example:
    /// `--dir /var/lib/flywheel-cache`.
    #[arg(long, value_name = "FOLDER", value_parser = path(), required_unless_present = "tokens")]
    dir: Option<PathBuf>,

    /// The file with the tokens, if `cache serve` has one by `--tokens`, too (default: `tokens` in
    /// the folder).
    #[arg(long, value_name = "FILE", value_parser = path())]
    tokens: Option<PathBuf>,
}

impl FileInputs {
    fn open(&self) -> Result<TokenFile, VerbError> {
        let (input, file) = match (&self.tokens, &self.dir) {
            (Some(file), _) => ("tokens", file.clone()),
            (None, Some(folder)) => ("dir", folder.join("tokens")),
            (None, None) => return Err(UsageError::new("dir", "is not given").into()),
        };
        TokenFile::open(&file).map_err(|error| {
            let hint = "Name the folder of a cache: the first `flywheel cache serve` makes the file in it.";
            named_file_error(input, &file, "be opened", error, hint)
        })
    }
}

/// Make a token, and print it on stdout: once, as the file keeps its hash alone.
#[derive(Args, Debug)]
#[command(
    after_help = "Example:\n  flywheel cache token new --dir ~/.cache/flywheel --scope write --cache main --expires 30d"
)]
struct New {
    #[command(flatten)]
    file: FileInputs,

    /// What it allows: `read`, or `write`, which includes reading.
    #[arg(
        long,
        value_name = "SCOPE",
        value_parser = one_of(&[("read", Scope::Read), ("write", Scope::Write)]),
        default_value = "read"
    )]
    scope: Scope,

    /// The one cache that it is for, such as `main` (default: all caches of the folder).
    #[arg(long, value_name = "NAME", value_parser = value(cache))]
    cache: Option<CacheName>,

    /// When it ends, from now on, such as `30d` (default: never).
    #[arg(long, value_name = "TIME", value_parser = value(units::duration))]
    expires: Option<Duration>,
}

/// List the tokens: name, scope, cache and end. A token itself is never shown.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel cache token list --dir ~/.cache/flywheel")]
struct List {
    #[command(flatten)]
    file: FileInputs,
}

/// Revoke a token: whoever has it is refused from then on.
#[derive(Args, Debug)]
#[command(after_help = "Example:\n  flywheel cache token revoke 6c1fa03b --dir ~/.cache/flywheel")]
struct Revoke {
    #[command(flatten)]
    file: FileInputs,

    /// The token's name, as `flywheel cache token list` shows it.
    #[arg(value_name = "TOKEN-NAME", value_parser = name())]
    id: String,
}

fn cache(text: &str) -> Result<CacheName, Invalid> {
    crate::inputs::cache_name(text).map_err(Invalid::from)
}

/// Runs the verb.
///
/// # Errors
/// For wrong input; when the file cannot be read or changed, or has no such token.
pub(super) fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let workflow = Workflow::new(env.in_github_actions());
    match inputs.task {
        Task::New(new) => {
            let file = new.file.open()?;
            let (token, listed) = file.add(new.scope, new.cache, new.expires)?;
            // In a job, later steps would show it.
            workflow.mask(&token);
            workflow.log(&format!(
                "token {}; it is shown only this once",
                about(&listed)
            ));
            shell_data(token.expose());
        }
        Task::List(list) => {
            for token in list.file.open()?.list()? {
                data(&about(&token));
            }
        }
        Task::Revoke(revoke) => {
            let token = revoke.file.open()?.revoke(&revoke.id)?;
            workflow.log(&format!("revoked {}", about(&token)));
        }
    }
    Ok(Exit::Ok)
}

fn about(token: &ListedToken) -> String {
    let cache = match &token.cache {
        Some(cache) => format!("cache {cache}"),
        None => "all caches".to_owned(),
    };
    let end = match (&token.expires, token.has_ended) {
        (None, _) => "no end".to_owned(),
        (Some(time), true) => format!("ended {time}"),
        (Some(time), false) => format!("until {time}"),
    };
    let plain = if token.is_plain {
        ", in the file as it is"
    } else {
        ""
    };
    format!(
        "{}  {}  {cache}  {end}{plain}",
        token.id,
        token.scope.as_str()
    )
}
