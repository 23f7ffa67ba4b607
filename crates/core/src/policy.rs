//! The publication policy: the rules a path must meet to enter a shared cache, how strictly each
//! applies, and what follows when one is broken. Pure: no I/O and no secrets; other modules find
//! out what a path contains.

mod allow;
mod impurity;

use std::fmt;

pub use self::allow::Allowed;
pub use self::impurity::{
    Impurity, impurity_in_arguments, impurity_in_command, impurity_in_settings,
};

use crate::text::{nearest, one_line};

/// A rule for published paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// A job that evaluated impurely publishes nothing.
    Impure,
    /// Where requested, nothing is published before `nix flake check` has passed in this job.
    Unchecked,
    /// No path refers to a store path that is invalid or outside its closure.
    Dangling,
    /// No path mentions a path of this machine.
    MachinePath,
    /// No path contains a secret.
    Secret,
}

impl Rule {
    /// All rules, in the order in which they are checked.
    pub const ALL: [Self; 5] = [
        Self::Impure,
        Self::Unchecked,
        Self::Dangling,
        Self::MachinePath,
        Self::Secret,
    ];

    /// The rule's name in inputs, annotations and outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Impure => "impure",
            Self::Unchecked => "unchecked",
            Self::Dangling => "dangling",
            Self::MachinePath => "machine-path",
            Self::Secret => "secret",
        }
    }

    /// Whether the rule is about what a path holds, so that its content has to be scanned. The others are about how the
    /// job made it.
    pub fn is_about_content(self) -> bool {
        match self {
            Self::Dangling | Self::MachinePath | Self::Secret => true,
            Self::Impure | Self::Unchecked => false,
        }
    }

    fn index(self) -> usize {
        Self::ALL
            .iter()
            .position(|rule| *rule == self)
            .expect("all rules are in the list")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How strictly a rule applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RuleMode {
    /// Paths that break it are not published.
    #[default]
    Enforce,
    /// Paths that break it are published and reported.
    Warn,
    /// It is not checked.
    Off,
}

impl RuleMode {
    /// All modes, the strictest first.
    pub const ALL: [Self; 3] = [Self::Enforce, Self::Warn, Self::Off];

    /// The mode's name in the input `policy`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Enforce => "enforce",
            Self::Warn => "warn",
            Self::Off => "off",
        }
    }
}

/// The decision about a path that a job could publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ruling {
    /// The job publishes nothing at all.
    Nothing,
    /// Publish it.
    Publish,
    /// Publish and report it.
    PublishAndWarn,
    /// Withhold and report it.
    Withhold,
}

#[derive(Clone, Debug, Default)]
pub struct Policy {
    modes: [RuleMode; Rule::ALL.len()],
    allowed: Vec<Allowed>,
}

impl Policy {
    /// Parses lines such as `machine-path = warn`; a comma also ends a line. Rules that are not
    /// mentioned are enforced.
    ///
    /// # Errors
    /// The problem with the first invalid line, as a fragment, with the closest valid name.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut policy = Self::default();
        for line in text
            .split(['\n', ','])
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
        {
            let (name, mode) = line.split_once('=').ok_or_else(|| {
                format!(
                    "has a line without `=`: `{}`; write `RULE = MODE`, such as `secret = warn`",
                    one_line(line, 80)
                )
            })?;
            let rule = parse_rule(name.trim())?;
            // A later line overrides an earlier one.
            policy.modes[rule.index()] = parse_mode(mode.trim())?;
        }
        Ok(policy)
    }

    #[must_use]
    pub fn with_allowed(mut self, allowed: Vec<Allowed>) -> Self {
        self.allowed.extend(allowed);
        self
    }

    /// How strictly a rule applies in this policy.
    pub fn mode(&self, rule: Rule) -> RuleMode {
        self.modes[rule.index()]
    }

    /// The reason why a path with this name (without store folder and hash) may break a rule;
    /// `None` if it may not.
    pub(crate) fn allows(&self, rule: Rule, name: &str) -> Option<&str> {
        self.allowed
            .iter()
            .find(|allowed| allowed.covers(rule, name))
            .map(Allowed::reason)
    }

    /// Decides about a path with this name. `breaks` is true if it breaks the rule.
    pub fn decide(&self, publishes: bool, rule: Rule, name: &str, breaks: bool) -> Ruling {
        match (publishes, self.mode(rule)) {
            // Without a permit nothing is published, whatever the policy.
            (false, _) => Ruling::Nothing,
            (true, RuleMode::Off) => Ruling::Publish,
            // An exception counts in every mode, and silences the warning as well.
            (true, _) if !breaks || self.allows(rule, name).is_some() => Ruling::Publish,
            (true, RuleMode::Warn) => Ruling::PublishAndWarn,
            (true, RuleMode::Enforce) => Ruling::Withhold,
        }
    }
}

