//! The graph in small scenarios and in random walks.

use std::collections::HashSet;

use super::*;
use crate::client::publish::outcome::Outcome;
use flywheel_nix::hash::Sha256;
use flywheel_nix::key::SecretKey;
use flywheel_nix::path_info::fingerprint;

fn path(name: &str) -> StorePath {
    let digest = Sha256(<sha2::Sha256 as sha2::Digest>::digest(name).into()).base32();
    StorePath::from_base_name(&format!("{}-{name}", &digest[..32])).expect("base name")
}

fn info(name: &str, references: &[&str]) -> PathInfo {
    PathInfo {
        path: path(name),
        nar_hash: Sha256([0; 32]),
        nar_size: 100 + name.len() as u64,
        references: references.iter().map(|name| path(name)).collect(),
        deriver: None,
        signatures: Vec::new(),
        ca: None,
        ultimate: true,
    }
}

/// Answers every query with "missing", except for the paths named.
fn answer(plan: &mut UploadPlan, there: &[&str]) {
    let there: Vec<StorePath> = there.iter().map(|name| path(name)).collect();
    for (id, _) in plan.next_query(1000) {
        let is_missing = !there.contains(&plan.nodes[id].path);
        plan.on_query_result(id, is_missing);
    }
}

fn take(plan: &mut UploadPlan) -> Option<(Id, String)> {
    plan.take(false)
        .map(|(id, info)| (id, info.path.name().to_owned()))
}

fn ends(plan: UploadPlan) -> HashMap<String, Final> {
    plan.finish("time", true)
        .into_iter()
        .map(|path| (path.info.path.name().to_owned(), path.end))
        .collect()
}

fn failed(end: &Final) -> &str {
    end.lost().expect("lost")
}

#[test]
fn references_go_first() {
    let mut plan = UploadPlan::default();
    plan.offer(info("app", &["app", "lib", "glibc"]));
    plan.offer(info("lib", &["glibc"]));
    answer(&mut plan, &["glibc"]);
    let (lib, name) = take(&mut plan).expect("ready");
    assert_eq!((name.as_str(), take(&mut plan)), ("lib", None));
    plan.settle(lib, Final::Published);
    assert_eq!(take(&mut plan).expect("released").1, "app");
    assert_eq!(plan.progress(), (1, 2));
}

#[test]
fn a_failure_blocks_what_refers_to_it_and_nothing_else() {
    let mut plan = UploadPlan::default();
    for path in [
        info("app", &["lib"]),
        info("lib", &["base"]),
        info("base", &[]),
        info("other", &[]),
    ] {
        plan.offer(path);
    }
    answer(&mut plan, &[]);
    let (base, _) = take(&mut plan).expect("ready");
    plan.settle(
        base,
        Final::Failed {
            reason: "413".into(),
            attempts: 1,
        },
    );
    let (other, _) = take(&mut plan).expect("ready");
    plan.settle(other, Final::Published);
    // Offered when it is too late already.
    plan.offer(info("late", &["lib"]));
    answer(&mut plan, &[]);
    let ends = ends(plan);
    for name in ["app", "lib", "late"] {
        assert!(
            failed(&ends[name]).contains("-base`, which could not be published"),
            "{ends:?}"
        );
    }
    assert_eq!(ends["other"], Final::Published);
}

#[test]
fn a_blocked_path_that_is_there_is_there() {
    let mut plan = UploadPlan::default();
    plan.offer(info("base", &[]));
    answer(&mut plan, &[]);
    let (base, _) = take(&mut plan).expect("ready");
    plan.settle(
        base,
        Final::Failed {
            reason: "x".into(),
            attempts: 1,
        },
    );
    plan.offer(info("app", &["base"]));
    answer(&mut plan, &["app"]);
    assert_eq!(ends(plan)["app"], Final::AlreadyThere);
}

#[test]
fn upstream_paths_are_skipped_and_block_nothing() {
    let key = SecretKey::generate("upstream-1").expect("random");
    let mut plan = UploadPlan::default();
    plan.omit(Upstream::default().with_keys([key.public()]));
    let mut glibc = info("glibc", &["base"]);
    glibc.signatures = vec!["other-1:x".into(), signature(&key, &glibc)];
    plan.offer(info("app", &["glibc"]));
    plan.offer(glibc);
    plan.omit_names(["upstream-1".to_owned()]);
    answer(&mut plan, &[]);
    assert_eq!(take(&mut plan).expect("ready").1, "app");
    assert_eq!(
        ends(plan)["glibc"],
        Final::Skipped(Skip::Upstream("upstream-1".into()))
    );
}

