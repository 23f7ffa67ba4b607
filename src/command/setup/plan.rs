//! `flywheel setup --plan`: which machine this is, and how a job on it gets a working Nix. Changes nothing.

use flywheel_core::exit::Exit;
use flywheel_nix::bootstrap::machine::Surroundings;
use flywheel_nix::bootstrap::plan::{Impossible, Plan, Wanted};
use flywheel_nix::bootstrap::{Examined, examine};
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::data;

/// Prints the facts and the plan. Ends with 69 where there can be no working Nix.
pub(super) async fn print(wanted: &Wanted, env: &Env) -> Exit {
    let Examined {
        machine,
        version,
        plan: planned,
    } = examine(env, wanted).await;
    let mut rows = machine.facts();
    rows.extend(version.map(|version| ("Nix version", version)));
    rows.extend_from_slice(Surroundings::read().rows());
    rows.push(("plan", planned.summary()));
    if let Plan::Impossible(Impossible { remedy, .. }) = &planned {
        rows.push(("remedy", remedy.clone()));
    }
    data(&table(&rows));
    match planned {
        Plan::Impossible(_) => Exit::Host,
        _ => Exit::Ok,
    }
}

/// Two columns.
fn table(rows: &[(&str, String)]) -> String {
    let width = rows
        .iter()
        .map(|(name, _)| name.len())
        .max()
        .unwrap_or_default();
    let lines = rows
        .iter()
        .map(|(name, text)| format!("{name:width$}  {text}"));
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_columns_stand_below_each_other() {
        let rows = [
            ("user", "runner".to_owned()),
            ("build users", "none".to_owned()),
        ];
        assert_eq!(table(&rows), "user         runner\nbuild users  none");
    }
}
