//! Resolves the paths that a person types to store paths: links are followed until they enter the store.

use std::path::{Path, PathBuf};

use flywheel_core::exit::UsageError;
use flywheel_core::text::one_line;
use flywheel_nix::store_path::StorePath;

/// A longer chain of links is taken for a loop; the kernel has the same limit.
const LINKS: usize = 40;

/// The store paths that the given paths are, lie in, or link to: in their order, each once.
///
/// # Errors
/// For the first path that leads to no store path.
pub(super) fn resolve(paths: &[PathBuf]) -> Result<Vec<StorePath>, UsageError> {
    let mut found: Vec<StorePath> = Vec::new();
    for path in paths {
        let store_path = store_path(path).ok_or_else(|| {
            let shown = one_line(&path.to_string_lossy(), 200);
            UsageError::new(
                "PATH",
                format!("must lie in the store or link to it, which `{shown}` does not"),
            )
            .with_hint("Give a path below `/nix/store`, or a link such as `./result`.")
        })?;
        if !found.contains(&store_path) {
            found.push(store_path);
        }
    }
    Ok(found)
}

/// Resolves one path. A store path may itself be a link to another one, so links are followed one by one, and no
/// further than into the store.
fn store_path(path: &Path) -> Option<StorePath> {
    let mut path = std::path::absolute(path).ok()?;
    for _ in 0..LINKS {
        if let Ok(found) = StorePath::containing(&path) {
            return Some(found);
        }
        // Links among the parent folders are resolved at once, and the last component by a single step.
        let folder = path.parent()?.canonicalize().ok()?;
        let here = folder.join(path.file_name()?);
        if let Ok(found) = StorePath::containing(&here) {
            return Some(found);
        }
        path = folder.join(std::fs::read_link(&here).ok()?);
    }
    None
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    const HELLO: &str = "/nix/store/fvchbymk0m4jvldpb9m5hy0bjy2lf30k-hello";

    #[test]
    fn links_are_followed_into_the_store_and_no_further() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let at = |name: &str| folder.path().join(name);
        symlink(HELLO, at("result")).expect("made");
        symlink("result", at("again")).expect("made");
        symlink(folder.path(), at("here")).expect("made");
        let hello: StorePath = HELLO.parse().expect("valid");
        let paths = [
            at("result"),
            at("again"),
            at("here/result"),
            PathBuf::from(format!("{HELLO}/bin/hello")),
        ];
        assert_eq!(resolve(&paths).expect("in the store"), [hello]);
    }

    #[test]
    fn what_leads_elsewhere_is_named() {
        let folder = tempfile::tempdir().expect("temporary folder");
        symlink("loop", folder.path().join("loop")).expect("made");
        for path in [
            folder.path().join("loop"),
            folder.path().join("none"),
            folder.path().to_owned(),
            "/".into(),
        ] {
            let error = resolve(std::slice::from_ref(&path)).expect_err("not in the store");
            assert!(
                error.to_string().contains(path.to_str().expect("text")),
                "{error}"
            );
        }
    }
}
