//! `flywheel validate-builders`: the canary. Checks a builder layer by layer, names the layer that is broken, and
//! reports it. This file has the order of the checks; the modules below it have the checks themselves.

mod cache;
mod check_list;
mod host;
mod inputs;
mod nix;
mod reporter;
mod tools;

use std::time::{Instant, SystemTime, UNIX_EPOCH};

pub(crate) use self::inputs::Inputs;

use self::check_list::CheckList;
use self::inputs::Plan;
use self::nix::Built;
use crate::inputs::roots::roots;
use crate::report::canary::Canary;
use flywheel_cache::client::bazel::BazelProber;
use flywheel_core::exit::{Exit, VerbError};
use flywheel_core::secret::Secret;
use flywheel_core::trust::{self, Decision, decide};
use flywheel_sys::http::Clients;
use flywheel_sys::runner::context;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::Workflow;

/// Runs the verb.
///
/// # Errors
/// For wrong input, before anything is checked.
pub(crate) async fn run(inputs: Inputs, env: &Env) -> Result<Exit, VerbError> {
    let begun = Instant::now();
    let plan = Plan::read(&inputs, env)?;
    let workflow = Workflow::new(env.in_github_actions());
    let attic = context::cache_token(env).inspect(|token| workflow.mask(token));
    let github = env.get("GITHUB_TOKEN").and_then(Secret::new);
    let github = github.inspect(|token| workflow.mask(token));
    let decision = decide(&context::facts(env), &plan.request, attic.is_some());
    let roots = roots(env);
    let work = CheckContext {
        plan,
        env,
        clients: Clients::new(&roots)?,
        prober: BazelProber::new(&roots)?,
        attic,
        decision,
    };
    let canary = work.run(begun).await;
    reporter::report(&canary, &work, &workflow, github.as_ref()).await;
    Ok(if canary.healthy() {
        Exit::Ok
    } else {
        Exit::Failed
    })
}

/// What the checks need.
struct CheckContext<'a> {
    plan: Plan,
    env: &'a Env,
    clients: Clients,
    prober: BazelProber,
    attic: Option<Secret>,
    decision: Decision,
}

impl CheckContext<'_> {
    /// Whether this builder's job runs code that may publish.
    fn trusted(&self) -> bool {
        matches!(self.decision.verdict(), trust::Verdict::MayPublish(_))
    }

    async fn run(&self, begun: Instant) -> Canary {
        let deadline = tokio::time::Instant::now() + self.plan.timeout;
        let mut host = CheckList::new(self.plan.weights.clone(), deadline);
        let (mut class, mut cache, mut bazel, mut write) =
            (host.beside(), host.beside(), host.beside(), host.beside());
        let mut first_build = None;
        // The checks of one list run one after the other; the lists run side by side, for a canary has little time.
        let (built, usable, disks, ()) = tokio::join!(
            async {
                let built = self.class(&mut class).await;
                first_build = built
                    .as_ref()
                    .and_then(|built| built.path.as_ref())
                    .map(|_| begun.elapsed());
                built
            },
            async {
                match self.plan.class.as_str() {
                    "nix-builder" => {
                        cache::read(&mut cache, &self.plan, self.attic.as_ref(), &self.clients)
                            .await
                    }
                    _ => None,
                }
            },
            host::checks(&mut host, &self.plan, self.env, &self.clients.api),
            async {
                if self.plan.class == "nix-builder" || self.plan.bazel_cache.is_some() {
                    cache::bazel(&mut bazel, &self.plan, self.env, &self.prober).await;
                }
            },
        );
        if self.plan.class == "nix-builder" {
            cache::read_any(
                &mut cache,
                &self.plan,
                usable.as_ref(),
                built.as_ref().map(|built| &built.nix),
            )
            .await;
            let new = built
                .as_ref()
                .and_then(|built| Some((&built.nix, built.path.as_ref()?)));
            cache::write(&mut write, usable.as_ref(), new, &self.decision).await;
        }
        let checks = [host, class, cache, write, bazel]
            .into_iter()
            .flat_map(|list| list.checks)
            .collect();
        Canary {
            class: self.plan.class.clone(),
            lane: self.plan.lane.clone(),
            checks,
            disks,
            cold_start: first_build.map(|at| at + self.plan.head_start),
            took: begun.elapsed(),
            ended_at: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
        }
    }

    /// Runs the checks of this class alone. A class that is not named here has its tools checked and nothing else.
    async fn class(&self, list: &mut CheckList) -> Option<Built> {
        tools::tools(list, &self.plan, self.env).await;
        match self.plan.class.as_str() {
            "nix-builder" => return nix::checks(list, &self.plan, self.env, self.trusted()).await,
            "container" => tools::container(list, &self.plan, self.env).await,
            "kernel" => tools::kernel(list, &self.plan, self.env).await,
            _ => {}
        }
        None
    }
}
