//! The three sources and their order, the numbers that hold literally, and what holds for every history.

use super::*;
use crate::history::Dependencies;
use crate::size::{AMD, ARM};

fn run(cpu_p95: f64, mem_p95: f64) -> Run {
    Run {
        at: 0,
        target: "final".into(),
        dependencies: Dependencies::Hit,
        size: None,
        cpu_p95,
        mem_p95,
        ran_out_of_memory: false,
        minutes: 10.0,
    }
}

fn ran_out(limit_gb: f64) -> Run {
    Run {
        ran_out_of_memory: true,
        ..run(2.0, limit_gb)
    }
}

fn approval(cpu: u32, memory_gb: u32) -> Approval {
    Approval {
        at: 0,
        target: "final".into(),
        cpu,
        memory_gb,
    }
}

struct Case {
    spec: Option<BuildSpec>,
    runs: Vec<Run>,
    approval: Option<Approval>,
    policy: Policy,
    target: Target,
}

impl Case {
    fn new(runs: Vec<Run>) -> Self {
        Self {
            spec: None,
            runs,
            approval: Some(approval(16, 32)),
            policy: Policy::P95,
            target: ARM,
        }
    }

    fn decide(&self) -> Decision {
        let runs: Vec<&Run> = self.runs.iter().collect();
        let known = Known {
            spec: self.spec.as_ref().map(|spec| (".build-spec.toml", spec)),
            runs: &runs,
            approval: self.approval.as_ref(),
            language: Language::Rust,
            marker: Some("Cargo.toml"),
        };
        decide(&SizeTable::default(), self.target, self.policy, &known)
    }
}

fn size_of(decision: &Decision) -> &str {
    decision
        .size
        .as_ref()
        .map_or("none", |size| size.name.as_str())
}

fn need(cpu: u32, memory_gb: u32) -> Need {
    Need { cpu, memory_gb }
}

#[test]
fn the_contracts_numbers_hold() {
    // 3.2 CPU and 6.1 GB give 4 and 8.
    let decision = Case::new(vec![run(3.2, 6.1); 5]).decide();
    assert_eq!(decision.source, Source::History);
    assert_eq!(decision.need, need(4, 8));
    assert_eq!(size_of(&decision), "cax21");
    // Never under 2 CPU and 4 GB.
    assert_eq!(Case::new(vec![run(0.1, 0.2); 5]).decide().need, need(2, 4));
    // A product that is whole stays what it is: 35 × 1.2 is 42, 2.5 × 1.2 is 3.
    assert_eq!(by_percentile(&[&run(2.5, 35.0)]).0, need(3, 42));
    assert_eq!(MAX_OOM_RETRIES, 1);
}

#[test]
fn the_first_source_that_knows_wins() {
    let five = || Case::new(vec![run(7.0, 12.0); 5]);
    let explicit = BuildSpec {
        cpu: Some(2),
        memory_gb: Some(7.5),
        time_budget_min: Some(5),
        runner_type: None,
    };
    let named = BuildSpec {
        runner_type: Some("cax41".into()),
        ..explicit.clone()
    };
    let only_time = BuildSpec {
        time_budget_min: Some(7),
        ..BuildSpec::default()
    };
    let with = |spec: &BuildSpec| Case {
        spec: Some(spec.clone()),
        ..five()
    };
    let few = Case::new(vec![run(7.0, 12.0); 4]);
    let unapproved = Case {
        approval: None,
        ..five()
    };
    for (case, source, wanted, size, minutes) in [
        (with(&named), Source::Explicit, need(16, 32), "cax41", 5),
        (with(&explicit), Source::Explicit, need(2, 8), "cax21", 5),
        (with(&only_time), Source::History, need(9, 15), "cax41", 7),
        (five(), Source::History, need(9, 15), "cax41", 60),
        (few, Source::Language, need(4, 8), "cax21", 60),
        (unapproved, Source::Language, need(4, 8), "cax21", 60),
    ] {
        let decision = case.decide();
        assert_eq!(
            (
                decision.source,
                decision.need,
                size_of(&decision),
                decision.time_budget_min
            ),
            (source, wanted, size, minutes),
            "{}",
            decision.reason
        );
    }
}

