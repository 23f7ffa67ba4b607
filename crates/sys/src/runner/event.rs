//! The event payload: the file in which GitHub describes the event that started the workflow. It is read with distrust,
//! because any earlier step can write to it. Only the fields that the facts need are read, and nothing is guessed.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::path::Path;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use thiserror::Error;

use crate::untrusted_file::{self, FileError, Owner};

/// GitHub's own limit for a payload is 25 MB.
const SIZE_LIMIT: u64 = 25 * 1024 * 1024;

/// Why a payload could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(crate) enum PayloadError {
    /// The file does not exist, or may not be read.
    #[error("the file cannot be opened ({0})")]
    Open(io::ErrorKind),
    /// A folder, a pipe or a device.
    #[error("it is not a regular file")]
    NotAFile,
    /// Larger than any payload of GitHub's.
    #[error("it is larger than 25 MB")]
    TooLarge,
    #[error("it is not UTF-8")]
    NotUtf8,
    #[error("its JSON is cut short")]
    Truncated,
    #[error("it is not JSON (line {line}, column {column})")]
    NotJson {
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
    },
    /// JSON, but a field that is read has the wrong type or occurs twice.
    #[error("a field has the wrong type or stands there twice (line {line}, column {column})")]
    WrongShape {
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
    },
}

impl PayloadError {
    /// The same as an error of the file, where the file itself is at fault and not its content.
    pub(crate) fn of_the_file(&self) -> Option<io::Error> {
        match self {
            Self::Open(kind) => Some((*kind).into()),
            Self::NotAFile | Self::TooLarge => {
                Some(io::Error::new(io::ErrorKind::InvalidInput, self.clone()))
            }
            _ => None,
        }
    }
}

/// The fields of a payload that the facts need. A field that is `null` counts as absent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Payload {
    /// The ref of a `push`, `workflow_dispatch`, `create`, `delete`.
    pub(crate) git_ref: Option<String>,
    /// Whether a `push` removed its ref.
    pub(crate) deleted: Option<bool>,
    /// The commit (or tag object) that a `push` left its ref at; all zeros if it removed it.
    pub(crate) after: Option<String>,
    /// `owner/name` of the repository that the event belongs to.
    pub(crate) repository: Option<String>,
    /// That repository's default branch, without `refs/heads/`.
    pub(crate) default_branch: Option<String>,
    /// The merge queue's ref, in a `merge_group` event.
    pub(crate) queue_ref: Option<String>,
    /// The fields of `MARKS` that occur in the payload, `null` or not.
    pub(crate) marks: Vec<&'static str>,
}

/// Top-level fields that show which kind of event a payload belongs to. None of them occurs in the payload of a `push`,
/// `schedule` or `workflow_dispatch`.
const MARKS: [&str; 17] = [
    "action",
    "check_run",
    "check_suite",
    "client_payload",
    "comment",
    "deployment",
    "deployment_status",
    "discussion",
    "forkee",
    "issue",
    "merge_group",
    "pull_request",
    "ref_type",
    "release",
    "review",
    "workflow_job",
    "workflow_run",
];

/// The other top-level fields that are read.
const FIELDS: [&str; 4] = ["ref", "deleted", "after", "repository"];

/// Reads the payload in `file`.
///
/// # Errors
/// When it is not a regular file, is too large, or holds anything but a payload. Never panics, whatever it holds.
pub(crate) fn read(file: &Path) -> Result<Payload, PayloadError> {
    parse(&read_bounded(file)?)
}

/// The bytes of the payload in `file`.
///
/// # Errors
/// When it is not a regular file, or is too large.
pub(crate) fn read_bounded(file: &Path) -> Result<Vec<u8>, PayloadError> {
    untrusted_file::read(file, Owner::Any, SIZE_LIMIT).map_err(|error| match error {
        FileError::TooLarge { .. } => PayloadError::TooLarge,
        FileError::System(error) => PayloadError::Open(error.kind()),
        FileError::Kind(_) | FileError::NoFolder | FileError::Owner(_) | FileError::Shared(_) => {
            PayloadError::NotAFile
        }
    })
}

