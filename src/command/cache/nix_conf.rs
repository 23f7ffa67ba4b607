//! The lines by which Nix reads a cache, and their place in a `nix.conf`: a block of their own, which is found again.

use std::fs::{self, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use flywheel_nix::key::PublicKey;

/// A cache that Nix is to read.
#[derive(Clone, Debug)]
pub(super) struct ReadCache {
    address: String,
    key: Option<PublicKey>,
}

impl ReadCache {
    /// `address` is whole: with the cache's name.
    pub(super) fn new(address: String, key: Option<PublicKey>) -> Self {
        Self { address, key }
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }
}

/// The settings for `nix.conf`, which leave other caches as they are.
pub(super) fn nix_lines(caches: &[ReadCache]) -> String {
    let addresses: Vec<&str> = caches.iter().map(ReadCache::address).collect();
    let keys: Vec<String> = caches
        .iter()
        .filter_map(|cache| Some(cache.key.as_ref()?.to_string()))
        .collect();
    let mut lines = format!("extra-substituters = {}\n", addresses.join(" "));
    if !keys.is_empty() {
        lines.push_str(&format!("extra-trusted-public-keys = {}\n", keys.join(" ")));
    }
    lines
}

/// The text of a `nix.conf` with these lines in the block of the cache at `address`, or without the block.
pub(super) fn with_block(text: &str, address: &str, lines: Option<&str>) -> String {
    let mark = |end: &str| format!("# flywheel cache use {address}: {end}");
    let (begin, end) = (mark("begin"), mark("end"));
    if lines.is_none() && !text.contains(&begin) {
        return text.to_owned();
    }
    let mut kept: Vec<&str> = Vec::new();
    let mut is_inside = false;
    // A block without an end was cut by hand: what follows it is not ours to remove.
    let is_whole = text.lines().any(|line| line.trim() == end);
    for line in text.lines() {
        if line.trim() == begin {
            is_inside = is_whole;
        } else if line.trim() == end {
            is_inside = false;
        } else if !is_inside {
            kept.push(line);
        }
    }
    let mut whole: String = kept.iter().map(|line| format!("{line}\n")).collect();
    if let Some(lines) = lines {
        whole.push_str(&format!("{begin}\n{lines}{end}\n"));
    }
    whole
}

/// Replaces a file's text in one step; it keeps its mode and owner. Behind a link, the file itself is replaced.
///
/// # Errors
/// When the folder or the file cannot be written to.
pub(super) fn replace(file: &Path, text: &str) -> io::Result<()> {
    let file: PathBuf = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let folder = file
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    new.write_all(text.as_bytes())?;
    let mode = match fs::metadata(&file) {
        Ok(old) => {
            let is = new.as_file().metadata()?;
            if (old.uid(), old.gid()) != (is.uid(), is.gid()) {
                fchown(new.as_file(), Some(old.uid()), Some(old.gid()))?;
            }
            old.mode() & 0o777
        }
        // As an editor makes it: other users' Nix reads it, too.
        Err(_) => 0o644,
    };
    new.as_file()
        .set_permissions(Permissions::from_mode(mode))?;
    new.persist(&file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "extra-substituters = http://h/main\n";

    #[test]
    fn a_block_is_written_once_and_taken_back_whole() {
        let before = "cores = 2\n\n# mine\nmax-jobs = 1\n";
        let once = with_block(before, "http://h/main", Some(LINES));
        assert_eq!(
            once,
            format!(
                "{before}# flywheel cache use http://h/main: begin\n{LINES}# flywheel cache use http://h/main: end\n"
            )
        );
        assert_eq!(with_block(&once, "http://h/main", Some(LINES)), once);
        let both = with_block(&once, "http://h/team", Some(LINES));
        assert_eq!(with_block(&both, "http://h/team", None), once);
        assert_eq!(with_block(&once, "http://h/main", None), before);
        for other in [before, "cores = 2"] {
            assert_eq!(with_block(other, "http://h/main", None), other);
        }
    }

    #[test]
    fn what_follows_a_block_without_an_end_stays() {
        let cut = "# flywheel cache use http://h/main: begin\ncores = 2\n";
        assert_eq!(with_block(cut, "http://h/main", None), "cores = 2\n");
    }
}
