//! Searches a store path, file by file as its NAR is read, for what must not be published: the
//! job's secrets, anything shaped like a secret, paths of this machine, and mentioned store paths.
//! Reports where something was found, never its value. Does not look into compressed files.

mod matcher;
mod needles;
mod secret_formats;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fmt, io};

use bytes::Bytes;
use serde::Serialize;

pub use self::needles::{is_secret_name, is_secret_value};

use self::matcher::Matcher;
use self::needles::{Needle, NeedleKind, needle_for_place, needles_for_secret};
use self::secret_formats::{LOOKAHEAD, SecretFormat};
use crate::hash::Sha256;
use crate::nar::{DumpError, NarVisitor, read_visited, write_visited};
use crate::store_path::PathHash;
use flywheel_core::policy::Rule;
use flywheel_core::secret::Secret;
use flywheel_core::text::one_line;

/// Bytes to search at once. A block stays in the second-level cache for every group of needles.
const BLOCK_SIZE: usize = 128 * 1024;
/// Bytes kept in front of a block, for judging what precedes a match.
const LOOKBACK: usize = 8;
/// Findings reported per path; more add nothing.
const MAX_FINDINGS: usize = 20;
/// Mentioned store paths remembered per path.
const MAX_MENTIONS: usize = 10_000;
/// The prefix of every store path.
const STORE_PREFIX: &[u8] = b"/nix/store/";
/// The prefix of build folders without a sandbox; the derivation's name follows.
const BUILD_FOLDER: &[u8] = b"/nix-build-";
/// Names of files and folders for tests and documentation. Keys in them are examples that open
/// nothing.
const EXAMPLE_NAMES: [&str; 18] = [
    "test",
    "tests",
    "testing",
    "testdata",
    "testsuite",
    "unittest",
    "fixture",
    "fixtures",
    "example",
    "examples",
    "sample",
    "samples",
    "demo",
    "demos",
    "doc",
    "docs",
    "mock",
    "mocks",
];

/// Something in a path that must not be published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Finding {
    /// The rule that it breaks, serialized by name.
    #[serde(serialize_with = "rule_name")]
    pub rule: Rule,
    /// The file inside the path; empty if the path is a file itself.
    pub file: String,
    /// Offset in bytes from the beginning of the file, or of the name or link target.
    pub offset: u64,
    /// A description, never the value itself.
    pub what: String,
}

fn rule_name<S: serde::Serializer>(rule: &Rule, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(rule.as_str())
}

impl Finding {
    /// A finding without a location in a file: the job itself, or the store's metadata of the path,
    /// breaks the rule.
    pub fn without_location(rule: Rule, what: String) -> Self {
        Self {
            rule,
            file: String::new(),
            offset: 0,
            what,
        }
    }

    fn has_location(&self) -> bool {
        self.rule.is_about_content() && !self.what.starts_with("it refers to")
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            rule,
            file,
            offset,
            what,
        } = self;
        if !self.has_location() {
            return write!(f, "{rule}: {what}");
        }
        let place = if file.is_empty() {
            "the file itself".to_owned()
        } else {
            format!("`{}`", one_line(file, 300))
        };
        write!(f, "{rule}: {what} in {place}, at byte {offset}")
    }
}

#[derive(Clone, Debug, Default)]
pub struct ScanResult {
    /// The findings, in the NAR's order, at most `MAX_FINDINGS`.
    pub findings: Vec<Finding>,
    /// Hashes of the mentioned store paths, each with the file and offset of its first mention.
    pub mentions: BTreeMap<PathHash, (String, u64)>,
    /// Bytes of file content that were searched.
    pub bytes: u64,
}

/// Scans paths. Built once per job and shared by all who scan.
pub struct Scanner {
    matcher: Matcher,
    patterns: Vec<Pattern>,
    /// Every form of every secret, to be redacted from file names in reports.
    values: Vec<Vec<u8>>,
    /// The machine's paths, the longest first, since one may be a prefix of another.
    places: Vec<(Vec<u8>, String)>,
    now: u64,
}

#[derive(Clone)]
enum Pattern {
    Needle(NeedleKind),
    SecretFormat(SecretFormat),
    StorePath,
    BuildFolder,
}

impl fmt::Debug for Scanner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scanner({} needles)", self.patterns.len())
    }
}

