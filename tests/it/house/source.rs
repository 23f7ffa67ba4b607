//! The repository's own files as the house rules look at them.

use std::fs;
use std::path::{Path, PathBuf};

#[derive(Clone, Debug)]
pub struct Source {
    /// Its path below the root.
    pub name: String,
    pub text: String,
}

impl Source {
    /// A file that is not there, to show that a rule complains about it.
    pub fn planted(name: &str, text: &str) -> Self {
        Self {
            name: name.to_owned(),
            text: text.to_owned(),
        }
    }

    /// Whether it lies in a module's folder (`src/command/`) or is its file (`src/command.rs`).
    pub fn is_of(&self, module: &str) -> bool {
        let rest = self.name.strip_prefix(module);
        rest.is_some_and(|rest| rest.starts_with('/') || rest == ".rs")
    }

    /// Its code without comments, and with empty texts in the place of literal ones.
    pub fn code(&self) -> String {
        strip(&self.text)
    }

    /// The same as `code`, without unit tests.
    pub fn product_code(&self) -> String {
        if self.name.ends_with("/tests.rs") || self.name.contains("/tests/") {
            return String::new();
        }
        let code = self.code();
        let end = code.find("#[cfg(test)]\nmod ").unwrap_or(code.len());
        code[..end].to_owned()
    }
}

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every file below `folder` with that ending, in order.
pub fn files(folder: &str, ending: &str) -> Vec<Source> {
    let mut found = Vec::new();
    collect(&root().join(folder), ending, &mut found);
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

pub fn file(name: &str) -> Source {
    let text =
        fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    Source {
        name: name.to_owned(),
        text,
    }
}

fn collect(folder: &Path, ending: &str, found: &mut Vec<Source>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    for path in paths {
        let name = path.strip_prefix(root()).unwrap().display().to_string();
        if path.is_dir() && name != "target" && name != ".git" {
            collect(&path, ending, found);
        } else if name.ends_with(ending) {
            // The rules are about text, so binary files are left out.
            if let Ok(text) = fs::read_to_string(&path) {
                found.push(Source { name, text });
            }
        }
    }
}

/// Rust without comments and without what stands in literal texts.
fn strip(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let skipped = match next {
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' if rest.starts_with("/*") => rest.find("*/").map_or(rest.len(), |end| end + 2),
            '"' => 1 + closing_quote(&rest[1..]),
            'r' if !code.ends_with(|last: char| last.is_alphanumeric() || last == '_') => {
                raw_text(rest).unwrap_or(0)
            }
            // A character, not a lifetime.
            '\'' if rest.starts_with("'\"'") => 3,
            '\'' if rest.starts_with("'\\") => 4 + rest[3..].find('\'').unwrap_or(0),
            _ => 0,
        };
        if skipped == 0 {
            code.push(next);
            rest = &rest[next.len_utf8()..];
        } else {
            if !rest.starts_with('/') {
                code.push_str("\"\"");
            }
            rest = &rest[skipped..];
        }
    }
    code
}

/// How many bytes up to and with the quote that ends a text.
fn closing_quote(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// How many bytes a raw text (`r"…"`, `r#"…"#`) has, if one begins here.
fn raw_text(text: &str) -> Option<usize> {
    let hashes = text[1..].bytes().take_while(|byte| *byte == b'#').count();
    let body = text[1 + hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    body.find(&end).map(|at| 1 + hashes + 1 + at + end.len())
}

#[test]
fn comments_and_literal_texts_are_no_code() {
    let text = "a // b\nc \"d // \\\" e\" /* f */ g 'h' '\"' '\\n' r#\"i \" j\"# &'k l";
    assert_eq!(strip(text), "a \nc \"\"  g 'h' \"\" \"\" \"\" &'k l");
}
