//! The door to GitHub's API. Knows requests and answers; what is said in them is decided elsewhere.

pub mod check_run;
pub mod checks;
