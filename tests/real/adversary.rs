//! An adversary with a budget of time: faults of a cache at random moments, hostile inputs, odd files where ours belong,
//! and strangers that hold connections. Each attack prints its seed and its counts, and fails at the first trial that
//! breaks a promise. `FLYWHEEL_ADVERSARY` is the time of all attacks together in seconds, `FLYWHEEL_SEED` the first
//! trial. The kills of `just adversary` are in `journal` and `watch_store`.

mod cache_faults;
mod hostile_inputs;
mod odd_files;
mod strangers;

use std::collections::BTreeMap;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::world::{must, need, root};

/// How many attacks share the time.
const ATTACKS: u32 = 4;
/// What CI has for them, in seconds.
const TIME: u64 = 48;

/// One kind of attack: as many trials as its time allows, each with a seed of its own.
struct Attack {
    name: &'static str,
    until: Instant,
    first: u64,
    trials: u64,
    counts: BTreeMap<String, u64>,
}

/// What one trial draws from.
struct Trial {
    random: fastrand::Rng,
    /// How to make this trial again.
    seed: String,
}

impl Attack {
    fn begin(name: &'static str) -> Self {
        let number = |variable: &str| {
            let text = std::env::var(variable).ok()?;
            Some(text.parse::<u64>().expect("a number"))
        };
        let asked = number("FLYWHEEL_ADVERSARY");
        let time = asked.unwrap_or(TIME);
        // The suite makes the same trials each time, so that a change is judged by itself. The first one would take a minute.
        let first = if asked.is_some() {
            u64::from(fastrand::u32(..))
        } else {
            2
        };
        Self {
            name,
            until: Instant::now() + Duration::from_secs(time) / ATTACKS,
            first: number("FLYWHEEL_SEED").unwrap_or(first),
            trials: 0,
            counts: BTreeMap::new(),
        }
    }

    /// The next trial, while there is time; there is always a first one.
    fn next(&mut self) -> Option<Trial> {
        if self.trials > 0 && Instant::now() >= self.until {
            return None;
        }
        let seed = self.first + self.trials;
        self.trials += 1;
        Some(Trial {
            // The first numbers of neighbouring seeds are alike.
            random: fastrand::Rng::with_seed(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            seed: format!("{}, FLYWHEEL_SEED={seed}", self.name),
        })
    }

    fn count(&mut self, what: impl Into<String>) {
        *self.counts.entry(what.into()).or_default() += 1;
    }

    fn report(self) {
        let counts = self.counts.iter();
        let counts: Vec<String> = counts.map(|(what, n)| format!("{n} {what}")).collect();
        println!(
            "{}: {} trials from seed {}: {}",
            self.name,
            self.trials,
            self.first,
            counts.join(", ")
        );
    }
}

impl Trial {
    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        self.random
            .choice(from)
            .expect("there is something to draw")
    }
}

/// `scripts/adversary-proof.sh` puts these faults back; that they are found takes some minutes, that they fit does not.
#[test]
fn the_faults_that_can_be_put_back_fit_the_sources() {
    let git = need("git", "apt-get install git");
    let patches = std::fs::read_dir(root().join("tests/fixtures/faults")).unwrap();
    let mut attacks = Vec::new();
    for patch in patches {
        let patch = patch.unwrap().path();
        must(
            Command::new(&git)
                .current_dir(root())
                .args(["apply", "--check"])
                .arg(&patch),
        );
        let text = std::fs::read_to_string(&patch).unwrap();
        attacks.push(text.split(':').next().unwrap().to_owned());
    }
    attacks.sort();
    assert_eq!(attacks, ["hostile_inputs", "odd_files", "strangers"]);
}
