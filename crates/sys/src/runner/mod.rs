//! The door to the CI runner: its environment, its event payload, its workflow commands and files.
//! Nothing else reads the environment or prints a workflow command.

pub mod context;
pub mod env;
pub mod event;
pub mod files;
pub mod gitlab;
pub mod workflow;
