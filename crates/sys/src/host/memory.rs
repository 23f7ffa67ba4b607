//! Memory as the kernel counts it: the control group's limit, use and peak, and the number of processes that were
//! killed because memory ran out. It reads only, apart from [`expendable`].
//!
//! Files and their meaning: the kernel's `cgroup-v2.rst` and `cgroup-v1/memory.rst`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A higher limit counts as none: version 1 writes "unlimited" as the largest multiple of a page.
const UNLIMITED: u64 = 1 << 60;

/// The folder with the memory files of a control group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cgroup {
    /// Version 2: the unified hierarchy.
    V2(PathBuf),
    /// Version 1: the memory controller's own hierarchy.
    V1(PathBuf),
}

/// The kernel's counts for a control group; a count that cannot be read is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The lowest limit of the group and its ancestors, in bytes.
    pub limit: Option<u64>,
    /// Memory in use now, in bytes.
    pub(crate) current: Option<u64>,
    /// The highest use since the group was created, in bytes.
    pub(crate) peak: Option<u64>,
    /// Processes of the group that were killed for memory, since it was created.
    pub(crate) killed_in_group: Option<u64>,
    /// Processes of the machine that were killed for memory, since it was started.
    pub(crate) killed_on_machine: Option<u64>,
}

impl Cgroup {
    /// The group of this process, if its memory files can be read.
    pub fn current() -> Option<Self> {
        Self::find(Path::new("/"))
    }

    /// As `current`, below another root for tests.
    fn find(root: &Path) -> Option<Self> {
        let text = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
        let mut v2 = None;
        for line in text.lines() {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            // On a hybrid host the memory controller belongs to version 1, so its line decides.
            if controllers.split(',').any(|name| name == "memory") {
                let folder = nearest(
                    &root.join("sys/fs/cgroup/memory"),
                    path,
                    "memory.limit_in_bytes",
                );
                if let Some(folder) = folder {
                    return Some(Self::V1(folder));
                }
            } else if controllers.is_empty() {
                v2 = ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
                    .into_iter()
                    .find_map(|mount| nearest(&root.join(mount), path, "memory.current"));
            }
        }
        v2.map(Self::V2)
    }

    pub fn read(&self) -> Memory {
        match self {
            Self::V2(folder) => Memory {
                limit: limit(folder, "memory.max"),
                current: number(folder, "memory.current"),
                peak: number(folder, "memory.peak"),
                killed_in_group: field(&folder.join("memory.events"), "oom_kill"),
                killed_on_machine: killed_on_machine(),
            },
            Self::V1(folder) => Memory {
                limit: limit(folder, "memory.limit_in_bytes"),
                current: number(folder, "memory.usage_in_bytes"),
                peak: number(folder, "memory.max_usage_in_bytes"),
                killed_in_group: field(&folder.join("memory.oom_control"), "oom_kill"),
                killed_on_machine: killed_on_machine(),
            },
        }
    }

    /// The memory of the group's processes in bytes, without the page cache, which the kernel can drop.
    pub fn of_processes(&self) -> Option<u64> {
        match self {
            Self::V2(folder) => field(&folder.join("memory.stat"), "anon"),
            Self::V1(folder) => field(&folder.join("memory.stat"), "total_rss"),
        }
    }
}

/// The memory of the machine, in bytes.
pub fn of_machine() -> Option<u64> {
    kibibytes(Path::new("/proc/meminfo"), "MemTotal:")
}

/// The machine's memory that is available to new processes, in bytes.
pub fn available() -> Option<u64> {
    kibibytes(Path::new("/proc/meminfo"), "MemAvailable:")
}

/// The resident memory of a process now and its peak, in bytes; `None` when the process has ended.
pub fn of_process(id: u32) -> Option<(u64, u64)> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    Some((
        kibibytes_in(&status, "VmRSS:")?,
        kibibytes_in(&status, "VmHWM:")?,
    ))
}

/// Makes a process the first one that the kernel kills when memory runs out (`proc_pid_oom_score_adj(5)`). Raising the
/// score needs no privilege.
pub fn expendable(id: u32) {
    // If it fails, the kernel chooses by size, which is mostly the same process.
    let _ = fs::write(format!("/proc/{id}/oom_score_adj"), "900");
}

