//! Check Runs on a commit: create, update, list. A call is one request, and never retries: a write without a response
//! may have arrived, and a second one would create a second Check Run. A caller that tries again lists first.
//!
//! octocrab uses our own HTTP client, so that names are resolved, proxies used and roots trusted as everywhere else in
//! the program.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ::http::StatusCode;
use ::http::header::HeaderMap;
use chrono::{DateTime, SecondsFormat, Utc};
use octocrab::Octocrab;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use url::Url;

use flywheel_core::exit::Explain;
use flywheel_core::secret::Secret;
use flywheel_core::text::{one_line, shorten, visible};

/// GitHub's own limits of the texts (its documentation of 2026).
const TITLE_LIMIT: usize = 255;
const SUMMARY_LIMIT: usize = 65_000;
/// Annotations in one request (the same).
pub(crate) const ANNOTATIONS: usize = 50;
/// Check Runs on one page of a list (the same).
const PAGE: usize = 100;
/// At most this many pages of a list are read.
const PAGES: usize = 50;
/// The wait after a secondary rate limit without a `retry-after` header (GitHub's "Best practices for using the REST
/// API").
const SECONDARY_WAIT: Duration = Duration::from_secs(60);

/// Where a Check Run goes.
#[derive(Clone, Debug)]
pub struct Commit {
    /// The API's base address.
    pub api: Url,
    /// `owner/name`.
    pub repository: String,
    /// The commit's hash.
    pub sha: String,
}

/// How a Check Run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Conclusion {
    Success,
    Failure,
    /// There was nothing to do.
    Neutral,
    Cancelled,
}

/// The stage of a Check Run, which only ever advances within one run of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Stage {
    Queued,
    InProgress,
    Completed(Conclusion),
}

impl Stage {
    pub(crate) fn is_completed(self) -> bool {
        matches!(self, Self::Completed(_))
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Completed(_) => "completed",
        }
    }
}

/// An annotation on lines of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Annotation {
    /// The file, from the repository's root.
    pub(crate) path: String,
    /// The first line, from 1.
    pub(crate) start_line: u32,
    /// The last line.
    pub(crate) end_line: u32,
    /// `failure`, `warning` or `notice`.
    pub(crate) annotation_level: &'static str,
    /// One line.
    pub(crate) title: String,
    pub(crate) message: String,
}

impl Annotation {
    /// The same with characters shown that nobody would see. The path has to stay the file's.
    fn visible(&self) -> Self {
        Self {
            title: visible(&self.title).into_owned(),
            message: visible(&self.message).into_owned(),
            ..self.clone()
        }
    }
}

/// A Check Run as GitHub should show it.
#[derive(Clone, Debug)]
pub(crate) struct CheckRun {
    /// The name, by which branch protection requires it.
    pub(crate) name: String,
    /// Our identifier, by which we find it again.
    pub(crate) external_id: String,
    pub(crate) stage: Stage,
    /// When it began, in seconds since 1970.
    pub(crate) started_at: Option<u64>,
    /// When it ended, in seconds since 1970.
    pub(crate) completed_at: Option<u64>,
    /// One line.
    pub(crate) title: String,
    /// Markdown.
    pub(crate) summary: String,
    /// Annotations on lines, of which the first fifty are sent.
    pub(crate) annotations: Vec<Annotation>,
}

/// A Check Run that has ended.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The name, by which branch protection requires it.
    pub name: String,
    /// Our identifier, by which we find it again.
    pub external_id: String,
    pub conclusion: Conclusion,
    /// One line.
    pub title: String,
    /// Markdown.
    pub summary: String,
    /// When it ended, in seconds since 1970.
    pub ended_at: u64,
    pub took: Duration,
}

/// A Check Run that GitHub has.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Listed {
    /// GitHub's number for it.
    pub(crate) id: u64,
    /// Our identifier, if it is one of ours.
    pub(crate) external_id: Option<String>,
}

