//! The builder contract as data: classes of builders, caches, what goes where, who may reach what, and what is
//! published when. Pure: the built-in contract, the `flywheel.yml` of a repository on top of it, and what follows from
//! both. Names no host, image or organisation of its own, and reads nothing from the machine.

pub mod print;
pub mod read;
pub mod shared_cache;
mod types;
pub mod workflow;

use serde::{Deserialize, Serialize};

pub use self::types::{Access, NamedMap, Requirement, Size, Skill};

/// The file in a repository that overrides the built-in contract.
pub const FILE: &str = "flywheel.yml";
/// The built-in contract, as a file of the same kind.
const BUILT_IN: &str = include_str!("default.yml");

/// The whole contract, or the part of it that a file holds: what a file leaves out stays as it is built in.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Contract {
    /// The version of the file's format, which is 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) version: Option<Version>,
    #[serde(default)]
    pub classes: NamedMap<Class>,
    #[serde(default)]
    pub(crate) caches: NamedMap<Cache>,
    /// What goes where.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) placement: Vec<Placement>,
    /// Who may reach which cache.
    #[serde(default)]
    pub(crate) exposure: NamedMap<NamedMap<Access>>,
    /// What is published, and when.
    #[serde(default)]
    pub(crate) publication: Publication,
    /// The shared-cache contract for Bazel.
    #[serde(default)]
    pub shared_cache: SharedCache,
}

/// The one version of the format so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "u32", into = "u32")]
pub(crate) struct Version;

impl TryFrom<u32> for Version {
    type Error = String;

    fn try_from(number: u32) -> Result<Self, String> {
        if number == 1 {
            Ok(Self)
        } else {
            Err(format!("version {number} is not known here, 1 is"))
        }
    }
}

impl From<Version> for u32 {
    fn from(_: Version) -> Self {
        1
    }
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Class {
    /// The lanes that its jobs run on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) lanes: Option<Vec<Lane>>,
    /// The container image of its runners.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) image: Option<String>,
    /// What it can do, as text for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) capabilities: Option<Vec<String>>,
    /// What it can do, as skills that workflows are checked against.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) provides: Option<Vec<Skill>>,
    /// What it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) used_for: Option<Vec<String>>,
    /// Tools that must be on `PATH`, with their versions.
    #[serde(skip_serializing_if = "NamedMap::is_empty")]
    pub tools: NamedMap<Requirement>,
    /// The memory that a job has at least, where its lane names none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<Size>,
}

impl Class {
    pub fn lanes(&self) -> &[Lane] {
        self.lanes.as_deref().unwrap_or_default()
    }

    /// Whether a lane of this class offers a skill.
    pub(crate) fn offers(&self, lane: &Lane, skill: Skill) -> bool {
        self.provides
            .iter()
            .flatten()
            .chain(&lane.provides)
            .any(|offered| *offered == skill)
    }

    /// The memory of a job on a lane: what the lane names, else what the class names.
    pub fn memory(&self, lane: Option<&Lane>) -> Option<Size> {
        lane.and_then(|lane| lane.memory).or(self.memory)
    }

    fn overlay(&mut self, over: Self) {
        take(&mut self.lanes, over.lanes);
        take(&mut self.image, over.image);
        take(&mut self.capabilities, over.capabilities);
        take(&mut self.provides, over.provides);
        take(&mut self.used_for, over.used_for);
        take(&mut self.memory, over.memory);
        self.tools.overlay(over.tools, |old, new| *old = new);
    }
}

/// A lane on which jobs of a class run: a runner label with its limits.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Lane {
    /// What a job writes in `runs-on`.
    pub label: String,
    /// The name of its runners, if it is not the label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) runner: Option<String>,
    /// The memory of one job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) memory: Option<Size>,
    /// How many runners there are at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) max_runners: Option<u32>,
    /// Whether its jobs may publish at all. If so, the trust gate still decides on each.
    #[serde(default = "yes", skip_serializing_if = "Clone::clone")]
    pub(crate) publishes: bool,
    /// The skills that it offers beyond those of its class.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) provides: Vec<Skill>,
    /// A note for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
}

fn yes() -> bool {
    true
}

/// A cache: what is in it, who reads it, who fills it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct Cache {
    /// The name that people read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) title: Option<String>,
    /// What it is the authority for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) authority: Option<String>,
    /// What is in it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
    /// Who reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) consumers: Option<String>,
    /// Who fills it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) filled_by: Option<String>,
    /// The credential that gives access.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) credential: Option<String>,
    /// What happens when it does not have something.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) on_miss: Option<String>,
    /// What that costs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) on_miss_costs: Option<String>,
}

