//! The interface to the CI runner: its environment, event payload, workflow commands and files. No other module reads
//! the environment or prints a workflow command.

pub mod context;
pub mod env;
pub mod event;
pub mod files;
pub mod gitlab;
pub mod guard;
pub mod input_names;
pub mod workflow;
