//! The machine that this program runs on: control groups and memory, disks, the user's home, private temporary folders,
//! inotify, thread priorities, and short blocking work. It reads and keeps; `budget` decides what follows.

mod answering;
pub mod disk;
pub mod home;
pub mod inline_blocking;
pub mod job_registry;
pub mod kill_counts;
pub mod loopback;
pub mod memory;
#[cfg_attr(not(target_os = "linux"), path = "notify/elsewhere.rs")]
pub mod notify;
pub mod peak;
pub mod priority;
pub mod private;
pub mod room_watcher;
