//! The names of the tokens that have been used, for as long as they would be valid: a token stands in the memory of a
//! job, and may come to stand in a log.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use super::Refusal;

/// So many tokens may be valid at once: each takes some hundred bytes.
const MOST: usize = 100_000;

/// Shared by its clones.
#[derive(Clone, Debug, Default)]
pub struct UsedTokens(Arc<Mutex<HashMap<String, SystemTime>>>);

impl UsedTokens {
    /// Uses a token up. `until`: when it ends.
    pub(super) fn take(
        &self,
        name: &str,
        until: SystemTime,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let mut used = self
            .0
            .lock()
            .expect("nothing panics while it holds this lock");
        if used.get(name).is_some_and(|end| *end > now) {
            return Err(Refusal::Used);
        }
        if used.len() >= MOST {
            used.retain(|_, end| *end > now);
            if used.len() >= MOST {
                return Err(Refusal::Full);
            }
        }
        used.insert(name.to_owned(), until);
        Ok(())
    }
}
