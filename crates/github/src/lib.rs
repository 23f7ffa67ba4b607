//! GitHub's API: requests and responses. What they contain is decided elsewhere.

pub mod check_run;
pub mod checks;
