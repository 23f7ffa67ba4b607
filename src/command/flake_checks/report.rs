//! The report of a run at its end: log lines, annotations, files for other tools, summary and outputs.

use crate::command::flake_checks::{FlakeChecks, RunResult};
use crate::job::JobReport;
use crate::report::job::JobResult;
use flywheel_core::text::{count, one_line};
use flywheel_github::checks::board::ReportStats;
use flywheel_github::checks::text::{annotation, title};
use flywheel_github::checks::{Conclusion, files, summary};
use flywheel_sys::runner::files::Files;
use flywheel_sys::runner::workflow::Level;

/// GitHub shows ten annotations of a kind of a step.
const ANNOTATIONS: usize = 10;

impl FlakeChecks<'_> {
    pub(super) fn log_check_runs(&self, stats: Option<ReportStats>) {
        let Some(stats) = stats else { return };
        self.session.workflow.log(&format!(
            "flywheel: {} shown, in {}",
            count(stats.shown as u64, "Check Run"),
            count(stats.requests as u64, "request")
        ));
        if !stats.missing.is_empty() {
            let names = one_line(&stats.missing.join(", "), 500);
            let text = format!(
                "{} could not be shown: {names}. The summary has them.",
                stats.missing.len()
            );
            // One warning is enough.
            if stats.is_explained {
                self.session.sink.note(format!("flywheel: {text}"));
            } else {
                self.session.sink.degraded("check runs", text);
            }
        }
    }

    /// Writes the log's last lines, annotations, files, summary and outputs.
    pub(super) fn report(&self, job: &JobResult, ran: &RunResult) {
        for label in &ran.wrong {
            let text = format!(
                "what was remembered of `{label}` is not what it evaluates to; the memory is corrected: this is a defect of Flywheel, please report it"
            );
            self.session
                .workflow
                .annotate(Level::Error, "evaluation memory", &text);
        }
        let ended = ran.ended();
        let files = Files::from_env(self.session.env);
        self.mark_lines(&ended);
        self.write_files(&ended);
        self.session
            .workflow
            .log(&format!("flywheel: {}", summary::closing_line(&ended)));
        let times = [
            ("evaluation-seconds", ran.evaluation),
            ("build-seconds", ran.build),
        ];
        let times = times.map(|(name, time)| (name, format!("{:.3}", time.as_secs_f64())));
        let number = |conclusion| {
            ended
                .iter()
                .filter(|(_, verdict)| verdict.conclusion() == conclusion)
                .count()
                .to_string()
        };
        let counts = [
            ("outputs", ended.len().to_string()),
            ("succeeded", number(Conclusion::Success)),
            ("failed", number(Conclusion::Failure)),
            ("cached", number(Conclusion::Neutral)),
            ("cancelled", number(Conclusion::Cancelled)),
            ("remembered", ran.remembered.to_string()),
        ];
        let shown = summary::with_logs(&ended, &ran.not_looked_at);
        let mut written = files.add_summary(&shown);
        for (name, value) in counts.into_iter().chain(times) {
            written = written.and_then(|()| files.set_output(name, &value));
        }
        if let Err(error) = written {
            self.session.workflow.annotate(
                Level::Warning,
                "report",
                &format!("the report could not be written: {error}"),
            );
        }
        JobReport::new(job).emit(&self.session.workflow, &files);
    }

    /// Annotates each output that failed, on the source line that is wrong where it is known. Where there are no Check
    /// Runs, these are what the run's page shows.
    fn mark_lines(&self, ended: &[summary::Ended<'_>]) {
        let failed = ended
            .iter()
            .filter(|(_, verdict)| verdict.conclusion() == Conclusion::Failure);
        for (output, verdict) in failed.take(ANNOTATIONS) {
            let label = one_line(&output.label, 100);
            if let (Some(location), Some(text)) = (verdict.cause.location(), annotation(verdict)) {
                self.session.workflow.annotate_line(
                    Level::Error,
                    &label,
                    &text,
                    &location.file,
                    location.line,
                    location.column,
                );
            } else {
                self.session
                    .workflow
                    .annotate(Level::Error, &label, &title(verdict));
            }
        }
    }

    /// Writes the files that other tools read. One that cannot be written is a warning.
    fn write_files(&self, ended: &[summary::Ended<'_>]) {
        let junit = self
            .plan
            .junit
            .as_ref()
            .map(|file| (file, files::junit(&self.plan.check_name, ended)));
        let lines = self
            .plan
            .json_lines
            .as_ref()
            .map(|file| (file, files::json_lines(ended)));
        for (file, text) in junit.into_iter().chain(lines) {
            if let Err(error) = std::fs::write(file, text) {
                let text = format!("`{}` could not be written: {error}", file.display());
                self.session
                    .workflow
                    .annotate(Level::Warning, "report", &text);
            }
        }
    }
}