/// Why a request for a Check Run failed.
#[derive(Debug, Error)]
pub enum Error {
    /// The token does not have the rights.
    #[error("GitHub answered {status}: {text}")]
    Refused {
        status: u16,
        /// GitHub's message.
        text: String,
    },
    /// A rate limit was reached; nothing was done.
    #[error("GitHub answered {status}: {text}")]
    Limited {
        status: u16,
        /// How long to wait before the next request.
        wait: Duration,
        /// GitHub's message.
        text: String,
    },
    /// GitHub rejects the request's content, and would do so again.
    #[error("GitHub answered {status}: {text}")]
    Invalid {
        status: u16,
        /// GitHub's message.
        text: String,
    },
    /// Anything else. The request may have arrived.
    #[error("the request to GitHub failed: {0}")]
    Request(String),
}

impl Explain for Error {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Refused { .. } => Some(
                "Grant the job `checks: write`; the token of a fork's pull request never has it."
                    .into(),
            ),
            _ => None,
        }
    }
}

/// The body of a request to create or to update; an update cannot change the commit.
#[derive(Serialize)]
struct Body<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    head_sha: Option<&'a str>,
    name: &'a str,
    external_id: &'a str,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    conclusion: Option<Conclusion>,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<String>,
    output: Output,
}

#[derive(Serialize)]
struct Output {
    title: String,
    summary: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
struct Page {
    check_runs: Vec<Listed>,
}

#[derive(Deserialize)]
struct Created {
    id: u64,
}

#[derive(Deserialize, Default)]
struct ErrorBody {
    #[serde(default)]
    message: String,
}

/// The Check Runs of one commit.
#[derive(Clone, Debug)]
pub struct CheckRuns {
    github: Octocrab,
    commit: Commit,
}

impl CheckRuns {
    /// A client for the Check Runs of a commit. Sends nothing yet.
    ///
    /// # Errors
    /// When the address or the token is malformed.
    pub fn for_commit(
        commit: &Commit,
        token: &Secret,
        client: reqwest::Client,
    ) -> Result<Self, Error> {
        let broken = |error: octocrab::Error| Error::Request(one_line(&error.to_string(), 300));
        let builder = Octocrab::builder()
            .base_uri(commit.api.as_str().trim_end_matches('/'))
            .map_err(broken)?;
        // GitHub's API is versioned by date: without the header it may one day answer in another form.
        let version = "x-github-api-version".parse().expect("a header's name");
        let builder = builder.add_header(version, "2022-11-28".to_owned());
        let github = builder
            .personal_token(token.expose())
            .build_with_reqwest(client)
            .map_err(broken)?;
        Ok(Self {
            github,
            commit: commit.clone(),
        })
    }

    /// Creates a Check Run, and returns GitHub's number for it.
    ///
    /// # Errors
    /// When GitHub refuses or does not answer; in the latter case the Check Run may exist.
    pub(crate) async fn create(&self, run: &CheckRun) -> Result<u64, Error> {
        let route = format!("/repos/{}/check-runs", self.commit.repository);
        let body = body(run, Some(&self.commit.sha));
        // The underscored calls of octocrab return the raw response, which is needed because rate limits are in its
        // headers.
        let answer = self
            .github
            ._post(route, Some(&body))
            .await
            .map_err(|error| may_have_arrived(&error))?;
        let created: Created = self.read(answer).await?;
        Ok(created.id)
    }

    /// Updates a Check Run.
    ///
    /// # Errors
    /// When GitHub refuses or does not answer.
    pub(crate) async fn update(&self, id: u64, run: &CheckRun) -> Result<(), Error> {
        let route = format!("/repos/{}/check-runs/{id}", self.commit.repository);
        let answer = self
            .github
            ._patch(route, Some(&body(run, None)))
            .await
            .map_err(|error| may_have_arrived(&error))?;
        self.read::<serde::de::IgnoredAny>(answer).await.map(drop)
    }

