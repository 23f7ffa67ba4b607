//! How a job begins: its secrets, the verdict of the trust gate, and the session that holds them to its end.

use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;

use super::inputs::Plan;
use super::not_watched::NotWatched;
use super::source::Source;
use crate::report::screen::Screen;
use flywheel_core::exit::{Exit, Explain, Failure};
use flywheel_core::progress::Sink;
use flywheel_core::secret::Secret;
use flywheel_core::trust::{Decision, decide};
use flywheel_nix::daemon_proxy::LastingLink;
use flywheel_sys::host::private::PrivateFolder;
use flywheel_sys::process::signals::Signals;
use flywheel_sys::runner::context;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::{Level, Workflow};

/// After the first request to stop, publishing and verifying end within this time. GitHub kills a step 10 s after
/// its `SIGINT`, and we promise to be done in 6.
pub(crate) const STOPPED_LIMIT: Duration = Duration::from_millis(5200);

/// The tokens that the job's environment holds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Secrets {
    /// `ATTIC_TOKEN`, for the cache.
    pub(crate) attic: Option<Secret>,
    /// `GITHUB_TOKEN`, for fetchers and Check Runs.
    pub(crate) github: Option<Secret>,
}

impl Secrets {
    /// Takes them from the environment, and has the runner mask them.
    pub(crate) fn masked(env: &Env, workflow: &Workflow) -> Self {
        let github = env.get("GITHUB_TOKEN").and_then(Secret::new);
        Self {
            attic: context::cache_token(env).inspect(|token| workflow.mask(token)),
            github: github.inspect(|token| workflow.mask(token)),
        }
    }
}

/// The folder below which private folders are made: the runner's temporary folder in a job, else the user's.
pub(crate) fn private_base(env: &Env) -> PathBuf {
    // The runner empties `RUNNER_TEMP` after each job, so even a killed job leaves no secret behind.
    let named = ["RUNNER_TEMP", "XDG_RUNTIME_DIR", "TMPDIR"]
        .into_iter()
        .filter_map(|name| env.path(name));
    named
        .into_iter()
        .find(|folder| folder.is_dir())
        .unwrap_or_else(|| "/tmp".into())
}

/// Decides whether this job publishes, and why.
pub(crate) fn judge(plan: &Plan, secrets: &Secrets, env: &Env) -> Decision {
    // An embedded cache makes its own token; another kind of store has its credentials in the environment.
    let has_token = secrets.attic.is_some()
        || matches!(plan.source, Source::Embedded { .. } | Source::Store(_));
    decide(&context::facts(env), &plan.request, has_token)
}

/// Logs the verdict of the trust gate, and why the job does not publish where it was asked to.
pub(crate) fn announce(plan: &Plan, decision: &Decision, workflow: &Workflow) {
    for hint in &plan.bad_hints {
        workflow.annotate(Level::Warning, "hint", hint);
    }
    workflow.log(&format!(
        "flywheel: trust: {}: {}",
        decision.verdict().as_str(),
        decision.reason()
    ));
    if decision.is_refused() {
        let remedy = decision
            .remedy()
            .map(|remedy| format!(". {remedy}"))
            .unwrap_or_default();
        workflow.annotate(
            Level::Notice,
            "not publishing",
            &format!("{}{remedy}", decision.reason()),
        );
    }
}

/// The system refused to install a signal handler.
#[derive(Debug, Error)]
#[error("the signal handlers cannot be installed")]
struct SignalError(#[source] std::io::Error);

impl Explain for SignalError {
    fn exit(&self) -> Exit {
        Exit::Host
    }
}

/// Everything that a job holds from its beginning to its end.
pub(crate) struct Session<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) env: &'a Env,
    pub(crate) workflow: Workflow,
    pub(crate) secrets: Secrets,
    /// Whether the job publishes.
    pub(crate) decision: Decision,
    /// Receives progress, and what goes worse than it should.
    pub(crate) sink: Sink,
    /// Draws the progress, and remembers what went worse than it should.
    pub(crate) screen: Screen,
    /// The stores that nothing can be published from.
    pub(super) not_watched: NotWatched,
    /// Whether later steps use the settings, which this process may not live to serve.
    pub(super) is_for_later_steps: bool,
    /// The link to Nix's daemon that the job's later steps get, if they get one.
    pub(super) lasting_link: Option<LastingLink>,
    /// Holds secret files, and removes them when it is dropped.
    private: PrivateFolder,
}

impl<'a> Session<'a> {
    /// Begins a job in the foreground: masks its secrets, lets the trust gate decide, and logs the verdict.
    ///
    /// # Errors
    /// When signals cannot be handled, or no private folder can be made.
    pub(crate) fn begin(plan: &'a Plan, env: &'a Env) -> Result<(Self, Signals), Failure> {
        let workflow = Workflow::new(env.in_github_actions());
        let secrets = Secrets::masked(env, &workflow);
        let decision = judge(plan, &secrets, env);
        let screen = Screen::new(&workflow);
        // Before the private folder is made: from here on a signal no longer ends the process without its removal.
        let signals = Signals::listen().map_err(SignalError)?;
        let private = PrivateFolder::create(&private_base(env))?;
        announce(plan, &decision, &workflow);
        let session = Self {
            plan,
            env,
            workflow,
            secrets,
            decision,
            sink: screen.sink(),
            screen,
            not_watched: NotWatched::default(),
            is_for_later_steps: false,
            lasting_link: None,
            private,
        };
        Ok((session, signals))
    }

    /// Puts a session together from its parts, for a process that has its secrets and its log from elsewhere.
    ///
    /// # Errors
    /// When no private folder can be made.
    pub(crate) fn from_parts(
        plan: &'a Plan,
        env: &'a Env,
        secrets: Secrets,
        workflow: Workflow,
        screen: Screen,
        sink: Sink,
    ) -> Result<Self, Failure> {
        let private = PrivateFolder::create(&private_base(env))?;
        let decision = judge(plan, &secrets, env);
        Ok(Self {
            plan,
            env,
            workflow,
            secrets,
            decision,
            sink,
            screen,
            not_watched: NotWatched::default(),
            is_for_later_steps: true,
            lasting_link: None,
            private,
        })
    }

    /// Has the later steps' commands reach Nix's daemon by this link. To be called only where the runner hands the link on
    /// to every step: what all of them name is then known.
    #[must_use]
    pub(crate) fn with_lasting_link(mut self, link: Option<LastingLink>) -> Self {
        self.lasting_link = link;
        self
    }

    /// The folder for secret files.
    pub(crate) fn private(&self) -> &Path {
        self.private.path()
    }

    /// Writes a file into that folder.
    ///
    /// # Errors
    /// When its disk is full, or fails.
    pub(crate) fn write_private(&self, name: &str, text: &str) -> Result<PathBuf, Failure> {
        Ok(self.private.write(name, text)?)
    }

    /// Takes the progress bar away, and reports a failure that kept the job from its work. `what` names the work
    /// that was not done.
    ///
    /// # Errors
    /// The failure that it was given.
    pub(crate) fn end(&self, ended: Result<Exit, Failure>, what: &str) -> Result<Exit, Failure> {
        self.screen.finish();
        ended.inspect_err(|failure| super::report::report_not_started(&**failure, self.env, what))
    }
}
