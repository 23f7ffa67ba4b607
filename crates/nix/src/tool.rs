//! The Nix that this job uses: its location, its version, and how our own short calls of it run.
//! Owns the environment of those calls, never that of the user's command.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use crate::error_message::ErrorMessage;
use flywheel_core::exit::{Exit, Explain};
use flywheel_core::text::one_line;
use flywheel_sys::process::capture::{CaptureError, Output, Tool};
use flywheel_sys::runner::env::{Env, split_path};

/// Folders where installers put Nix, searched after `PATH`. The one below the home folder comes
/// second.
pub const WELL_KNOWN: [&str; 4] = [
    "/nix/var/nix/profiles/default/bin",
    "/run/current-system/sw/bin",
    "/usr/bin",
    // Flywheel's own, which stays where `nix-env` has put something else into the default one.
    "/nix/var/nix/profiles/flywheel/bin",
];
/// The folder of a single-user installation, below the home folder.
const PROFILE_BIN: &str = ".nix-profile/bin";
/// Printing the version opens no store, so this is ample even on a loaded machine.
const VERSION_LIMIT: Duration = Duration::from_secs(20);
/// Characters of Nix's error message that an error of ours may quote.
const MESSAGE_LIMIT: usize = 400;
/// Our own calls need the new command line, which an installation may not have enabled.
pub(crate) const FEATURES: &str = "extra-experimental-features = nix-command flakes";

#[derive(Debug, Error)]
pub enum Error {
    /// It did not start or did not end in time.
    #[error("`{call}` did not run")]
    Run {
        /// The call, without its options' values.
        call: String,
        #[source]
        source: CaptureError,
    },
    /// It ended with an error.
    #[error("`{call}` failed: {message}")]
    Failed {
        /// The call, without its options' values.
        call: String,
        /// Nix's message, on one line.
        message: String,
    },
    /// Its output was not understood.
    #[error("`{call}` printed something unexpected: {problem}")]
    UnexpectedOutput {
        /// The call, without its options' values.
        call: String,
        problem: String,
    },
}

impl Explain for Error {
    fn exit(&self) -> Exit {
        Exit::Host
    }
}

/// The oldest Nix that nixpkgs lets itself be evaluated by: `lib/minver.nix` there.
const NIXPKGS_MINIMUM: (u32, u32) = (2, 18);
/// Since this version Nix reads local Git repositories with a library of its own (its release notes). Lix does not.
const OWN_GIT: (u32, u32) = (2, 20);

/// The distribution of Nix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    Nix,
    /// Determinate Systems' distribution; `/etc/nix/nix.conf` is its own, ours to extend is `nix.custom.conf`.
    Determinate,
    /// The fork.
    Lix,
}

/// A version of Nix, as parsed from `nix --version`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    pub(crate) flavour: Flavour,
    /// First number of the Nix version: 2.
    pub major: u32,
    /// Second number: 8 for 2.8.0.
    pub minor: u32,
    /// The line as it was printed, `nix (Nix) 2.8.0`.
    pub line: String,
}

impl Version {
    /// Parses `nix (Nix) 2.8.0`, `nix (Determinate Nix 3.6.2) 2.29.0` or `nix (Lix, like Nix)
    /// 2.91.1`.
    pub fn parse(text: &str) -> Option<Self> {
        let line = text.lines().find(|line| line.starts_with("nix"))?.trim();
        let (name, number) = line.strip_prefix("nix")?.trim().rsplit_once(' ')?;
        // Pre-releases have suffixes, such as `2.19.0pre20231002`.
        let mut numbers = number.split(|c: char| !c.is_ascii_digit());
        let flavour = match name {
            // The names of the forks contain "Nix" as well, so they are checked first.
            name if name.contains("Determinate") => Flavour::Determinate,
            name if name.contains("Lix") => Flavour::Lix,
            _ => Flavour::Nix,
        };
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        Some(Self {
            flavour,
            major,
            minor,
            line: one_line(line, 120),
        })
    }

    /// Whether this is at least that version of Nix. Lix forked from Nix 2.18 and counts from 2.90.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }
}

impl Version {
    /// The number alone, `2.8.0`.
    pub(crate) fn number(&self) -> &str {
        self.line.rsplit(' ').next().unwrap_or_default()
    }

    /// What is wrong with a version that nixpkgs refuses to be evaluated by, as a sentence.
    pub fn too_old(&self) -> Option<String> {
        let (major, minor) = NIXPKGS_MINIMUM;
        (!self.at_least(major, minor)).then(|| {
            format!("{self} is older than {major}.{minor}, and so cannot evaluate nixpkgs of today: update it, or remove it from this machine to have a newer one installed")
        })
    }

