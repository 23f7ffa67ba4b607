//! The users that builds run as, made for a Nix that is installed with a daemon: lines of `/etc/passwd` and `/etc/group`, since
//! small systems have no program that makes users. What was added is noted beside the manifest, so that it can be taken back.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use flywheel_sys::untrusted_file::{self, Owner};

/// As upstream's installer has it: the group, its number, and how many users are in it.
const GROUP: &str = "nixbld";
const GROUP_NUMBER: u32 = 30_000;
const USERS: u32 = 32;
const LIMIT: u64 = 1 << 20;

/// Where the lines are noted.
fn note(nix: &Path) -> PathBuf {
    nix.join("var/flywheel/build-users")
}

/// The lines of both files.
struct Lines {
    passwd: Vec<String>,
    group: Vec<String>,
}

impl Lines {
    fn new() -> Self {
        let names: Vec<String> = (1..=USERS)
            .map(|number| format!("{GROUP}{number}"))
            .collect();
        let user = |(number, name): (u32, &String)| {
            let id = GROUP_NUMBER + number;
            format!("{name}:x:{id}:{GROUP_NUMBER}:Nix build user {number}:/var/empty:/sbin/nologin")
        };
        Self {
            passwd: (1..).zip(&names).map(user).collect(),
            group: vec![format!("{GROUP}:x:{GROUP_NUMBER}:{}", names.join(","))],
        }
    }
}

/// Makes the group and its users, if there is no such group. `etc` is `/etc` but for tests.
///
/// # Errors
/// When a file cannot be written to, or the numbers belong to others.
pub(super) fn make(etc: &Path, nix: &Path) -> io::Result<()> {
    let groups = read(&etc.join("group"))?;
    if groups
        .lines()
        .any(|line| line.split(':').next() == Some(GROUP))
    {
        return Ok(());
    }
    let passwd = read(&etc.join("passwd"))?;
    let number = |line: &str| {
        line.split(':')
            .nth(2)
            .and_then(|number| number.parse::<u32>().ok())
    };
    let ours = GROUP_NUMBER..=GROUP_NUMBER + USERS;
    let mut numbers = groups.lines().chain(passwd.lines()).filter_map(number);
    if let Some(taken) = numbers.find(|number| ours.contains(number)) {
        let problem =
            format!("the number {taken}, which build users get, belongs to another user or group");
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, problem));
    }
    let lines = Lines::new();
    // Before the lines are there: one that is noted and was not added does no harm.
    fs::write(note(nix), "")?;
    append(&etc.join("passwd"), &passwd, &lines.passwd)?;
    append(&etc.join("group"), &groups, &lines.group)
}

/// Removes the lines that `make` has added.
///
/// # Errors
/// When a file cannot be written to.
pub(super) fn remove(etc: &Path, nix: &Path) -> io::Result<()> {
    if !note(nix).exists() {
        return Ok(());
    }
    let lines = Lines::new();
    for (name, added) in [("passwd", &lines.passwd), ("group", &lines.group)] {
        let file = etc.join(name);
        let text = read(&file)?;
        let is_kept = |line: &&str| !added.iter().any(|added| added == line);
        let kept: String = text
            .lines()
            .filter(is_kept)
            .map(|line| format!("{line}\n"))
            .collect();
        if kept != text {
            replace(&file, &kept)?;
        }
    }
    fs::remove_file(note(nix))
}

fn read(file: &Path) -> io::Result<String> {
    let bytes = untrusted_file::read(file, Owner::Any, LIMIT)?;
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

fn append(file: &Path, text: &str, lines: &[String]) -> io::Result<()> {
    let end = if text.is_empty() || text.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    let added: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let mut opened = fs::OpenOptions::new().append(true).open(file)?;
    // One write, so that no reader sees half a line.
    opened.write_all(format!("{end}{added}").as_bytes())
}

/// Gives a file another content at one moment, with the rights that it had.
fn replace(file: &Path, text: &str) -> io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("/"));
    let mut fresh = tempfile::Builder::new()
        .prefix(".flywheel-")
        .tempfile_in(folder)?;
    fresh.write_all(text.as_bytes())?;
    fresh
        .as_file()
        .set_permissions(fs::metadata(file)?.permissions())?;
    fresh.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_users_are_made_once_and_taken_back_to_the_byte() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (etc, nix) = (folder.path().join("etc"), folder.path().join("nix"));
        fs::create_dir(&etc).expect("made");
        fs::create_dir_all(nix.join("var/flywheel")).expect("made");
        let (passwd, group) = ("root:x:0:0::/root:/bin/sh\n", "root:x:0:\nusers:x:100:\n");
        fs::write(etc.join("passwd"), passwd).expect("written");
        fs::write(etc.join("group"), group).expect("written");
        for _ in 0..2 {
            make(&etc, &nix).expect("made");
        }
        let text = read(&etc.join("passwd")).expect("there");
        assert_eq!(text.lines().count(), 33, "{text}");
        assert!(text.contains("nixbld32:x:30032:30000:"), "{text}");
        let text = read(&etc.join("group")).expect("there");
        assert_eq!(text.matches("nixbld").count(), 33, "{text}");
        remove(&etc, &nix).expect("taken back");
        assert_eq!(read(&etc.join("passwd")).expect("there"), passwd);
        assert_eq!(read(&etc.join("group")).expect("there"), group);
    }

    #[test]
    fn what_others_have_is_left_alone() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (etc, nix) = (folder.path(), folder.path().join("nix"));
        fs::write(etc.join("passwd"), "a:x:30007:1::/:/bin/sh\n").expect("written");
        fs::write(etc.join("group"), "a:x:1:\n").expect("written");
        let error = make(etc, &nix).expect_err("taken");
        assert!(error.to_string().contains("30007"), "{error}");
        fs::write(etc.join("group"), "nixbld:x:1:a\n").expect("written");
        make(etc, &nix).expect("there already");
        remove(etc, &nix).expect("nothing was added");
        assert_eq!(read(&etc.join("group")).expect("there"), "nixbld:x:1:a\n");
    }
}