    /// The latest Check Runs of the commit, all or those of one name.
    ///
    /// # Errors
    /// When GitHub refuses or does not answer.
    pub(crate) async fn list(&self, name: Option<&str>) -> Result<Vec<Listed>, Error> {
        let Commit {
            repository, sha, ..
        } = &self.commit;
        let mut all = Vec::new();
        for page in 1..=PAGES {
            let route = format!(
                "/repos/{repository}/commits/{sha}/check-runs?{}",
                query(page, name)
            );
            let answer = self
                .github
                ._get(route)
                .await
                .map_err(|error| may_have_arrived(&error))?;
            let found: Page = self.read(answer).await?;
            let last = found.check_runs.len() < PAGE;
            all.extend(found.check_runs);
            if last {
                break;
            }
        }
        Ok(all)
    }

    async fn read<T: serde::de::DeserializeOwned>(&self, answer: ApiResponse) -> Result<T, Error> {
        let (status, headers) = (answer.status(), answer.headers().clone());
        let text = self
            .github
            .body_to_string(answer)
            .await
            .map_err(|error| may_have_arrived(&error))?;
        if status.is_success() {
            return serde_json::from_str(&text)
                .map_err(|error| Error::Request(format!("its answer is not read: {error}")));
        }
        let error_body: ErrorBody = serde_json::from_str(&text).unwrap_or_default();
        Err(error_of(
            status,
            &headers,
            one_line(&error_body.message, 200),
        ))
    }
}

type ApiResponse =
    ::http::Response<http_body_util::combinators::BoxBody<bytes::Bytes, octocrab::Error>>;

fn query(page: usize, name: Option<&str>) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    query
        .append_pair("filter", "latest")
        .append_pair("per_page", &PAGE.to_string());
    query.append_pair("page", &page.to_string());
    if let Some(name) = name {
        query.append_pair("check_name", name);
    }
    query.finish()
}

/// The error that a response means. Rate limits are known by headers and text, as GitHub's "Rate limits for the REST
/// API" describes them.
fn error_of(status: StatusCode, headers: &HeaderMap, text: String) -> Error {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<u64>().ok();
    let status_code = status.as_u16();
    let after = number("retry-after").map(Duration::from_secs);
    let exhausted = number("x-ratelimit-remaining") == Some(0);
    let secondary = text.to_lowercase().contains("secondary rate limit");
    match status_code {
        403 | 429 if after.is_some() || exhausted || secondary || status_code == 429 => {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let reset =
                number("x-ratelimit-reset").map(|at| Duration::from_secs(at).saturating_sub(now));
            let wait = after
                .or(reset.filter(|_| exhausted))
                .unwrap_or(SECONDARY_WAIT);
            Error::Limited {
                status: status_code,
                wait,
                text,
            }
        }
        401 | 403 | 404 => Error::Refused {
            status: status_code,
            text,
        },
        400..=499 => Error::Invalid {
            status: status_code,
            text,
        },
        _ => Error::Request(format!("GitHub answered {status_code}: {text}")),
    }
}

/// Puts a finished Check Run on a commit. When a job runs again, the Check Run of before is updated.
///
/// # Errors
/// When GitHub refuses or does not answer.
pub async fn create_or_update(
    commit: &Commit,
    finished: &Finished,
    token: &Secret,
    client: reqwest::Client,
) -> Result<(), Error> {
    let runs = CheckRuns::for_commit(commit, token, client)?;
    let run = CheckRun {
        name: finished.name.clone(),
        external_id: finished.external_id.clone(),
        stage: Stage::Completed(finished.conclusion),
        started_at: Some(finished.ended_at.saturating_sub(finished.took.as_secs())),
        completed_at: Some(finished.ended_at),
        title: finished.title.clone(),
        summary: finished.summary.clone(),
        annotations: Vec::new(),
    };
    let listed = runs.list(Some(&run.name)).await;
    // A token that may write but not read creates a second Check Run, which is better than none.
    let known = listed.ok().and_then(|listed| {
        let ours =
            |listed: &Listed| listed.external_id.as_deref() == Some(run.external_id.as_str());
        listed.into_iter().find(ours)
    });
    match known {
        Some(known) => runs.update(known.id, &run).await,
        None => runs.create(&run).await.map(drop),
    }
}

