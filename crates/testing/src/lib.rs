//! What the unit tests of several crates need. No crate depends on it but for its tests.

use std::path::{Path, PathBuf};
use std::time::Duration;

use flywheel_sys::process::capture::Tool;
use flywheel_sys::runner::env::Env;

const LIMIT: Duration = Duration::from_secs(10);

/// The strings of a NAR in its own form: each with its length before it, padded to eight bytes.
pub fn nar_strings(words: &[&str]) -> Vec<u8> {
    let mut nar = Vec::new();
    for word in words {
        nar.extend((word.len() as u64).to_le_bytes());
        nar.extend(word.as_bytes());
        nar.resize(nar.len().next_multiple_of(8), 0);
    }
    nar
}

/// The NAR of a file that is not executable.
pub fn nar_of_file(content: &str) -> Vec<u8> {
    let kind = ["nix-archive-1", "(", "type", "regular"];
    nar_strings(&[&kind[..], &["contents", content, ")"]].concat())
}

/// The tables of Nix's database, schema version 10, as far as they are read here.
pub const NIX_DATABASE: &str = "
    create table ValidPaths (id integer primary key autoincrement not null, path text unique not null,
        hash text not null, registrationTime integer not null, deriver text, narSize integer,
        ultimate integer, sigs text, ca text);
    create table Refs (referrer integer not null, reference integer not null,
        primary key (referrer, reference),
        foreign key (referrer) references ValidPaths(id) on delete cascade,
        foreign key (reference) references ValidPaths(id) on delete restrict);
    create index IndexReference on Refs(reference);
    create table DerivationOutputs (drv integer not null, id text not null, path text not null,
        primary key (drv, id), foreign key (drv) references ValidPaths(id) on delete cascade);
    pragma journal_mode = wal;";

/// Makes a shell script. A child writes it: a file that a fork of ours, of another test's thread,
/// still holds open for writing cannot be run.
pub async fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
    let file = folder.join(name);
    let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && /bin/chmod 755 "$0""#;
    let tool = Tool::new(Path::new("/bin/sh"))
        .args(["-c", write])
        .arg(&file)
        .arg(text);
    assert!(tool.run(LIMIT).await.expect("runs").status.success());
    file
}

/// Compares a report with the file `tests/fixtures/summaries/NAME.md` of the repository, which people have looked at.
/// `UPDATE_DOCS=1` writes the file.
///
/// # Panics
/// When they differ.
pub fn golden(name: &str, text: &str) {
    let env = Env::from_process();
    let here = env.path("CARGO_MANIFEST_DIR").expect("cargo names it");
    let folder = here
        .ancestors()
        .map(|folder| folder.join("tests/fixtures/summaries"))
        .find(|folder| folder.is_dir())
        .expect("below the repository");
    let file = folder.join(format!("{name}.md"));
    if env.get("UPDATE_DOCS").is_some() {
        std::fs::write(&file, text).expect("written");
    }
    let kept = std::fs::read_to_string(&file).unwrap_or_default();
    assert_eq!(
        kept, text,
        "{name}.md is another summary: UPDATE_DOCS=1 writes it; then look at it"
    );
}