/// A cache for machines that reach no other one gets all of a closure.
#[test]
fn without_an_upstream_cache_what_is_signed_is_sent_as_well() {
    let key = SecretKey::generate("upstream-1").expect("random");
    for (upstream, expected) in [
        (Upstream::none(), "glibc"),
        (Upstream::default().with_keys([key.public()]), "app"),
    ] {
        let mut plan = UploadPlan::default();
        plan.omit(upstream);
        plan.omit_names(["upstream-1".to_owned()]);
        let mut glibc = info("glibc", &[]);
        glibc.signatures = vec![signature(&key, &glibc)];
        plan.offer(info("app", &["glibc"]));
        plan.offer(glibc);
        answer(&mut plan, &[]);
        assert_eq!(take(&mut plan).expect("ready").1, expected);
    }
}

fn signature(key: &SecretKey, info: &PathInfo) -> String {
    let (hash, size) = (&info.nar_hash, info.nar_size);
    key.sign(&fingerprint(&info.path, hash, size, &info.references))
}

/// Anybody can put a signature with any name into a store.
#[test]
fn the_name_of_an_upstream_key_alone_skips_nothing() {
    let forger = SecretKey::generate("cache.nixos.org-1").expect("random");
    let unknown = SecretKey::generate("unknown-1").expect("random");
    let mut plan = UploadPlan::default();
    plan.omit(Upstream::default());
    plan.omit_names(["unknown-1".to_owned()]);
    for (name, key) in [("forged", &forger), ("unknown", &unknown)] {
        let mut path = info(name, &[]);
        path.signatures = vec![signature(key, &path)];
        plan.offer(path);
    }
    let mut nonsense = info("nonsense", &[]);
    nonsense.signatures = vec!["cache.nixos.org-1:x".into()];
    plan.offer(nonsense);
    answer(&mut plan, &[]);
    let mut ready: Vec<String> = (0..3).map(|_| take(&mut plan).expect("ready").1).collect();
    ready.sort_unstable();
    assert_eq!(ready, ["forged", "nonsense", "unknown"]);
}

#[test]
fn a_derivation_is_published_only_where_a_path_refers_to_it() {
    let mut plan = UploadPlan::default();
    for path in [
        info("source.drv", &[]),
        info("needed.drv", &["source.drv"]),
        info("other.drv", &[]),
    ] {
        plan.offer(path);
    }
    assert_eq!(plan.progress(), (3, 3));
    plan.offer(info("app", &["needed.drv"]));
    assert_eq!(plan.progress(), (1, 4));
    answer(&mut plan, &[]);
    for expected in ["source.drv", "needed.drv", "app"] {
        let (id, name) = take(&mut plan).expect("ready");
        assert_eq!(name, expected);
        plan.settle(id, Final::Published);
    }
    assert_eq!(ends(plan)["other.drv"], Final::Skipped(Skip::Derivation));
}

#[test]
fn a_reference_that_was_never_offered_is_named() {
    let mut plan = UploadPlan::default();
    plan.offer(info("app", &["lost"]));
    answer(&mut plan, &[]);
    assert_eq!(take(&mut plan), None);
    plan.offer(info("tool", &["late"]));
    answer(&mut plan, &[]);
    plan.offer(info("late", &[]));
    assert_eq!(take(&mut plan).expect("known to be missing").1, "late");
    let ends = ends(plan);
    assert!(
        failed(&ends["app"]).contains("-lost`, which is neither in the cache nor offered"),
        "{ends:?}"
    );
    // `late` was taken and never settled, so `tool` waits for a path that was offered.
    assert!(
        failed(&ends["tool"]).starts_with("something in its closure"),
        "{ends:?}"
    );
}

#[test]
fn a_path_that_is_there_after_a_lost_response_was_published() {
    let mut plan = UploadPlan::default();
    plan.offer(info("app", &[]));
    answer(&mut plan, &[]);
    let (id, _) = take(&mut plan).expect("ready");
    plan.back_off(id, true, true);
    plan.requery(id);
    answer(&mut plan, &["app"]);
    assert_eq!(ends(plan)["app"], Final::Published);
}

#[test]
fn small_ones_come_smallest_first_and_large_ones_apart() {
    let mut plan = UploadPlan::default();
    for (name, size) in [("c", 300), ("a", 100), ("huge", LARGE), ("b", 200)] {
        plan.offer(PathInfo {
            nar_size: size,
            ..info(name, &[])
        });
    }
    answer(&mut plan, &[]);
    assert_eq!(plan.ready_sizes(), (true, true));
    let order: Vec<String> = std::iter::from_fn(|| take(&mut plan))
        .map(|(_, name)| name)
        .collect();
    assert_eq!(order, ["a", "b", "c"]);
    assert_eq!(plan.take(true).expect("large").1.path.name(), "huge");
}

