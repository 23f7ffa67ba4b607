//! Which caches a build may read and write in a registry, by who builds, for what, and what the trust gate says. Pure.
//!
//! `ci/<workspace>/…` is written by jobs that may publish, and by nobody else; `dev/<actor>-<workspace>/…` by its actor.

use std::fmt;

use serde::{Deserialize, Serialize};

use flywheel_core::trust::{Facts, Verdict};

/// The layer caches of a build, each a repository below its namespace.
pub const LAYERS: [Layer; 2] = [
    Layer {
        name: "base",
        about: "the toolchain",
    },
    Layer {
        name: "deps",
        about: "the dependencies",
    },
];

/// A layer that is cached by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    pub name: &'static str,
    pub about: &'static str,
}

/// The kind of an actor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActorKind {
    Ci,
    Human,
    Agent,
    CiAux,
}

impl ActorKind {
    /// Every kind, as directives name it.
    pub const ALL: [(&str, Self); 4] = [
        ("ci", Self::Ci),
        ("human", Self::Human),
        ("agent", Self::Agent),
        ("ci_aux", Self::CiAux),
    ];
}

/// Who builds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A job of a workspace's own CI.
    Ci,
    /// A person.
    Human(ActorId),
    /// A program that works for a person.
    Agent(ActorId),
    /// A job beside it that fills caches for others, with the workspaces that it was given.
    CiAux(Vec<String>),
}

/// What names an actor in a registry.
///
/// The name of a repository holds it before the workspace, with a `-` in between. A `-` of its own is written as `__`, so
/// that no two pairs of actor and workspace have one name: `a-b` on `c` would else write to the caches of `a` on `b-c`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ActorId(String);

impl ActorId {
    /// The identity of an actor whose name has been checked to be a name (`document::Shape::Name`).
    pub fn new(name: &str) -> Self {
        Self(name.replace('-', "__"))
    }
}

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What becomes of the caches that a session makes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Disposition {
    /// They are written back when the build succeeds.
    #[default]
    Export,
    /// They are not written.
    Discard,
    /// They are written back when the build succeeds, and the last good state is put back when it fails.
    Rollback,
}

impl Disposition {
    /// Every disposition, by its name.
    pub const ALL: [(&str, Self); 3] = [
        ("export", Self::Export),
        ("discard", Self::Discard),
        ("rollback", Self::Rollback),
    ];
}

/// Where a build runs, as far as the right to write depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// On a person's machine.
    Local,
    /// In a job that may publish.
    Publishing,
    /// In a job that may not, or one whose facts are in doubt.
    ReadOnly,
}

impl Standing {
    /// The standing of a job, by its facts and what the trust gate made of them.
    pub fn of(facts: &Facts, verdict: &Verdict) -> Self {
        match (facts, verdict) {
            // `--publish` on a person's machine is no job of CI.
            (Facts::Local, _) => Self::Local,
            (Facts::Job(_), Verdict::MayPublish(_)) => Self::Publishing,
            (Facts::Job(_), Verdict::ReadOnly(_)) | (Facts::OtherCi(_), _) => Self::ReadOnly,
        }
    }
}

/// What the build does to its caches when it has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Export {
    /// The namespace that is written to, such as `ci/web`.
    pub namespace: String,
    /// Whether the last good state is put back when the build fails.
    pub restores_on_failure: bool,
}

/// What a build may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CachePlan {
    /// The namespaces that are read, in this order.
    pub imports: Vec<String>,
    pub export: Option<Export>,
    /// Why it writes there, or why nowhere: a fragment.
    pub reason: String,
}

/// Decides what a build may do.
pub fn plan(
    actor: &Actor,
    workspace: &str,
    disposition: Disposition,
    standing: Standing,
) -> CachePlan {
    let ci = format!("ci/{workspace}");
    let own = match actor {
        Actor::Ci | Actor::CiAux(_) => ci.clone(),
        Actor::Human(id) | Actor::Agent(id) => format!("dev/{id}-{workspace}"),
    };
    let mut imports = vec![ci];
    // Nothing that a person or an agent left may become a part of what CI publishes, whoever the job says it is.
    if standing == Standing::Local && !imports.contains(&own) {
        imports.push(own.clone());
    }
    let allowed = may_write(actor, workspace, standing);
    let (is_written, reason) = match (allowed, disposition) {
        (Err(refusal), _) => (false, refusal.to_owned()),
        (Ok(_), Disposition::Discard) => (false, "the disposition is `discard`".to_owned()),
        (Ok(grounds), _) => (true, grounds.to_owned()),
    };
    CachePlan {
        imports,
        export: is_written.then(|| Export {
            namespace: own,
            restores_on_failure: disposition == Disposition::Rollback,
        }),
        reason,
    }
}

/// Whether an actor may write to its own namespace, and why.
fn may_write(
    actor: &Actor,
    workspace: &str,
    standing: Standing,
) -> Result<&'static str, &'static str> {
    match (actor, standing) {
        // Whoever opens a pull request writes the directives of its job, the name of an actor among them.
        (_, Standing::ReadOnly) => {
            Err("a job that may not publish writes no cache, whatever its directives name")
        }
        (Actor::CiAux(given), _) if given.iter().all(|name| name != workspace) => {
            Err("`ci_aux` was not given this workspace")
        }
        (Actor::Ci | Actor::CiAux(_), Standing::Publishing) => Ok("the job may publish"),
        (Actor::Ci | Actor::CiAux(_), Standing::Local) => {
            Err("`ci/` is written by jobs of CI alone")
        }
        (Actor::Human(_) | Actor::Agent(_), Standing::Local) => {
            Ok("the namespace is the actor's own")
        }
        // A job speaks for its repository; who the actor is, only its own directives say.
        (Actor::Human(_) | Actor::Agent(_), Standing::Publishing) => {
            Err("a job of CI does not write the namespace of a person or an agent")
        }
    }
}

impl Export {
    /// The name under which a layer is written while the build runs. It becomes [`Export::tag`] by its manifest alone.
    pub fn staging_tag(&self, run: &str) -> String {
        format!("staging-{run}")
    }

    /// The name of a layer by what it is made from, a SHA-256 in hexadecimal.
    pub fn tag(sha256: &str) -> String {
        format!("sha256-{sha256}")
    }
}

/// The repository of a layer in a namespace: `ci/web/deps`.
pub fn repository(namespace: &str, layer: Layer) -> String {
    format!("{namespace}/{}", layer.name)
}

#[cfg(test)]
mod tests;
