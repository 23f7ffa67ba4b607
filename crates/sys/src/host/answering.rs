//! Whether the file system of a folder answers. A server that is gone holds up whoever looks at its files, and no signal
//! ends that; so only a thread looks, and is left behind.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// A server on the same network answers within milliseconds.
pub(crate) const LIMIT: Duration = Duration::from_secs(3);
/// File systems that another process or machine serves, by the names that the kernel has for them.
const SERVED: [&str; 12] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "ceph",
    "glusterfs",
    "lustre",
    "afs",
    "9p",
    "virtiofs",
    "autofs",
    "fuse",
];
/// As many links as the kernel follows.
const LINK_LIMIT: usize = 40;

/// Whether a folder can be looked at within the limit. Of a disk of this machine it is not tried.
pub(crate) fn answers(folder: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if !is_served(folder, &mounts) {
        return true;
    }
    let (send, receive) = mpsc::channel();
    let folder = folder.to_owned();
    let looking = thread::spawn(move || {
        let _ = fs::metadata(folder);
        let _ = send.send(());
    });
    let answered = receive.recv_timeout(LIMIT).is_ok();
    if answered {
        let _ = looking.join();
        await_one_thread();
    }
    answered
}

/// A namespace is entered by a process with one thread, and one that was joined is gone a moment later.
fn await_one_thread() {
    for _ in 0..100 {
        let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
        if threads == 1 {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Whether the folder, or one on the way to it, is on a served file system. Looks at nothing there.
fn is_served(folder: &Path, mounts: &str) -> bool {
    let names = |path: &Path| -> VecDeque<OsString> {
        let parts = path.components().filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        });
        parts.collect()
    };
    let mut path = PathBuf::from("/");
    let mut rest = names(folder);
    let mut links = 0;
    while let Some(name) = rest.pop_front() {
        if name == ".." {
            path.pop();
            continue;
        }
        path.push(name);
        if is_served_mount(&path, mounts) {
            return true;
        }
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        links += 1;
        if links > LINK_LIMIT {
            return false;
        }
        path.pop();
        if target.is_absolute() {
            path = PathBuf::from("/");
        }
        let mut target = names(&target);
        target.append(&mut rest);
        rest = target;
    }
    false
}

/// Whether the last of the mounts that the path is below is served (`proc(5)`, `/proc/pid/mountinfo`).
fn is_served_mount(path: &Path, mounts: &str) -> bool {
    let mounts = mounts.lines().filter_map(|line| {
        let (before, behind) = line.split_once(" - ")?;
        let point = before.split(' ').nth(4)?.replace("\\040", " ");
        Some((PathBuf::from(point), behind.split(' ').next()?))
    });
    let kind = mounts
        .filter(|(point, _)| path.starts_with(point))
        // Of two at one place, the later one is seen.
        .max_by_key(|(point, _)| point.components().count())
        .map(|(_, kind)| kind);
    let kind = kind.map(|kind| kind.split('.').next().unwrap_or(kind));
    kind.is_some_and(|kind| SERVED.contains(&kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:40 / /srv/home rw - nfs4 server:/home rw
31 22 0:41 / /mnt/with\\040space rw - fuse.sshfs host: rw
32 30 0:42 / /srv/home/local rw - tmpfs tmpfs rw";

    #[test]
    fn what_a_server_has_is_told_by_the_mounts_alone() {
        let served = |path: &str| is_served(Path::new(path), MOUNTS);
        assert!(served("/srv/home/runner"));
        assert!(served("/mnt/with space/x"));
        assert!(!served("/srv/homes"));
        assert!(!served("/srv/../var"));
        // Only by way of the server.
        assert!(served("/srv/home/local/x"));
    }

    #[test]
    fn a_link_to_a_server_counts_as_one() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let link = folder.path().join("home");
        std::os::unix::fs::symlink("/srv/home", &link).expect("made");
        assert!(is_served(&link.join("runner"), MOUNTS));
        let looped = folder.path().join("loop");
        std::os::unix::fs::symlink(&looped, &looped).expect("made");
        assert!(!is_served(&looped, MOUNTS));
        assert!(answers(folder.path()));
    }
}