#[test]
fn a_decision_carries_its_reasons() {
    let unapproved = Case {
        approval: None,
        ..Case::new(vec![run(3.2, 6.1); 5])
    };
    let decision = unapproved.decide();
    assert_eq!(decision.reason, "`Cargo.toml` means rust");
    let advice = decision.advice.unwrap_or_default();
    assert!(
        advice.starts_with("P95 of 5 runs is 3.2 CPU, 6.1 GB;")
            && advice.ends_with("advice until `flywheel image sizing approve` allows it"),
        "{advice}"
    );
    let capped = Case {
        approval: Some(approval(2, 8)),
        ..Case::new(vec![run(3.2, 9.0); 5])
    };
    let decision = capped.decide();
    assert_eq!(decision.need, need(2, 8));
    assert!(
        decision.reason.ends_with("at most 2 CPU, 8 GB is approved"),
        "{}",
        decision.reason
    );
}

#[test]
fn an_image_for_amd64_gets_no_arm_size_from_any_source() {
    let explicit = BuildSpec {
        runner_type: Some("cax21".into()),
        ..BuildSpec::default()
    };
    let mut sources = Vec::new();
    for (spec, runs) in [(Some(explicit), 5), (None, 5), (None, 0)] {
        for policy in [Policy::P95, Policy::ExpectedCost] {
            let case = Case {
                spec: spec.clone(),
                policy,
                target: AMD,
                ..Case::new(vec![run(3.2, 6.1); runs])
            };
            let decision = case.decide();
            assert!(decision.size.is_err(), "{decision:?}");
            assert!(decision.choices.is_empty(), "{decision:?}");
            sources.push(decision.source);
        }
    }
    for source in [Source::Explicit, Source::History, Source::Language] {
        assert!(sources.contains(&source));
    }
}

#[test]
fn a_run_out_of_memory_means_more_than_its_limit() {
    // The last runs hit the limit of 8 GB: the next one has to get more.
    let mut runs = vec![run(2.0, 6.0); 20];
    runs.extend(vec![ran_out(8.0); 5]);
    let decision = Case::new(runs.clone()).decide();
    assert!(decision.need.memory_gb > 8, "{}", decision.reason);
    // Of the smaller sizes, each of those runs would have needed another one.
    let choice = |decision: &Decision, name: &str| {
        let mut choices = decision.choices.iter();
        choices
            .find(|choice| choice.size == name)
            .cloned()
            .expect("a size of the table")
    };
    assert!(choice(&decision, "cax21").retried > 0.2);
    assert!(choice(&decision, "cax31").retried < 1e-9);
    assert!((choice(&decision, "cax11").failed - choice(&decision, "cax21").retried).abs() < 1e-9);
}

#[test]
fn an_old_run_counts_for_less_and_half_after_25_builds() {
    let of = |count| percentile::weights(count).collect::<Vec<_>>();
    assert!((of(26)[0] - 0.5).abs() < 1e-12 && (of(51)[0] - 0.25).abs() < 1e-12);
    // Ten large runs are forgotten behind a hundred small ones, and not behind ten.
    let after = |count| {
        let mut runs = vec![run(2.0, 20.0); 10];
        runs.extend(vec![run(2.0, 3.0); count]);
        Case::new(runs).decide().need.memory_gb
    };
    assert_eq!((after(10), after(150)), (24, 4));
}

#[test]
fn expected_cost_takes_a_retry_into_account() {
    // One build in twelve is large: buying its size every time costs more than a retry now and then.
    let mut runs = Vec::new();
    for index in 0..48 {
        runs.push(run(2.0, if index % 12 == 5 { 6.0 } else { 3.0 }));
    }
    let decide = |policy| {
        let case = Case {
            policy,
            ..Case::new(runs.clone())
        };
        case.decide()
    };
    assert_eq!(size_of(&decide(Policy::P95)), "cax21");
    let cheap = decide(Policy::ExpectedCost);
    assert_eq!(size_of(&cheap), "cax11");
    // By hand: an hour of the smallest costs 1, and a run takes ten minutes. One that does not fit spends 70 % of that,
    // and the whole on the next size, which costs 2.
    let large: f64 = percentile::weights(48)
        .enumerate()
        .filter(|(index, _)| index % 12 == 5)
        .map(|(_, weight)| weight)
        .sum();
    let share = large / percentile::weights(48).sum::<f64>();
    let expected = (1.0 - share) / 6.0 + share * (0.7 + 2.0) / 6.0;
    assert!((cheap.choices[0].cost - expected).abs() < 1e-9);
    assert!((cheap.choices[0].retried - share).abs() < 1e-9);
    // Where three of four builds are large, the retry is what costs.
    let mixed: Vec<Run> = (0..40)
        .map(|index| run(2.0, if index % 4 == 0 { 3.0 } else { 6.0 }))
        .collect();
    let case = Case {
        policy: Policy::ExpectedCost,
        ..Case::new(mixed)
    };
    assert_eq!(size_of(&case.decide()), "cax21");
}

