//! Directives: what is to be built, where, with which caches, and where its events go. The types, their declaration, and
//! the same as Nickel contracts. Names no caller of its own.

use serde::Deserialize;

use crate::build_spec::{BUILD_SPEC, BuildSpec};
use crate::document::{Field, Record, Rule, Shape, is_name, nickel_contract, nickel_definitions};
use crate::namespace::{Actor, ActorId, ActorKind, Disposition};

/// What makes directives in Nickel, on the contracts.
const CONSTRUCTORS: &str = include_str!("directives/constructors.ncl");

/// What is to be done.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Directives {
    pub workspace: String,
    pub artifact: Artifact,
    pub compute_provider: ComputeProvider,
    pub registry_provider: RegistryProvider,
    pub cache_policy: CachePolicy,
    pub runner_override: Option<BuildSpec>,
    pub nats_events: Option<NatsEvents>,
}

/// What comes of the build.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Artifact {
    /// The image's whole name, with its registry.
    pub image: String,
    /// The stage that is built; the last one if it is left out.
    pub target: Option<String>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum ComputeProvider {
    Hcloud,
    Proxmox,
    DockerLocal,
    Ssh,
    Http,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum RegistryProvider {
    Zot,
    Harbor,
    Ghcr,
    Dockerhub,
}

/// Who builds, and what becomes of the caches.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct CachePolicy {
    pub actor: ActorKind,
    pub actor_id: Option<String>,
    pub workspaces: Option<Vec<String>>,
    pub disposition: Disposition,
}

/// Where events go.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct NatsEvents {
    /// What the subjects begin with.
    pub prefix: String,
}

impl CachePolicy {
    /// The actor. A document that has been checked has the identity where one is needed.
    pub fn actor(&self) -> Actor {
        let id = || ActorId::new(self.actor_id.as_deref().unwrap_or_default());
        match self.actor {
            ActorKind::Ci => Actor::Ci,
            ActorKind::Human => Actor::Human(id()),
            ActorKind::Agent => Actor::Agent(id()),
            ActorKind::CiAux => Actor::CiAux(self.workspaces.clone().unwrap_or_default()),
        }
    }
}

/// Whether a text can be the name of a workspace or an actor.
pub fn is_workspace(text: &str) -> bool {
    is_name(text)
}

const ARTIFACT: Record = Record {
    name: "Artifact",
    about: "What comes of the build.",
    fields: &[
        Field {
            name: "image",
            shape: Shape::Text,
            is_required: true,
            about: "The image, with its registry, such as registry.example.org/team/web:1.",
        },
        Field {
            name: "target",
            shape: Shape::Text,
            is_required: false,
            about: "The stage of the Dockerfile that is built. The last one, if it is left out.",
        },
    ],
    rules: &[],
};

/// What a cache policy may hold.
pub const CACHE_POLICY: Record = Record {
    name: "CachePolicy",
    about: "Who builds, and what becomes of the caches.",
    fields: &[
        Field {
            name: "actor",
            shape: Shape::Choice(&["ci", "human", "agent", "ci_aux"]),
            is_required: true,
            about: "Who builds.",
        },
        Field {
            name: "actor_id",
            shape: Shape::Name,
            is_required: false,
            about: "The name of the person or the agent. Its caches are below it.",
        },
        Field {
            name: "workspaces",
            shape: Shape::List(&Shape::Name),
            is_required: false,
            about: "The workspaces that a ci_aux was given.",
        },
        Field {
            name: "disposition",
            shape: Shape::Choice(&["export", "discard", "rollback"]),
            is_required: true,
            about: "Whether caches are written back on success, not at all, or put back on failure.",
        },
    ],
    rules: &[
        Rule::Needed {
            field: "actor_id",
            by: "actor",
            words: &["human", "agent"],
        },
        Rule::Needed {
            field: "workspaces",
            by: "actor",
            words: &["ci_aux"],
        },
    ],
};

const NATS_EVENTS: Record = Record {
    name: "NatsEvents",
    about: "Where events go.",
    fields: &[Field {
        name: "prefix",
        shape: Shape::Name,
        is_required: true,
        about: "What the subjects begin with. The workspace and the event follow.",
    }],
    rules: &[],
};

/// What directives may hold.
pub const BUILD_DIRECTIVES: Record = Record {
    name: "BuildDirectives",
    about: "What is to be built, where, with which caches, and where its events go.",
    fields: &[
        Field {
            name: "workspace",
            shape: Shape::Name,
            is_required: true,
            about: "What is built belongs to it: caches, history, events.",
        },
        Field {
            name: "artifact",
            shape: Shape::Record(&ARTIFACT),
            is_required: true,
            about: "What comes of the build.",
        },
        Field {
            name: "compute_provider",
            shape: Shape::Choice(&["hcloud", "proxmox", "docker_local", "ssh", "http"]),
            is_required: true,
            about: "Where runners come from.",
        },
        Field {
            name: "registry_provider",
            shape: Shape::Choice(&["zot", "harbor", "ghcr", "dockerhub"]),
            is_required: true,
            about: "The kind of registry that keeps images and caches.",
        },
        Field {
            name: "cache_policy",
            shape: Shape::Record(&CACHE_POLICY),
            is_required: true,
            about: "Who builds, and what becomes of the caches.",
        },
        Field {
            name: "runner_override",
            shape: Shape::Record(&BUILD_SPEC),
            is_required: false,
            about: "What the build needs. It goes before a file in the context.",
        },
        Field {
            name: "nats_events",
            shape: Shape::Record(&NATS_EVENTS),
            is_required: false,
            about: "Where events go. Nowhere, if it is left out.",
        },
    ],
    rules: &[],
};

/// A Nickel file with all contracts and what makes directives. It stands by itself.
pub fn nickel() -> String {
    let mut text = String::from("# Printed by `flywheel image schema --nickel`.\n");
    text.push_str(&nickel_definitions());
    text.push_str("let contracts = {\n");
    for record in [&BUILD_SPEC, &CACHE_POLICY, &BUILD_DIRECTIVES] {
        let contract = nickel_contract(record);
        text.push_str(&format!(
            "# {}\n{} | not_exported = {contract},\n",
            record.about, record.name
        ));
    }
    text.push_str("} in\n");
    text.push_str(CONSTRUCTORS);
    text
}

#[cfg(test)]
mod tests;
