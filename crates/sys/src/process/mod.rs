//! Children of this program: started, supervised, stopped. Nothing else starts one.

pub mod capture;
pub mod detached;
pub mod lines;
mod orphans;
pub mod own;
pub mod service;
pub mod signals;
pub mod supervise;
