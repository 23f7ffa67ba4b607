//! Why there is no store, and what to change, in words.

use super::{Impossible, Plan, Wanted};
use crate::bootstrap::machine::{Folder, Machine, Namespaces, Sudo};

/// A store that does not open, for none of the reasons that have a repair.
pub(in crate::bootstrap) fn does_not_open(problem: &str) -> Impossible {
    // SQLite's messages.
    let is_damaged = ["malformed", "not a database", "disk I/O error"];
    let remedy = if is_damaged.iter().any(|words| problem.contains(words)) {
        "The store's database is damaged (`/nix/var/nix/db/db.sqlite`): restore it, or empty `/nix` and have Nix installed \
         anew."
    } else {
        "Look at `NIX_CONFIG`, `NIX_REMOTE` and `/etc/nix/nix.conf` on the runner."
    };
    Impossible {
        obstacle: format!("the Nix store does not open: {problem}"),
        remedy: remedy.into(),
    }
}

/// Why there is no store, with everything that was thought of.
pub(super) fn nowhere(machine: &Machine, wanted: &Wanted, missing: &str) -> Plan {
    let mut obstacles = vec![folder_obstacle(machine)];
    if let Sudo::Refused(problem) = &machine.sudo {
        obstacles.push(format!("`sudo -n` refuses ({problem})"));
    }
    let mut remedy = folder_remedy(machine);
    if !machine.user.is_root() {
        match &machine.namespaces {
            Namespaces::Forbidden {
                obstacle,
                remedy: other,
            } => {
                obstacles.push(obstacle.clone());
                remedy = format!("{remedy} Or: {other}");
            }
            Namespaces::Allowed if machine.is_nix_below => {
                obstacles.push("a store of this job's own would hide the Nix that is there".into());
            }
            Namespaces::Allowed if !wanted.is_for_children_alone => {
                obstacles
                    .push("a store of this step's own would not be seen by later steps".into());
            }
            Namespaces::Allowed => {}
        }
    }
    Plan::Impossible(Impossible {
        obstacle: format!("{missing}: {}", obstacles.join(", and ")),
        remedy,
    })
}

pub(super) fn folder_obstacle(machine: &Machine) -> String {
    let user = machine.user.shown();
    match &machine.folder {
        Folder::Absent { .. } if machine.user.is_root() => {
            "there is no `/nix`, and `/` cannot be written to".into()
        }
        Folder::Absent { .. } => format!("there is no `/nix`, and user {user} cannot make it"),
        Folder::Empty { .. } => format!("`/nix` is empty, and user {user} cannot write to it"),
        Folder::Used { owner, .. } => {
            format!("`/nix` belongs to user {owner}, and user {user} cannot write to it")
        }
        Folder::ReadOnly => "`/nix` is mounted read-only".into(),
        Folder::NoExec => {
            "`/nix` is mounted with `noexec`, so that no program can be started from it".into()
        }
        Folder::Link { place, target, .. } => format!(
            "`{}` is a symbolic link to `{}`, and Nix has no store behind a link",
            place.display(),
            target.display()
        ),
        Folder::NoFolder => "`/nix` is no folder".into(),
    }
}

pub(super) fn folder_remedy(machine: &Machine) -> String {
    let user = &machine.user;
    match &machine.folder {
        Folder::Absent { .. } if user.is_root() => {
            "Mount a volume that can be written to at `/nix` (in a pod: an `emptyDir`).".into()
        }
        Folder::Absent { .. } | Folder::Empty { .. } => format!(
            "Have the runner's image make the folder: `install -d -o {} -g {} -m 755 /nix` as root (in a pod: mount an \
             `emptyDir` there), or let the user run `sudo` without a password.",
            user.uid, user.gid
        ),
        Folder::Used { .. } => "Start `nix-daemon` as root on the runner and put `nix` on `PATH`, run the job as root, or \
             give `/nix` to the job's user."
            .into(),
        Folder::ReadOnly => "Mount `/nix` so that it can be written to, or put a Nix with a daemon beside it.".into(),
        Folder::NoExec => "Mount `/nix` without `noexec` (`mount -o remount,exec /nix` as root).".into(),
        Folder::Link {
            place,
            leads_to_folder: false,
            ..
        } => format!("Remove the link `{}`, which leads nowhere, from the runner's image.", place.display()),
        Folder::Link { place, target, .. } => format!(
            "Have the runner's image make `{place}` a folder, and show the other one there by a bind mount instead of the \
             link: `rm {place}; mkdir {place}; mount --bind {target} {place}` as root.",
            place = place.display(),
            target = target.display()
        ),
        Folder::NoFolder => "Remove the file `/nix` from the runner's image.".into(),
    }
}
