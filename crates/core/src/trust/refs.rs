//! The refs that may publish besides the default branch: the input `trusted-refs`. Pure.

use crate::exit::UsageError;
use crate::trust::facts::shown;

/// What is trusted when `trusted-refs` is not given.
const DEFAULT: &str = "refs/tags/v*";

/// Patterns of full refs. `*` stands for any text without a `/`, `**` for any text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustedRefs(Vec<String>);

impl Default for TrustedRefs {
    fn default() -> Self {
        Self(vec![DEFAULT.to_owned()])
    }
}

impl TrustedRefs {
    /// Reads the input `trusted-refs`: patterns separated by white space or commas. They take the
    /// default's place. An input that was left out (or is empty) is the default.
    ///
    /// # Errors
    /// For a pattern that can name no branch and no tag, or names pull requests.
    pub fn parse(text: &str) -> Result<Self, UsageError> {
        let parts = text
            .split(|c: char| c == ',' || c.is_whitespace())
            .filter(|part| !part.is_empty());
        let patterns = parts
            .map(|part| check(part).map(|()| part.to_owned()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(if patterns.is_empty() {
            Self::default()
        } else {
            Self(patterns)
        })
    }

    /// The pattern that names this ref, if any does. Only branches and tags can be named, whatever a pattern matches.
    pub(crate) fn naming(&self, git_ref: &str) -> Option<String> {
        let nameable = git_ref.starts_with("refs/heads/") || git_ref.starts_with("refs/tags/");
        self.0
            .iter()
            .find(|pattern| nameable && matches(pattern, git_ref))
            .cloned()
    }
}

fn check(pattern: &str) -> Result<(), UsageError> {
    let wrong = |problem: &str, hint: &str| {
        Err(UsageError::new(
            "trusted-refs",
            format!("{problem}, not `{}`", shown(pattern)),
        )
        .with_hint(hint))
    };
    let Some(below) = pattern.strip_prefix("refs/") else {
        return wrong(
            "must hold full refs",
            "Write `refs/heads/NAME` for a branch, `refs/tags/NAME` for a tag.",
        );
    };
    let kind = below.split('/').next().unwrap_or_default();
    if kind == "pull" {
        return wrong(
            "must name branches or tags",
            "A pull request never publishes, and no setting can change that: leave `refs/pull/` out.",
        );
    }
    let names_a_kind = match kind.split_once("**") {
        // What follows `**` need not be in the same part.
        Some((start, _)) => ["heads/", "tags/"]
            .iter()
            .any(|named| matches(&format!("{start}**"), named)),
        None => ["heads", "tags"].iter().any(|named| matches(kind, named)),
    };
    if !names_a_kind {
        return wrong(
            "must name branches or tags",
            "Begin it with `refs/heads/` or `refs/tags/`.",
        );
    }
    if pattern.split('/').any(str::is_empty) {
        return wrong(
            "must hold names without empty parts",
            "Leave out a `/` at the end and the second of two: no ref has one. `refs/heads/NAME/*` names the branches below `NAME/`.",
        );
    }
    if kind == below && !kind.contains("**") {
        return wrong(
            "must name branches or tags",
            "Add the name: `refs/heads/NAME` or `refs/tags/NAME`.",
        );
    }
    if pattern.contains("***") {
        return wrong(
            "must use no other wildcards than `*` and `**`",
            "`*` stops at a `/`, `**` does not.",
        );
    }
    // git lets no ref hold these, so such a pattern would silently match nothing.
    if pattern.contains(['?', '[', '\\', '^', '~', ':']) {
        return wrong(
            "must use no other wildcards than `*` and `**`",
            "`*` stops at a `/`, `**` does not.",
        );
    }
    // `git check-ref-format` refuses these in every ref.
    let is_refused = |part: &str| {
        part.starts_with('.')
            || part
                .strip_suffix(".lock")
                .is_some_and(|name| !name.ends_with('*'))
    };
    if pattern.split('/').any(is_refused)
        || pattern.contains("..")
        || pattern.contains("@{")
        || pattern.ends_with('.')
        || pattern.contains(|c: char| c.is_control())
    {
        return wrong(
            "must hold names that git allows",
            "No ref has a part that begins with `.` or ends in `.lock`, `..` or `@{`, or a `.` at its end.",
        );
    }
    Ok(())
}

/// Whether `pattern` matches all of `text`. Takes time in proportion to the product of their lengths,
/// so that no pattern is a trap.
fn matches(pattern: &str, text: &str) -> bool {
    let (mut rest, text) = (pattern.as_bytes(), text.as_bytes());
    // `reached[i]`: what was taken of the pattern so far matches the first `i` bytes.
    let mut reached = vec![false; text.len() + 1];
    reached[0] = true;
    while let Some((&first, after)) = rest.split_first() {
        if first != b'*' {
            for end in (0..text.len()).rev() {
                reached[end + 1] = reached[end] && text[end] == first;
            }
            reached[0] = false;
            rest = after;
            continue;
        }
        let (crosses, after) = match after.split_first() {
            Some((b'*', after)) => (true, after),
            _ => (false, after),
        };
        for end in 0..text.len() {
            reached[end + 1] |= reached[end] && (crosses || text[end] != b'/');
        }
        rest = after;
    }
    reached[text.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(patterns: &str, named: &[&str], not_named: &[&str]) {
        let trusted = TrustedRefs::parse(patterns).expect("good patterns");
        for git_ref in named {
            assert!(
                trusted.naming(git_ref).is_some(),
                "`{patterns}` should name {git_ref}"
            );
        }
        for git_ref in not_named {
            assert!(
                trusted.naming(git_ref).is_none(),
                "`{patterns}` should not name {git_ref}"
            );
        }
    }

    #[test]
    fn the_default_is_version_tags() {
        let not = [
            "refs/tags/1.0",
            "refs/tags/v1/x",
            "refs/heads/v1",
            "refs/tags/x/v1",
            "xrefs/tags/v1",
        ];
        check("", &["refs/tags/v1.0", "refs/tags/v"], &not);
        check(" , ", &["refs/tags/v1.0"], &not);
    }

    #[test]
    fn what_is_given_takes_the_defaults_place() {
        check(
            "refs/heads/stable",
            &["refs/heads/stable"],
            &["refs/tags/v1", "refs/heads/stable2", "refs/heads/Stable"],
        );
    }

    #[test]
    fn one_star_stops_at_a_slash_and_two_do_not() {
        check(
            "refs/heads/release/*",
            &["refs/heads/release/1"],
            &["refs/heads/release/1/x", "refs/heads/release"],
        );
        check(
            "refs/heads/release/**",
            &["refs/heads/release/1/x", "refs/heads/release/1"],
            &["refs/heads/release"],
        );
        check(
            "refs/heads/*/b*c",
            &["refs/heads/a/bc", "refs/heads/a/bxbc"],
            &["refs/heads/a/x/bc", "refs/heads/a/bcd"],
        );
        check(
            "refs/**/v*",
            &["refs/tags/v1", "refs/heads/x/v2"],
            &["refs/tags/w", "refs/notes/v1"],
        );
    }

    #[test]
    fn several_patterns_by_comma_space_or_line() {
        let all = ["refs/tags/v1", "refs/heads/a", "refs/heads/b"];
        check(
            "refs/tags/v*,refs/heads/a\n\trefs/heads/b",
            &all,
            &["refs/heads/c", "refs/heads/a,refs/heads/b"],
        );
    }

    #[test]
    fn no_pattern_reaches_beyond_branches_and_tags() {
        check(
            "refs/** refs/*/1/*",
            &["refs/heads/x"],
            &["refs/pull/1/merge", "refs/notes/x", "refs/merge-requests/1"],
        );
    }

    #[test]
    fn a_pattern_is_no_trap() {
        let many = "*a".repeat(200);
        check(
            &format!("refs/heads/{many}b"),
            &[],
            &[&format!("refs/heads/{}", "a".repeat(1000))],
        );
    }

    #[test]
    fn patterns_that_cannot_be_meant_are_refused_with_a_hint() {
        for wrong in [
            "main",
            "heads/main",
            "*",
            "**",
            "refs/pull/**",
            "refs/pull",
            "refs/notes/*",
            "refs/",
            "refs/tags/v?",
            "refs/heads/[a]",
            "/refs/heads/main",
            "refs/heads/main/",
            "refs/heads/release/*/",
            "refs/heads/",
            "refs/heads",
            "refs/*",
            "refs/heads//main",
            "refs//heads/main",
            "refs/head*/../main",
            "refs/x*/main",
            "refs/x**",
            "refs/pul*/**",
            "refs/heads/***",
            "refs/heads/.main",
            "refs/heads/main.lock",
            "refs/heads/a..b",
            "refs/heads/main.",
            "refs/heads/@{1}",
        ] {
            let error = TrustedRefs::parse(&format!("refs/tags/v*, {wrong}")).expect_err(wrong);
            assert!(
                error.to_string().contains("`trusted-refs`")
                    && error.to_string().contains(&format!("`{wrong}`"))
            );
            assert!(error.into_parts().1.is_some());
        }
    }
}