fn kibibytes(file: &Path, name: &str) -> Option<u64> {
    kibibytes_in(&fs::read_to_string(file).ok()?, name)
}

fn kibibytes_in(text: &str, name: &str) -> Option<u64> {
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(name))?
        .trim()
        .strip_suffix("kB")?;
    kib.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The counts on a host without a readable control group.
pub(crate) fn without_cgroup() -> Memory {
    Memory {
        killed_on_machine: killed_on_machine(),
        ..Memory::default()
    }
}

/// The resident memory of this process's descendants in bytes; shared pages count once for each process. For machines
/// on which the job has no control group of its own.
pub fn of_descendants() -> u64 {
    let pages = descendants()
        .unwrap_or_else(descendants_of_all)
        .into_values()
        .sum::<u64>();
    pages * rustix::param::page_size() as u64
}

/// The descendants of this process and their resident pages, by following the lists of children; `None` where the
/// kernel has no such lists (`CONFIG_PROC_CHILDREN`). A child may be missing while one of its siblings ends
/// (`proc_tid_children(5)`).
fn descendants() -> Option<HashMap<u32, u64>> {
    let mut family = HashMap::new();
    let mut queue = children(std::process::id())?;
    while let Some(pid) = queue.pop() {
        // The second field of `proc_pid_statm(5)` is the number of resident pages.
        let pages = fs::read_to_string(format!("/proc/{pid}/statm"))
            .ok()
            .and_then(|text| nth(&text, 1));
        // A process that has ended has no pages. Each one is visited once, even if ids are reused.
        if family.insert(pid, pages.unwrap_or_default()).is_none() {
            queue.extend(children(pid).unwrap_or_default());
        }
    }
    Some(family)
}

/// The children of a process, which the kernel lists for each of its threads.
fn children(pid: u32) -> Option<Vec<u32>> {
    let mut found = Vec::new();
    for thread in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        match fs::read_to_string(thread.path().join("children")) {
            Ok(text) => found.extend(
                text.split_whitespace()
                    .filter_map(|word| word.parse::<u32>().ok()),
            ),
            // The thread still exists, so this kernel has no lists of children.
            Err(_) if thread.path().exists() => return None,
            Err(_) => (),
        }
    }
    Some(found)
}

/// As [`descendants`], by reading all processes of the machine.
fn descendants_of_all() -> HashMap<u32, u64> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // Fields 4 (parent) and 24 (resident pages) of `proc_pid_stat(5)`. They are counted from behind the name, which
        // may contain spaces and parentheses.
        let Some((_, rest)) = stat.rsplit_once(')') else {
            continue;
        };
        all.push((
            pid,
            nth(rest, 1).unwrap_or_default(),
            nth(rest, 21).unwrap_or_default(),
        ));
    }
    let (mut family, mut queue) = (HashMap::new(), vec![u64::from(std::process::id())]);
    while let Some(above) = queue.pop() {
        for (pid, _, pages) in all.iter().filter(|(_, parent, _)| *parent == above) {
            family.insert(*pid, *pages);
            queue.push(u64::from(*pid));
        }
    }
    family
}

/// The number at this position, from 0, of a list separated by white space.
fn nth(text: &str, number: usize) -> Option<u64> {
    text.split_whitespace().nth(number)?.parse().ok()
}

/// The folder of `path` below `mount`, or the nearest ancestor that has `file`: in a container the path may be that of
/// the host, while the mount shows only the container's part of the tree.
fn nearest(mount: &Path, path: &str, file: &str) -> Option<PathBuf> {
    let whole = mount.join(path.trim_start_matches('/'));
    whole
        .ancestors()
        .take_while(|folder| folder.starts_with(mount))
        .find(|folder| folder.join(file).is_file())
        .map(Path::to_owned)
}

fn number(folder: &Path, file: &str) -> Option<u64> {
    fs::read_to_string(folder.join(file))
        .ok()?
        .trim()
        .parse()
        .ok()
}

