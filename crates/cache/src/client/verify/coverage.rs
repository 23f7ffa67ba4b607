//! How much of what was published was looked at, in words. Pure.

use crate::client::verify::Seed;

/// How far verification goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Every narinfo and every body, of what was sent and of what was there already.
    Full,
    /// Every narinfo of what was sent, its bodies up to a budget and a sample of them above it, and a few bodies of what
    /// was there already.
    #[default]
    Sample,
    /// Nothing.
    Off,
}

/// What verification looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    pub mode: Mode,
    /// Paths sent.
    pub sent: u64,
    /// Of those, with a body that was read, unpacked and hashed.
    pub sent_read: u64,
    /// Paths that the cache had already, and that were not found to be damaged.
    pub there: u64,
    /// Of those, with a body that was read.
    pub there_read: u64,
    pub seed: Seed,
}

impl Coverage {
    /// What goes behind the number of verified paths; empty if every body of what was sent was read.
    #[must_use]
    pub fn suffix(&self) -> String {
        match self.mode {
            Mode::Off => " (`verify: off`)".to_owned(),
            _ if self.sent_read == self.sent => String::new(),
            _ => format!(" (sample of {})", count_bodies(self.sent_read)),
        }
    }

    /// What goes behind the number of paths that were already there; empty if none of their bodies was read.
    #[must_use]
    pub fn there_suffix(&self) -> String {
        match self.there_read {
            0 => String::new(),
            read => format!(" ({} read)", count_bodies(read)),
        }
    }

    /// What was looked at, and the seed if bodies were drawn by it.
    #[must_use]
    pub fn sentence(&self) -> String {
        if self.mode == Mode::Off {
            return "off: nothing was looked up".to_owned();
        }
        let mut parts = Vec::new();
        if self.sent > 0 {
            parts.push(match (self.sent_read, self.sent) {
                (read, sent) if read == sent => "every body of what was sent".to_owned(),
                (read, sent) => format!("a sample of {read} of the {sent} bodies sent"),
            });
        }
        if self.there > 0 {
            parts.push(match (self.there_read, self.there) {
                (read, there) if read == there => "every body of what was already there".to_owned(),
                (read, there) => {
                    format!("a sample of {read} of the {there} bodies that were already there")
                }
            });
        }
        if parts.is_empty() {
            return "nothing was to be looked up".to_owned();
        }
        if self.sent_read < self.sent || self.there_read < self.there {
            parts.push(format!("seed {}", self.seed));
        }
        parts.join(", ")
    }
}

fn count_bodies(number: u64) -> String {
    match number {
        1 => "1 body".to_owned(),
        number => format!("{number} bodies"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_called_a_sample() {
        let all = Coverage {
            sent: 3,
            sent_read: 3,
            ..Coverage::default()
        };
        assert_eq!(all.suffix(), "");
        assert_eq!(all.sentence(), "every body of what was sent");
        let some = Coverage {
            sent_read: 2,
            there: 300,
            there_read: 4,
            seed: Seed(0xab),
            ..all.clone()
        };
        assert_eq!(some.suffix(), " (sample of 2 bodies)");
        assert_eq!(some.there_suffix(), " (4 bodies read)");
        assert_eq!(
            some.sentence(),
            "a sample of 2 of the 3 bodies sent, a sample of 4 of the 300 bodies that were already there, seed 00000000000000ab"
        );
        let off = Coverage {
            mode: Mode::Off,
            ..all
        };
        assert_eq!(off.suffix(), " (`verify: off`)");
        assert_eq!(off.sentence(), "off: nothing was looked up");
    }
}
