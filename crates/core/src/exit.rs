//! Exit codes, and the trait by which an error gives its exit code and a hint.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::Path;

use crate::secret::without_credentials;
use crate::text::one_line;

/// Characters of a problem that are shown.
const PROBLEM_LIMIT: usize = 2000;

/// The exit codes of Flywheel itself. `nix-job` otherwise ends with the command's own code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Ok,
    /// The task could not be done, or `require-publish` was not met.
    Failed,
    /// Bad input; nothing was touched. `EX_USAGE` of `sysexits.h`.
    Usage,
    /// The host lacks something that Flywheel cannot replace. `EX_UNAVAILABLE`.
    Host,
    /// A bug in Flywheel. `EX_SOFTWARE`.
    Bug,
    /// The exit code of the user's command.
    Command(u8),
}

impl Exit {
    /// Every exit code of Flywheel's own, with its meaning.
    pub const OWN: [(Self, &str); 6] = [
        (Self::Ok, "Everything was done that the call was for."),
        (
            Self::Failed,
            "It could not be done; or `require-publish` or another required condition was not met.",
        ),
        (
            Self::Usage,
            "An input is wrong. Nothing has been touched, and the message names the input.",
        ),
        (
            Self::Host,
            "The host lacks something that Flywheel cannot make up for.",
        ),
        (Self::Bug, "A fault of Flywheel's own: please report it."),
        (Self::Command(130), "A signal stopped the job."),
    ];

    /// What stands below that table.
    pub const OF_A_COMMAND: &'static str =
        "`nix-job` otherwise ends with the code of its command, whatever it is.";

    /// The process exit status, 0 to 255.
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Failed => 1,
            Self::Usage => 64,
            Self::Host => 69,
            Self::Bug => 70,
            Self::Command(code) => code,
        }
    }
}

/// An error with an exit code and a hint.
///
/// `Display` gives the problem as one lowercase fragment; the hint names the input or setting to change.
pub trait Explain: Error + Send + Sync + 'static {
    /// The exit code with which this error ends the program.
    fn exit(&self) -> Exit {
        Exit::Failed
    }

    /// What to do about the error, as a full sentence without `help:`.
    fn hint(&self) -> Option<String> {
        None
    }
}

/// How a verb fails: any error that can explain itself.
pub type Failure = Box<dyn Explain>;

impl<E: Explain> From<E> for Failure {
    fn from(error: E) -> Self {
        Box::new(error)
    }
}

/// Why a verb has not done its work. A [`UsageError`] is no [`Failure`], so what happens once the inputs are read cannot
/// end with the exit code of a wrong input.
#[derive(Debug)]
pub enum VerbError {
    /// An input is wrong.
    Usage(UsageError),
    Failure(Failure),
}

impl VerbError {
    /// The exit code of the program.
    pub fn exit(&self) -> Exit {
        match self {
            Self::Usage(_) => Exit::Usage,
            Self::Failure(failure) => failure.exit(),
        }
    }

    /// What to do, as a full sentence without `help:`.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Usage(error) => error.hint.clone(),
            Self::Failure(failure) => failure.hint(),
        }
    }

    /// The error and its causes.
    pub fn as_error(&self) -> &(dyn Error + 'static) {
        match self {
            Self::Usage(error) => error,
            Self::Failure(failure) => &**failure,
        }
    }
}

impl fmt::Display for VerbError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.as_error(), f)
    }
}

impl From<UsageError> for VerbError {
    fn from(error: UsageError) -> Self {
        Self::Usage(error)
    }
}

impl From<Failure> for VerbError {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

impl<E: Explain> From<E> for VerbError {
    fn from(error: E) -> Self {
        Self::Failure(error.into())
    }
}

/// The file or folder that an input names cannot be used, and not because of its name: its disk is full or broken, or
/// the system has no more files to open.
#[derive(Debug)]
struct NamedFileError {
    /// The input, the name, and what failed.
    problem: String,
    source: io::Error,
}

impl fmt::Display for NamedFileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)
    }
}

impl Error for NamedFileError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&self.source)
    }
}

impl Explain for NamedFileError {
    fn exit(&self) -> Exit {
        Exit::Host
    }

    fn hint(&self) -> Option<String> {
        Some("The input is not at fault: look at the disk that the file lies on.".into())
    }
}

/// The error for a file or folder that `input` names. `failed` says what could not be done, such as "be read". Whether
/// the input is to blame depends on the cause.
pub fn named_file_error(
    input: &str,
    file: &Path,
    failed: &str,
    source: impl Into<io::Error>,
    hint: &str,
) -> VerbError {
    let source = source.into();
    let file = one_line(&file.to_string_lossy(), 200);
    let problem = format!("names `{file}`, which cannot {failed}");
    if is_about_the_name(&source) {
        return UsageError::new(input, format!("{problem} ({source})"))
            .with_hint(hint)
            .into();
    }
    let problem = format!("input `{input}` {problem}");
    NamedFileError { problem, source }.into()
}

/// Whether another name would have helped. Whatever is not known to be about the name is the host's fault.
fn is_about_the_name(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    // `ErrorKind::FilesystemLoop` is not stable.
    const ELOOP: i32 = 40;
    let by_name = matches!(
        error.kind(),
        Kind::NotFound
            | Kind::PermissionDenied
            | Kind::AlreadyExists
            | Kind::NotADirectory
            | Kind::IsADirectory
            | Kind::InvalidFilename
            | Kind::InvalidInput
            | Kind::InvalidData
            | Kind::ReadOnlyFilesystem
    );
    by_name || error.raw_os_error() == Some(ELOOP)
}

/// Bad input, found before anything was touched.
#[derive(Debug)]
pub struct UsageError {
    input: String,
    problem: String,
    hint: Option<String>,
}

impl UsageError {
    /// `input` is the name as the user wrote it (`attic-server`), `problem` a fragment such as
    /// "must be an http or https URL, not `foo`". What it quotes may be anything: credentials in a
    /// URL are taken out, and it becomes one line of a bounded length.
    pub fn new(input: impl Into<String>, problem: impl AsRef<str>) -> Self {
        Self {
            input: input.into(),
            problem: one_line(&without_credentials(problem.as_ref()), PROBLEM_LIMIT),
            hint: None,
        }
    }

    /// What is wrong, without the input's name; and the hint.
    pub fn into_parts(self) -> (String, Option<String>) {
        (self.problem, self.hint)
    }

    /// Adds a hint: a sentence about what to do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "input `{}` {}", self.input, self.problem)
    }
}

impl Error for UsageError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_not_an_inputs_fault() {
        let of = |error: io::Error| {
            let ended = named_file_error("report-file", Path::new("/r"), "be written", error, "h");
            (ended.exit(), ended.to_string())
        };
        // ENOSPC, EIO, EMFILE, EDQUOT.
        for code in [28, 5, 24, 122] {
            let (exit, text) = of(io::Error::from_raw_os_error(code));
            assert_eq!(exit, Exit::Host, "{text}");
            assert_eq!(
                text,
                "input `report-file` names `/r`, which cannot be written"
            );
        }
        // ENOENT, EACCES, EISDIR, ENAMETOOLONG, ELOOP.
        for code in [2, 13, 21, 36, 40] {
            assert_eq!(of(io::Error::from_raw_os_error(code)).0, Exit::Usage);
        }
    }
}
