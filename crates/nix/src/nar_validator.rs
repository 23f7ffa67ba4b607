//! Checks that bytes which come piece by piece are a NAR that Nix can restore. Pure, and in bounded memory whatever the
//! bytes announce. Does not hash.

use thiserror::Error;

/// Longest name and longest keyword, in bytes. Linux allows 255, macOS 255 characters.
const NAME_LIMIT: u64 = 1024;
/// Longest target of a symbolic link, in bytes: what the system calls take.
const TARGET_LIMIT: u64 = 4096;
/// Deepest nesting of folders; a path of the system calls holds no more.
const DEPTH_LIMIT: usize = 2048;
const MAGIC: &[u8] = b"nix-archive-1";

/// Why bytes are not a NAR.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{problem} at byte {offset}")]
pub struct NarError {
    problem: &'static str,
    /// Offset of the item that is wrong.
    offset: u64,
}

/// What the root of a NAR is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    File { executable: bool },
    Symlink,
    Folder,
}

/// What a NAR holds, in the order in which it comes. A name is checked before it is passed on, and comes before the node
/// that has it; the root has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    Name(&'a [u8]),
    Folder,
    FolderEnd,
    /// `size` is what the NAR announces, in bytes.
    File {
        executable: bool,
        size: u64,
    },
    Contents(&'a [u8]),
    FileEnd,
    /// The target of a symbolic link.
    Symlink(&'a [u8]),
}

/// The item that has to come next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Magic,
    NodeBegin,
    TypeTag,
    Type,
    ContentsOrExecutable,
    ExecutableValue,
    ContentsTag,
    Contents,
    TargetTag,
    Target,
    NodeEnd,
    EntryOrEnd,
    EntryBegin,
    NameTag,
    Name,
    NodeTag,
    EntryEnd,
    /// The NAR is complete.
    Nothing,
}

/// The part of an item that is being read.
#[derive(Debug)]
enum Part {
    /// The eight bytes before each item.
    Length {
        bytes: [u8; 8],
        got: usize,
    },
    Text {
        left: u64,
        padding: u8,
    },
    Contents {
        left: u64,
        padding: u8,
    },
    Padding {
        left: u8,
    },
}

const LENGTH: Part = Part::Length {
    bytes: [0; 8],
    got: 0,
};

/// Reads a NAR piece by piece.
#[derive(Debug)]
pub struct NarValidator {
    expected: Expected,
    part: Part,
    text: Vec<u8>,
    /// The last name in each open folder.
    folders: Vec<Vec<u8>>,
    root: Option<Root>,
    /// Whether the current file is executable.
    executable: bool,
    /// Offset of the current item.
    offset: u64,
    /// Bytes read.
    read: u64,
}

impl Default for NarValidator {
    fn default() -> Self {
        Self {
            expected: Expected::Magic,
            part: LENGTH,
            text: Vec::new(),
            folders: Vec::new(),
            root: None,
            executable: false,
            offset: 0,
            read: 0,
        }
    }
}

