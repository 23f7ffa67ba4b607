//! What keeps an ordinary user from making user and mount namespaces, and what an administrator does about it.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;

use rustix::io::Errno;

use super::{Refused, Step};

/// What the kernel shows of its limits on namespaces; `None` where it does not have the setting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// `user.max_user_namespaces`
    pub max_user_namespaces: Option<u64>,
    /// `user.max_mnt_namespaces`
    pub max_mnt_namespaces: Option<u64>,
    /// `kernel.unprivileged_userns_clone`, of Debian's older kernels.
    pub unprivileged_userns_clone: Option<u64>,
    /// `kernel.apparmor_restrict_unprivileged_userns`, of Ubuntu's kernels.
    pub apparmor_restrict: Option<u64>,
    /// Whether AppArmor has a profile for this process, which decides in the place of that setting.
    pub has_apparmor_profile: bool,
    /// Whether this process is in a `chroot`.
    pub in_chroot: bool,
    /// Whether a filter of system calls is on this process, as container runtimes have it.
    pub has_seccomp_filter: bool,
}

/// Why no namespace can be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// A setting of the kernel's forbids it.
    Setting {
        name: &'static str,
        value: u64,
        /// A value that allows it.
        allowing: u64,
    },
    /// A `chroot`: the kernel makes no user namespace in one.
    Chroot,
    /// A filter of a container runtime.
    Filter,
    /// The AppArmor profile of this process, such as a container runtime's, which forbids mounts.
    Profile,
    /// The number that is allowed is used up, here or outside of this container.
    UsedUp,
    /// The kernel has no user namespaces.
    Kernel,
    /// Another reason, such as a security module; with the action that failed and the system's message.
    Other(String),
}

impl Limits {
    /// Reads them. Takes no process and no wait.
    pub fn read() -> Self {
        Self::read_below(Path::new("/proc"))
    }

    fn read_below(proc: &Path) -> Self {
        let text = |file: &str| fs::read_to_string(proc.join(file)).ok();
        let number = |file: &str| text(file)?.trim().parse().ok();
        let mounts = text("self/mountinfo");
        Self {
            max_user_namespaces: number("sys/user/max_user_namespaces"),
            max_mnt_namespaces: number("sys/user/max_mnt_namespaces"),
            unprivileged_userns_clone: number("sys/kernel/unprivileged_userns_clone"),
            apparmor_restrict: number("sys/kernel/apparmor_restrict_unprivileged_userns"),
            has_apparmor_profile: text("self/attr/apparmor/current")
                .or_else(|| text("self/attr/current"))
                .is_some_and(|label| label.trim_end_matches(['\n', '\0']) != "unconfined"),
            in_chroot: mounts.is_some_and(|mounts| !has_root(&mounts)) || is_other_root(proc),
            has_seccomp_filter: text("self/status").is_some_and(|status| has_filter(&status)),
        }
    }

    /// What is known to forbid it, without trying. `None` is no promise: a filter or a security module shows only when it
    /// is tried.
    pub fn obstacle(&self) -> Option<Obstacle> {
        let clone = self.unprivileged_userns_clone;
        let debian = setting("kernel.unprivileged_userns_clone", clone, 0, 1);
        let ubuntu = || self.apparmor().filter(|_| !self.has_apparmor_profile);
        let chroot = || self.in_chroot.then_some(Obstacle::Chroot);
        self.number().or(debian).or_else(ubuntu).or_else(chroot)
    }

    /// A number of namespaces that is set to none.
    fn number(&self) -> Option<Obstacle> {
        let (users, mounts) = (self.max_user_namespaces, self.max_mnt_namespaces);
        setting("user.max_user_namespaces", users, 0, 15_000)
            .or_else(|| setting("user.max_mnt_namespaces", mounts, 0, 15_000))
    }

    fn apparmor(&self) -> Option<Obstacle> {
        let name = "kernel.apparmor_restrict_unprivileged_userns";
        setting(name, self.apparmor_restrict, 1, 0)
    }

