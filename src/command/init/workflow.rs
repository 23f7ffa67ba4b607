//! The workflow as text. Every value in it was checked when it was read, so that it stands in YAML as it is.

use std::fmt;

use crate::inputs::value::Invalid;
use url::Url;

use crate::inputs::{Address, cache_name, http_address};
use flywheel_core::text::one_line;
use flywheel_nix::cache_name::CacheName;

/// Pinned by commit, since a tag can be moved. `tests/it/init.rs` compares it with what our own workflows use.
const CHECKOUT: &str = "actions/checkout@de0fac2e4500dabe0009e67214ff5f5447ce83dd # v6.0.2";
/// Restores and saves a folder; pinned likewise.
const CACHE: [&str; 2] = [
    "actions/cache/restore@0057852bfaa89a56745cba8c7296529d2fc39830 # v4.3.0",
    "actions/cache/save@0057852bfaa89a56745cba8c7296529d2fc39830 # v4.3.0",
];
/// The folder of the embedded cache, below the checkout's parent, so that it is no part of a flake's source.
const EMBEDDED: &str = "${{ runner.temp }}/flywheel-cache";
/// The runner where nothing names another.
const HOSTED: &str = "ubuntu-24.04";

/// The repository and the version of Flywheel's actions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Actions {
    repository: String,
    reference: String,
}

impl Actions {
    /// Reads `OWNER/NAME@REF`.
    pub(super) fn parse(text: &str) -> Result<Self, Invalid> {
        let invalid = || {
            Invalid::new(format!(
                "must be OWNER/NAME@REF, such as `octo-org/flywheel@main`, not `{}`",
                one_line(text, 100)
            ))
        };
        let is_name = |text: &str| is_made_of(text, "._-");
        let (repository, reference) = text.split_once('@').ok_or_else(invalid)?;
        let (owner, name) = repository.split_once('/').ok_or_else(invalid)?;
        if is_name(owner) && is_name(name) && is_made_of(reference, "._-/") {
            let (repository, reference) = (repository.to_owned(), reference.to_owned());
            return Ok(Self {
                repository,
                reference,
            });
        }
        Err(invalid())
    }
}

impl fmt::Display for Actions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.repository, self.reference)
    }
}

/// The labels that a runner must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Runner(Vec<String>);

impl Runner {
    /// Reads labels with commas between them.
    pub(super) fn parse(text: &str) -> Result<Self, Invalid> {
        let labels: Vec<&str> = text.split(',').map(str::trim).collect();
        match labels.iter().find(|label| !is_made_of(label, "._-")) {
            None => Ok(Self(labels.into_iter().map(str::to_owned).collect())),
            Some(wrong) => Err(Invalid::new(format!(
                "must be labels of letters, digits, `.`, `_` and `-` with commas between them, not `{}`",
                one_line(wrong, 60)
            ))),
        }
    }

    /// A runner of GitHub's.
    pub(super) fn hosted() -> Self {
        Self(vec![HOSTED.to_owned()])
    }
}

impl fmt::Display for Runner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

/// Where paths are kept between jobs.
#[derive(Clone, Debug)]
pub(super) enum BinaryCache {
    /// `cache` is `main` if nothing names it.
    Attic {
        server: Url,
        cache: Option<CacheName>,
    },
    /// An embedded cache, whose folder GitHub keeps.
    GitHub,
    None,
}

impl BinaryCache {
    /// Reads an address, `github` or `none`.
    pub(super) fn parse(text: &str) -> Result<Self, Invalid> {
        match text {
            "github" => return Ok(Self::GitHub),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let hint = "Give an address such as `https://cache.example.org/main`, `github` or `none`.";
        let address =
            http_address(text).map_err(|problem| Invalid::new(problem).with_hint(hint))?;
        Self::of_address(&address).map_err(|problem| Invalid::new(problem).with_hint(hint))
    }

    /// The path of an address names the cache, as in the address that Nix reads.
    fn of_address(address: &Address) -> Result<Self, String> {
        if !is_made_of(address.url.as_str(), ":/._-~+%[]") {
            return Err("has characters that have no place in a workflow".into());
        }
        let path = address.url.path().trim_matches('/');
        if path.is_empty() {
            let server = address.url.clone();
            return Ok(Self::Attic {
                server,
                cache: None,
            });
        }
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        let cache = Some(cache_name(name)?);
        let mut server = address.url.clone();
        server.set_path(folder);
        Ok(Self::Attic { server, cache })
    }
}

impl fmt::Display for BinaryCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attic {
                server,
                cache: None,
            } => write!(f, "{server}"),
            Self::Attic {
                server,
                cache: Some(name),
            } => {
                write!(f, "{}/{name}", server.as_str().trim_end_matches('/'))
            }
            Self::GitHub => f.write_str("github"),
            Self::None => f.write_str("none"),
        }
    }
}