impl Cache {
    fn overlay(&mut self, over: Self) {
        take(&mut self.title, over.title);
        take(&mut self.authority, over.authority);
        take(&mut self.content, over.content);
        take(&mut self.consumers, over.consumers);
        take(&mut self.filled_by, over.filled_by);
        take(&mut self.credential, over.credential);
        take(&mut self.on_miss, over.on_miss);
        take(&mut self.on_miss_costs, over.on_miss_costs);
    }
}

/// Which cache a kind of thing goes to.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Placement {
    /// A kind of thing.
    pub(crate) what: String,
    /// The name of the cache.
    #[serde(rename = "where")]
    pub(crate) cache: String,
}

/// What is published, and when.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(crate) struct Publication {
    /// The conditions under which a thing is publishable.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) publishable: Vec<String>,
    /// What each event publishes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) triggers: Vec<Trigger>,
    /// Further rules.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) rules: Vec<String>,
}

/// What an event publishes, as a description for people. The trust gate is what decides.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Trigger {
    /// The event.
    pub(crate) event: String,
    /// What goes to FlakeHub.
    pub(crate) flakehub: String,
    /// What goes to Attic.
    pub(crate) attic: String,
}

/// The shared-cache contract for Bazel, as a repository declares it.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct SharedCache {
    /// The mode that the repository's builds are in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) mode: Option<shared_cache::Mode>,
    /// The schemes that an endpoint may have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) schemes: Option<Vec<String>>,
    /// Whether an endpoint may be on the local machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_localhost: Option<bool>,
    /// Whether the executor may have another address than the cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_separate_executor: Option<bool>,
}

impl Contract {
    pub fn built_in() -> Self {
        serde_saphyr::from_str(BUILT_IN).expect("the built-in contract is read in a test")
    }

    /// The class of this name.
    pub fn class(&self, name: &str) -> Option<&Class> {
        self.classes.get(name)
    }

    /// Every lane with its class.
    pub(crate) fn lanes(&self) -> impl Iterator<Item = (&str, &Class, &Lane)> {
        self.classes
            .iter()
            .flat_map(|(name, class)| class.lanes().iter().map(move |lane| (name, class, lane)))
    }

    /// The lane of this label.
    pub fn lane(&self, label: &str) -> Option<(&str, &Class, &Lane)> {
        self.lanes()
            .find(|(_, _, lane)| lane.label.eq_ignore_ascii_case(label))
    }

    /// Overrides this contract by that of a file; what the file leaves out stays. A list of the file replaces the whole
    /// list, and a class or cache that is `null` is removed.
    fn overlay(&mut self, over: Self) {
        self.classes.overlay(over.classes, Class::overlay);
        self.caches.overlay(over.caches, Cache::overlay);
        self.exposure.overlay(over.exposure, |old, new| {
            old.overlay(new, |old, new| *old = new);
        });
        take_list(&mut self.placement, over.placement);
        take_list(
            &mut self.publication.publishable,
            over.publication.publishable,
        );
        take_list(&mut self.publication.triggers, over.publication.triggers);
        take_list(&mut self.publication.rules, over.publication.rules);
        take(&mut self.shared_cache.mode, over.shared_cache.mode);
        take(&mut self.shared_cache.schemes, over.shared_cache.schemes);
        take(
            &mut self.shared_cache.allow_localhost,
            over.shared_cache.allow_localhost,
        );
        take(
            &mut self.shared_cache.allow_separate_executor,
            over.shared_cache.allow_separate_executor,
        );
    }
}

fn take<T>(old: &mut Option<T>, new: Option<T>) {
    if new.is_some() {
        *old = new;
    }
}

// An absent list and an empty one look alike after parsing, so an empty list cannot remove one.
fn take_list<T>(old: &mut Vec<T>, new: Vec<T>) {
    if !new.is_empty() {
        *old = new;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_contract_holds_together() {
        let contract = read::contract(FILE, BUILT_IN).expect("it is a contract");
        let names: Vec<_> = contract.classes.iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["nix-builder", "general", "container", "kernel"]);
        assert!(contract.caches.get("attic").is_some());
        assert!(
            !BUILT_IN.contains("://") && !BUILT_IN.contains("image:"),
            "no host and no image"
        );
    }

    #[test]
    fn a_lane_has_its_own_memory_and_skills_before_the_classs() {
        let contract = Contract::built_in();
        let (name, class, lane) = contract
            .lane("Nix-Builder-KVM")
            .expect("labels ignore case");
        assert_eq!(name, "nix-builder");
        assert!(
            class.offers(lane, Skill::Kvm)
                && class.offers(lane, Skill::Nix)
                && !class.offers(lane, Skill::Docker)
        );
        assert!(!lane.publishes);
        let heavy = contract.lane("nix-builder-heavy").expect("there").2;
        assert_eq!(class.memory(Some(heavy)).map(Size::bytes), Some(64 << 30));
    }
}
