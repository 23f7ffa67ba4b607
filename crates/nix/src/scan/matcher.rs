//! Searches one haystack for many needles: the needles are divided into groups that fit the
//! vectorised searcher, and each group scans a block that stays in the processor's cache. Knows
//! bytes, not their meaning.

use aho_corasick::packed::{Config, MatchKind, Searcher};
use aho_corasick::{AhoCorasick, Input, Span};

/// Needles per group; the vectorised searcher is slow with more.
const GROUP_SIZE: usize = 64;

/// Finds where needles begin.
#[derive(Debug)]
pub(super) struct Matcher {
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    first: usize,
    engine: Engine,
}

#[derive(Debug)]
enum Engine {
    Vectors(Searcher),
    /// On processors without the vector instructions.
    Automaton(Box<AhoCorasick>),
}

impl Matcher {
    /// Creates a matcher for these needles, none of which may be empty.
    pub(super) fn new(needles: &[Vec<u8>]) -> Self {
        let groups = needles
            .chunks(GROUP_SIZE)
            .enumerate()
            .map(|(n, chunk)| Group {
                first: n * GROUP_SIZE,
                engine: Engine::new(chunk),
            });
        Self {
            groups: groups.collect(),
        }
    }

    /// Calls `on_match` with the number and position of each needle that begins within
    /// `from..until`; its end may lie beyond. Of several needles in a group that begin at the same
    /// position, one is reported.
    pub(super) fn find(
        &self,
        hay: &[u8],
        from: usize,
        until: usize,
        mut on_match: impl FnMut(usize, usize),
    ) {
        for group in &self.groups {
            let mut start = from;
            while start < until {
                match group.engine.next(hay, start) {
                    Some((number, at)) if at < until => {
                        on_match(group.first + number, at);
                        // Overlapping needles count, so the search goes on one byte further.
                        start = at + 1;
                    }
                    _ => break,
                }
            }
        }
    }
}

impl Engine {
    fn new(needles: &[Vec<u8>]) -> Self {
        // Of needles with a common start, the first in the list wins.
        let mut builder = Config::new().match_kind(MatchKind::LeftmostFirst).builder();
        match builder.extend(needles).build() {
            Some(searcher) => Self::Vectors(searcher),
            None => {
                let automaton = AhoCorasick::new(needles);
                Self::Automaton(Box::new(
                    automaton.expect("a few dozen needles are never too many"),
                ))
            }
        }
    }

    fn next(&self, hay: &[u8], start: usize) -> Option<(usize, usize)> {
        let span = Span {
            start,
            end: hay.len(),
        };
        let found = match self {
            Self::Vectors(searcher) => searcher.find_in(hay, span),
            Self::Automaton(automaton) => automaton.find(Input::new(hay).span(span)),
        };
        found.map(|found| (found.pattern().as_usize(), found.start()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_needle_of_every_group_is_found_and_no_other_place() {
        let needles: Vec<Vec<u8>> = (0..200)
            .map(|n| format!("needle-{n:03}-of-hay").into_bytes())
            .collect();
        let matcher = Matcher::new(&needles);
        let mut hay = vec![b'-'; 100_000];
        let mut expected = Vec::new();
        for (n, needle) in needles.iter().enumerate() {
            let at = 37 + n * 441;
            hay[at..at + needle.len()].copy_from_slice(needle);
            expected.push((n, at));
        }
        let mut found = Vec::new();
        matcher.find(&hay, 0, hay.len(), |n, at| found.push((n, at)));
        found.sort_unstable();
        assert_eq!(found, expected);
        found.clear();
        matcher.find(&hay, 38, 478, |n, at| found.push((n, at)));
        assert!(
            found.is_empty(),
            "neither the one before nor the one that begins at the end"
        );
        matcher.find(&hay, 38, 479, |n, at| found.push((n, at)));
        assert_eq!(found, [(1, 478)]);
    }
}
