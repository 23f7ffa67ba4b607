//! Lines, table and file of what the runs came to.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

use crate::cells::Cell;
use crate::run::Run;
use crate::verdict::{Job, Verdict};

/// The most paths that a failure names.
const NAMED: usize = 3;

/// Every run with its verdict and its seconds.
#[derive(Default)]
pub(crate) struct Table(Vec<(Run, Verdict, f64)>);

impl Table {
    pub(crate) fn add(&mut self, run: Run, verdict: Verdict, seconds: f64) {
        self.0.push((run, verdict, seconds));
    }

    pub(crate) fn holds(&self) -> bool {
        self.0.iter().all(|(_, verdict, _)| verdict.holds())
    }

    /// One JSON document a line for each run.
    pub(crate) fn write(&self, file: &Path) {
        let mut text = String::new();
        for (run, verdict, seconds) in &self.0 {
            let jobs: Vec<serde_json::Value> = verdict.jobs.iter().map(json).collect();
            let value = serde_json::json!({
                "cell": run.cell.to_string(), "seed": run.seed, "seconds": seconds, "holds": verdict.holds(),
                "broken": verdict.broken, "jobs": jobs,
            });
            text.push_str(&format!("{value}\n"));
        }
        fs::write(file, text).unwrap();
    }

    /// What became of each path of a job of less trust, and why.
    fn write_foreign(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.0.iter();
        let jobs =
            runs.flat_map(|(run, verdict, _)| verdict.jobs.iter().map(move |job| (run, job)));
        for (run, job) in jobs {
            for one in &job.foreign {
                let end = match (one.is_published, one.how.as_str()) {
                    (true, _) => "PUBLISHED",
                    (false, "refused") => "refused by the store, so built by the job itself",
                    (false, _) => "not published",
                };
                let reason = one.reason.as_deref().unwrap_or("not named");
                writeln!(
                    f,
                    "{} seed {}: {}: {end}; {reason}",
                    run.cell, run.seed, one.how
                )?;
            }
        }
        Ok(())
    }

    fn cell(&self, cell: Cell) -> String {
        let runs: Vec<_> = self.0.iter().filter(|(run, ..)| run.cell == cell).collect();
        let failed = runs
            .iter()
            .filter(|(_, verdict, _)| !verdict.holds())
            .count();
        let reported = runs
            .iter()
            .filter(|(_, verdict, _)| missing(verdict) > 0)
            .count();
        match (runs.len(), failed, reported) {
            (0, ..) => "·".to_owned(),
            (all, 0, 0) => format!("{all}"),
            (all, 0, some) => format!("{all} r{some}"),
            (all, failed, _) => format!("{all} F{failed}"),
        }
    }
}

fn json(job: &Job) -> serde_json::Value {
    serde_json::json!({
        "name": job.name, "exit": job.exit, "line": job.line, "results": job.results, "missing": job.missing,
        "silent": job.silent, "overclaimed": job.overclaimed, "forged": job.forged,
    })
}

fn missing(verdict: &Verdict) -> usize {
    verdict.jobs.iter().map(|job| job.missing.len()).sum()
}

/// The table, the totals, and each failure with the command that shows it again.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells: BTreeSet<Cell> = self.0.iter().map(|(run, ..)| run.cell).collect();
        let shapes: Vec<&str> = column(&cells, |cell| cell.shape);
        let mut rows: BTreeMap<(&str, &str), ()> = BTreeMap::new();
        rows.extend(cells.iter().map(|cell| ((cell.kind, cell.version), ())));
        writeln!(
            f,
            "Runs of each cell; rN: in N of them paths are missing and reported; FN: N of them fail.\n"
        )?;
        write!(f, "{:<18}", "")?;
        for shape in &shapes {
            write!(f, " {shape:>9}")?;
        }
        writeln!(f)?;
        for (kind, version) in rows.into_keys() {
            write!(f, "{:<18}", format!("{kind} {version}"))?;
            for shape in &shapes {
                let cell = cells
                    .iter()
                    .find(|cell| (cell.kind, cell.version, cell.shape) == (kind, version, *shape));
                let text = cell.map_or_else(|| "·".to_owned(), |cell| self.cell(*cell));
                write!(f, " {text:>9}")?;
            }
            writeln!(f)?;
        }
        let jobs: Vec<&Job> = self
            .0
            .iter()
            .flat_map(|(_, verdict, _)| &verdict.jobs)
            .collect();
        let sum = |count: fn(&Job) -> usize| -> usize { jobs.iter().map(|job| count(job)).sum() };
        writeln!(
            f,
            "\n{} runs, {} jobs, {} results: {} missing, {} of them silently; {} called lost although they are there; {} forged",
            self.0.len(),
            jobs.len(),
            sum(|job| job.results),
            sum(|job| job.missing.len()),
            sum(|job| job.silent.len()),
            sum(|job| job.overclaimed.len()),
            sum(|job| job.forged.len()),
        )?;
        self.write_foreign(f)?;
        let failed: Vec<_> = self
            .0
            .iter()
            .filter(|(_, verdict, _)| !verdict.holds())
            .collect();
        writeln!(f, "{} of {} runs fail", failed.len(), self.0.len())?;
        for (run, verdict, _) in failed {
            writeln!(
                f,
                "FAILED {} seed {}: {}",
                run.cell,
                run.seed,
                reasons(verdict)
            )?;
            writeln!(
                f,
                "       just matrix --cell {} --seed {}",
                run.cell, run.seed
            )?;
        }
        Ok(())
    }
}

/// The different values of a dimension, in the order of the matrix.
fn column(cells: &BTreeSet<Cell>, value: impl Fn(&Cell) -> &'static str) -> Vec<&'static str> {
    let present: BTreeSet<&str> = cells.iter().map(&value).collect();
    let mut ordered: Vec<&'static str> = Vec::new();
    for cell in crate::cells::all() {
        let value = value(&cell);
        if present.contains(value) && !ordered.contains(&value) {
            ordered.push(value);
        }
    }
    ordered
}

/// One line about a run, as soon as it is over.
pub(crate) fn line(run: &Run, verdict: &Verdict, seconds: f64) -> String {
    let word = match (verdict.holds(), missing(verdict)) {
        (true, 0) => "ok",
        (true, _) => "reported",
        (false, _) => "FAILED",
    };
    let lines: Vec<&str> = verdict.jobs.iter().map(|job| job.line.as_str()).collect();
    format!(
        "{word:<8} {:<26} seed {:<5} {seconds:4.1} s  {}",
        run.cell.to_string(),
        run.seed,
        lines.join(" | ")
    )
}

/// Why a run fails.
fn reasons(verdict: &Verdict) -> String {
    let mut reasons: Vec<String> = verdict.broken.iter().cloned().collect();
    for job in &verdict.jobs {
        if job.exit != "0" {
            reasons.push(format!("job {}: exit {}", job.name, job.exit));
        }
        if job.line.is_empty() {
            reasons.push(format!("job {}: no closing line", job.name));
        }
        for (paths, what) in [
            (&job.silent, "missing and not reported"),
            (&job.forged, "published and not its own"),
        ] {
            if !paths.is_empty() {
                let mut some = paths
                    .iter()
                    .take(NAMED)
                    .cloned()
                    .collect::<Vec<_>>()
                    .join(" ");
                if paths.len() > NAMED {
                    some.push_str(" …");
                }
                reasons.push(format!(
                    "job {}: {} of {} {what} ({some})",
                    job.name,
                    paths.len(),
                    job.results
                ));
            }
        }
    }
    reasons.join("; ")
}
