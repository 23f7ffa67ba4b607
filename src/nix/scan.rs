//! Looks into a store path, file by file as its NAR is read, for what must not leave: secrets of this job, what has
//! the shape of one, places of this machine, and store paths that are mentioned. Reports where, never what. Looks
//! into no compressed file.

mod matcher;
mod needles;
mod shapes;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Serialize;

pub use self::needles::{is_secret_name, is_secret_value};

use self::matcher::Matcher;
use self::needles::{Needle, What, of_place, of_secret};
use self::shapes::{LOOKAHEAD, Shape};
use crate::nix::hash::Sha256;
use crate::nix::nar::{DumpError, Observe, read_observed, write_observed};
use crate::nix::store_path::PathHash;
use crate::policy::Rule;
use crate::secret::Secret;
use crate::text::one_line;

/// Bytes that are looked through at once: they stay in the second-level cache for every group of needles.
const BLOCK: usize = 128 * 1024;
/// Bytes kept in front of a block, to see what stands before a find.
const LOOKBACK: usize = 8;
/// So many finds of one path say enough.
const FINDS: usize = 20;
/// So many mentioned store paths are remembered of one path.
const MENTIONS: usize = 10_000;
/// Where store paths begin.
const STORE: &[u8] = b"/nix/store/";
/// Nix builds here without a sandbox, in a folder named after the derivation.
const SCRATCH: &[u8] = b"/nix-build-";
/// Folders and files of these names hold what tests and documentation need; a key in them opens nothing.
const FOR_SHOW: [&str; 18] = [
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

/// Something that must not leave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Finding {
    /// The rule that it breaks, by its word.
    #[serde(serialize_with = "by_word")]
    pub rule: Rule,
    /// The file inside the path; empty if the path is a file itself.
    pub file: String,
    /// Bytes from the file's beginning; of a name or a link's target, from its beginning.
    pub offset: u64,
    /// What it is, never the thing itself.
    pub what: String,
}

fn by_word<S: serde::Serializer>(rule: &Rule, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(rule.word())
}

impl Finding {
    /// One that is at no place in a file: the job, or what the store knows of the path, breaks the rule.
    pub fn of_job(rule: Rule, what: String) -> Self {
        Self {
            rule,
            file: String::new(),
            offset: 0,
            what,
        }
    }

