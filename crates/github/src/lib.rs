//! GitHub's API: requests and responses, what they contain being decided elsewhere; and who a job is that proves it by
//! a token.

pub mod check_run;
pub mod checks;
pub mod oidc;