fn parse(bytes: &[u8]) -> Result<Payload, PayloadError> {
    // Checked first, because serde_json does not validate strings that it skips.
    let text = std::str::from_utf8(bytes).map_err(|_| PayloadError::NotUtf8)?;
    serde_json::from_str(text).map_err(|error| {
        use serde_json::error::Category;
        // Line and column only: the error's own message quotes the file, which any step may have written.
        let (line, column) = (error.line(), error.column());
        match error.classify() {
            Category::Eof => PayloadError::Truncated,
            Category::Syntax | Category::Io => PayloadError::NotJson { line, column },
            Category::Data => PayloadError::WrongShape { line, column },
        }
    })
}

/// Written by hand: a derived implementation would accept an array in place of an object, and ignore a mark that occurs
/// twice.
impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TopLevel;
        impl<'de> Visitor<'de> for TopLevel {
            type Value = Payload;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Payload, A::Error> {
                let mut payload = Payload::default();
                let mut seen: Vec<&str> = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    let Some(field) = FIELDS.iter().chain(&MARKS).find(|field| **field == key)
                    else {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    };
                    // Parsers disagree about which duplicate counts, so none is accepted.
                    if seen.contains(field) {
                        return Err(serde::de::Error::duplicate_field(field));
                    }
                    seen.push(field);
                    payload.take(field, &mut map)?;
                }
                Ok(payload)
            }
        }
        deserializer.deserialize_map(TopLevel)
    }
}

