//! Shows progress: a bar on a terminal, a line every few seconds in a log.

use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use flywheel_core::progress::{Progress, Sink};
use flywheel_core::text::bytes;
use flywheel_sys::runner::workflow::{Level, Workflow};

/// How often a log gets a line about the progress of a publication.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Draws progress, and keeps what went worse than it should so far.
#[derive(Clone)]
pub(crate) struct Screen(Arc<Inner>);

struct Inner {
    workflow: Workflow,
    bar: Option<ProgressBar>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    degraded: Vec<String>,
    last_line: Option<Instant>,
    /// Events that wait while the command's output has the screen for itself.
    held: Option<Vec<Progress>>,
}

impl Screen {
    /// Draws on the terminal if stderr is one and this is no job, else in the log.
    pub(crate) fn new(workflow: &Workflow) -> Self {
        let on_terminal = !workflow.in_job() && std::io::stderr().is_terminal();
        let bar = on_terminal.then(|| {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} paths {msg}");
            let bar = ProgressBar::hidden();
            bar.set_style(style.expect("the template is a constant that indicatif accepts"));
            bar
        });
        Self(Arc::new(Inner {
            workflow: workflow.clone(),
            bar,
            state: Mutex::default(),
        }))
    }

    /// A sink for events that draws them here.
    pub(crate) fn sink(&self) -> Sink {
        let screen = self.clone();
        Sink::new(move |event| screen.show(event))
    }

    /// What went worse than it should so far, one line each.
    pub(crate) fn degraded(&self) -> Vec<String> {
        self.state().degraded.clone()
    }

    /// Removes the bar.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.0.bar {
            bar.finish_and_clear();
        }
    }

    /// Holds every event back from here on: the command's output has the screen for itself.
    pub(crate) fn hold(&self) {
        self.state().held.get_or_insert_default();
    }

    /// Draws the events that were held back, and from here on each as it comes.
    pub(crate) fn release(&self) {
        let held = self.state().held.take();
        for event in held.into_iter().flatten() {
            self.show(event);
        }
    }

    /// Logs a line at once if events are held back, for what cannot wait for the command's end. Whether they were.
    pub(crate) fn log_if_held(&self, line: &str) -> bool {
        let is_held = self.state().held.is_some();
        if is_held {
            self.log(line);
        }
        is_held
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0
            .state
            .lock()
            .expect("nothing panics while it holds this lock")
    }

    fn show(&self, event: Progress) {
        if let Some(held) = &mut self.state().held {
            // Progress is out of date by the time that it could be drawn.
            if !matches!(event, Progress::Moved { .. }) {
                held.push(event);
            }
            return;
        }
        match event {
            Progress::Note(line) => self.log(&line),
            Progress::Degraded { area, text } => self.warn(area, &text),
            Progress::Moved {
                done,
                total,
                bytes: sent,
            } => self.moved(done, total, sent),
        }
    }

    fn log(&self, line: &str) {
        match &self.0.bar {
            Some(bar) => bar.suspend(|| self.0.workflow.log(line)),
            None => self.0.workflow.log(line),
        }
    }

    fn warn(&self, area: &str, text: &str) {
        let line = format!("{area}: {text}");
        let mut state = self.state();
        if state.degraded.contains(&line) {
            return;
        }
        state.degraded.push(line);
        drop(state);
        self.0.workflow.annotate(Level::Warning, area, text);
    }

    fn moved(&self, done: u64, total: u64, sent: u64) {
        if let Some(bar) = &self.0.bar {
            if bar.is_hidden() {
                bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            }
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(bytes(sent));
            return;
        }
        let mut state = self.state();
        // The first line comes only after a while: a short publication needs none.
        let last = *state.last_line.get_or_insert_with(Instant::now);
        if last.elapsed() >= PROGRESS_INTERVAL {
            state.last_line = Some(Instant::now());
            drop(state);
            self.0.workflow.log(&format!(
                "publishing: {done} of {total} paths, {}",
                bytes(sent)
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_degraded_is_kept_once() {
        let screen = Screen::new(&Workflow::new(false));
        screen.sink().degraded("cache", "connection refused");
        screen.sink().degraded("cache", "connection refused");
        assert_eq!(screen.degraded(), ["cache: connection refused"]);
    }
}
