//! Questions on the terminal, each with an answer that Enter gives.

use std::fmt::Display;
use std::io::{self, BufRead as _, IsTerminal as _, Write as _};

use crate::inputs::value::Invalid;
use flywheel_core::exit::{Explain, VerbError};

/// Wrong answers to one question before it gives up.
const TRIES: usize = 3;

/// Who is asked: somebody at the terminal, or nobody.
pub(super) struct Questions {
    asks: bool,
}

/// Nobody gave an answer that could be used.
#[derive(Debug, thiserror::Error)]
#[error("no answer to the question for {0}")]
struct NoAnswer(String);

impl Explain for NoAnswer {
    fn hint(&self) -> Option<String> {
        Some(
            "Give it as a flag: `flywheel init --help` has all of them. Nothing was written."
                .into(),
        )
    }
}

impl Questions {
    /// `silent` asks nothing even on a terminal.
    pub(super) fn new(silent: bool) -> Self {
        let asks = !silent && io::stdin().is_terminal() && io::stderr().is_terminal();
        Self { asks }
    }

    /// Tells the user something; the standard output is the result's alone.
    #[expect(clippy::unused_self, reason = "the same voice that asks")]
    pub(super) fn say(&self, text: &str) {
        // A closed stderr is no reason to fail.
        let _ = writeln!(io::stderr(), "{}", text.trim_end());
    }

    /// Asks for a value; Enter takes `found`, and so does a run without a terminal.
    ///
    /// # Errors
    /// When no answer can be used.
    pub(super) fn ask<T: Clone + Display>(
        &mut self,
        what: &str,
        found: &T,
        read: impl Fn(&str) -> Result<T, Invalid>,
    ) -> Result<T, VerbError> {
        let answer = self.answer(&format!("{what} [{found}]"), what, |line| match line {
            "" => Ok(found.clone()),
            _ => read(line),
        })?;
        Ok(answer.unwrap_or_else(|| found.clone()))
    }

    /// Asks for a value that nothing stands in for; `None` where nobody can be asked.
    ///
    /// # Errors
    /// When no answer can be used.
    pub(super) fn require<T>(
        &mut self,
        what: &str,
        read: impl Fn(&str) -> Result<T, Invalid>,
    ) -> Result<Option<T>, VerbError> {
        self.answer(what, what, read)
    }

    fn answer<T>(
        &mut self,
        question: &str,
        what: &str,
        read: impl Fn(&str) -> Result<T, Invalid>,
    ) -> Result<Option<T>, VerbError> {
        if !self.asks {
            return Ok(None);
        }
        for _ in 0..TRIES {
            let _ = write!(io::stderr(), "{question}: ");
            let _ = io::stderr().flush();
            let mut line = String::new();
            match io::stdin().lock().read_line(&mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            match read(line.trim()) {
                Ok(value) => return Ok(Some(value)),
                Err(invalid) => self.say(&format!("This {invalid}.")),
            }
        }
        Err(NoAnswer(what.to_owned()).into())
    }
}