impl Payload {
    fn take<'de, A: MapAccess<'de>>(
        &mut self,
        field: &'static str,
        map: &mut A,
    ) -> Result<(), A::Error> {
        // A mark counts even when its value is `null`: other events do not have the field at all.
        if MARKS.contains(&field) {
            self.marks.push(field);
        }
        match field {
            "ref" => self.git_ref = map.next_value()?,
            "deleted" => self.deleted = map.next_value()?,
            "after" => self.after = map.next_value()?,
            "repository" => {
                let repository: Option<Object<Repository>> = map.next_value()?;
                let repository = repository.map(|object| object.0).unwrap_or_default();
                (self.repository, self.default_branch) =
                    (repository.full_name, repository.default_branch);
            }
            "merge_group" => {
                let group: Option<Object<MergeGroup>> = map.next_value()?;
                self.queue_ref = group.and_then(|object| object.0.head_ref);
            }
            _ => {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

#[derive(Default, serde::Deserialize)]
struct Repository {
    full_name: Option<String>,
    default_branch: Option<String>,
}

#[derive(serde::Deserialize)]
struct MergeGroup {
    head_ref: Option<String>,
}

/// Deserializes from an object only. A derived struct would also accept an array.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Only<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Only<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(Only(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str, expected: &Result<Payload, PayloadError>) {
        assert_eq!(
            parse(json.as_bytes()),
            *expected,
            "{}",
            flywheel_core::text::shorten(json, 100)
        );
    }

    fn wrong(json: &str) {
        let read = parse(json.as_bytes());
        assert!(
            matches!(read, Err(PayloadError::WrongShape { .. })),
            "{json} gave {read:?}"
        );
    }

    #[test]
    fn a_push_gives_its_fields_and_nothing_else() {
        check(
            r#"{"ref":"refs/heads/main","deleted":false,"after":"ab","commits":[{}],
                "repository":{"full_name":"o/r","default_branch":"main","id":7}}"#,
            &Ok(Payload {
                git_ref: Some("refs/heads/main".into()),
                deleted: Some(false),
                after: Some("ab".into()),
                repository: Some("o/r".into()),
                default_branch: Some("main".into()),
                ..Payload::default()
            }),
        );
        check(r#"{"repository":null,"ref":null}"#, &Ok(Payload::default()));
    }

    #[test]
    fn a_mark_counts_even_if_it_is_null() {
        check(
            r#"{"pull_request":null}"#,
            &Ok(Payload {
                marks: vec!["pull_request"],
                ..Payload::default()
            }),
        );
    }

    #[test]
    fn wrong_types_are_refused_and_not_bent() {
        for json in [
            "[]",
            r#"["refs/heads/main",false]"#,
            "7",
            "\"text\"",
            "null",
            r#"{"repository":[]}"#,
            r#"{"repository":["o/r","main"]}"#,
            r#"{"repository":"o/r"}"#,
            r#"{"repository":{"full_name":["o/r"]}}"#,
            r#"{"repository":{"default_branch":{"a":1}}}"#,
            r#"{"ref":5}"#,
            r#"{"deleted":"false"}"#,
            r#"{"deleted":0}"#,
            r#"{"after":0}"#,
            r#"{"merge_group":["refs/heads/x"]}"#,
        ] {
            wrong(json);
        }
    }

    #[test]
    fn a_field_that_occurs_twice_is_refused() {
        wrong(r#"{"ref":"refs/heads/x","ref":"refs/heads/main"}"#);
        wrong(r#"{"ref":"refs/heads/x","\u0072ef":"refs/heads/main"}"#);
        wrong(r#"{"repository":{},"repository":{}}"#);
        wrong(r#"{"repository":{"full_name":"a/b","full_name":"o/r"}}"#);
        wrong(r#"{"pull_request":1,"pull_request":2}"#);
    }

    #[test]
    fn a_payload_cut_anywhere_is_unreadable() {
        let whole =
            r#"{"ref":"refs/heads/main","repository":{"full_name":"o/ü","default_branch":"main"}}"#;
        assert!(parse(whole.as_bytes()).is_ok());
        for end in 0..whole.len() {
            assert!(parse(&whole.as_bytes()[..end]).is_err(), "cut at {end}");
        }
        check("", &Err(PayloadError::Truncated));
    }

    #[test]
    fn hostile_text_is_unreadable() {
        let not_json = |text: &[u8]| {
            let read = parse(text);
            assert!(
                matches!(read, Err(PayloadError::NotJson { .. })),
                "{read:?}"
            );
        };
        not_json(b"{} {}");
        not_json("\u{feff}{}".as_bytes());
        not_json(br#"{"ref":"\ud800"}"#);
        not_json(br#"{"ref":"\ud800x"}"#);
        assert_eq!(parse(b"{\"x\":\"\xff\"}"), Err(PayloadError::NotUtf8));
    }

    #[test]
    fn a_nesting_bomb_does_no_harm() {
        let deep = 1_000_000;
        for key in ["commits", "ref", "repository", "pull_request"] {
            let bomb = format!("{{\"{key}\":{}{}}}", "[".repeat(deep), "]".repeat(deep));
            // A field that is not read is skipped without recursion; a field that is read has the wrong type.
            assert_eq!(
                parse(bomb.as_bytes()).is_ok(),
                matches!(key, "commits" | "pull_request"),
                "{key}"
            );
        }
    }

    #[test]
    fn only_a_regular_file_of_a_sane_size_is_read() {
        let folder = tempfile::tempdir().expect("temporary folder");
        assert!(matches!(
            read(&folder.path().join("none")),
            Err(PayloadError::Open(_))
        ));
        assert_eq!(read(folder.path()), Err(PayloadError::NotAFile));
        assert_eq!(read(Path::new("/dev/zero")), Err(PayloadError::NotAFile));
        let large = folder.path().join("large");
        std::fs::File::create(&large)
            .and_then(|file| file.set_len(SIZE_LIMIT + 1))
            .expect("sparse file");
        assert_eq!(read(&large), Err(PayloadError::TooLarge));
    }
}