fn body<'a>(run: &'a CheckRun, head_sha: Option<&'a str>) -> Body<'a> {
    let conclusion = match run.stage {
        Stage::Completed(conclusion) => Some(conclusion),
        Stage::Queued | Stage::InProgress => None,
    };
    Body {
        head_sha,
        name: &run.name,
        external_id: &run.external_id,
        status: run.stage.as_str(),
        conclusion,
        started_at: run.started_at.map(rfc3339),
        completed_at: run
            .completed_at
            .filter(|_| conclusion.is_some())
            .map(rfc3339),
        output: Output {
            title: shorten(&visible(&run.title), TITLE_LIMIT - 1),
            summary: shorten(&visible(&run.summary), SUMMARY_LIMIT),
            annotations: run
                .annotations
                .iter()
                .take(ANNOTATIONS)
                .map(Annotation::visible)
                .collect(),
        },
    }
}

/// `YYYY-MM-DDTHH:MM:SSZ`, the one form that GitHub takes.
fn rfc3339(seconds: u64) -> String {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    let time = DateTime::from_timestamp(seconds, 0).unwrap_or(DateTime::<Utc>::MAX_UTC);
    time.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// The request may have arrived.
fn may_have_arrived(error: &octocrab::Error) -> Error {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text.push_str(&format!(": {source}"));
        cause = source.source();
    }
    Error::Request(one_line(&text, 300))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_seen_is_shown() {
        let run = CheckRun {
            name: "checks".into(),
            external_id: "1".into(),
            stage: Stage::InProgress,
            started_at: None,
            completed_at: None,
            title: "a\u{202e}b".into(),
            summary: "c\u{2066}\nd".into(),
            annotations: vec![Annotation {
                path: "flake.nix".into(),
                start_line: 1,
                end_line: 1,
                annotation_level: "failure",
                title: "e\u{200b}".into(),
                message: "f\u{2028}g".into(),
            }],
        };
        let sent = serde_json::to_string(&body(&run, None)).expect("JSON");
        for shown in [
            "a\\\\u{202e}b",
            "c\\\\u{2066}\\nd",
            "e\\\\u{200b}",
            "f\\\\u{2028}g",
        ] {
            assert!(sent.contains(shown), "{shown}: {sent}");
        }
    }

    #[test]
    fn rate_limits_are_no_refusals() {
        let answer = |status: u16, headers: &[(&'static str, &str)], text: &str| {
            let headers = headers.iter().map(|(name, value)| {
                (
                    name.parse().expect("a name"),
                    value.parse().expect("a value"),
                )
            });
            error_of(
                StatusCode::from_u16(status).expect("a status"),
                &headers.collect(),
                text.to_owned(),
            )
        };
        let wait = |error: Error| match error {
            Error::Limited { wait, .. } => Some(wait.as_secs()),
            _ => None,
        };
        assert_eq!(wait(answer(403, &[("retry-after", "7")], "")), Some(7));
        assert_eq!(wait(answer(429, &[], "")), Some(60));
        assert_eq!(
            wait(answer(
                403,
                &[],
                "You have exceeded a secondary rate limit."
            )),
            Some(60)
        );
        assert_eq!(
            wait(answer(
                403,
                &[("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "1")],
                ""
            )),
            Some(0)
        );
        assert!(matches!(
            answer(403, &[("x-ratelimit-remaining", "9")], "not accessible"),
            Error::Refused { .. }
        ));
        assert!(matches!(answer(422, &[], ""), Error::Invalid { .. }));
        assert!(matches!(answer(502, &[], ""), Error::Request(_)));
    }

    #[test]
    fn time_stamps_match_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_767_225_600, "2026-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
        // The web's own form of dates agrees for every day of forty years.
        for day in 0..15_000 {
            let time: SystemTime = UNIX_EPOCH + Duration::from_secs(day * 86_400);
            let web = httpdate::fmt_http_date(time);
            assert_eq!(web[5..7], rfc3339(day * 86_400)[8..10], "{web}");
        }
    }
}
