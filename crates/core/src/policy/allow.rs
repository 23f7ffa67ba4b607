//! Exceptions to the policy: which paths may break which rule, and why. Pure.

use crate::policy::{Rule, parse_rule};
use crate::text::one_line;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    rule: Rule,
    pattern: String,
    reason: String,
}

impl Allowed {
    /// Parses `RULE PATTERN REASON…`, such as `secret openssl-*-doc the keys of its examples`. The
    /// pattern matches a store path's name, without folder and hash; `*` stands for any text.
    ///
    /// # Errors
    /// The problem, as a fragment.
    pub(crate) fn parse(line: &str) -> Result<Self, String> {
        let mut words = line.split_whitespace();
        let (Some(name), Some(pattern)) = (words.next(), words.next()) else {
            return Err(format!(
                "has `{}`; write `RULE PATTERN REASON`",
                one_line(line, 80)
            ));
        };
        let reason = words.collect::<Vec<_>>().join(" ");
        // An exception without a reason cannot be reviewed.
        if reason.is_empty() {
            return Err(format!(
                "allows `{name} {}` without a reason; add one",
                one_line(pattern, 80)
            ));
        }
        // Paths are matched by name, so a pattern with a folder would never match.
        if pattern.contains('/') {
            let problem = "has folders in it; give the store path's name alone";
            return Err(format!(
                "has the pattern `{}`, which {problem}",
                one_line(pattern, 80)
            ));
        }
        Ok(Self {
            rule: parse_rule(name)?,
            pattern: pattern.to_owned(),
            reason,
        })
    }

    /// Parses one exception per line. Empty lines and lines that begin with `#` are skipped.
    ///
    /// # Errors
    /// The problem with the first invalid line, as a fragment.
    pub fn parse_all(text: &str) -> Result<Vec<Self>, String> {
        let lines = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.map(Self::parse).collect()
    }

    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    /// Whether it applies to this rule and a path with this name.
    pub(super) fn covers(&self, rule: Rule, name: &str) -> bool {
        self.rule == rule && matches(&self.pattern, name)
    }
}

/// Matches a pattern in which `*` stands for any text.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(mut rest) = text.strip_prefix(head) else {
        return false;
    };
    let mut parts: Vec<&str> = tail.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = rest.find(part) else {
            return false;
        };
        // Taking the first occurrence is enough: it leaves the most text for the other parts.
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_any_text() {
        for (pattern, text, fits) in [
            ("hello", "hello", true),
            ("hello", "hello2", false),
            ("hello*", "hello-2.12", true),
            ("*-doc", "openssl-doc", true),
            ("*-doc", "openssl-docs", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c", false),
            ("*", "", true),
            ("a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, text), fits, "{pattern} {text}");
        }
    }

    #[test]
    fn an_exception_has_a_rule_a_pattern_and_a_reason() {
        let list = "# ours\n\nsecret openssl-*-doc the keys of its examples\n";
        let allowed = Allowed::parse_all(list).expect("good");
        assert_eq!(
            (allowed.len(), allowed[0].reason()),
            (1, "the keys of its examples")
        );
        assert!(allowed[0].covers(Rule::Secret, "openssl-3-doc"));
        assert!(!allowed[0].covers(Rule::MachinePath, "openssl-3-doc"));
        for (line, says) in [
            ("secret", "write `RULE PATTERN REASON`"),
            ("secret x", "without a reason"),
            ("sekret x why", "Did you mean `secret`?"),
            ("secret /nix/store/x why", "the store path's name alone"),
        ] {
            let error = Allowed::parse(line).expect_err(line);
            assert!(error.contains(says), "{line}: {error}");
        }
    }
}
