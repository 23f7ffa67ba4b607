//! The job summary: Markdown for people who look at the run's page. In this order: one headline that is true, what
//! failed, what is missing, and the details folded.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::report::job::{CacheState, FailedBuild, JobResult, Outcome, Work};
use crate::report::publication::{Missed, Publication};
use flywheel_core::markdown::{code, fenced};
use flywheel_core::text::{bytes, count, duration, one_line};

/// At most this many paths of a list are shown, because GitHub drops a summary over 1 MiB; the log and the journal have
/// all.
const LISTED: usize = 100;
/// What to do about a path that the policy keeps back.
const WITHHELD: &str =
    "Take what was found out of the build, or except the path by `policy-allow` with a reason.";
/// So many failed builds are listed.
const FAILURES: usize = 20;

/// The summary of one job.
pub(crate) fn render(job: &JobResult) -> String {
    let mut text = String::new();
    // Writing to a `String` cannot fail.
    let _ = write(&mut text, job);
    text
}

fn write(text: &mut String, job: &JobResult) -> std::fmt::Result {
    let headline = headline(job);
    let closing_line = job.closing_line();
    writeln!(text, "### {} Flywheel: {headline}\n", sign(job))?;
    // The numbers of a publication that was not tried are noughts.
    if job.publication.is_none() {
        writeln!(text, "Not publishing: {}\n", cell(&job.unpublished))?;
    } else if headline != closing_line {
        writeln!(text, "{closing_line}\n")?;
    }
    if let Some(found) = &job.out_of_memory {
        writeln!(
            text,
            "**Out of memory:** {}\n",
            cell(&found.text(job.heavy_lane.as_deref()))
        )?;
    }
    failed_builds(text, &job.failed_builds)?;
    if let Some(found) = job.disk.full_text() {
        writeln!(text, "**Disk full:** {}\n", cell(&found))?;
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
    list(text, "Not watched", &job.not_watched)?;
    if let Some(publication) = &job.publication {
        list(text, "Lost", &publication.lost)?;
        list(text, "Ambiguous, not published", &publication.ambiguous)?;
        list(text, "Sent, but not verified", &publication.unverified)?;
        list(text, "Withheld by the policy", &publication.withheld)?;
        if !publication.withheld.is_empty() {
            writeln!(text, "{WITHHELD}\n")?;
        }
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
    }
    writeln!(text, "<details><summary>Details</summary>\n")?;
    for (name, value) in rows(job) {
        writeln!(text, "- **{name}:** {value}")?;
    }
    writeln!(text, "\n</details>\n")
}

fn sign(job: &JobResult) -> &'static str {
    match job.outcome {
        // A green sign would be read as "all is in the cache".
        Outcome::Success if job.has_losses() => "⚠️",
        Outcome::Success => "✅",
        Outcome::Cancelled => "⚠️",
        // The outputs that failed have a heading of their own.
        Outcome::CommandFailed if job.work == Work::Outputs && job.has_losses() => "⚠️",
        Outcome::CommandFailed if job.work == Work::Outputs => "✅",
        Outcome::CommandFailed
        | Outcome::OutOfMemory
        | Outcome::DiskFull
        | Outcome::NotPublished
        | Outcome::Withheld
        | Outcome::NotStarted => "❌",
    }
}

/// What a person wants to know first.
fn headline(job: &JobResult) -> String {
    let code = job.exit_code;
    match job.outcome {
        Outcome::Success if job.has_losses() => format!("not all is in the cache: {}", losses(job)),
        Outcome::CommandFailed if job.work == Work::Outputs => job.closing_line(),
        Outcome::Success => match &job.publication {
            Some(publication) if publication.published + publication.verified > 0 => {
                job.closing_line()
            }
            Some(publication) => format!(
                "nothing new to publish: {} built, {} already in the cache, 0 lost",
                job.built, publication.already_there
            ),
            None => format!(
                "{} built, {} substituted; nothing is published",
                job.built, job.substituted
            ),
        },
        Outcome::CommandFailed => match names(&job.failed_builds) {
            Some(names) => format!("{names} (exit code {code})"),
            None => format!("the command failed with exit code {code}"),
        },
        Outcome::OutOfMemory => format!("the command ran out of memory (exit code {code})"),
        Outcome::DiskFull => format!("a disk was full (exit code {code})"),
        Outcome::Cancelled => "cancelled while the command ran".to_owned(),
        Outcome::NotPublished => format!(
            "the command succeeded, but `require-publish` is not met: {}",
            missing(job)
        ),
        Outcome::Withheld => {
            let withheld = job
                .publication
                .as_ref()
                .map_or(0, |found| found.withheld.len());
            format!(
                "the command succeeded, but the policy withholds {}",
                count(withheld as u64, "path")
            )
        }
        Outcome::NotStarted => "the command was not run".to_owned(),
    }
}

fn losses(job: &JobResult) -> String {
    let nothing = Publication::default();
    let publication = job.publication.as_ref().unwrap_or(&nothing);
    let losses = publication.losses(job.not_watched.len());
    match publication.unverified.len() {
        0 => losses,
        // A nought in front of what is wrong would be read first.
        unverified if losses == "0 lost" => format!("{unverified} unverified"),
        unverified => format!("{losses}, {unverified} unverified"),
    }
}