impl NarValidator {
    /// Checks a whole NAR.
    ///
    /// # Errors
    /// When it is none.
    pub fn check(nar: &[u8]) -> Result<(), NarError> {
        let mut validator = Self::default();
        validator.take(nar)?;
        validator.finish().map(|_| ())
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// When they cannot belong to a NAR.
    pub fn take(&mut self, bytes: &[u8]) -> Result<(), NarError> {
        self.take_with(bytes, |_| ())
    }

    /// As `take`, and passes on the contents of all files.
    ///
    /// # Errors
    /// As `take`.
    pub fn take_with(
        &mut self,
        bytes: &[u8],
        mut contents: impl FnMut(&[u8]),
    ) -> Result<(), NarError> {
        self.take_events(bytes, |event| {
            if let Event::Contents(bytes) = event {
                contents(bytes);
            }
        })
    }

    /// As `take`, and passes on all that the NAR holds.
    ///
    /// # Errors
    /// As `take`.
    pub fn take_events(
        &mut self,
        mut bytes: &[u8],
        mut events: impl FnMut(Event<'_>),
    ) -> Result<(), NarError> {
        while !bytes.is_empty() {
            if self.expected == Expected::Nothing {
                self.offset = self.read;
                return Err(self.error("something follows the NAR's end"));
            }
            let taken = self.part(bytes, &mut events)?;
            self.read += taken as u64;
            bytes = &bytes[taken..];
            self.close_parts(&mut events)?;
        }
        Ok(())
    }

    /// Returns what the root is.
    ///
    /// # Errors
    /// When the NAR is not complete.
    pub fn finish(mut self) -> Result<Root, NarError> {
        match self.root {
            Some(root) if self.expected == Expected::Nothing => Ok(root),
            _ => {
                self.offset = self.read;
                Err(self.error("it ends in the middle"))
            }
        }
    }

    /// Takes bytes for the current part; returns how many, which is 0 only for a part of no length.
    fn part(
        &mut self,
        bytes: &[u8],
        events: &mut impl FnMut(Event<'_>),
    ) -> Result<usize, NarError> {
        match &mut self.part {
            Part::Length { bytes: length, got } => {
                let taken = bytes.len().min(length.len() - *got);
                length[*got..*got + taken].copy_from_slice(&bytes[..taken]);
                *got += taken;
                Ok(taken)
            }
            Part::Text { left, .. } => {
                let taken = at_most(bytes, *left);
                self.text.extend_from_slice(&bytes[..taken]);
                *left -= taken as u64;
                Ok(taken)
            }
            Part::Contents { left, .. } => {
                let taken = at_most(bytes, *left);
                events(Event::Contents(&bytes[..taken]));
                *left -= taken as u64;
                Ok(taken)
            }
            Part::Padding { left } => {
                let taken = at_most(bytes, u64::from(*left));
                if bytes[..taken].iter().any(|byte| *byte != 0) {
                    return Err(self.error("the padding is not zero"));
                }
                // At most seven.
                *left -= taken as u8;
                Ok(taken)
            }
        }
    }

    /// Goes on to the part whose bytes are still to come.
    fn close_parts(&mut self, events: &mut impl FnMut(Event<'_>)) -> Result<(), NarError> {
        loop {
            self.part = match self.part {
                Part::Length { bytes, got: 8 } => {
                    self.begin_item(u64::from_le_bytes(bytes), events)?
                }
                Part::Text { left: 0, padding } | Part::Contents { left: 0, padding } => {
                    Part::Padding { left: padding }
                }
                Part::Padding { left: 0 } => {
                    self.end_item(events)?;
                    self.offset = self.read;
                    LENGTH
                }
                _ => return Ok(()),
            };
        }
    }

    fn begin_item(
        &mut self,
        length: u64,
        events: &mut impl FnMut(Event<'_>),
    ) -> Result<Part, NarError> {
        // Fewer than eight.
        let padding = (length.wrapping_neg() % 8) as u8;
        self.text.clear();
        let limit = match self.expected {
            Expected::Contents => {
                events(Event::File {
                    executable: self.executable,
                    size: length,
                });
                return Ok(Part::Contents {
                    left: length,
                    padding,
                });
            }
            Expected::Target => TARGET_LIMIT,
            _ => NAME_LIMIT,
        };
        if length <= limit {
            Ok(Part::Text {
                left: length,
                padding,
            })
        } else if self.expected == Expected::Magic {
            Err(self.error("it does not begin as a NAR"))
        } else {
            Err(self.error("a text is too long"))
        }
    }

    fn end_item(&mut self, events: &mut impl FnMut(Event<'_>)) -> Result<(), NarError> {
        use Expected as E;
        let text = self.text.as_slice();
        self.expected = match (self.expected, text) {
            (E::Magic, MAGIC) => E::NodeBegin,
            (E::Magic, _) => return Err(self.error("it does not begin as a NAR")),
            (E::NodeBegin, b"(") => E::TypeTag,
            (E::TypeTag, b"type") => E::Type,
            (E::Type, b"regular") => {
                self.executable = false;
                self.begin_node(Root::File { executable: false }, E::ContentsOrExecutable)
            }
            (E::Type, b"symlink") => self.begin_node(Root::Symlink, E::TargetTag),
            (E::Type, b"directory") => {
                if self.folders.len() == DEPTH_LIMIT {
                    return Err(self.error("its folders are nested too deeply"));
                }
                let next = self.begin_node(Root::Folder, E::EntryOrEnd);
                self.folders.push(Vec::new());
                events(Event::Folder);
                next
            }
            (E::ContentsOrExecutable | E::ContentsTag, b"contents") => E::Contents,
            (E::ContentsOrExecutable, b"executable") => E::ExecutableValue,
            (E::ExecutableValue, b"") => {
                self.executable = true;
                if self.folders.is_empty() {
                    self.root = Some(Root::File { executable: true });
                }
                E::ContentsTag
            }
            (E::Contents, _) => {
                events(Event::FileEnd);
                E::NodeEnd
            }
            (E::TargetTag, b"target") => E::Target,
            (E::Target, target) if target.is_empty() || target.contains(&0) => {
                return Err(self.error("a link has no usable target"));
            }
            (E::Target, target) => {
                events(Event::Symlink(target));
                E::NodeEnd
            }
            (E::NodeEnd, b")") => self.end_node(),
            (E::EntryOrEnd, b"entry") => E::EntryBegin,
            (E::EntryOrEnd, b")") => {
                self.folders.pop();
                events(Event::FolderEnd);
                self.end_node()
            }
            (E::EntryBegin, b"(") => E::NameTag,
            (E::NameTag, b"name") => E::Name,
            (E::Name, _) => self.end_name(events)?,
            (E::NodeTag, b"node") => E::NodeBegin,
            (E::EntryEnd, b")") => E::EntryOrEnd,
            _ => return Err(self.error("an item is not the expected one")),
        };
        Ok(())
    }

    fn begin_node(&mut self, root: Root, next: Expected) -> Expected {
        self.root.get_or_insert(root);
        next
    }

    fn end_node(&self) -> Expected {
        if self.folders.is_empty() {
            Expected::Nothing
        } else {
            Expected::EntryEnd
        }
    }

    fn end_name(&mut self, events: &mut impl FnMut(Event<'_>)) -> Result<Expected, NarError> {
        let name = self.text.as_slice();
        if matches!(name, b"" | b"." | b"..") || name.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(self.error("a name is not usable"));
        }
        let unsorted = self
            .folders
            .last()
            .is_some_and(|last| last.as_slice() >= name);
        if unsorted {
            return Err(self.error("the names are not sorted"));
        }
        events(Event::Name(name));
        if let Some(last) = self.folders.last_mut() {
            std::mem::swap(last, &mut self.text);
        }
        Ok(Expected::NodeTag)
    }

    fn error(&self, problem: &'static str) -> NarError {
        NarError {
            problem,
            offset: self.offset,
        }
    }
}

fn at_most(bytes: &[u8], left: u64) -> usize {
    usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()))
}

#[cfg(test)]
mod tests {
    use flywheel_testing::nar_strings;

    use super::*;

    fn words(text: &str) -> Vec<u8> {
        let words: Vec<&str> = text
            .split(' ')
            .map(|word| word.trim_matches('\''))
            .collect();
        nar_strings(&words)
    }

    const TREE: &str = "nix-archive-1 ( type directory \
        entry ( name B node ( type regular contents '' ) ) \
        entry ( name a node ( type symlink target b/run ) ) \
        entry ( name b node ( type directory entry ( name run node \
        ( type regular executable '' contents nine-byte ) ) ) ) )";

    fn check_pieces(nar: &[u8], size: usize) -> Result<Root, NarError> {
        let mut validator = NarValidator::default();
        for piece in nar.chunks(size) {
            validator.take(piece)?;
        }
        validator.finish()
    }

    #[test]
    fn what_our_own_writer_writes_is_a_nar_however_it_comes() {
        let folder = tempfile::tempdir().expect("temporary folder");
        std::fs::create_dir_all(folder.path().join("a/b")).expect("made");
        for (name, size) in [("x", 0), ("a/y", 7), ("a/b/z", 100_000)] {
            std::fs::write(folder.path().join(name), vec![7; size]).expect("made");
        }
        std::os::unix::fs::symlink("../x", folder.path().join("a/link")).expect("made");
        let mut nar = Vec::new();
        crate::nar::write(folder.path(), &mut nar).expect("readable");
        for size in [1, 7, 8, 4096, nar.len()] {
            assert_eq!(check_pieces(&nar, size), Ok(Root::Folder), "{size}");
        }
        assert_eq!(check_pieces(&words(TREE), 5), Ok(Root::Folder));
    }

    #[test]
    fn the_root_and_its_contents_are_passed_on() {
        let nar = words("nix-archive-1 ( type regular executable '' contents hello )");
        let (mut validator, mut came) = (NarValidator::default(), Vec::new());
        for piece in nar.chunks(3) {
            let add = |bytes: &[u8]| came.extend_from_slice(bytes);
            validator.take_with(piece, add).expect("good");
        }
        assert_eq!(validator.finish(), Ok(Root::File { executable: true }));
        assert_eq!(came, b"hello");
        let link = words("nix-archive-1 ( type symlink target x )");
        assert_eq!(check_pieces(&link, 8), Ok(Root::Symlink));
    }

    #[test]
    fn every_cut_and_every_addition_is_noticed() {
        let nar = words(TREE);
        for end in 0..nar.len() {
            assert!(NarValidator::check(&nar[..end]).is_err(), "cut at {end}");
        }
        assert!(NarValidator::check(&[&nar[..], &[0]].concat()).is_err());
    }

    #[test]
    fn what_nix_would_not_restore_is_no_nar() {
        for (from, to, problem) in [
            ("nix-archive-1", "nix-archive-2", "does not begin"),
            ("name B", "name c", "not sorted"),
            ("name B", "name a", "not sorted"),
            ("name B", "name ..", "not usable"),
            ("name B", "name .", "not usable"),
            ("name B", "name ''", "not usable"),
            ("name B", "name A/B", "not usable"),
            ("name B", "name A\0B", "not usable"),
            ("target b/run", "target ''", "no usable target"),
            ("type symlink", "type socket", "not the expected one"),
            ("executable ''", "executable x", "not the expected one"),
            ("contents nine", "extra nine", "not the expected one"),
        ] {
            let text = TREE.replacen(from, to, 1);
            assert_ne!(text, TREE, "{from}");
            let error = NarValidator::check(&words(&text)).expect_err(&text);
            assert!(error.to_string().contains(problem), "{to}: {error}");
        }
        let mut padded = words(TREE);
        // The byte after `nix-archive-1`, which has 13.
        padded[8 + 13] = 1;
        let error = NarValidator::check(&padded).expect_err("bad padding");
        assert_eq!(error.to_string(), "the padding is not zero at byte 0");
    }

    #[test]
    fn what_is_announced_takes_no_memory() {
        let mut huge = u64::MAX.to_le_bytes().to_vec();
        huge.extend(b"x");
        assert!(NarValidator::check(&huge).is_err());
        let mut deep = words("nix-archive-1 ( type directory");
        let below = words("entry ( name a node ( type directory");
        for _ in 0..DEPTH_LIMIT {
            deep.extend(&below);
        }
        let error = NarValidator::check(&deep).expect_err("too deep");
        assert!(error.to_string().contains("nested too deeply"), "{error}");
        // A file may be as large as it likes: its contents are not kept.
        let mut file = words("nix-archive-1 ( type regular contents");
        file.extend((1_u64 << 62).to_le_bytes());
        let mut validator = NarValidator::default();
        assert_eq!(validator.take(&file), Ok(()));
        assert_eq!(validator.take(&[0; 100_000]), Ok(()));
    }
}
