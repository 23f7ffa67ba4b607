//! A scripted `nix` with the recorded answers of one version, and a store below another root whose database the test
//! writes as Nix would. The answers are in `tests/fixtures/nix`; `scripts/record-nix.sh` records them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use flywheel_testing::{NIX_DATABASE, nar_of_file};
use rusqlite::{Connection, params};

use super::cache_server::sha256;

/// The versions whose answers are recorded.
pub const VERSIONS: [&str; 3] = ["2.8.0", "2.26.3", "2.34.8"];

/// A Nix in a folder of its own.
pub struct ScriptedNix {
    /// The folder of the program.
    pub bin: PathBuf,
    /// The root of the store.
    store: PathBuf,
    answers: PathBuf,
}

impl ScriptedNix {
    /// Puts the program and an empty store into `folder`.
    pub fn new(folder: &Path, version: &str) -> Self {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/nix");
        let nix = Self {
            bin: folder.join("nix-bin"),
            store: folder.join("store"),
            answers: folder.join("answers"),
        };
        for made in [
            nix.bin.clone(),
            nix.answers.clone(),
            nix.store.join("nix/store"),
            nix.state().join("db"),
            nix.state().join("temproots"),
        ] {
            fs::create_dir_all(made).unwrap();
        }
        for name in ["version", "settings", "ping", "ping-errors"] {
            let recorded = fixtures.join(version).join(name);
            fs::copy(recorded, nix.answers.join(name)).unwrap();
        }
        let script = fs::read_to_string(fixtures.join("nix")).unwrap();
        let script = script
            .replace("@ANSWERS@", nix.answers.to_str().unwrap())
            .replace("@STORE_ROOT@", nix.store.to_str().unwrap());
        let program = nix.bin.join("nix");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        nix.database().execute_batch(NIX_DATABASE).unwrap();
        nix
    }

    fn state(&self) -> PathBuf {
        self.store.join("nix/var/nix")
    }

    fn database(&self) -> Connection {
        Connection::open(self.state().join("db/db.sqlite")).unwrap()
    }

    /// Registers a file as a build that has ended does; its path. `letter` stands 32 times in it.
    pub fn build(&self, letter: char, name: &str, content: &str) -> String {
        let base = format!("{}-{name}", letter.to_string().repeat(32));
        fs::write(self.store.join("nix/store").join(&base), content).unwrap();
        let path = format!("/nix/store/{base}");
        let nar = nar_of_file(content);
        let hash = sha256(&nar).to_string();
        let insert = "insert into ValidPaths (path, hash, registrationTime, narSize, ultimate) values (?1, ?2, 1, ?3, 1)";
        let row = params![path, hash, nar.len() as i64];
        self.database().execute(insert, row).unwrap();
        path
    }

    /// The calls that nothing was recorded for.
    pub fn unknown_calls(&self) -> String {
        let file = self.answers.with_extension("unknown");
        fs::read_to_string(file).unwrap_or_default()
    }
}