/// Why `require-publish` is not met.
fn missing(job: &JobResult) -> String {
    if job.publication.is_none() && job.not_watched.is_empty() {
        format!("nothing is published, {}", cell(&job.unpublished))
    } else {
        losses(job)
    }
}

/// `the build of good failed`, `the builds of good, bad and 3 more failed`.
fn names(failed: &[FailedBuild]) -> Option<String> {
    const NAMED: usize = 3;
    let named: Vec<String> = failed
        .iter()
        .take(NAMED)
        .map(|build| code(&build.name))
        .collect();
    match failed.len() {
        0 => None,
        1 => Some(format!("the build of {} failed", named[0])),
        all if all > NAMED => Some(format!(
            "the builds of {} and {} more failed",
            named.join(", "),
            all - NAMED
        )),
        _ => {
            let (last, others) = named.split_last()?;
            Some(format!(
                "the builds of {} and {last} failed",
                others.join(", ")
            ))
        }
    }
}

/// The failed builds, each with the end of its log, the first one unfolded.
fn failed_builds(text: &mut String, failed: &[FailedBuild]) -> std::fmt::Result {
    for (n, build) in failed.iter().take(FAILURES).enumerate() {
        let by_hand = code(&format!("nix log {}", build.derivation));
        if build.log_tail.is_empty() {
            writeln!(text, "The log of {}: {by_hand}\n", code(&build.name))?;
            continue;
        }
        let open = if n == 0 { " open" } else { "" };
        writeln!(
            text,
            "<details{open}><summary>The end of the log of <code>{}</code></summary>\n\n{}\n\nThe whole log: {by_hand}\n\n</details>\n",
            build.name,
            fenced(&build.log_tail.join("\n"))
        )?;
    }
    if failed.len() > FAILURES {
        writeln!(
            text,
            "… and {} more builds failed.\n",
            failed.len() - FAILURES
        )?;
    }
    Ok(())
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
    rows.extend(warmth(job).map(|text| ("From caches", text)));
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
    let room = job.disk.lowest();
    rows.extend(room.map(|text| ("Lowest free room", cell(&text))));
    let freed = job.disk.freed();
    rows.extend(freed.map(|text| ("Freed in the store", text)));
    rows
}