/// Paths in random order, each of which refers to some of those before it.
fn random_graph(random: &mut fastrand::Rng, count: usize) -> Vec<PathInfo> {
    let name = |n: usize| format!("p{n}");
    let mut offers: Vec<PathInfo> = (0..count)
        .map(|n| {
            let references: Vec<String> = (0..n).filter(|_| random.u8(..) < 40).map(name).collect();
            info(
                &name(n),
                &references.iter().map(String::as_str).collect::<Vec<_>>(),
            )
        })
        .collect();
    random.shuffle(&mut offers);
    offers
}

fn random_verdict(random: &mut fastrand::Rng) -> Verdict {
    if random.bool() {
        Verdict::Bad("damaged".into())
    } else {
        Verdict::Good { body: true }
    }
}

/// Each of the `count` paths is in one state and in one view; returns how many were repaired.
fn check_states(outcome: &Outcome, count: usize, seed: u64) -> u64 {
    let counts = outcome.counts();
    let sum = counts.published
        + counts.already_there
        + counts.repaired
        + counts.skipped
        + counts.withheld
        + counts.failed
        + counts.left;
    assert_eq!((sum, counts.left), (count as u64, 0), "seed {seed}");
    let offered: HashSet<&StorePath> = outcome.paths.iter().map(|path| &path.info.path).collect();
    assert_eq!(offered.len(), count, "seed {seed}");
    // The views that reports are made of are those states, and overlap nowhere.
    let views = outcome.sent().count()
        + outcome.already_there().count()
        + outcome.withheld().count()
        + outcome.lost().count();
    assert_eq!(views as u64 + counts.skipped, sum, "seed {seed}");
    assert_eq!(outcome.repaired().count() as u64, counts.repaired);
    counts.repaired
}

/// Random graphs, random order of offers, random answers and failures: every path is decided,
/// none is sent before its references, none is sent after a reference failed, and each is counted in exactly one state.
/// Some of those that were there already turn out to be damaged.
#[test]
fn random_graphs_end_decided_and_in_order() {
    let mut repairs = 0;
    for seed in 0..300 {
        let mut random = fastrand::Rng::with_seed(seed);
        let count = random.usize(1..40);
        let mut offers = random_graph(&mut random, count);
        let mut plan = UploadPlan::default();
        let mut good: HashSet<StorePath> = HashSet::new();
        let mut sending: Vec<(Id, PathInfo)> = Vec::new();
        let mut there: Vec<Id> = Vec::new();
        loop {
            match random.u8(0..5) {
                0 if !offers.is_empty() => {
                    there.extend(plan.offer(offers.pop().expect("not empty")));
                }
                1 => {
                    for (id, _) in plan.next_query(random.usize(1..5)) {
                        let is_missing = random.u8(..) < 200;
                        if !is_missing {
                            good.insert(plan.nodes[id].path.clone());
                        }
                        plan.on_query_result(id, is_missing);
                        there.push(id);
                    }
                }
                2 => {
                    if let Some((id, info)) = plan.take(false) {
                        let own = info.path.clone();
                        assert!(
                            info.references
                                .iter()
                                .all(|path| *path == own || good.contains(path)),
                            "seed {seed}"
                        );
                        sending.push((id, info));
                    }
                }
                3 => {
                    // A check may come at any time, and for a path that is something else by now.
                    if let Some(id) = there.pop() {
                        plan.on_checked(id, random_verdict(&mut random));
                    }
                }
                _ => {
                    if let Some((id, info)) = sending.pop() {
                        if random.u8(..) < 230 {
                            good.insert(info.path);
                            plan.on_sent(id);
                        } else {
                            plan.settle(
                                id,
                                Final::Failed {
                                    reason: "x".into(),
                                    attempts: 1,
                                },
                            );
                        }
                    }
                }
            }
            let idle =
                sending.is_empty() && plan.unqueried() == 0 && plan.ready_sizes() == (false, false);
            if idle && offers.is_empty() {
                break;
            }
        }
        assert_eq!(plan.progress(), (count as u64, count as u64), "seed {seed}");
        let outcome = Outcome {
            paths: plan.finish("time", true),
            ..Outcome::default()
        };
        repairs += check_states(&outcome, count, seed);
    }
    assert!(repairs > 50, "{repairs} repairs in all");
}