impl Scanner {
    /// Creates a scanner for these secrets (with the names of their variables), these paths of the
    /// machine (with their descriptions), and everything shaped like a secret.
    pub fn new(secrets: &[(String, Secret)], places: &[(&str, &Path)]) -> Self {
        let mut needles: Vec<Needle> = secrets
            .iter()
            .flat_map(|(name, secret)| needles_for_secret(name, secret))
            .collect();
        // Collected before the paths are added: only secrets are redacted.
        let values = needles.iter().map(|needle| needle.bytes.clone()).collect();
        let mut sole: Vec<Needle> = places
            .iter()
            .filter_map(|(what, folder)| needle_for_place(what, folder))
            .collect();
        // The longest path first: of two that match, the more specific one is reported.
        sole.sort_by_key(|needle| std::cmp::Reverse(needle.bytes.len()));
        let places = sole.iter().filter_map(|needle| match &needle.kind {
            NeedleKind::Place(what) => Some((needle.bytes.clone(), what.clone())),
            NeedleKind::Value { .. } => None,
        });
        let places = places.collect();
        needles.extend(sole);
        let mut bytes: Vec<Vec<u8>> = needles.iter().map(|needle| needle.bytes.clone()).collect();
        let mut patterns: Vec<Pattern> = needles
            .into_iter()
            .map(|needle| Pattern::Needle(needle.kind))
            .collect();
        for (beginning, format) in SecretFormat::PREFIXES {
            bytes.push(beginning.as_bytes().to_vec());
            patterns.push(Pattern::SecretFormat(format));
        }
        for (beginning, what) in [
            (STORE_PREFIX, Pattern::StorePath),
            (BUILD_FOLDER, Pattern::BuildFolder),
        ] {
            bytes.push(beginning.to_vec());
            patterns.push(what);
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        Self {
            matcher: Matcher::new(&bytes),
            patterns,
            values,
            places,
            now,
        }
    }

    /// The number of byte strings it searches for.
    pub fn needles(&self) -> usize {
        self.patterns.len()
    }

    /// Scans a path on disk. Blocking.
    ///
    /// # Errors
    /// When it cannot be read completely.
    pub fn scan(&self, path: &Path) -> Result<ScanResult, DumpError> {
        let mut scan = self.begin();
        match write_visited(path, &mut io::sink(), &mut scan) {
            // The scan stopped itself after enough findings.
            Err(DumpError::Sink(_)) => Ok(scan.result),
            Err(error) => Err(error),
            Ok(()) => Ok(scan.result),
        }
    }

    /// Scans a small path and returns its NAR as well, unless the scan stopped early. What is
    /// uploaded is then exactly what was scanned. `hash` and `size` are the registered ones.
    ///
    /// # Errors
    /// When it cannot be read completely, or is not what was registered.
    pub fn scan_and_read(
        &self,
        path: &Path,
        hash: Sha256,
        size: u64,
    ) -> Result<(ScanResult, Option<Bytes>), DumpError> {
        let mut scan = self.begin();
        match read_visited(path, hash, size, &mut scan) {
            Err(DumpError::Sink(_)) => Ok((scan.result, None)),
            Err(error) => Err(error),
            Ok(nar) => Ok((scan.result, Some(nar))),
        }
    }

    /// Returns the longest path that matches here as a whole: `/home/me2` is not `/home/me`.
    fn place(&self, before: Option<u8>, found: &[u8]) -> Option<&str> {
        let is_of_name = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
        let ends = |place: &[u8]| {
            found.starts_with(place) && !found.get(place.len()).is_some_and(is_of_name)
        };
        let begins = !before.as_ref().is_some_and(is_of_name);
        self.places
            .iter()
            .find(|(place, _)| begins && ends(place))
            .map(|(_, what)| what.as_str())
    }

    /// Starts a scan that the reader of a path feeds.
    pub fn begin(&self) -> PathScan<'_> {
        PathScan {
            scanner: self,
            result: ScanResult::default(),
            file: Vec::new(),
            block: Vec::new(),
            base: 0,
            next: 0,
        }
    }
}

/// One scan of one path, in constant memory.
pub struct PathScan<'a> {
    scanner: &'a Scanner,
    result: ScanResult,
    /// The path of the current file inside the store path.
    file: Vec<Vec<u8>>,
    /// The most recent bytes; everything before `next` has been searched.
    block: Vec<u8>,
    /// The block's offset in the file.
    base: u64,
    next: usize,
}

