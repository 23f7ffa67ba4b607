//! How the namespaces are made, and the root folder put together, with the calls of Linux.

use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change,
    mount_remount, unmount,
};
use rustix::process::{chdir, getcwd, getegid, geteuid, pivot_root};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities};

use super::{Refused, Step, View};

/// Makes the namespaces and what is seen in them. Gives the entries of the root folder that could not be taken along.
///
/// # Errors
/// When the system refuses it.
pub(super) fn make(view: &View) -> Result<Vec<PathBuf>, Refused> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    // The same path leads to the same folder in the new root, but the old folder is not in it.
    let current = getcwd(Vec::new())
        .ok()
        .map(|path| PathBuf::from(OsString::from_vec(path.into_bytes())));
    create().map_err(|error| Refused::new(Step::Create, "making the namespaces", error))?;
    map_user(user, group)?;
    let mounting = |action: &str| {
        let action = action.to_owned();
        move |error| Refused::new(Step::Mount, action, error)
    };
    // What the host mounts and unmounts later is followed; what is mounted here stays here.
    let follow = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", follow).map_err(mounting("cutting the mounts off from the host's"))?;
    let left_out = if is_folder(&view.seen_at) {
        mount_bind_recursive(&view.folder, &view.seen_at)
            .map_err(mounting("binding the folder"))?;
        Vec::new()
    } else {
        change_root(view)?
    };
    if let Some(current) = current {
        chdir(&current).map_err(mounting("returning to the current folder"))?;
    }
    drop_rights().map_err(mounting("giving the namespace's rights up"))?;
    Ok(left_out)
}

#[expect(
    deprecated,
    reason = "it is unsafe for `UnshareFlags::FILES` alone, and safe code has no other way to a namespace"
)]
fn create() -> rustix::io::Result<()> {
    rustix::thread::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)
}

/// Lets the user keep the number that he has, so that he is who he was, and not root, whom Nix treats differently.
fn map_user(user: u32, group: u32) -> Result<(), Refused> {
    let write = |file: &str, text: String| {
        let path = format!("/proc/self/{file}");
        // One call of `write`, without truncation: the kernel takes a map once and whole.
        let written = File::options()
            .write(true)
            .open(&path)
            .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()));
        written.map_err(|error| Refused::new(Step::MapUser, format!("writing `{path}`"), error))
    };
    // A group can be mapped without rights only where `setgroups` is given up.
    write("setgroups", "deny".to_owned())?;
    write("uid_map", format!("{user} {user} 1"))?;
    write("gid_map", format!("{group} {group} 1"))
}

/// Puts a root folder together that has every entry of the present one, and `view.seen_at` besides, and makes it the root.
fn change_root(view: &View) -> Result<Vec<PathBuf>, Refused> {
    let failed = |action: &str| {
        let action = action.to_owned();
        move |error: io::Error| Refused::new(Step::Mount, action, error)
    };
    let new = &view.scratch;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("flywheel", new, "tmpfs", flags, c"mode=755,size=1m")
        .map_err(|error| failed("mounting a folder in memory")(error.into()))?;
    // The entry that has the scratch folder in it would otherwise take the unfinished root along.
    mount_change(new, MountPropagationFlags::UNBINDABLE)
        .map_err(|error| failed("preparing the new root")(error.into()))?;
    let entries = fs::read_dir("/").map_err(failed("listing `/`"))?;
    let mut left_out = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed("listing `/`"))?.path();
        // A symbolic link to nowhere can be in its place.
        if path != view.seen_at && take_along(&path, new).is_err() {
            left_out.push(path);
        }
    }
    let place = below(new, &view.seen_at);
    fs::create_dir(&place).map_err(failed("making the new root"))?;
    let finish = || {
        mount_bind_recursive(&view.folder, &place)?;
        mount_change(new, MountPropagationFlags::PRIVATE)?;
        // An ordinary user cannot write to `/` either, and what he wrote there would be lost.
        mount_remount(new, flags | MountFlags::BIND | MountFlags::RDONLY, "")?;
        chdir(new)?;
        // With one folder for both, the old root comes to lie on top of the new one, and is taken off (`pivot_root(2)`).
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)
    };
    finish().map_err(|error| failed("`pivot_root`")(error.into()))?;
    chdir("/").map_err(|error| failed("entering the new root")(error.into()))?;
    Ok(left_out)
}

/// Takes an entry of the root folder into the new one.
fn take_along(path: &Path, new: &Path) -> io::Result<()> {
    let target = below(new, path);
    let facts: Metadata = fs::symlink_metadata(path)?;
    if facts.is_symlink() {
        return symlink(fs::read_link(path)?, target);
    }
    if facts.is_dir() {
        fs::create_dir(&target)?;
    } else {
        File::create_new(&target)?;
    }
    Ok(mount_bind_recursive(path, &target)?)
}

/// The place of an entry of the root folder in another root.
fn below(root: &Path, entry: &Path) -> PathBuf {
    root.join(entry.strip_prefix("/").unwrap_or(entry))
}

fn is_folder(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|facts| facts.is_dir())
}

/// Whoever makes a user namespace has every right in it. The job is to run as the ordinary user that it runs as elsewhere.
fn drop_rights() -> rustix::io::Result<()> {
    let none = CapabilitySet::empty();
    set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
}
