//! Finds the base names of store paths in a stream of bytes, wherever the reads divide it. It reports too much rather
//! than too little, because the caller compares the names with paths that exist.

use std::ops::Range;

/// A 32-character hash and a dash.
const HEAD: usize = 33;
/// Nix's limit for the name behind the hash.
const NAME_LIMIT: usize = 211;
/// How far a run of the characters of names is followed: an integer of the protocol may stand right behind a name.
const RUN_LIMIT: usize = NAME_LIMIT + INTEGER;
/// Every integer of the worker protocol has eight bytes, the lowest first; the length before a text is one.
const INTEGER: usize = 8;
const STORE_PREFIX: &[u8] = b"/nix/store/";
/// What is looked at before a hash: the text's length and the store's folder.
const BEFORE: usize = INTEGER + STORE_PREFIX.len();
/// The most bytes that are kept from one read to the next.
const KEPT_LIMIT: usize = BEFORE + HEAD + RUN_LIMIT;
const READ_SIZE: usize = 64 * 1024;

const BASE32: u8 = 1;
const NAME: u8 = 2;
/// The classes that each byte belongs to.
const CLASSES: [u8; 256] = classes();

const fn classes() -> [u8; 256] {
    let mut classes = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let character = byte as u8;
        if character.is_ascii_digit()
            || (character.is_ascii_lowercase() && !matches!(character, b'e' | b'o' | b't' | b'u'))
        {
            classes[byte] |= BASE32;
        }
        if character.is_ascii_alphanumeric()
            || matches!(character, b'+' | b'-' | b'.' | b'_' | b'?' | b'=')
        {
            classes[byte] |= NAME;
        }
        byte += 1;
    }
    classes
}

/// One direction of one connection: the buffer for the next read, behind the end of the one before where a name may
/// have been cut.
pub(super) struct Scanner {
    bytes: Box<[u8]>,
    /// How many bytes in front were there before the last read.
    kept: usize,
    /// The first position at which a hash may begin that has not been looked at.
    next: usize,
}

impl Scanner {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; KEPT_LIMIT + READ_SIZE].into(),
            kept: 0,
            next: 0,
        }
    }

    /// Where the next read goes.
    pub(super) fn space(&mut self) -> &mut [u8] {
        &mut self.bytes[self.kept..]
    }

    /// What the last read brought, `read` bytes.
    pub(super) fn fresh(&self, read: usize) -> &[u8] {
        &self.bytes[self.kept..self.kept + read]
    }

    /// Finds the names in what the last read brought. A name at its very end counts as it is, and once more when the
    /// rest of it has come.
    pub(super) fn scan(&mut self, read: usize, mut found: impl FnMut(&[u8])) {
        let hay = &self.bytes[..self.kept + read];
        self.next = scan(hay, self.next, &mut found);
    }

    /// Makes room for the next read.
    pub(super) fn keep_tail(&mut self, read: usize) {
        let from = self.next.saturating_sub(BEFORE);
        let end = self.kept + read;
        self.bytes.copy_within(from..end, 0);
        self.next -= from;
        self.kept = end - from;
    }
}

/// Looks at every hash that begins at `from` or later; the position at which to go on when more bytes have come.
fn scan(hay: &[u8], from: usize, found: &mut impl FnMut(&[u8])) -> usize {
    let is = |at: usize, class: u8| CLASSES[usize::from(hay[at])] & class != 0;
    let mut start = from;
    // The first name that the next read may go on with.
    let mut unfinished = None;
    while start + HEAD <= hay.len() {
        let dash = start + HEAD - 1;
        // Backwards, as a byte of another kind near the end rules out every start before it: where there are no
        // names, most bytes are never looked at.
        if let Some(other) = (start..dash).rev().find(|at| !is(*at, BASE32)) {
            start = other + 1;
            continue;
        }
        // In a longer run only the characters before its end can be a hash.
        let run = (dash..hay.len()).find(|at| !is(*at, BASE32));
        let run = run.unwrap_or(hay.len());
        start = run + 1 - HEAD;
        if run == hay.len() {
            break;
        }
        let dash = run;
        if hay[dash] != b'-' {
            start = dash + 1;
            continue;
        }
        let name = dash + 1;
        let limit = hay.len().min(name + RUN_LIMIT);
        let end = (name..limit).find(|at| !is(*at, NAME)).unwrap_or(limit);
        report(hay, start, end, found);
        if end == hay.len() && end - name < RUN_LIMIT {
            unfinished.get_or_insert(start);
        }
        // The name may hold another hash: `builtins.path` of a store path makes such.
        start = name;
    }
    unfinished.unwrap_or(start)
}

/// Reports the name in `start..end`, and where it may be shorter, because the protocol puts integers and texts side by
/// side without a mark between them.
fn report(hay: &[u8], start: usize, end: usize, found: &mut impl FnMut(&[u8])) {
    let mut one = |range: Range<usize>| {
        let name = range.len().saturating_sub(HEAD);
        if (1..=NAME_LIMIT).contains(&name) {
            found(&hay[range]);
        }
    };
    one(start..end);
    // `NAME.drv!OUTPUTS` is how a client asks for a derivation to be built (`DerivedPath`, in all versions).
    if hay.get(end) == Some(&b'!') && hay[start..end].ends_with(b".drv") {
        found(&hay[start..=end]);
        return;
    }
    if let Some(exact) = announced_end(hay, start) {
        // A text ends here, though characters of names follow: the length of the next one.
        if exact < end {
            one(start..exact);
        }
    } else if hay.get(end) == Some(&0) {
        // Behind a path that ends a longer text, an integer's low bytes may look like characters of a name. Its
        // highest is zero.
        for cut in 1..INTEGER.min(end - start) {
            one(start..end - cut);
        }
    }
}