/// How much of what the job needed came from caches: the times of a cold and of a warm run are not to be compared.
fn warmth(job: &JobResult) -> Option<String> {
    let all = job.built + job.substituted;
    let percent = (job.substituted * 100).checked_div(all)?;
    Some(format!(
        "{} of {} that the store lacked ({percent} %)",
        job.substituted,
        count(all, "path")
    ))
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

/// Lists paths below each reason, so that one that many share stands once.
fn list(text: &mut String, title: &str, missed: &[Missed]) -> std::fmt::Result {
    if missed.is_empty() {
        return Ok(());
    }
    let mut by_reason: BTreeMap<String, Vec<&Missed>> = BTreeMap::new();
    for one in missed.iter().take(LISTED) {
        // A reason that names the path itself is that path's alone.
        by_reason.entry(cell(&one.reason)).or_default().push(one);
    }
    writeln!(text, "**{title}**\n")?;
    let mut by_reason: Vec<_> = by_reason.into_iter().collect();
    // What struck many is the cause more often than what struck one.
    by_reason.sort_by_key(|(_, paths)| std::cmp::Reverse(paths.len()));
    for (reason, paths) in by_reason {
        if let [one] = paths[..] {
            writeln!(text, "- `{}`: {reason}", cell(&one.path))?;
            continue;
        }
        writeln!(text, "- {} of them: {reason}", paths.len())?;
        for one in paths {
            writeln!(text, "  - `{}`", cell(&one.path))?;
        }
    }
    if missed.len() > LISTED {
        writeln!(text, "- … and {} more", missed.len() - LISTED)?;
    }
    writeln!(text)
}

/// Text from outside in one line, and nothing in it that Markdown or HTML would obey.
fn cell(text: &str) -> String {
    one_line(text, 600).replace('|', "\\|").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::report::job::tests::example;
    use flywheel_core::budget::{Observed, out_of_memory};
    use flywheel_testing::golden;

    fn missed(name: &str, reason: &str) -> Missed {
        Missed {
            path: format!("/nix/store/cxxib9y6zslr9m7x7r0n9d7sx7v1xm55-{name}"),
            reason: reason.to_owned(),
        }
    }

    fn changed(change: impl FnOnce(&mut JobResult, &mut Publication)) -> JobResult {
        let mut job = example();
        let mut publication = job.publication.take().expect("publishes");
        change(&mut job, &mut publication);
        job.publication = Some(publication);
        job
    }

    #[test]
    fn success() {
        let job = changed(|job, publication| {
            (job.built, job.substituted, job.added) = (412, 1236, 1648);
            job.command = Duration::from_secs(754);
            publication.bytes = 1_300_000_000;
            (publication.published, publication.verified) = (412, 412);
            (publication.coverage.sent, publication.coverage.sent_read) = (412, 412);
        });
        golden("success", &render(&job));
    }

    #[test]
    fn failure() {
        let job = changed(|job, publication| {
            (job.outcome, job.exit_code) = (Outcome::CommandFailed, 1);
            (job.built, publication.published, publication.verified) = (2, 2, 2);
            let build = |name: &str, log: &[&str]| FailedBuild {
                derivation: format!("/nix/store/cxxib9y6zslr9m7x7r0n9d7sx7v1xm55-{name}.drv"),
                name: name.to_owned(),
                log_tail: log.iter().map(|line| (*line).to_owned()).collect(),
            };
            let log = [
                "running tests",
                "test parse ... ok",
                "test `write` ... FAILED",
                "error: 1 of 2 tests failed",
            ];
            job.failed_builds = vec![build("parser-1.2", &log), build("docs", &[])];
        });
        golden("failure", &render(&job));
    }

    #[test]
    fn out_of_memory_and_what_to_do() {
        let mut job = example();
        (job.outcome, job.exit_code) = (Outcome::OutOfMemory, 137);
        (job.peak, job.limit) = (Some(8 << 30), Some(8 << 30));
        job.out_of_memory = out_of_memory(&Observed {
            killed_in_group: 1,
            killed_on_machine: 0,
            failed: true,
            limit: job.limit,
            peak: job.peak,
        });
        job.heavy_lane = Some("nix-heavy".into());
        golden("out-of-memory", &render(&job));
    }

    #[test]
    fn cancelled() {
        let job = changed(|job, publication| {
            (job.outcome, job.exit_code) = (Outcome::Cancelled, 130);
            publication.lost = vec![missed(
                "docs",
                "the job was cancelled before it was sent; kept for the next job (journal)",
            )];
        });
        golden("cancelled", &render(&job));
    }

    #[test]
    fn read_only() {
        let mut job = example();
        job.publication = None;
        (job.built, job.substituted) = (1, 3);
        job.trust.verdict = "read-only";
        job.trust.reason = "`pull_request` only reads".into();
        job.unpublished.clone_from(&job.trust.reason);
        golden("read-only", &render(&job));
    }

    #[test]
    fn lost() {
        let reason = "the cache answered 507 (insufficient storage), five times; kept for the next job (journal)";
        let job = changed(|job, publication| {
            job.built = 7;
            publication.lost = ["parser-1.2", "server-1.2", "client-1.2"]
                .map(|path| missed(path, reason))
                .into();
            publication.lost.push(missed(
                "image-1.2",
                "refers to `/nix/store/cxxib9y6zslr9m7x7r0n9d7sx7v1xm55-server-1.2`, which is lost",
            ));
        });
        golden("lost", &render(&job));
    }

    #[test]
    fn withheld() {
        let job = changed(|job, publication| {
            (job.outcome, job.exit_code) = (Outcome::Withheld, 1);
            publication.withheld = vec![missed(
                "config",
                "secret: a private key at /nix/store/cxxib9y6zslr9m7x7r0n9d7sx7v1xm55-config/key, byte 0",
            )];
        });
        golden("withheld", &render(&job));
    }

    #[test]
    fn watch_store() {
        let job = changed(|job, _| {
            job.work = crate::report::job::Work::OtherSteps;
            (job.substituted, job.command) = (9, Duration::from_secs(75));
        });
        golden("watch-store", &render(&job));
    }

    #[test]
    fn required_publication_that_does_not_hold() {
        let job = changed(|job, publication| {
            (job.outcome, job.exit_code) = (Outcome::NotPublished, 1);
            job.command = Duration::from_secs(75);
            publication.unverified = vec![missed("docs", "the deadline was over")];
        });
        golden("not-published", &render(&job));
    }

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
    fn a_full_disk_is_named_with_its_lowest_room_and_the_remedy() {
        use flywheel_core::disk::{DiskUse, Reclaimed, Room, disk_full};
        let mut job = example();
        assert!(!render(&job).contains("room"));
        let lowest = Room {
            total: 64 << 20,
            ..Room::default()
        };
        let disk = DiskUse {
            name: "/nix (tmpfs)".into(),
            holds: vec!["the store `/nix/store`".into()],
            has_store: true,
            lowest,
            last: lowest,
            full_before_end: Some(Duration::ZERO),
            refuses: false,
        };
        job.outcome = Outcome::DiskFull;
        job.disk.full = disk_full(std::slice::from_ref(&disk), true, false);
        job.disk.low = vec![disk];
        job.disk.reclaimed = Reclaimed {
            paths: 2,
            size: 1 << 20,
        };
        let text = render(&job);
        for part in [
            "### ❌",
            "\n**Disk full:** `/nix (tmpfs)`",
            "`reclaim: true`",
            "- **Lowest free room:** 0 B of 64.0 MiB on /nix (tmpfs)",
            "- **Freed in the store:** 2 paths of this job's own, of 1.0 MiB",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
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