/// The lowest limit of the folder and its ancestors. `max` and absurdly high values count as none.
fn limit(folder: &Path, file: &str) -> Option<u64> {
    // A limit of any ancestor applies as well. Above the mount point there is no such file.
    let values = folder
        .ancestors()
        .map_while(|folder| folder.join(file).is_file().then(|| number(folder, file)));
    values.flatten().filter(|bytes| *bytes < UNLIMITED).min()
}

pub(super) fn killed_on_machine() -> Option<u64> {
    field(Path::new("/proc/vmstat"), "oom_kill")
}

pub(super) fn field(file: &Path, name: &str) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        (key == name).then(|| value.trim().parse().ok()).flatten()
    })
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::{Command, Stdio};

    use super::*;

    fn file(root: &Path, name: &str, text: &str) {
        let file = root.join(name);
        fs::create_dir_all(file.parent().expect("has one")).expect("made");
        fs::write(file, text).expect("written");
    }

    #[test]
    fn version_2_in_a_container_that_sees_its_own_root() {
        let root = tempfile::tempdir().expect("temporary folder");
        file(root.path(), "proc/self/cgroup", "0::/kubepods/pod1\n");
        file(root.path(), "sys/fs/cgroup/memory.max", "1048576\n");
        file(root.path(), "sys/fs/cgroup/memory.current", "4096\n");
        file(
            root.path(),
            "sys/fs/cgroup/memory.events",
            "low 0\noom 3\noom_kill 2\n",
        );
        let memory = Cgroup::find(root.path()).expect("found").read();
        assert_eq!(
            (memory.limit, memory.current, memory.killed_in_group),
            (Some(1_048_576), Some(4096), Some(2))
        );
    }

    #[test]
    fn version_1_takes_the_least_limit_of_its_ancestors() {
        let root = tempfile::tempdir().expect("temporary folder");
        file(
            root.path(),
            "proc/self/cgroup",
            "9:name=systemd:/\n4:memory:/a/b\n0::/\n",
        );
        file(
            root.path(),
            "sys/fs/cgroup/memory/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        file(
            root.path(),
            "sys/fs/cgroup/memory/a/memory.limit_in_bytes",
            "2097152\n",
        );
        file(
            root.path(),
            "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        file(
            root.path(),
            "sys/fs/cgroup/memory/a/b/memory.oom_control",
            "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n",
        );
        let memory = Cgroup::find(root.path()).expect("found").read();
        assert_eq!(
            (memory.limit, memory.killed_in_group),
            (Some(2_097_152), Some(5))
        );
    }

    #[test]
    fn this_process_is_seen() {
        let (now, most) = of_process(std::process::id()).expect("it runs");
        assert!(
            0 < now && now <= most + (64 << 20) && available().is_some_and(|bytes| bytes > 0),
            "{now} {most}"
        );
        assert_eq!(of_process(u32::MAX), None);
    }

    #[test]
    fn children_and_their_children_are_found_either_way() {
        let _alive = crate::CHILDREN_OF_TESTS.blocking_lock();
        let mut shell = Command::new("sh");
        // `dd` holds the whole block once it has written the first byte and cannot write the rest.
        shell
            .args(["-c", "dd if=/dev/zero bs=64M count=1 2>/dev/null; true"])
            .stdout(Stdio::piped());
        let mut shell = shell.spawn().expect("started");
        shell
            .stdout
            .as_mut()
            .expect("piped")
            .read_exact(&mut [0])
            .expect("written");
        let held = (64 << 20) / rustix::param::page_size() as u64;
        let all = descendants_of_all();
        assert!(
            all.contains_key(&shell.id()) && all.values().sum::<u64>() >= held,
            "{all:?}"
        );
        // Some kernels do not list children.
        if Path::new("/proc/thread-self/children").exists() {
            let found = descendants().expect("listed");
            assert!(
                found.contains_key(&shell.id()) && found.values().sum::<u64>() >= held,
                "{found:?}"
            );
        }
        assert!((64 << 20..1 << 40).contains(&of_descendants()));
        drop(shell.stdout.take());
        shell.wait().expect("ended");
    }
}
