//! What a job would find on this machine and do about it, for people. Changes nothing.

use std::time::Duration;

use tokio::time::Instant;

use super::machine::{Folder, Machine, Opening};
use super::plan::{Impossible, Plan, Wanted, plan};
use super::{Error, repair};
use crate::tool::Nix;
use flywheel_core::exit::Explain as _;
use flywheel_sys::runner::env::Env;

/// A machine that is looked at answers faster than one that a job waits for.
const LIMIT: Duration = Duration::from_secs(20);

/// A machine, and what a job would do there.
#[derive(Clone, Debug)]
pub struct Examined {
    pub machine: Machine,
    /// The line that Nix prints of itself, if there is one that runs.
    pub version: Option<String>,
    pub plan: Plan,
}

/// Looks at this machine as a job would. A store that is not there yet is not opened, since Nix would make it.
pub async fn examine(env: &Env, wanted: &Wanted) -> Examined {
    let mut machine = Machine::read(env);
    machine.try_sudo().await;
    machine.try_namespaces(env, wanted).await;
    machine.try_socket(env).await;
    let mut version = None;
    let mut broken = None;
    if let Some(found) = machine.nix.clone() {
        let has_store = machine.is_elsewhere
            || match machine.folder {
                Folder::Used { .. } | Folder::NoExec => true,
                // Nothing can be made there.
                Folder::ReadOnly | Folder::Link { .. } => machine.is_nix_below,
                Folder::Absent { .. } | Folder::Empty { .. } | Folder::NoFolder => false,
            };
        match Nix::detect(&found.program, env).await {
            Ok(nix) => {
                version = Some(
                    nix.version
                        .too_old()
                        .unwrap_or_else(|| nix.version.to_string()),
                );
                let opening = match plan(&machine, wanted) {
                    Plan::Ready if has_store => {
                        repair::opening(&nix, &machine, Instant::now() + LIMIT).await
                    }
                    Plan::Ready => repair::foreseen(&nix, &machine).await,
                    _ => Ok(Opening::Untried),
                };
                match opening {
                    Ok(opening) => machine.opening = opening,
                    Err(error) => broken = Some(error),
                }
            }
            Err(error) => broken = Some(Error::Nix(error)),
        }
    }
    let planned = match broken {
        Some(error) => Plan::Impossible(Impossible {
            remedy: error.hint().unwrap_or_default(),
            obstacle: error.to_string(),
        }),
        None => plan(&machine, wanted),
    };
    Examined {
        machine,
        version,
        plan: planned,
    }
}
