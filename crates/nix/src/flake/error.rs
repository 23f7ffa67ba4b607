//! Evaluation errors: Nix's message, and the line of the flake that it points to.

use std::path::Path;

use crate::error_message::ErrorMessage;
use crate::tool::strip_ansi;
use flywheel_core::location::SourceLocation;

/// Parses Nix's standard error.
pub(crate) fn parse(stderr: &str) -> ErrorMessage {
    ErrorMessage::parse(&strip_ansi(stderr))
}

/// Returns the innermost location in the flake's own tree that the error mentions: the first one of the message, which
/// is where it happened, else the last one of the trace. Both notations are read: `at /nix/store/…-source/flake.nix:12:5:`
/// and, in newer versions, `«…»/flake.nix:12:5`.
pub(crate) fn location_in(error: &ErrorMessage, tree: &Path) -> Option<SourceLocation> {
    let first = locations(&error.message, tree).into_iter().next();
    first.or_else(|| locations(&error.trace, tree).pop())
}

/// The locations in the flake's own tree; those outside, in nixpkgs for example, do not help its author.
fn locations(text: &str, tree: &Path) -> Vec<SourceLocation> {
    let tree = format!("{}/", tree.display());
    let found = text.match_indices(&tree).filter_map(|(at, _)| {
        let rest = &text[at + tree.len()..];
        let end = rest
            .find(|c: char| c.is_whitespace() || "'\"»,".contains(c))
            .unwrap_or(rest.len());
        // A mention without a line number is none.
        position(&rest[..end])
    });
    found.collect()
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

    fn found(stderr: &str) -> Option<String> {
        let location = location_in(&parse(stderr), Path::new("/nix/store/aaa-source"))?;
        let SourceLocation { file, line, column } = location;
        Some(format!("{file}:{line}:{}", column.unwrap_or_default()))
    }

    #[test]
    fn the_innermost_place_of_the_flake_is_taken() {
        // 2.8 with `--show-trace` prints the innermost first, and newer versions print it last.
        let old = "error: attribute 'x' missing\n\n       at /nix/store/aaa-source/sub/x.nix:12:7:\n\n       … while\n\n       at /nix/store/aaa-source/flake.nix:3:5:\n";
        assert_eq!(found(old).as_deref(), Some("sub/x.nix:12:7"));
        let trace = "\u{1b}[31;1merror:\u{1b}[0m\n       … while\n         at /nix/store/aaa-source/flake.nix:3:5:\n       … while\n         at «/nix/store/aaa-source/sub/x.nix:12:7»\n         at /nix/store/bbb-source/lib.nix:9:9:\n\n       error: ";
        assert_eq!(
            found(&format!("{trace}no way")).as_deref(),
            Some("sub/x.nix:12:7")
        );
        let own = format!("{trace}no way\n       at /nix/store/aaa-source/y.nix:1:2:");
        assert_eq!(found(&own).as_deref(), Some("y.nix:1:2"));
        assert_eq!(found("error: no way"), None);
        assert_eq!(found("error: see /nix/store/aaa-source/README"), None);
    }
}
