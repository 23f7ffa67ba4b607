//! Cuts a stream into JSON objects, whatever their layout, up to the first text that is none.

/// The largest object, in bytes. BuildKit's messages hold a few kilobytes of log at most; what is larger is no message.
const OBJECT_LIMIT: usize = 8 << 20;

/// Where in the stream it is.
#[derive(Debug, Default)]
pub(super) struct Splitter {
    /// The object so far.
    object: Vec<u8>,
    /// How many braces and brackets are open.
    depth: usize,
    is_in_string: bool,
    is_escaped: bool,
    /// Whether the objects have ended.
    is_plain: bool,
}

/// What the next bytes of a stream held.
#[derive(Debug, Default)]
pub(super) struct Split {
    /// How many bytes were read; at least one.
    pub(super) read: usize,
    /// A whole object.
    pub(super) object: Option<Vec<u8>>,
    /// Plain text.
    pub(super) plain: Vec<u8>,
}

impl Splitter {
    /// Reads up to the end of an object, or all of the bytes.
    pub(super) fn next(&mut self, bytes: &[u8]) -> Split {
        for (at, byte) in bytes.iter().enumerate() {
            if !self.is_plain && self.depth == 0 {
                match byte {
                    b'{' => {}
                    b' ' | b'\t' | b'\r' | b'\n' => continue,
                    _ => self.is_plain = true,
                }
            }
            if self.is_plain || self.object.len() >= OBJECT_LIMIT {
                // What was taken for an object is plain text, too, if it has no end.
                self.is_plain = true;
                let mut plain = std::mem::take(&mut self.object);
                plain.extend(&bytes[at..]);
                return Split {
                    read: bytes.len(),
                    object: None,
                    plain,
                };
            }
            self.object.push(*byte);
            self.follow(*byte);
            if self.depth == 0 {
                return Split {
                    read: at + 1,
                    object: Some(std::mem::take(&mut self.object)),
                    plain: Vec::new(),
                };
            }
        }
        Split {
            read: bytes.len(),
            ..Split::default()
        }
    }

    /// What is left of an object that did not end.
    pub(super) fn finish(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.object)
    }

    fn follow(&mut self, byte: u8) {
        if self.is_in_string {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' => self.is_escaped = true,
                b'"' => self.is_in_string = false,
                _ => {}
            }
            return;
        }
        match byte {
            b'"' => self.is_in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
    }
}
