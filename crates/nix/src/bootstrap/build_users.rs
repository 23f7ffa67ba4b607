//! The users that builds run as, made for a Nix that is installed with a daemon: lines of `/etc/passwd` and `/etc/group`, since
//! small systems have no program that makes users. What was added is noted beside the manifest, so that it can be taken back.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;

use flywheel_sys::untrusted_file::{self, Owner};

/// As upstream's installer has it: the group, its number, and how many users are in it.
const GROUP: &str = "nixbld";
const GROUP_NUMBER: u32 = 30_000;
const USERS: u32 = 32;
const LIMIT: u64 = 1 << 20;
/// As long as `lckpwdf` waits.
const LOCK_LIMIT: Duration = Duration::from_secs(15);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

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
    let _alone = lock(etc)?;
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
    let _alone = lock(etc)?;
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

/// Keeps `useradd` and its like from writing the same files until the lock is dropped, as they keep each other
/// (`lckpwdf(3)`).
fn lock(etc: &Path) -> io::Result<fs::File> {
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(etc.join(".pwd.lock"))?;
    let until = Instant::now() + LOCK_LIMIT;
    loop {
        match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::AGAIN | Errno::ACCESS) if Instant::now() < until => {
                thread::sleep(LOCK_PAUSE);
            }
            Err(error) => return Err(error.into()),
        }
    }
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
    fn nothing_is_written_while_another_program_has_the_lock() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let (etc, nix) = (folder.path().to_owned(), folder.path().join("nix"));
        fs::create_dir_all(nix.join("var/flywheel")).expect("made");
        for name in ["passwd", "group"] {
            fs::write(etc.join(name), "").expect("written");
        }
        // The lock is a process's, so another one has to hold it.
        let mut holder = std::process::Command::new("python3")
            .args(["-c", "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"])
            .arg(etc.join(".pwd.lock"))
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .expect("started");
        let mut line = [0];
        io::Read::read_exact(holder.stdout.as_mut().expect("piped"), &mut line).expect("locked");
        let making = thread::spawn({
            let etc = etc.clone();
            move || make(&etc, &nix)
        });
        thread::sleep(10 * LOCK_PAUSE);
        assert_eq!(read(&etc.join("group")).expect("there"), "");
        drop(holder.stdin.take());
        holder.wait().expect("ended");
        making.join().expect("no panic").expect("made");
        assert!(
            read(&etc.join("group"))
                .expect("there")
                .contains("nixbld32")
        );
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