/// What the job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Builds each output below this attribute of the flake.
    FlakeOutputs(&'static str),
    /// Runs this command.
    Command(&'static str),
}

/// All that the workflow is made of.
#[derive(Debug)]
pub(super) struct Workflow {
    pub(super) actions: Actions,
    pub(super) runs_on: Runner,
    pub(super) cache: BinaryCache,
    /// As it was given.
    pub(super) public_key: Option<String>,
    pub(super) default_branch: String,
    pub(super) work: Work,
}

impl Workflow {
    /// What is left to do by hand, as lines for people.
    pub(super) fn next_steps(&self) -> String {
        let mut steps = vec![];
        if let BinaryCache::Attic { .. } = self.cache {
            steps.push("Put the cache's token into the repository's secret `ATTIC_TOKEN` (Settings, Secrets and variables, Actions).");
            if self.public_key.is_none() {
                steps.push("Put the cache's public key into the repository's variable `ATTIC_PUBLIC_KEY`; without it Nix refuses every hit.");
            }
        }
        steps.push("Commit the file and open a pull request: that job reads. Merged, the job of the default branch publishes.");
        let numbered = steps
            .iter()
            .zip(1..)
            .map(|(step, number)| format!("{number}. {step}"));
        format!("next:\n{}", numbered.collect::<Vec<_>>().join("\n"))
    }

    /// The steps that put the embedded cache's folder in place and keep it.
    fn kept_folder(&self) -> Option<(String, String)> {
        let BinaryCache::GitHub = self.cache else {
            return None;
        };
        let [restore, save] = CACHE;
        let before = format!(
            "      # The folder of the embedded cache, as the last job of the default branch left it.
      - uses: {restore}
        with:
          path: {EMBEDDED}
          key: flywheel-${{{{ runner.os }}}}-${{{{ runner.arch }}}}-${{{{ github.run_id }}}}
          restore-keys: flywheel-${{{{ runner.os }}}}-${{{{ runner.arch }}}}-
"
        );
        let after = format!(
            "      # Kept after a failure, too: what was built is not built again. Pull requests keep nothing.
      - uses: {save}
        if: ${{{{ !cancelled() && github.event_name == 'push' }}}}
        with:
          path: {EMBEDDED}
          key: flywheel-${{{{ runner.os }}}}-${{{{ runner.arch }}}}-${{{{ github.run_id }}}}-${{{{ github.run_attempt }}}}
"
        );
        Some((before, after))
    }

    /// The lines of `with:` about the cache.
    fn cache_inputs(&self) -> String {
        match &self.cache {
            BinaryCache::Attic { server, cache } => {
                let mut lines = format!(
                    "          # The cache: paths are read from it, and go there.\n          attic-server: {server}\n"
                );
                if let Some(name) = cache {
                    lines.push_str(&format!("          attic-cache: {name}\n"));
                }
                let key = self.public_key.as_deref();
                lines.push_str(&format!(
                    "          # Nix takes a path from the cache only with a signature by this key.\n          attic-public-key: {}\n",
                    key.unwrap_or("${{ vars.ATTIC_PUBLIC_KEY || '' }}")
                ));
                lines
            }
            BinaryCache::GitHub => format!(
                "          # A cache without a server: it is served from this folder while the step runs.\n          embedded-cache: {EMBEDDED}\n"
            ),
            BinaryCache::None => "          # No cache: nothing is read or published.\n          attic-enabled: \"false\"\n".to_owned(),
        }
    }

    /// The step that does the work.
    fn step(&self) -> String {
        let Actions {
            repository,
            reference,
        } = &self.actions;
        let (action, about, work) = match self.work {
            Work::FlakeOutputs(attribute) => (
                "flake-checks",
                "Evaluates the outputs in parallel, builds them as they appear, and gives each a verdict.",
                format!(
                    "          # Which outputs of the flake: `checks`, `packages`, …\n          flake-attr: {attribute}\n"
                ),
            ),
            Work::Command(command) => (
                "nix-job",
                "Makes Nix ready, runs the command, and publishes what it built while it runs.",
                format!("          # Put your own command here.\n          command: {command}\n"),
            ),
        };
        let mut env = Vec::new();
        if let BinaryCache::Attic { .. } = self.cache {
            env.push("          # Only for publishing. A pull request from a fork has no secrets, and reads.\n          ATTIC_TOKEN: ${{ secrets.ATTIC_TOKEN || '' }}\n");
        }
        if let Work::FlakeOutputs(_) = self.work {
            env.push("          # For a Check Run of each output.\n          GITHUB_TOKEN: ${{ github.token }}\n");
        }
        let env = match env.is_empty() {
            true => String::new(),
            false => format!("        env:\n{}", env.concat()),
        };
        let push = match self.cache {
            BinaryCache::None => "",
            _ => {
                "          # Publish where the trust gate allows it: on a push to the default branch, never for a pull request.\n          push-cache: auto\n"
            }
        };
        format!(
            "      # {about}\n      - uses: {repository}/actions/{action}@{reference}\n{env}        with:\n{work}{}{push}",
            self.cache_inputs()
        )
    }
}

impl fmt::Display for Workflow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runner = match self.runs_on.0.as_slice() {
            [label] => label.clone(),
            labels => format!("[{}]", labels.join(", ")),
        };
        let checks = match self.work {
            Work::FlakeOutputs(_) => "      checks: write # A Check Run for each output.\n",
            Work::Command(_) => "",
        };
        let (before, after) = self.kept_folder().unwrap_or_default();
        write!(
            f,
            "# Written by `flywheel init`; it is yours to change.
name: nix

on:
  push:
    branches: [{branch}] # The branch whose jobs publish.
  pull_request: # Its jobs read only.

# The token of a job may do nothing but what the job lists.
permissions: {{}}

# A new push to a pull request ends the run of the one before; on the branch every run comes to its end.
concurrency:
  group: ${{{{ github.workflow }}}}-${{{{ github.ref }}}}
  cancel-in-progress: ${{{{ github.event_name == 'pull_request' }}}}

jobs:
  nix:
    name: Build with Nix
    runs-on: {runner}
    timeout-minutes: 60
    permissions:
      contents: read # For the checkout.
{checks}    steps:
      - uses: {CHECKOUT}
        with:
          persist-credentials: false # No later step needs git's token.
{before}{step}{after}",
            branch = self.default_branch,
            step = self.step(),
        )
    }
}

/// Whether a text is not empty, and letters and digits of ASCII and these characters alone.
fn is_made_of(text: &str, others: &str) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || others.contains(c))
}