    /// What a refusal comes from.
    pub fn explain(&self, refused: &Refused) -> Obstacle {
        let errno = Errno::from_io_error(&refused.source);
        let other = || Obstacle::Other(format!("{refused}: {}", refused.source));
        let is_denied = matches!(errno, Some(Errno::PERM | Errno::ACCESS));
        if is_denied && self.has_apparmor_profile && refused.step == Step::Mount {
            return Obstacle::Profile;
        }
        // Ubuntu's restriction lets the namespace be made, and then takes every right in it away.
        if let Some(restriction) = self.apparmor().filter(|_| is_denied && !self.in_chroot) {
            return restriction;
        }
        if refused.step != Step::Create {
            return other();
        }
        match errno {
            Some(Errno::NOSPC) => self.number().unwrap_or(Obstacle::UsedUp),
            // More than 32 in one another, which older kernels have an error of its own for.
            Some(Errno::USERS) => Obstacle::UsedUp,
            Some(Errno::PERM) => match self.obstacle() {
                Some(obstacle) => obstacle,
                None if self.has_seccomp_filter => Obstacle::Filter,
                None => other(),
            },
            Some(Errno::NOSYS | Errno::INVAL) => Obstacle::Kernel,
            _ => other(),
        }
    }
}

/// The setting as an obstacle, if it has the value that forbids.
fn setting(
    name: &'static str,
    value: Option<u64>,
    forbidding: u64,
    allowing: u64,
) -> Option<Obstacle> {
    (value == Some(forbidding)).then_some(Obstacle::Setting {
        name,
        value: forbidding,
        allowing,
    })
}

/// A fragment.
impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("user namespaces ")?;
        match self {
            Self::Setting { name, value, .. } => write!(f, "are forbidden by `{name} = {value}`"),
            Self::Chroot => f.write_str("cannot be made inside a `chroot`"),
            Self::Filter => f.write_str(
                "are forbidden to this process, which runs under a seccomp filter such as a container runtime's",
            ),
            Self::Profile => f.write_str(
                "are of no use to this process, whose AppArmor profile, such as a container runtime's, forbids mounts",
            ),
            Self::UsedUp => f.write_str(
                "are used up: `user.max_user_namespaces` is reached, here or outside of this container",
            ),
            Self::Kernel => f.write_str("are not supported by this kernel"),
            Self::Other(problem) => write!(f, "are refused by the system ({problem})"),
        }
    }
}

impl Obstacle {
    /// What an administrator does on the host, as an imperative without a full stop.
    pub fn remedy(&self) -> String {
        match self {
            Self::Setting {
                name, allowing, ..
            } => format!("run `sysctl -w {name}={allowing}`"),
            Self::Chroot => "start the runner with `pivot_root` or in a container instead of a `chroot`".to_owned(),
            Self::Filter => {
                "run the container with a seccomp profile that allows `unshare`, such as `--security-opt seccomp=unconfined`"
                    .to_owned()
            }
            Self::Profile => {
                "run the container with an AppArmor profile that allows `mount` (in a pod: `appArmorProfile` with the \
                 type `Unconfined`)"
                    .to_owned()
            }
            Self::UsedUp => "raise it (`sysctl -w user.max_user_namespaces=15000`)".to_owned(),
            Self::Kernel => "boot a kernel with CONFIG_USER_NS".to_owned(),
            Self::Other(_) => "find what refuses them, such as AppArmor, SELinux or a `chroot`, and allow them there".to_owned(),
        }
    }
}

/// Whether the root folder of this process is that of a mount, which a folder that was made the root by `chroot` mostly is
/// not (`proc_pid_mountinfo(5)`: the fifth field is the mount point as this process sees it).
fn has_root(mounts: &str) -> bool {
    mounts
        .lines()
        .any(|line| line.split(' ').nth(4) == Some("/"))
}

/// Whether the root folder of the first process is another one. Only a user who may look at that process learns it.
fn is_other_root(proc: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let place = |path: &Path| -> io::Result<(u64, u64)> {
        let facts = fs::metadata(path)?;
        Ok((facts.dev(), facts.ino()))
    };
    let namespaces = ["1/ns/mnt", "self/ns/mnt"].map(|link| fs::read_link(proc.join(link)).ok());
    // In a mount namespace of its own another root is no `chroot`.
    namespaces[0].is_some()
        && namespaces[0] == namespaces[1]
        && place(&proc.join("1/root/"))
            .is_ok_and(|first| place(Path::new("/")).is_ok_and(|own| own != first))
}