#[test]
fn what_holds_for_every_history() {
    let mut random = fastrand::Rng::with_seed(24);
    let table = SizeTable::default();
    for _ in 0..2000 {
        let count = random.usize(0..60);
        let runs: Vec<Run> = (0..count)
            .map(|_| Run {
                ran_out_of_memory: random.u8(0..10) == 0,
                minutes: 1.0 + random.f64() * 50.0,
                ..run(random.f64() * 20.0, random.f64() * 40.0)
            })
            .collect();
        let most = approval(2 + random.u32(0..20), 4 + random.u32(0..40));
        let case = Case {
            approval: (random.bool()).then_some(most.clone()),
            policy: [Policy::P95, Policy::ExpectedCost][random.usize(0..2)],
            ..Case::new(runs)
        };
        let decision = case.decide();
        let by_history = decision.source == Source::History;
        assert_eq!(
            by_history,
            count >= LEAST_SAMPLES && case.approval.is_some()
        );
        let Need { cpu, memory_gb } = decision.need;
        assert!(cpu >= FLOOR.cpu && memory_gb >= FLOOR.memory_gb);
        if by_history {
            assert!(
                cpu <= most.cpu && memory_gb <= most.memory_gb,
                "{decision:?}"
            );
        }
        // The size covers the need, and no smaller one does.
        match &decision.size {
            Ok(size) => {
                assert!(size.covers(decision.need));
                let smaller = table.for_target(ARM).take_while(|other| *other != size);
                assert!(
                    smaller
                        .into_iter()
                        .all(|other| !other.covers(decision.need))
                );
            }
            Err(error) => assert!(matches!(error, NoSize::TooLarge { .. }), "{error}"),
        }
        for choice in &decision.choices {
            assert!(choice.failed <= choice.retried + 1e-9 && choice.retried <= 1.0 + 1e-9);
            assert!(choice.cost.is_finite() && choice.cost > 0.0);
        }
    }
}

#[test]
fn the_percentile_is_the_nearest_rank() {
    // With fewer than 20 runs, each of which counts for more than 5 %, the nearest rank is the largest.
    let mut random = fastrand::Rng::with_seed(95);
    for _ in 0..500 {
        let count = random.usize(1..14);
        let runs: Vec<Run> = (0..count).map(|_| run(1.0, random.f64() * 30.0)).collect();
        let runs: Vec<&Run> = runs.iter().collect();
        let largest = runs.iter().map(|run| run.mem_p95).fold(0.0, f64::max);
        let least_weight = percentile::weights(count).next().unwrap_or_default();
        let total: f64 = percentile::weights(count).sum();
        assert!(least_weight / total > 0.05);
        assert!((percentile::p95(&runs, |run| run.mem_p95) - largest).abs() < 1e-12);
    }
    // Where small values are the newest, the rank moves down with the weight of the large ones.
    let rising: Vec<Run> = (1..=100).map(|value| run(1.0, f64::from(value))).collect();
    let falling: Vec<Run> = rising.iter().rev().cloned().collect();
    let p95 = |runs: &[Run]| {
        let runs: Vec<&Run> = runs.iter().collect();
        percentile::p95(&runs, |run| run.mem_p95)
    };
    assert!((p95(&rising) - 99.0).abs() < 1e-9, "{}", p95(&rising));
    assert!(p95(&falling) < 95.0, "{}", p95(&falling));
}