    fn has_place(&self) -> bool {
        let everywhere = matches!(self.rule, Rule::Impure | Rule::Unchecked);
        !everywhere && !self.what.starts_with("it refers to")
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
        if !self.has_place() {
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

/// What a look into a path came to.
#[derive(Clone, Debug, Default)]
pub struct Looked {
    /// What must not leave, in the NAR's order; no more than twenty.
    pub findings: Vec<Finding>,
    /// Hashes of the store paths that it mentions, and where it does so first: file and offset.
    pub mentions: BTreeMap<PathHash, (String, u64)>,
    /// Bytes of files that were looked through.
    pub bytes: u64,
}

/// Looks into paths. Made once a job; shared by all that look.
pub struct Scanner {
    matcher: Matcher,
    looked_for: Vec<LookedFor>,
    /// Every form of every secret, to be kept out of what is said.
    values: Vec<Vec<u8>>,
    /// The places, the longest first: one may begin with another.
    places: Vec<(Vec<u8>, String)>,
    now: u64,
}

#[derive(Clone)]
enum LookedFor {
    Needle(What),
    Shape(Shape),
    StorePath,
    Scratch,
}

impl fmt::Debug for Scanner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scanner({} needles)", self.looked_for.len())
    }
}

impl Scanner {
    /// One that looks for these secrets, by the names of their variables, and these places, by what they are;
    /// and for all that has the shape of a secret.
    pub fn new(secrets: &[(String, Secret)], places: &[(&str, &Path)]) -> Self {
        let mut needles: Vec<Needle> = secrets
            .iter()
            .flat_map(|(name, secret)| of_secret(name, secret))
            .collect();
        let values = needles.iter().map(|needle| needle.bytes.clone()).collect();
        let mut sole: Vec<Needle> = places
            .iter()
            .filter_map(|(what, folder)| of_place(what, folder))
            .collect();
        sole.sort_by_key(|needle| std::cmp::Reverse(needle.bytes.len()));
        let places = sole.iter().filter_map(|needle| match &needle.what {
            What::Place(what) => Some((needle.bytes.clone(), what.clone())),
            What::Value { .. } => None,
        });
        let places = places.collect();
        needles.extend(sole);
        let mut bytes: Vec<Vec<u8>> = needles.iter().map(|needle| needle.bytes.clone()).collect();
        let mut looked_for: Vec<LookedFor> = needles
            .into_iter()
            .map(|needle| LookedFor::Needle(needle.what))
            .collect();
        for (beginning, shape) in Shape::BEGINNINGS {
            bytes.push(beginning.as_bytes().to_vec());
            looked_for.push(LookedFor::Shape(shape));
        }
        for (beginning, what) in [(STORE, LookedFor::StorePath), (SCRATCH, LookedFor::Scratch)] {
            bytes.push(beginning.to_vec());
            looked_for.push(what);
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        Self {
            matcher: Matcher::new(&bytes),
            looked_for,
            values,
            places,
            now,
        }
    }

    /// How many different byte strings it looks for.
    pub fn needles(&self) -> usize {
        self.looked_for.len()
    }

    /// Looks into a path on disk. Blocks.
    ///
    /// # Errors
    /// When it cannot be read whole.
    pub fn look_into(&self, path: &Path) -> Result<Looked, DumpError> {
        let mut look = self.begin();
        match write_observed(path, &mut io::sink(), &mut look) {
            // Enough was found.
            Err(DumpError::Sink(_)) => Ok(look.looked),
            Err(error) => Err(error),
            Ok(()) => Ok(look.looked),
        }
    }

    /// The same of a small path, whose NAR comes back with it unless enough was found before its end. What is sent
    /// then is what was looked at. `hash` and `size` are the registered ones.
    ///
    /// # Errors
    /// When it cannot be read whole, or is not what was registered.
    pub fn look_and_read(
        &self,
        path: &Path,
        hash: Sha256,
        size: u64,
    ) -> Result<(Looked, Option<Bytes>), DumpError> {
        let mut look = self.begin();
        match read_observed(path, hash, size, &mut look) {
            Err(DumpError::Sink(_)) => Ok((look.looked, None)),
            Err(error) => Err(error),
            Ok(nar) => Ok((look.looked, Some(nar))),
        }
    }

    /// The longest place that stands here whole: `/home/me2` is not `/home/me`.
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

    /// A look that whoever reads a path feeds.
    pub fn begin(&self) -> Look<'_> {
        Look {
            scanner: self,
            looked: Looked::default(),
            file: Vec::new(),
            block: Vec::new(),
            base: 0,
            next: 0,
        }
    }
}

/// One look into one path, in flat memory whatever its size.
pub struct Look<'a> {
    scanner: &'a Scanner,
    looked: Looked,
    /// The names down to where we are.
    file: Vec<Vec<u8>>,
    /// The end of what was read, of which all before `next` has been looked through.
    block: Vec<u8>,
    /// Where in the file the block begins.
    base: u64,
    next: usize,
}

