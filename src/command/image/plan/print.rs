//! A plan as lines for people, and as JSON.

use serde_json::json;

use super::Planned;
use crate::command::image::sizing::stage;
use flywheel_image::sizing::Choice;
use flywheel_sys::runner::workflow::{data, json_data};

pub(super) fn text(planned: &Planned) {
    let decision = &planned.decision;
    let (workspace, target) = (&planned.workspace, stage(&planned.target));
    data(&format!(
        "workspace {workspace}, {target}, {}",
        planned.platform
    ));
    match &decision.size {
        Ok(size) => data(&format!(
            "size: {} ({} CPU, {} GB, {})",
            size.name, size.cpu, size.memory_gb, size.architecture
        )),
        Err(error) => {
            data(&format!(
                "size: none for {}, because {error}",
                decision.need
            ));
            data(&format!("  {}", error.remedy()));
        }
    }
    data(&format!(
        "because: {} ({})",
        decision.reason,
        decision.source.as_str()
    ));
    if let Some(advice) = &decision.advice {
        data(&format!("history: {advice}"));
    }
    data(&format!("time: {} min at most", decision.time_budget_min));
    if !decision.choices.is_empty() {
        data("what each size would have cost on the history, for a build:");
    }
    decision
        .choices
        .iter()
        .for_each(|choice| data(&line(choice)));
    if let Some(caches) = &planned.caches {
        data(&format!("caches read: {}", caches.imports.join(", ")));
        let written = match &caches.export {
            Some(export) if export.restores_on_failure => {
                format!("{}, put back on failure", export.namespace)
            }
            Some(export) => export.namespace.clone(),
            None => "none".into(),
        };
        data(&format!(
            "caches written: {written}, because {}",
            caches.reason
        ));
    }
}

fn line(choice: &Choice) -> String {
    format!(
        "  {} ({}): {:.3}, {:.0} % run twice, {:.0} % of all fail on the next size, too",
        choice.size,
        choice.need,
        choice.cost,
        choice.retried * 100.0,
        choice.failed * 100.0
    )
}

pub(super) fn json(planned: &Planned) {
    let decision = &planned.decision;
    let size = decision.size.as_ref();
    let whole = json!({
        "workspace": planned.workspace,
        "target": planned.target,
        "platform": planned.platform.to_string(),
        "source": decision.source,
        "reason": decision.reason,
        "need": decision.need,
        "size": size.ok(),
        "no_size": size.err().map(ToString::to_string),
        "time_budget_min": decision.time_budget_min,
        "history": decision.advice,
        "choices": decision.choices,
        "caches": planned.caches,
    });
    json_data(&format!("{whole:#}"));
}