impl PathScan<'_> {
    /// Searches the block. `whole` is true when the file ends with it.
    fn search(&mut self, whole: bool) -> io::Result<()> {
        // A match that begins near the end of the block needs the bytes that follow it, so it waits
        // for the next block.
        let until = if whole {
            self.block.len()
        } else {
            self.block.len().saturating_sub(LOOKAHEAD)
        };
        if until > self.next {
            // The callback below borrows `self` mutably, so the block moves out for the search.
            let block = std::mem::take(&mut self.block);
            let scanner = self.scanner;
            scanner
                .matcher
                .find(&block, self.next, until, |number, at| {
                    self.on_match(number, &block, at);
                });
            self.block = block;
            self.next = until;
        }
        let done = if whole {
            self.block.len()
        } else {
            self.next.saturating_sub(LOOKBACK)
        };
        self.block.drain(..done);
        self.base += done as u64;
        self.next -= done;
        // An error makes the NAR reader stop.
        if self.result.findings.len() >= MAX_FINDINGS {
            Err(io::Error::other("enough was found"))
        } else {
            Ok(())
        }
    }

    fn on_match(&mut self, number: usize, block: &[u8], at: usize) {
        let patterns = &self.scanner.patterns[number];
        let (before, found) = (at.checked_sub(1).map(|at| block[at]), &block[at..]);
        let offset = self.base + at as u64;
        match patterns {
            Pattern::Needle(NeedleKind::Value { name, form }) => {
                self.report(
                    Rule::Secret,
                    offset,
                    format!("the value of `{name}` {form}"),
                );
            }
            Pattern::Needle(NeedleKind::Place(_)) => {
                // The longest path wins over the one that matched.
                if let Some(what) = self.scanner.place(before, found) {
                    self.report(Rule::MachinePath, offset, format!("{what} of this machine"));
                }
            }
            Pattern::SecretFormat(format) => {
                if let Some(what) = format
                    .identify(before, found, self.scanner.now)
                    // Only formats are excused in examples; a real secret of the job never is.
                    .filter(|_| !self.is_example_file())
                {
                    self.report(
                        Rule::Secret,
                        offset,
                        format!("something shaped like {what}"),
                    );
                }
            }
            Pattern::StorePath => {
                let hash = found
                    .get(STORE_PREFIX.len()..STORE_PREFIX.len() + 32)
                    .and_then(|hash| std::str::from_utf8(hash).ok());
                // Only the hash identifies a path; the dash shows that the hash is complete.
                if found.get(STORE_PREFIX.len() + 32) == Some(&b'-')
                    && let Some(hash) = hash.and_then(|hash| PathHash::parse(hash).ok())
                    && self.result.mentions.len() < MAX_MENTIONS
                    && !self.result.mentions.contains_key(&hash)
                {
                    let file = self.display_name();
                    self.result.mentions.insert(hash, (file, offset));
                }
            }
            Pattern::BuildFolder => {
                if is_build_folder(&found[BUILD_FOLDER.len()..]) {
                    self.report(
                        Rule::MachinePath,
                        offset,
                        "the folder that it was built in".to_owned(),
                    );
                }
            }
        }
    }

    fn report(&mut self, rule: Rule, offset: u64, what: String) {
        let finding = Finding {
            rule,
            file: self.display_name(),
            offset,
            what,
        };
        // Overlapping needles report the same finding more than once.
        if self.result.findings.len() < MAX_FINDINGS && !self.result.findings.contains(&finding) {
            self.result.findings.push(finding);
        }
    }

    /// The current file's name for reports. A part of it that contains a secret is replaced.
    fn display_name(&self) -> String {
        let is_secret = |name: &[u8]| {
            self.scanner
                .values
                .iter()
                .any(|value| contains(name, value))
        };
        let shown = |name: &Vec<u8>| {
            if is_secret(name) {
                "…".into()
            } else {
                String::from_utf8_lossy(name).into_owned()
            }
        };
        let names: Vec<String> = self.file.iter().map(shown).collect();
        names.join("/")
    }

    /// Whether the file belongs to tests or documentation.
    fn is_example_file(&self) -> bool {
        let names = self
            .file
            .iter()
            .map(|name| String::from_utf8_lossy(name).to_ascii_lowercase());
        // `test-keys` and `keys_test.go` count, `contest` does not.
        names.into_iter().any(|name| {
            name.split(|c: char| !c.is_ascii_alphanumeric())
                .any(|word| EXAMPLE_NAMES.contains(&word))
        })
    }

    fn whole_text(&mut self, text: &[u8]) -> io::Result<()> {
        self.block.extend_from_slice(text);
        self.end()
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.len() >= part.len() && text.windows(part.len()).any(|window| window == part)
}

/// Whether `name.drv-0` follows, as in the names of Nix's build folders.
fn is_build_folder(text: &[u8]) -> bool {
    let name = text
        .iter()
        .take(220)
        .position(|byte| !byte.is_ascii_graphic() || *byte == b'/')
        .unwrap_or(text.len().min(220));
    let name = &text[..name];
    name.windows(5).enumerate().any(|(at, part)| {
        at > 0 && part == b".drv-" && name.get(at + 5).is_some_and(u8::is_ascii_digit)
    })
}

impl NarVisitor for PathScan<'_> {
    fn enter(&mut self, name: &[u8]) -> io::Result<()> {
        // A file's name may contain a secret as well.
        self.file.push(name.to_vec());
        self.whole_text(name)
    }

    fn leave(&mut self) {
        self.file.pop();
    }

    fn content(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.result.bytes += bytes.len() as u64;
        self.block.extend_from_slice(bytes);
        // Small files are searched at their end, in one go.
        if self.block.len() >= BLOCK_SIZE {
            self.search(false)
        } else {
            Ok(())
        }
    }

    fn end(&mut self) -> io::Result<()> {
        self.search(true)?;
        // Offsets count from the beginning of each file.
        self.base = 0;
        Ok(())
    }

    fn target(&mut self, target: &[u8]) -> io::Result<()> {
        self.whole_text(target)
    }
}

#[cfg(test)]
mod tests;
