//! The job summary: Markdown for people who look at the run's page.

use std::fmt::Write as _;

use crate::report::job::{CacheState, JobResult, Outcome};
use crate::report::publication::Missed;
use flywheel_core::text::{bytes, duration, one_line};

/// At most this many lost paths are listed, because GitHub drops a summary over 1 MiB; the log and the journal have
/// all.
const LISTED: usize = 100;

/// The summary of one job.
pub(crate) fn render(job: &JobResult) -> String {
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    let _ = write(&mut text, job);
    text
}

fn write(text: &mut String, job: &JobResult) -> std::fmt::Result {
    let sign = match job.outcome {
        // A green sign would be read as "all is in the cache".
        Outcome::Success if job.has_losses() => "⚠️",
        Outcome::Success => "✅",
        Outcome::Cancelled => "⚠️",
        Outcome::CommandFailed
        | Outcome::OutOfMemory
        | Outcome::NotPublished
        | Outcome::Withheld
        | Outcome::NotStarted => "❌",
    };
    writeln!(text, "### {sign} Flywheel: {}\n", job.closing_line())?;
    if let Some(found) = &job.out_of_memory {
        writeln!(
            text,
            "> **Out of memory:** {}\n",
            cell(&found.text(job.heavy_lane.as_deref()))
        )?;
    }
    if let CacheState::LeftOut {
        layer,
        text: reason,
    } = &job.cache_state
    {
        writeln!(
            text,
            "> **The cache was left out** at the layer `{layer}`: {}\n",
            cell(reason)
        )?;
    }
    for line in &job.degraded {
        writeln!(text, "> {}\n", cell(line))?;
    }
    writeln!(text, "| | |\n|---|---|")?;
    for (name, value) in rows(job) {
        writeln!(text, "| {name} | {value} |")?;
    }
    list(text, "Not watched", &job.not_watched)?;
    if let Some(publication) = &job.publication {
        list(text, "Withheld by the policy", &publication.withheld)?;
        list(
            text,
            "Published, although a rule warns",
            &publication.warned,
        )?;
        list(
            text,
            "Damaged in the cache, and repaired",
            &publication.repaired,
        )?;
        list(text, "Lost", &publication.lost)?;
        list(text, "Ambiguous, not published", &publication.ambiguous)?;
        list(text, "Sent, but not verified", &publication.unverified)?;
    }
    writeln!(text)
}

fn rows(job: &JobResult) -> Vec<(&'static str, String)> {
    let mut rows = vec![
        (
            "Outcome",
            format!("`{}`, exit code {}", job.outcome.as_str(), job.exit_code),
        ),
        ("Nix", cell(&job.nix)),
        (
            "Trust",
            format!("`{}`: {}", job.trust.verdict, cell(&job.trust.reason)),
        ),
        ("Cache", cache(job)),
        (
            "Store",
            job.store
                .as_deref()
                .map_or_else(|| "not read".to_owned(), cell),
        ),
        (
            "Paths",
            format!(
                "{} built, {} substituted, {} added",
                job.built, job.substituted, job.added
            ),
        ),
    ];
    if let Some(publication) = &job.publication {
        let counts = format!(
            "{} published ({}), {} already there, {} repaired, {} skipped, {} verified, {}",
            publication.published,
            bytes(publication.bytes),
            publication.already_there,
            publication.repaired.len(),
            publication.skipped,
            publication.verified,
            publication.losses(job.not_watched.len())
        );
        rows.push(("Publication", counts));
        rows.push(("Verification", publication.coverage.sentence()));
        let unread = publication.unread_sentence();
        rows.extend(unread.map(|text| ("Not watched", text)));
    }
    rows.push((
        "Clocks",
        format!(
            "bootstrap {}{}, command {}, publication {}",
            duration(job.bootstrap),
            job.parts_of_bootstrap(),
            duration(job.command),
            duration(job.publish)
        ),
    ));
    if let Some(peak) = job.peak {
        let limit = job
            .limit
            .map(|limit| format!(" of {}", bytes(limit)))
            .unwrap_or_default();
        rows.push(("Peak memory", format!("{}{limit}", bytes(peak))));
    }
    rows
}

fn cache(job: &JobResult) -> String {
    let url = job
        .cache
        .as_deref()
        .map(|url| format!("`{}`, ", cell(url)))
        .unwrap_or_default();
    let state = match &job.cache_state {
        CacheState::Attached => "attached".to_owned(),
        CacheState::Off => "switched off by `attic-enabled`".to_owned(),
        CacheState::NotNamed => "none named".to_owned(),
        CacheState::LeftOut { layer, .. } => format!("left out (layer `{layer}`)"),
    };
    format!("{url}{state}")
}

fn list(text: &mut String, title: &str, missed: &[Missed]) -> std::fmt::Result {
    if missed.is_empty() {
        return Ok(());
    }
    writeln!(text, "\n**{title}**\n")?;
    for one in missed.iter().take(LISTED) {
        writeln!(text, "- `{}`: {}", cell(&one.path), cell(&one.reason))?;
    }
    if missed.len() > LISTED {
        writeln!(text, "- … and {} more", missed.len() - LISTED)?;
    }
    Ok(())
}

/// Text from outside for a table cell: one line, and nothing in it that Markdown or HTML would obey.
fn cell(text: &str) -> String {
    one_line(text, 600).replace('|', "\\|").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::job::tests::example;

    #[test]
    fn a_lost_path_is_named_with_its_reason() {
        let mut job = example();
        let publication = job.publication.as_mut().expect("publishes");
        publication.lost.push(Missed {
            path: "/nix/store/x-lost".into(),
            reason: "500, five times".into(),
        });
        let text = render(&job);
        assert!(
            text.contains("1 lost") && text.contains("- `/nix/store/x-lost`: 500, five times"),
            "{text}"
        );
    }

    #[test]
    fn a_heading_over_a_loss_is_not_green() {
        let mut job = example();
        assert!(render(&job).starts_with("### ✅"));
        let publication = job.publication.as_mut().expect("publishes");
        publication.ambiguous.push(Missed {
            path: "/nix/store/x-whose".into(),
            reason: "whose is it".into(),
        });
        let text = render(&job);
        assert!(
            text.starts_with("### ⚠️") && !text.contains("0 lost"),
            "{text}"
        );
        assert!(
            text.contains("- `/nix/store/x-whose`: whose is it"),
            "{text}"
        );
    }

    #[test]
    fn text_from_outside_stays_text() {
        let mut job = example();
        job.degraded.push("<img src=x>\n# title | cell".into());
        let text = render(&job);
        assert!(text.contains("> &lt;img src=x> # title \\| cell"), "{text}");
    }

    #[test]
    fn the_layer_that_failed_is_named() {
        let mut job = example();
        job.cache_state = CacheState::LeftOut {
            layer: "connect",
            text: "connection refused".into(),
        };
        assert!(render(&job).contains("left out** at the layer `connect`: connection refused"));
    }
}
