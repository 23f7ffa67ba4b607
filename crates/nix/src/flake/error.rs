//! Parses evaluation errors: Nix's message, and the line of the flake that it points to.

use std::path::Path;

use flywheel_core::location::SourceLocation;

/// Returns the error from Nix's standard error: everything from the first `error:` on, without
/// colours.
pub(crate) fn error_text(stderr: &str) -> String {
    let plain = super::super::tool::strip_ansi(stderr);
    let from = plain.find("error:").unwrap_or(0);
    let text = plain[from..].trim();
    let text = text
        .strip_suffix("(use '--show-trace' to show detailed location information)")
        .unwrap_or(text);
    text.trim_end().to_owned()
}

/// Returns the last location in the flake's own tree that the error mentions, which is the
/// innermost. Both notations are read: `at /nix/store/…-source/flake.nix:12:5:` and, in newer
/// versions, `«…»/flake.nix:12:5`.
pub(crate) fn location_in(text: &str, tree: &Path) -> Option<SourceLocation> {
    let tree = format!("{}/", tree.display());
    let mut found = None;
    // Locations outside the flake's own tree, in nixpkgs for example, do not help its author.
    for (at, _) in text.match_indices(&tree) {
        let rest = &text[at + tree.len()..];
        let end = rest
            .find(|c: char| c.is_whitespace() || "'\"»,".contains(c))
            .unwrap_or(rest.len());
        // A mention without a line number does not replace an earlier one that has one.
        found = position(&rest[..end]).or(found);
    }
    found
}

/// Parses `flake.nix:12:5:` or `flake.nix:12`.
fn position(text: &str) -> Option<SourceLocation> {
    let mut parts = text.trim_end_matches(':').split(':');
    let file = parts.next().filter(|file| !file.is_empty())?;
    let line = parts.next()?.parse().ok()?;
    Some(SourceLocation {
        file: file.to_owned(),
        line,
        column: parts.next().and_then(|column| column.parse().ok()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_place_of_the_flake_is_taken() {
        let text = "error: attribute 'x' missing\n\n       at /nix/store/aaa-source/flake.nix:3:5:\n  2| a\n       at /nix/store/bbb-source/lib.nix:9:9:\n \
            at /nix/store/aaa-source/sub/x.nix:12:7:\n";
        let place = location_in(text, Path::new("/nix/store/aaa-source"));
        assert_eq!(
            place,
            Some(SourceLocation {
                file: "sub/x.nix".into(),
                line: 12,
                column: Some(7)
            })
        );
        assert_eq!(
            super::location_in("error: no way", Path::new("/nix/store/aaa-source")),
            None
        );
        assert_eq!(
            super::location_in(
                "see /nix/store/aaa-source/README",
                Path::new("/nix/store/aaa-source")
            ),
            None
        );
    }

    #[test]
    fn the_error_is_told_without_what_came_before() {
        let said = "warning: dirty\n\u{1b}[31;1merror:\u{1b}[0m no way\n(use '--show-trace' to show detailed location information)\n";
        assert_eq!(error_text(said), "error: no way");
        assert_eq!(error_text("killed\n"), "killed");
    }
}