fn parse_rule(text: &str) -> Result<Rule, String> {
    Rule::ALL
        .into_iter()
        .find(|rule| rule.as_str() == text)
        .ok_or_else(|| {
            let meant = nearest(text, Rule::ALL.map(Rule::as_str))
                .map(|meant| format!(". Did you mean `{meant}`?"));
            let all = Rule::ALL.map(|rule| format!("`{rule}`")).join(", ");
            format!(
                "names `{}`, which is none of the rules {all}{}",
                one_line(text, 40),
                meant.unwrap_or_default()
            )
        })
}

fn parse_mode(text: &str) -> Result<RuleMode, String> {
    RuleMode::ALL
        .into_iter()
        .find(|mode| mode.as_str() == text)
        .ok_or_else(|| {
            let meant = nearest(text, RuleMode::ALL.map(RuleMode::as_str))
                .map(|meant| format!(". Did you mean `{meant}`?"));
            format!(
                "has `{}`, which is neither `enforce`, `warn` nor `off`{}",
                one_line(text, 40),
                meant.unwrap_or_default()
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_what_is_not_named_is_enforced() {
        let policy = Policy::parse("machine-path = warn\n# why\nsecret=off, dangling = enforce")
            .expect("good");
        let modes: Vec<RuleMode> = Rule::ALL
            .into_iter()
            .map(|rule| policy.mode(rule))
            .collect();
        assert_eq!(
            modes,
            [
                RuleMode::Enforce,
                RuleMode::Enforce,
                RuleMode::Enforce,
                RuleMode::Warn,
                RuleMode::Off
            ]
        );
    }

    #[test]
    fn a_wrong_word_is_named_with_the_one_that_was_meant() {
        for (text, says) in [
            ("secrets = off", "Did you mean `secret`?"),
            ("secret = enforced", "Did you mean `enforce`?"),
            ("secret", "write `RULE = MODE`"),
            ("secret = ", "neither `enforce`, `warn` nor `off`"),
        ] {
            let error = Policy::parse(text).expect_err(text);
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn every_setting_has_its_ruling() {
        for rule in Rule::ALL {
            for mode in RuleMode::ALL {
                let text = mode.as_str();
                let policy = Policy::parse(&format!("{rule} = {text}")).expect("good");
                assert_eq!(policy.decide(false, rule, "x", true), Ruling::Nothing);
                assert_eq!(policy.decide(true, rule, "x", false), Ruling::Publish);
                let broken = match mode {
                    RuleMode::Enforce => Ruling::Withhold,
                    RuleMode::Warn => Ruling::PublishAndWarn,
                    RuleMode::Off => Ruling::Publish,
                };
                assert_eq!(
                    policy.decide(true, rule, "x", true),
                    broken,
                    "{rule} {text}"
                );
                let allowed = Allowed::parse(&format!("{rule} x* it is ours")).expect("good");
                let policy = policy.with_allowed(vec![allowed]);
                assert_eq!(
                    policy.decide(true, rule, "xyz", true),
                    Ruling::Publish,
                    "{rule} {text}"
                );
                assert_eq!(
                    policy.decide(true, rule, "wxyz", true),
                    broken,
                    "{rule} {text}"
                );
            }
        }
    }
}
