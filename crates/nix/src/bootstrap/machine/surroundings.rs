//! Facts of a machine that decide nothing, and that people want to see beside those that do.

use std::fs;
use std::path::Path;

use flywheel_core::text::bytes;
use flywheel_sys::host::memory::{Cgroup, of_machine};

/// Files that container engines leave in their containers.
const CONTAINER_FILES: [(&str, &str); 3] = [
    ("/.dockerenv", "Docker"),
    ("/run/.containerenv", "Podman"),
    ("/var/run/secrets/kubernetes.io", "Kubernetes"),
];
/// The loaders of the two libraries of C that Linux systems have. Neither is needed.
const LOADERS: [(&str, &str); 4] = [
    ("/lib64/ld-linux-x86-64.so.2", "glibc"),
    ("/lib/ld-linux-aarch64.so.1", "glibc"),
    ("/lib/ld-musl-x86_64.so.1", "musl"),
    ("/lib/ld-musl-aarch64.so.1", "musl"),
];
/// Package managers, by the file of their program.
const PACKAGE_MANAGERS: [(&str, &str); 5] = [
    ("/usr/bin/apt-get", "apt"),
    ("/sbin/apk", "apk"),
    ("/usr/bin/dnf", "dnf"),
    ("/usr/bin/pacman", "pacman"),
    ("/usr/bin/zypper", "zypper"),
];

/// What surrounds the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surroundings {
    rows: Vec<(&'static str, String)>,
}

impl Surroundings {
    /// Looks at this machine; takes milliseconds.
    pub fn read() -> Self {
        let known = |known: &[(&str, &'static str)]| {
            let found = known.iter().find(|(file, _)| Path::new(file).exists());
            found.map_or("none", |(_, name)| *name).to_owned()
        };
        Self {
            rows: vec![
                ("container", known(&CONTAINER_FILES)),
                ("memory", memory()),
                ("C library", known(&LOADERS)),
                ("package manager", known(&PACKAGE_MANAGERS)),
                ("disk", disk()),
                ("system", system()),
            ],
        }
    }

    /// Rows of a table: what it is, and how it stands.
    pub fn rows(&self) -> &[(&'static str, String)] {
        &self.rows
    }
}

fn memory() -> String {
    let limit = Cgroup::current().and_then(|group| group.read().limit);
    match (limit, of_machine()) {
        (Some(limit), _) => format!("a limit of {}", bytes(limit)),
        (None, Some(machine)) => format!("no limit, and {} in the machine", bytes(machine)),
        (None, None) => "unknown".into(),
    }
}

/// The room where a store is, or where it would come to be.
fn disk() -> String {
    let folder = ["/nix/store", "/nix", "/"]
        .map(Path::new)
        .into_iter()
        .find(|folder| folder.is_dir());
    let folder = folder.unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(folder) {
        Ok(stat) => {
            let free = bytes(stat.f_bavail.saturating_mul(stat.f_frsize));
            let inodes = if stat.f_files > 0 {
                format!(", {} inodes", stat.f_favail)
            } else {
                String::new()
            };
            format!("{free}{inodes} free in `{}`", folder.display())
        }
        Err(error) => format!("`{}` cannot be looked at: {error}", folder.display()),
    }
}

fn system() -> String {
    let version = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = version
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let name = name.map_or("Linux", |name| name.trim_matches('"'));
    format!("{name}, {}", std::env::consts::ARCH)
}
