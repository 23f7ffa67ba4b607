//! `flywheel namespace-trial`: the process that tries for `setup --plan` whether a store of this user's own can be entered.
//! A process cannot leave such a namespace again, so that another one tries it. The help does not list it.

use clap::Args;

use flywheel_nix::bootstrap::rootless;
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::data;

/// Try the namespaces of a store of this user's own, and print what forbids them and the remedy, a line each.
#[derive(Args, Debug)]
#[command(hide = true)]
pub(crate) struct Inputs {}

/// Tries it. To be called before any thread is started.
pub(crate) fn enter(env: &Env) {
    if let Err((obstacle, remedy)) = rootless::try_out(env) {
        data(&format!("{obstacle}\n{remedy}"));
    }
}