/// The end of the text that begins with this path or base name, by the length that the protocol puts before it.
fn announced_end(hay: &[u8], start: usize) -> Option<usize> {
    let before = &hay[..start];
    let text = before.strip_suffix(STORE_PREFIX).unwrap_or(before);
    let length = u64::from_le_bytes(*text.last_chunk::<INTEGER>()?);
    let length = usize::try_from(length).ok()?;
    let end = text.len().checked_add(length)?;
    (end > start + HEAD && end <= start + HEAD + NAME_LIMIT).then_some(end)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const STORE: &str = "/nix/store";
    const A: &str = "fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello-1.0";
    const B: &str = "0c9a1y9lz2h6wfpw7bs2v3avkdbdjvjn-lib.drv";

    /// What is found in the pieces, read one after the other.
    fn found<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> BTreeSet<String> {
        let mut scanner = Scanner::new();
        let mut names = BTreeSet::new();
        for piece in pieces {
            for part in piece.chunks(READ_SIZE) {
                scanner.space()[..part.len()].copy_from_slice(part);
                scanner.scan(part.len(), |name| {
                    names.insert(String::from_utf8(name.to_vec()).expect("ASCII"));
                });
                assert_eq!(scanner.fresh(part.len()), part);
                scanner.keep_tail(part.len());
                assert!(scanner.kept <= KEPT_LIMIT);
            }
        }
        names
    }

    #[test]
    fn a_derivation_that_is_to_be_built_is_marked() {
        let request = text(&format!("{STORE}/{B}!out,dev"));
        let whole = found([&request[..]]);
        assert!(
            whole.contains(B) && whole.contains(&format!("{B}!")),
            "{whole:?}"
        );
        for cut in 0..request.len() {
            let cut = found([&request[..cut], &request[cut..]]);
            assert!(cut.contains(&format!("{B}!")), "{cut:?}");
        }
        let other = text(&format!("{STORE}/{A}!"));
        assert!(!found([&other[..]]).contains(&format!("{A}!")));
    }

    /// A text as the worker protocol sends it.
    fn text(content: &str) -> Vec<u8> {
        let mut bytes = (content.len() as u64).to_le_bytes().to_vec();
        bytes.extend(content.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(INTEGER), 0);
        bytes
    }

    fn path(base: &str) -> String {
        format!("/nix/store/{base}")
    }

    #[test]
    fn a_name_is_found_wherever_the_reads_divide_it() {
        let mut stream = b"noise ".repeat(20);
        stream.extend(text(&path(A)));
        stream.extend(format!("{{\"outPath\":\"{B}\"}}").as_bytes());
        let expected = [A, B].map(str::to_owned).into();
        assert_eq!(found([&stream[..]]), expected);
        for at in 0..=stream.len() {
            let names = found([&stream[..at], &stream[at..]]);
            assert!(names.is_superset(&expected), "at {at}: {names:?}");
        }
        assert!(found(stream.chunks(1)).is_superset(&expected));
    }

    #[test]
    fn the_length_of_the_next_text_does_not_become_part_of_a_name() {
        // A text whose length is a multiple of eight has no padding, and the length of the next one is that of `-`,
        // a digit or a letter.
        for more in 0..80 {
            for before in ["", "/nix/store/", "--with=/nix/store/", "!/nix/store/"] {
                let base = A.to_owned() + &"x".repeat(more % 9);
                let mut stream = text(&format!("{before}{base}"));
                stream.extend(text(&"z".repeat(45 + more)));
                for pieces in [1, 7, stream.len()] {
                    let names = found(stream.chunks(pieces));
                    assert!(names.contains(&base), "{before} {more}: {names:?}");
                }
            }
        }
    }

    #[test]
    fn a_text_that_the_protocol_has_announced_is_found_before_anything_follows() {
        let base = A.to_owned() + "xxx";
        let stream = text(&path(&base));
        assert_eq!(stream.len(), INTEGER + path(&base).len(), "no padding");
        assert_eq!(found([&stream[..]]), [base].into());
    }

    #[test]
    fn the_word_at_the_end_of_an_answer_does_not_become_part_of_a_name() {
        // `STDERR_LAST` and `STDERR_NEXT` of the worker protocol, as they stand behind a path of 48 bytes.
        for word in [0x616c_7473_u64, 0x6f6c_6d67] {
            let base = format!("{}-ca-b", &A[..32]);
            for before in [&text(&path(&base))[..], path(&base).as_bytes()] {
                let stream = [before, &word.to_le_bytes()].concat();
                assert!(found([&stream[..]]).contains(&base), "{word:x}");
            }
        }
    }

    #[test]
    fn what_is_no_name_is_not_found() {
        for stream in [
            &b"/nix/store/"[..],
            b"/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k",
            b"/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-",
            b"/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k/hello",
            b"/nix/store/evchbymk0m4jvldpb9m5hy0bjy2lf30k-hello",
            b"/nix/store/.links/short-name",
        ] {
            assert_eq!(found([stream]), BTreeSet::new());
        }
        let long = format!("{A}{}", "x".repeat(5000));
        assert_eq!(found([long.as_bytes()]), BTreeSet::new());
    }

    #[test]
    fn a_path_in_the_name_of_another_and_a_subpath_count() {
        let nested = format!("{}-{B}", &A[..32]);
        let stream = format!("{}/bin:{}", path(A), path(&nested));
        assert_eq!(
            found([stream.as_bytes()]),
            [A, B, nested.as_str()].map(str::to_owned).into()
        );
    }

    #[test]
    fn a_flood_of_characters_keeps_nothing_back() {
        let mut stream = vec![b'a'; 3 * READ_SIZE];
        stream.extend(format!("/{A} ").as_bytes());
        assert!(found([&stream[..]]).contains(A));
    }
}
