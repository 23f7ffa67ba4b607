//! How much of the machine our threads ask for. Never touches another process.

/// The niceness of threads that only accompany a build (`nice(2)`): on a busy machine the build gets about ten
/// times as much, and on an idle one nobody notices.
const NICE: i32 = 10;

/// Lets the calling thread come after everybody else, and with it what it starts. On Linux niceness belongs to a
/// thread, so the thread that starts the job's command must not call this.
pub fn yield_to_others() {
    let now = rustix::process::nice(0).unwrap_or(NICE);
    // A kernel that refuses leaves the thread as it was, which is no worse than before.
    let _ = rustix::process::nice((NICE - now).max(0));
}