/// `Seccomp: 2` in `/proc/self/status`.
fn has_filter(status: &str) -> bool {
    let field = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp:"));
    field.is_some_and(|value| value.trim() == "2")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(step: Step, errno: Errno) -> Refused {
        Refused::new(step, "making the namespaces", errno)
    }

    fn name_of(obstacle: &Obstacle) -> Option<&'static str> {
        match obstacle {
            Obstacle::Setting { name, .. } => Some(name),
            _ => None,
        }
    }

    const OPEN: Limits = Limits {
        max_user_namespaces: Some(96_365),
        max_mnt_namespaces: Some(96_365),
        unprivileged_userns_clone: None,
        apparmor_restrict: None,
        has_apparmor_profile: false,
        in_chroot: false,
        has_seccomp_filter: false,
    };

    #[test]
    fn a_setting_that_forbids_is_named_with_the_line_that_allows() {
        let user = Limits {
            max_user_namespaces: Some(0),
            ..OPEN
        };
        let mount = Limits {
            max_mnt_namespaces: Some(0),
            ..OPEN
        };
        let debian = Limits {
            unprivileged_userns_clone: Some(0),
            ..OPEN
        };
        for (limits, errno, name, line) in [
            (
                user,
                Errno::NOSPC,
                "user.max_user_namespaces",
                "sysctl -w user.max_user_namespaces=15000",
            ),
            (
                mount,
                Errno::NOSPC,
                "user.max_mnt_namespaces",
                "sysctl -w user.max_mnt_namespaces=15000",
            ),
            (
                debian,
                Errno::PERM,
                "kernel.unprivileged_userns_clone",
                "sysctl -w kernel.unprivileged_userns_clone=1",
            ),
        ] {
            let explained = limits.explain(&refused(Step::Create, errno));
            assert_eq!(name_of(&explained), Some(name));
            assert!(explained.remedy().contains(line), "{explained:?}");
            assert_eq!(
                limits.obstacle(),
                Some(explained),
                "known before it is tried"
            );
        }
        assert_eq!(OPEN.obstacle(), None);
        assert_eq!(
            Limits::default().obstacle(),
            None,
            "no `/proc` forbids nothing"
        );
    }

    #[test]
    fn the_restriction_of_ubuntu_holds_where_no_profile_decides() {
        let ubuntu = Limits {
            apparmor_restrict: Some(1),
            unprivileged_userns_clone: Some(1),
            ..OPEN
        };
        let profiled = Limits {
            has_apparmor_profile: true,
            ..ubuntu
        };
        let name = "kernel.apparmor_restrict_unprivileged_userns";
        let known = ubuntu.obstacle().expect("it forbids them");
        assert_eq!(name_of(&known), Some(name));
        assert!(
            known
                .remedy()
                .contains("apparmor_restrict_unprivileged_userns=0")
        );
        assert_eq!(profiled.obstacle(), None, "the profile may allow it");
        for step in [Step::Create, Step::MapUser] {
            let explained = profiled.explain(&refused(step, Errno::PERM));
            assert_eq!(name_of(&explained), Some(name), "the profile does not");
        }
        let mounts = profiled.explain(&refused(Step::Mount, Errno::ACCESS));
        assert_eq!(
            mounts,
            Obstacle::Profile,
            "it allows namespaces without mounts"
        );
        let full = ubuntu.explain(&refused(Step::Create, Errno::NOSPC));
        assert_eq!(full, Obstacle::UsedUp);
    }

    #[test]
    fn one_error_of_the_system_has_several_causes() {
        let chroot = Limits {
            in_chroot: true,
            has_seccomp_filter: true,
            ..OPEN
        };
        let filter = Limits {
            has_seccomp_filter: true,
            ..OPEN
        };
        let of = |limits: Limits, step, errno| limits.explain(&refused(step, errno));
        assert_eq!(of(chroot, Step::Create, Errno::PERM), Obstacle::Chroot);
        assert_eq!(chroot.obstacle(), Some(Obstacle::Chroot));
        assert_eq!(of(filter, Step::Create, Errno::PERM), Obstacle::Filter);
        assert_eq!(of(OPEN, Step::Create, Errno::NOSPC), Obstacle::UsedUp);
        assert_eq!(of(OPEN, Step::Create, Errno::USERS), Obstacle::UsedUp);
        assert_eq!(of(OPEN, Step::Create, Errno::INVAL), Obstacle::Kernel);
        for (step, errno) in [(Step::Create, Errno::PERM), (Step::Mount, Errno::NOSPC)] {
            let Obstacle::Other(text) = of(OPEN, step, errno) else {
                panic!("nothing explains {errno}");
            };
            assert!(text.starts_with("making the namespaces failed: "), "{text}");
        }
    }

    #[test]
    fn a_chroot_and_a_filter_are_known_by_what_proc_shows() {
        let root = "27 1 254:0 / / rw,relatime - ext4 /dev/root rw\n22 27 0:21 / /proc rw - proc proc rw\n";
        assert!(has_root(root));
        assert!(!has_root("22 27 0:21 / /proc rw,relatime - proc proc rw\n"));
        assert!(has_filter("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"));
        assert!(!has_filter("Seccomp:\t0\nSeccomp_filters:\t0\n"));
        assert!(!Limits::read().in_chroot);
    }
}