    /// The words of a call for facts about paths as JSON, in a format that `path_json` parses.
    pub fn path_info_as_json(&self) -> &'static [&'static str] {
        // From 2.33 on Nix warns where the format is not named, and announces that it will refuse that.
        if self.flavour != Flavour::Lix && self.at_least(2, 33) {
            &["path-info", "--json", "--json-format", "1"]
        } else {
            &["path-info", "--json"]
        }
    }

    /// Whether it needs the program `git` to read a flake in a Git checkout.
    pub fn needs_git(&self) -> bool {
        let (major, minor) = OWN_GIT;
        self.flavour == Flavour::Lix || !self.at_least(major, minor)
    }
}

/// The line as it was printed.
impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line)
    }
}

/// An installed Nix, with the environment for our calls of it.
#[derive(Clone)]
pub struct Nix {
    /// The program, absolute.
    pub program: PathBuf,
    pub version: Version,
    environment: BTreeMap<String, OsString>,
    config: String,
}

impl Nix {
    /// Runs the program to get its version. `env` is the job's environment; its `NIX_CONFIG`
    /// applies to our calls too.
    ///
    /// # Errors
    /// When the program does not run or is not a Nix.
    pub async fn detect(program: &Path, env: &Env) -> Result<Self, Error> {
        let unversioned = Self::unversioned(program, env);
        let call = || format!("{} --version", program.display());
        let tool = Tool::new(program)
            .envs(&unversioned.environment)
            .arg("--version");
        let output = tool.run(VERSION_LIMIT).await.map_err(|source| Error::Run {
            call: call(),
            source,
        })?;
        if !output.status.success() {
            return Err(Error::Failed {
                call: call(),
                message: error_summary(&output.stderr),
            });
        }
        let text = output.text();
        let version = Version::parse(&text).ok_or_else(|| Error::UnexpectedOutput {
            call: call(),
            problem: format!("`{}`", one_line(&text, 120)),
        })?;
        Ok(Self {
            version,
            ..unversioned
        })
    }

    /// A Nix of unknown version, treated as the oldest: only for calls that all versions
    /// understand.
    pub(super) fn unversioned(program: &Path, env: &Env) -> Self {
        let version = Version {
            flavour: Flavour::Nix,
            major: 0,
            minor: 0,
            line: String::new(),
        };
        let config = env.get("NIX_CONFIG").unwrap_or_default().to_owned();
        Self {
            program: program.to_owned(),
            version,
            environment: environment(env),
            config,
        }
    }

    /// The folder of the program, for a command's `PATH`.
    pub fn folder(&self) -> &Path {
        self.program
            .parent()
            .expect("the program's path is absolute")
    }

    /// The same Nix with another `NIX_CONFIG`.
    #[must_use]
    pub fn with_config(mut self, config: &str) -> Self {
        config.clone_into(&mut self.config);
        self
    }

    /// The same Nix with one variable set, or removed.
    #[must_use]
    pub fn with_variable(mut self, name: &str, value: Option<&str>) -> Self {
        match value {
            Some(value) => self.environment.insert(name.to_owned(), value.into()),
            None => self.environment.remove(name),
        };
        self
    }

    /// The `NIX_CONFIG` of its calls.
    pub fn config(&self) -> &str {
        &self.config
    }

    /// A variable in the environment of its calls; `None` if unset or empty.
    pub fn variable(&self, name: &str) -> Option<&str> {
        self.environment
            .get(name)?
            .to_str()
            .filter(|value| !value.is_empty())
    }

    /// The environment for a call, including `NIX_CONFIG` with the new command line enabled.
    pub fn variables(&self) -> BTreeMap<String, OsString> {
        let mut all = self.environment.clone();
        all.insert(
            "NIX_CONFIG".to_owned(),
            format!("{}\n{FEATURES}\n", self.config.trim_end()).into(),
        );
        all
    }

    /// A call of `nix` to which arguments can be added.
    pub fn tool(&self) -> Tool {
        Tool::new(&self.program).envs(self.variables())
    }

    /// Runs `nix` with these arguments (never a secret) and returns its output, whether it
    /// succeeded or not.
    ///
    /// # Errors
    /// When it cannot be started or does not end within `limit`.
    pub async fn run(&self, arguments: &[&str], limit: Duration) -> Result<Output, Error> {
        let ran = self.tool().args(arguments).run(limit).await;
        ran.map_err(|source| Error::Run {
            call: display_call(arguments),
            source,
        })
    }

    /// Opens a store: runs `nix store ping` with `more` arguments, or what newer versions call it.
    ///
    /// # Errors
    /// As `run`.
    pub async fn ping_store(&self, more: &[&str], limit: Duration) -> Result<Output, Error> {
        let call = async |name| self.run(&[&["store", name], more].concat(), limit).await;
        let output = call("ping").await?;
        // Since 2.19 the old name is a deprecated alias of `info`, which older versions and Lix do not know. The version
        // is not always known yet.
        if !output.status.success() && output.stderr.contains("is not a recognised command") {
            return call("info").await;
        }
        Ok(output)
    }

