//! Who besides the job's own user can write what they like into a store. No rule about whose a path is helps against
//! these: they can register a forged path as if it had been built.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::ping::Opened;
use crate::settings::Settings;

/// The right to write for everybody.
const OPEN_MODE: u32 = 0o002;

/// Who else can write the store with its files in `folder`, as the subject of a sentence; `None` if that is nobody but
/// root. `user` is the name of the job's own user.
pub fn other_writers(
    folder: &Path,
    opened: &Opened,
    settings: &Settings,
    user: Option<&str>,
) -> Option<String> {
    if fs::metadata(folder).is_ok_and(|found| found.mode() & OPEN_MODE != 0) {
        return Some(format!(
            "every user of this host (mode of `{}`)",
            folder.display()
        ));
    }
    // Without a daemon, the folder's mode alone counts.
    if opened.is_local() {
        return None;
    }
    trusted_users(&settings.list("trusted-users"), user)
}

fn trusted_users(trusted: &[String], user: Option<&str>) -> Option<String> {
    if trusted.iter().any(|name| name == "*") {
        return Some("every user of the daemon (`trusted-users = *`)".to_owned());
    }
    let others = trusted.iter().map(String::as_str);
    let others: Vec<&str> = others
        .filter(|name| *name != "root" && Some(*name) != user)
        .collect();
    (!others.is_empty()).then(|| format!("the daemon's trusted users (`{}`)", others.join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whom_a_daemon_trusts_can_write_its_store() {
        let users = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            trusted_users(&names, Some("runner"))
        };
        assert_eq!(users(&["root"]), None);
        assert_eq!(users(&["root", "runner"]), None);
        assert!(users(&["root", "*"]).is_some_and(|text| text.starts_with("every user")));
        assert!(
            users(&["runner", "alice", "@wheel"])
                .is_some_and(|text| text.contains("`alice @wheel`"))
        );
    }
}
