//! The priority of this program's threads. It never touches another process.

/// The niceness of threads that only accompany a build (`nice(2)`). On a busy machine the build gets about ten times as
/// much processor time; on an idle one there is no difference.
const NICE: i32 = 10;

/// Lowers the priority of the calling thread, and of the threads and processes that it starts. On Linux niceness
/// belongs to a thread, so the thread that starts the job's command must not call this.
pub fn lower_priority() {
    let now = rustix::process::nice(0).unwrap_or(NICE);
    // If the kernel refuses, the thread keeps its priority, which does no harm.
    let _ = rustix::process::nice((NICE - now).max(0));
}