    /// Like `run`, but a non-zero exit code is an error that carries Nix's message.
    ///
    /// # Errors
    /// When it does not succeed within `limit`.
    pub(crate) async fn run_checked(
        &self,
        arguments: &[&str],
        limit: Duration,
    ) -> Result<Output, Error> {
        let output = self.run(arguments, limit).await?;
        if output.status.success() {
            return Ok(output);
        }
        Err(Error::Failed {
            call: display_call(arguments),
            message: error_summary(&output.stderr),
        })
    }
}

/// Prints no environment and no configuration, since values may be secrets.
impl fmt::Debug for Nix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nix({}, {})", self.program.display(), self.version)
    }
}

/// The program `nix` and where it was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundProgram {
    /// The program, absolute.
    pub program: PathBuf,
    /// Whether it is on `PATH`, so that the user's command finds it too.
    pub on_path: bool,
}

/// Searches `PATH`, then `~/.nix-profile/bin` and `places`.
pub fn find(env: &Env, places: &[PathBuf]) -> Option<FoundProgram> {
    // The user's command would find this one, so it takes precedence.
    if let Some(program) = on_path(env, "nix") {
        return Some(FoundProgram {
            program,
            on_path: true,
        });
    }
    let profile_bin = env.path("HOME").map(|home| home.join(PROFILE_BIN));
    // The order of installers: system-wide, then the user's profile, then the rest.
    let folders = places
        .iter()
        .take(1)
        .chain(profile_bin.as_ref())
        .chain(places.iter().skip(1));
    folders
        .map(|folder| folder.join("nix"))
        .find(|file| is_executable(file) && !is_of_another_user(file))
        .map(|program| FoundProgram {
            program,
            on_path: false,
        })
}

/// Finds a program on the job's `PATH` and returns its absolute path. Relative entries are skipped,
/// because they depend on the current folder.
pub fn on_path(env: &Env, name: &str) -> Option<PathBuf> {
    let path = env.path("PATH")?;
    let found = split_path(path.as_os_str())
        .into_iter()
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name));
    found.into_iter().find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    file.is_file() && rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
}

/// Whether an ordinary user other than this process's has the program, who could put anything in its place. Nobody has
/// named it, so that it would be run unseen.
fn is_of_another_user(file: &Path) -> bool {
    let Ok(found) = fs::metadata(file) else {
        return true;
    };
    let own = rustix::process::geteuid().as_raw();
    // In a user namespace, root's files can be those of an id that stands for all that have none there.
    let unmapped = fs::read_to_string("/proc/sys/kernel/overflowuid")
        .ok()
        .and_then(|id| id.trim().parse().ok());
    ![Some(0), Some(own), unmapped].contains(&Some(found.uid()))
}

/// The job's environment without the variables that Nix has no use for and could leak.
fn environment(env: &Env) -> BTreeMap<String, OsString> {
    let kept = env.all().filter(|(name, _)| !is_withheld(name));
    kept.map(|(name, value)| (name.to_owned(), value.clone()))
        .collect()
}

fn is_withheld(name: &str) -> bool {
    // Names that may hold credentials: inputs of actions, the runner's own tokens, and common
    // endings.
    const PREFIXES: [&str; 3] = ["FLYWHEEL_", "ACTIONS_", "INPUT_"];
    const ENDINGS: [&str; 4] = ["_TOKEN", "_PASSWORD", "_SECRET", "_KEY"];
    // Each call sets this one itself, from `config`.
    name == "NIX_CONFIG"
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// The call as shown in errors: the subcommand without options and paths.
fn display_call(arguments: &[&str]) -> String {
    let words = arguments
        .iter()
        .take_while(|word| !word.starts_with(['-', '/']));
    words.fold("nix".to_owned(), |call, word| format!("{call} {word}"))
}

/// Nix's error message on one line: the text after its `error:`, then the trace, without colours.
pub fn error_summary(stderr: &str) -> String {
    // This message of Nix quotes the whole line, which may hold an access token.
    if stderr.contains("configuration line") {
        return "NIX_CONFIG or nix.conf has a line that Nix cannot read".to_owned();
    }
    // The message may contain terminal colours.
    let error = ErrorMessage::parse(&strip_ansi(stderr)).to_string();
    let from = error
        .find("error:")
        .map_or(error.as_str(), |start| &error[start + "error:".len()..]);
    let words: Vec<&str> = from.split_whitespace().collect();
    // An empty message would leave the reader without any hint.
    if words.is_empty() {
        "it printed nothing".to_owned()
    } else {
        one_line(&words.join(" "), MESSAGE_LIMIT)
    }
}

/// Removes terminal colours (`ESC [ … letter`).
pub(crate) fn strip_ansi(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        // An escape sequence ends with its first letter.
        if character == '\u{1b}' && characters.next_if_eq(&'[').is_some() {
            while characters.next_if(|c| !c.is_ascii_alphabetic()).is_some() {}
            characters.next();
        } else {
            plain.push(character);
        }
    }
    plain
}

#[cfg(test)]
mod tests;