impl Look<'_> {
    /// Looks through what is in the block; `whole`: nothing follows.
    fn through(&mut self, whole: bool) -> io::Result<()> {
        let until = if whole {
            self.block.len()
        } else {
            self.block.len().saturating_sub(LOOKAHEAD)
        };
        if until > self.next {
            let block = std::mem::take(&mut self.block);
            let scanner = self.scanner;
            scanner
                .matcher
                .find(&block, self.next, until, |number, at| {
                    self.judge(number, &block, at);
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
        if self.looked.findings.len() >= FINDS {
            Err(io::Error::other("enough was found"))
        } else {
            Ok(())
        }
    }

    fn judge(&mut self, number: usize, block: &[u8], at: usize) {
        let looked_for = &self.scanner.looked_for[number];
        let (before, found) = (at.checked_sub(1).map(|at| block[at]), &block[at..]);
        let offset = self.base + at as u64;
        match looked_for {
            LookedFor::Needle(What::Value { name, form }) => {
                self.find(
                    Rule::Secret,
                    offset,
                    format!("the value of `{name}` {form}"),
                );
            }
            LookedFor::Needle(What::Place(_)) => {
                if let Some(what) = self.scanner.place(before, found) {
                    self.find(Rule::MachinePath, offset, format!("{what} of this machine"));
                }
            }
            LookedFor::Shape(shape) => {
                if let Some(what) = shape
                    .judge(before, found, self.scanner.now)
                    .filter(|_| !self.is_for_show())
                {
                    self.find(
                        Rule::Secret,
                        offset,
                        format!("what has the shape of {what}"),
                    );
                }
            }
            LookedFor::StorePath => {
                let hash = found
                    .get(STORE.len()..STORE.len() + 32)
                    .and_then(|hash| std::str::from_utf8(hash).ok());
                if found.get(STORE.len() + 32) == Some(&b'-')
                    && let Some(hash) = hash.and_then(|hash| PathHash::parse(hash).ok())
                    && self.looked.mentions.len() < MENTIONS
                    && !self.looked.mentions.contains_key(&hash)
                {
                    let file = self.shown();
                    self.looked.mentions.insert(hash, (file, offset));
                }
            }
            LookedFor::Scratch => {
                if is_scratch(&found[SCRATCH.len()..]) {
                    self.find(
                        Rule::MachinePath,
                        offset,
                        "the folder that it was built in".to_owned(),
                    );
                }
            }
        }
    }

    fn find(&mut self, rule: Rule, offset: u64, what: String) {
        let finding = Finding {
            rule,
            file: self.shown(),
            offset,
            what,
        };
        if self.looked.findings.len() < FINDS && !self.looked.findings.contains(&finding) {
            self.looked.findings.push(finding);
        }
    }

    /// The file inside the path. A name may hold a secret, and nothing that is said may.
    fn shown(&self) -> String {
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

    /// Whether the file is among what tests and documentation hold.
    fn is_for_show(&self) -> bool {
        let names = self
            .file
            .iter()
            .map(|name| String::from_utf8_lossy(name).to_ascii_lowercase());
        names.into_iter().any(|name| {
            name.split(|c: char| !c.is_ascii_alphanumeric())
                .any(|word| FOR_SHOW.contains(&word))
        })
    }

    fn short(&mut self, text: &[u8]) -> io::Result<()> {
        self.block.extend_from_slice(text);
        self.end()
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.len() >= part.len() && text.windows(part.len()).any(|window| window == part)
}

/// `name.drv-0` follows, which is how Nix names the folder of a build.
fn is_scratch(text: &[u8]) -> bool {
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

impl Observe for Look<'_> {
    fn enter(&mut self, name: &[u8]) -> io::Result<()> {
        self.file.push(name.to_vec());
        self.short(name)
    }

    fn leave(&mut self) {
        self.file.pop();
    }

    fn content(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.looked.bytes += bytes.len() as u64;
        self.block.extend_from_slice(bytes);
        if self.block.len() >= BLOCK {
            self.through(false)
        } else {
            Ok(())
        }
    }

    fn end(&mut self) -> io::Result<()> {
        self.through(true)?;
        self.base = 0;
        Ok(())
    }

    fn target(&mut self, target: &[u8]) -> io::Result<()> {
        self.short(target)
    }
}

#[cfg(test)]
mod tests;
