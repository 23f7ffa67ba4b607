//! Reads Nix's own database, and never writes it: which paths are valid, since when, and what they
//! refer to. Blocking; the store calls it from threads that may block.
//!
//! `ValidPaths.id` only grows, and a deleted path that is added again gets a new id, so that "after
//! this id" means "added since".

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, Row, Statement, params};
use thiserror::Error;

use crate::hash::Sha256;
use crate::path_info::{PathInfo, PathInfos, Unreadable};
use crate::store_path::{PathHash, STORE_DIR, StorePath};
use flywheel_core::text::one_line;

/// SQLite retries for this long while a writer holds the database.
const BUSY_LIMIT: Duration = Duration::from_secs(10);
/// The columns that `ValidPathRow::read` expects, in this order.
const COLUMNS: &str = "id, path, hash, narSize, deriver, ultimate, sigs, ca";

#[derive(Debug, Error)]
pub enum Error {
    /// The file is missing, belongs to another user, or is no database.
    #[error("Nix's database `{file}` could not be opened")]
    Open {
        /// The expected location.
        file: PathBuf,
        /// The error from SQLite.
        #[source]
        source: rusqlite::Error,
    },
    #[error("Nix's database could not be read")]
    Read(#[source] rusqlite::Error),
}

/// An open database. It stays open, which keeps its shared memory alive; an unprivileged reader
/// depends on that.
#[derive(Debug)]
pub struct Db {
    connection: Connection,
}

/// The paths registered after an id.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Added {
    /// The paths with their ids, oldest first.
    pub(crate) rows: Vec<(i64, PathInfo)>,
    /// The valid paths with unusable metadata.
    pub(crate) unreadable: Vec<Unreadable>,
    /// The last id seen; pass it to the next query.
    pub(crate) last_id: i64,
}

/// A row of `ValidPaths`, not yet checked.
struct ValidPathRow {
    id: i64,
    path: String,
    hash: String,
    nar_size: Option<i64>,
    deriver: Option<String>,
    ultimate: Option<i64>,
    signatures: Option<String>,
    ca: Option<String>,
}

/// A valid path with usable metadata, or one without.
enum Classified {
    Readable(PathInfo),
    Unreadable(Unreadable),
}

impl Db {
    /// The database file of this state folder (`/nix/var/nix`).
    pub fn file(state: &Path) -> PathBuf {
        state.join("db/db.sqlite")
    }

    /// Opens the database read-only and checks that it can be read. Never opens it as `immutable`,
    /// since Nix writes to it.
    ///
    /// # Errors
    /// When the file is missing, or an unprivileged reader finds no shared memory because no
    /// process has the database open.
    pub fn open(file: &Path) -> Result<Self, Error> {
        let open = |source| Error::Open {
            file: file.to_owned(),
            source,
        };
        // Without the flags for creating and for URIs, a missing file is an error and a name with
        // `?` or `:` stays a plain name.
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(file, flags).map_err(open)?;
        // Without a timeout, a query fails whenever a writer holds the database.
        connection.busy_timeout(BUSY_LIMIT).map_err(open)?;
        let db = Self { connection };
        // SQLite opens a file lazily; only a query shows whether it can be read.
        db.last_id().map_err(|error| match error {
            Error::Read(source) => open(source),
            error @ Error::Open { .. } => error,
        })?;
        Ok(db)
    }

    /// The id of the path registered last, whether it is still valid or not; 0 in a new store. A path that is registered
    /// later has a higher one.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub fn last_id(&self) -> Result<i64, Error> {
        let query = "select max(coalesce((select max(id) from ValidPaths), 0),
            coalesce((select seq from sqlite_sequence where name = 'ValidPaths'), 0))";
        self.connection
            .query_row(query, [], |row| row.get(0))
            .map_err(Error::Read)
    }

    /// The path with this id, if it is valid and has been since it was given the id.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn path_of_id(&self, id: i64) -> Result<Option<String>, Error> {
        let query = "select path from ValidPaths where id = ?";
        self.connection
            .query_row(query, [id], |row| row.get(0))
            .optional()
            .map_err(Error::Read)
    }

    /// Returns what was registered after `id` and is still valid, with ids, oldest first. These are
    /// two quick queries over an index, so a watcher may poll often.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn added_after(&self, id: i64) -> Result<Added, Error> {
        self.read_added_after(id).map_err(Error::Read)
    }

    fn read_added_after(&self, id: i64) -> rusqlite::Result<Added> {
        // Both queries must see the same snapshot.
        let snapshot = self.connection.unchecked_transaction()?;
        let query = format!("select {COLUMNS} from ValidPaths where id > ?1 order by id");
        let mut statement = snapshot.prepare_cached(&query)?;
        let rows = statement
            .query_map([id], ValidPathRow::read)?
            .collect::<Result<Vec<_>, _>>()?;
        let mut references: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        let query = "select r.referrer, p.path from Refs r join ValidPaths p on p.id = r.reference where r.referrer > ?1";
        let mut statement = snapshot.prepare_cached(query)?;
        for pair in statement.query_map([id], |row| Ok((row.get(0)?, row.get(1)?)))? {
            let (referrer, path): (i64, String) = pair?;
            references.entry(referrer).or_default().push(path);
        }
        let mut added = Added {
            rows: Vec::with_capacity(rows.len()),
            last_id: id,
            ..Added::default()
        };
        for row in rows {
            let id = row.id;
            // Advance past unreadable rows too, or the watcher would read them again each time.
            added.last_id = id;
            match row.classify(references.remove(&id).unwrap_or_default()) {
                Classified::Readable(info) => added.rows.push((id, info)),
                Classified::Unreadable(path) => added.unreadable.push(path),
            }
        }
        Ok(added)
    }

    /// Returns the valid paths with these hashes.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn valid_by_hash(&self, hashes: &[PathHash]) -> Result<Vec<StorePath>, Error> {
        let found = || -> rusqlite::Result<Vec<String>> {
            let query = "select path from ValidPaths where path >= ?1 and path < ?2 limit 1";
            let mut statement = self.connection.prepare_cached(query)?;
            let mut paths = Vec::new();
            for hash in hashes {
                // A range query uses the index on `path`. `.` is the character after `-`.
                let bounds = [
                    format!("{STORE_DIR}/{hash}-"),
                    format!("{STORE_DIR}/{hash}."),
                ];
                paths.extend(statement.query_row(bounds, |row| row.get(0)).optional()?);
            }
            Ok(paths)
        };
        Ok(found()
            .map_err(Error::Read)?
            .iter()
            .filter_map(|path| path.parse().ok())
            .collect())
    }

    /// Returns up to `most` valid paths, no derivations, whose NAR has at most `nar_size` bytes:
    /// first those signed with `key`, which came from that cache, then the newest.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn likely_served(
        &self,
        key: Option<&str>,
        nar_size: u64,
        most: u32,
    ) -> Result<Vec<StorePath>, Error> {
        let query =
            "select path from ValidPaths where narSize between 1 and ?1 and path not like '%.drv'
            order by instr(' ' || coalesce(sigs, ''), ' ' || ?2 || ':') > 0 desc, id desc limit ?3";
        let size = i64::try_from(nar_size).unwrap_or(i64::MAX);
        let found = || -> rusqlite::Result<Vec<String>> {
            let mut statement = self.connection.prepare_cached(query)?;
            statement
                .query_map(params![size, key.unwrap_or_default(), most], |row| {
                    row.get(0)
                })?
                .collect()
        };
        Ok(found()
            .map_err(Error::Read)?
            .iter()
            .filter_map(|path| path.parse().ok())
            .collect())
    }

    /// Returns the highest id that was ever given, and how many valid paths have a higher one than `last`.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn registered_after(&self, last: i64) -> Result<(i64, i64), Error> {
        let read = || -> rusqlite::Result<(i64, i64)> {
            let snapshot = self.connection.unchecked_transaction()?;
            // A deleted row takes its id along; the sequence does not go back.
            let query =
                "select coalesce(max(seq), 0) from sqlite_sequence where name = 'ValidPaths'";
            let highest = snapshot.query_row(query, [], |row| row.get(0))?;
            let query = "select count(*) from ValidPaths where id > ?1";
            Ok((
                highest,
                snapshot.query_row(query, [last], |row| row.get(0))?,
            ))
        };
        read().map_err(Error::Read)
    }

    /// Returns the names of the derivations with outputs that are not known before they are built. An output's deriver
    /// is the resolved derivation, which has the same name.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn floating_derivations(&self) -> Result<BTreeSet<String>, Error> {
        let read = || -> rusqlite::Result<Vec<String>> {
            let table = "select count(*) from sqlite_master where name = 'Realisations'";
            let has_table: i64 = self.connection.query_row(table, [], |row| row.get(0))?;
            // Without the experimental feature there are none, and the store need not be gone through.
            if has_table == 0 {
                return Ok(Vec::new());
            }
            let any = self
                .connection
                .query_row("select 1 from Realisations limit 1", [], |_| Ok(()));
            if any.optional()?.is_none() {
                return Ok(Vec::new());
            }
            let query = "select path from ValidPaths d where path like '%.drv'
                and not exists (select 1 from DerivationOutputs where drv = d.id)";
            let mut statement = self.connection.prepare_cached(query)?;
            statement.query_map([], |row| row.get(0))?.collect()
        };
        let found = read().map_err(Error::Read)?;
        let paths = found
            .iter()
            .filter_map(|path| path.parse::<StorePath>().ok());
        Ok(paths.map(|path| path.name().to_owned()).collect())
    }

    /// Returns the outputs of these derivations, valid or not. Those of content-addressed derivations are not among them.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn outputs_of(&self, derivations: &[StorePath]) -> Result<Vec<StorePath>, Error> {
        let found = || -> rusqlite::Result<Vec<String>> {
            let query = "select o.path from DerivationOutputs o join ValidPaths d on d.id = o.drv where d.path = ?1";
            let mut statement = self.connection.prepare_cached(query)?;
            let mut outputs = Vec::new();
            for derivation in derivations {
                let found = statement.query_map([derivation.to_string()], |row| row.get(0))?;
                outputs.extend(found.collect::<Result<Vec<String>, _>>()?);
            }
            Ok(outputs)
        };
        let found = found().map_err(Error::Read)?;
        Ok(found.iter().filter_map(|path| path.parse().ok()).collect())
    }

    /// Returns everything that the named paths lead to: what they refer to and, for each derivation among that, its
    /// outputs and what was built from it after `mark`. Paths that are not valid are left out.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn leads_to(
        &self,
        named: &[StorePath],
        mark: i64,
    ) -> Result<BTreeSet<StorePath>, Error> {
        self.read_leads_to(named, mark).map_err(Error::Read)
    }

    fn read_leads_to(
        &self,
        named: &[StorePath],
        mark: i64,
    ) -> rusqlite::Result<BTreeSet<StorePath>> {
        let snapshot = self.connection.unchecked_transaction()?;
        // `deriver` has no index, so it is read once. A content-addressed output is found by it alone, because
        // `DerivationOutputs` names no path for such a derivation.
        let mut derived: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let query = "select deriver, path from ValidPaths where id > ?1 and deriver is not null";
        let mut statement = snapshot.prepare_cached(query)?;
        for pair in statement.query_map([mark], |row| Ok((row.get(0)?, row.get(1)?)))? {
            let (deriver, path): (String, String) = pair?;
            derived.entry(deriver).or_default().push(path);
        }
        let mut id_of = snapshot.prepare_cached("select id from ValidPaths where path = ?1")?;
        let mut referred = snapshot.prepare_cached(
            "select p.path from Refs r join ValidPaths p on p.id = r.reference where r.referrer = ?1",
        )?;
        let mut outputs =
            snapshot.prepare_cached("select path from DerivationOutputs where drv = ?1")?;
        let mut found = BTreeSet::new();
        let mut seen: BTreeSet<String> = named.iter().map(ToString::to_string).collect();
        let mut ahead: Vec<String> = seen.iter().cloned().collect();
        while let Some(path) = ahead.pop() {
            let id: Option<i64> = id_of.query_row([&path], |row| row.get(0)).optional()?;
            let Some(id) = id else { continue };
            let mut next = strings(&mut referred, id)?;
            if path.ends_with(".drv") {
                next.extend(strings(&mut outputs, id)?);
                next.extend(derived.remove(&path).unwrap_or_default());
            }
            ahead.extend(next.into_iter().filter(|path| seen.insert(path.clone())));
            found.extend(path.parse::<StorePath>());
        }
        Ok(found)
    }

    /// Returns the metadata of these paths. Paths that are not valid are left out.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn infos(&self, paths: &[StorePath]) -> Result<PathInfos, Error> {
        self.look_up(paths, Reach::Themselves).map_err(Error::Read)
    }

    /// Returns the metadata of these paths and of everything they refer to, transitively. Paths
    /// that are not valid are left out.
    ///
    /// # Errors
    /// When the database cannot be read.
    pub(crate) fn closure(&self, paths: &[StorePath]) -> Result<PathInfos, Error> {
        self.look_up(paths, Reach::Closure).map_err(Error::Read)
    }

    fn look_up(&self, paths: &[StorePath], reach: Reach) -> rusqlite::Result<PathInfos> {
        let snapshot = self.connection.unchecked_transaction()?;
        let mut by_path = snapshot
            .prepare_cached(&format!("select {COLUMNS} from ValidPaths where path = ?1"))?;
        let mut referred = snapshot.prepare_cached(
            "select p.path from Refs r join ValidPaths p on p.id = r.reference where r.referrer = ?1",
        )?;
        let mut found = PathInfos::default();
        // References can be circular (a path may refer to itself), so each path is visited once.
        let mut seen: BTreeSet<String> = paths.iter().map(ToString::to_string).collect();
        let mut ahead: Vec<String> = seen.iter().cloned().collect();
        while let Some(path) = ahead.pop() {
            let Some(row) = by_path
                .query_row(params![path], ValidPathRow::read)
                .optional()?
            else {
                continue;
            };
            let references = strings(&mut referred, row.id)?;
            if reach == Reach::Closure {
                ahead.extend(
                    references
                        .iter()
                        .filter(|path| seen.insert((*path).clone()))
                        .cloned(),
                );
            }
            match row.classify(references) {
                Classified::Readable(info) => found.infos.push(info),
                Classified::Unreadable(path) => found.unreadable.push(path),
            }
        }
        found.infos.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        found
            .unreadable
            .sort_unstable_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Themselves,
    Closure,
}

fn strings(statement: &mut Statement<'_>, id: i64) -> rusqlite::Result<Vec<String>> {
    statement.query_map([id], |row| row.get(0))?.collect()
}

impl ValidPathRow {
    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get(0)?,
            path: row.get(1)?,
            // Old or damaged rows may lack a hash, and must not fail the whole query.
            hash: row.get::<_, Option<String>>(2)?.unwrap_or_default(),
            nar_size: row.get(3)?,
            deriver: row.get(4)?,
            ultimate: row.get(5)?,
            signatures: row.get(6)?,
            ca: row.get(7)?,
        })
    }

    fn classify(self, references: Vec<String>) -> Classified {
        let path = self.path.clone();
        match self.into_info(references) {
            Ok(info) => Classified::Readable(info),
            Err(problem) => Classified::Unreadable(Unreadable {
                path: one_line(&path, 260),
                problem,
            }),
        }
    }

    fn into_info(self, references: Vec<String>) -> Result<PathInfo, String> {
        let store_path =
            |text: String| text.parse::<StorePath>().map_err(|error| error.to_string());
        let nar_size = self
            .nar_size
            .and_then(|size| u64::try_from(size).ok())
            // Nix stores 0 where the size is unknown; no NAR is empty.
            .filter(|size| *size > 0);
        let mut references = references
            .into_iter()
            .map(store_path)
            .collect::<Result<Vec<_>, _>>()?;
        // Signatures cover sorted references without duplicates.
        references.sort_unstable();
        references.dedup();
        if self.hash.is_empty() {
            return Err("its hash is unknown".to_owned());
        }
        Ok(PathInfo {
            path: store_path(self.path)?,
            nar_hash: Sha256::parse(&self.hash).map_err(|error| error.to_string())?,
            nar_size: nar_size.ok_or("its size is unknown")?,
            references,
            deriver: self
                .deriver
                .filter(|text| !text.is_empty())
                .map(store_path)
                .transpose()?,
            signatures: self
                .signatures
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
            ca: self.ca.filter(|text| !text.is_empty()),
            ultimate: self.ultimate == Some(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    struct World {
        folder: tempfile::TempDir,
        writer: Connection,
    }

    impl World {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("temporary folder");
            std::fs::create_dir(folder.path().join("db")).expect("made");
            let writer = Connection::open(Db::file(folder.path())).expect("opened");
            writer
                .execute_batch(flywheel_testing::NIX_DATABASE)
                .expect("made");
            Self { folder, writer }
        }

        fn open(&self) -> Db {
            Db::open(&Db::file(self.folder.path())).expect("opened")
        }

        fn add(&self, name: &str, references: &[i64]) -> i64 {
            let insert = "insert into ValidPaths (path, hash, registrationTime, narSize) values (?1, ?2, 1, 120)";
            self.writer
                .execute(insert, params![path(name).to_string(), HASH])
                .expect("inserted");
            let id = self.writer.last_insert_rowid();
            for reference in references {
                self.writer
                    .execute("insert into Refs values (?1, ?2)", params![id, reference])
                    .expect("inserted");
            }
            id
        }
    }

    fn path(name: &str) -> StorePath {
        StorePath::from_base_name(&format!("fvchbymk0m4jvldpb9m5hy0bjy2lf30k-{name}"))
            .expect("valid")
    }

    fn names(infos: &[PathInfo]) -> Vec<&str> {
        infos.iter().map(|info| info.path.name()).collect()
    }

    #[test]
    fn what_came_after_a_mark_is_found_with_its_references() {
        let world = World::new();
        let old = world.add("old", &[]);
        let db = world.open();
        let mark = db.last_id().expect("read");
        let b = world.add("b", &[old]);
        let at_mark = db.path_of_id(mark).expect("read");
        assert_eq!(at_mark, Some(path("old").to_string()));
        assert_eq!(db.path_of_id(9).expect("read"), None);
        world.add("a", &[b, old]);
        let Added {
            rows,
            unreadable,
            last_id,
        } = db.added_after(mark).expect("read");
        assert_eq!((unreadable, last_id), (vec![], 3));
        assert_eq!(
            rows.iter()
                .map(|(id, info)| (*id, info.path.name()))
                .collect::<Vec<_>>(),
            [(2, "b"), (3, "a")]
        );
        assert_eq!(rows[1].1.references, [path("b"), path("old")], "sorted");
        assert_eq!(
            db.added_after(3).expect("read"),
            Added {
                last_id: 3,
                ..Added::default()
            }
        );
    }

    #[test]
    fn a_path_that_went_and_came_again_is_new() {
        let world = World::new();
        world.add("a", &[]);
        let db = world.open();
        let mark = db.last_id().expect("read");
        world
            .writer
            .execute("delete from ValidPaths", [])
            .expect("deleted");
        assert_eq!(db.added_after(mark).expect("read").rows, []);
        assert_eq!(db.last_id().expect("read"), mark, "an id is given once");
        world.add("a", &[]);
        assert_eq!(db.added_after(mark).expect("read").rows.len(), 1);
    }

    #[test]
    fn named_paths_lead_to_references_outputs_and_what_was_derived_from_them() {
        let world = World::new();
        let input = world.add("input.drv", &[]);
        let source = world.add("source", &[]);
        let drv = world.add("tool.drv", &[input, source]);
        let built = world.add("tool", &[]);
        world.add("addressed", &[]);
        world.add("other.drv", &[source]);
        world.add("other", &[]);
        let run = |text: &str| world.writer.execute(text, []).expect("written");
        run(&format!(
            "insert into DerivationOutputs values ({drv}, 'out', '{}')",
            path("tool")
        ));
        run(&format!(
            "update ValidPaths set deriver = '{}' where path = '{}'",
            path("input.drv"),
            path("addressed")
        ));
        let db = world.open();
        let names = |named: &str, mark| {
            let found = db.leads_to(&[path(named)], mark).expect("read");
            let names = found.iter().map(|path| path.name().to_owned());
            names.collect::<Vec<_>>()
        };
        assert_eq!(
            names("tool.drv", 0),
            ["addressed", "input.drv", "source", "tool", "tool.drv"]
        );
        assert_eq!(
            names("tool.drv", built + 1),
            ["input.drv", "source", "tool", "tool.drv"],
            "what was derived before the mark is not looked for"
        );
        assert_eq!(names("source", 0), ["source"]);
        assert!(names("absent", 0).is_empty());
    }

    #[test]
    fn a_closure_holds_what_is_referred_to_and_no_stranger() {
        let world = World::new();
        let c = world.add("c", &[]);
        let b = world.add("b", &[c]);
        let a = world.add("a", &[b]);
        world
            .writer
            .execute("insert into Refs values (?1, ?1)", [a])
            .expect("a refers to itself");
        world.add("stranger", &[a]);
        let db = world.open();
        let found = db.closure(&[path("a"), path("gone")]).expect("read");
        assert_eq!(names(&found.infos), ["a", "b", "c"]);
        assert_eq!(
            names(&db.infos(&[path("b"), path("gone")]).expect("read").infos),
            ["b"]
        );
    }

    #[test]
    fn a_registration_without_size_or_hash_is_named() {
        let world = World::new();
        world.add("a", &[]);
        world.add("b", &[]);
        world.add("c", &[]);
        world
            .writer
            .execute("update ValidPaths set narSize = null where id = 1", [])
            .expect("updated");
        world
            .writer
            .execute("update ValidPaths set hash = '' where id = 2", [])
            .expect("updated");
        let Added {
            rows,
            unreadable,
            last_id,
        } = world.open().added_after(0).expect("read");
        assert_eq!((rows.len(), last_id), (1, 3));
        let problems: Vec<&str> = unreadable
            .iter()
            .map(|path| path.problem.as_str())
            .collect();
        assert_eq!(problems, ["its size is unknown", "its hash is unknown"]);
    }

    #[test]
    fn no_database_is_an_error_that_names_the_file() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let error = Db::open(&Db::file(folder.path())).expect_err("nothing there");
        assert!(error.to_string().contains("db/db.sqlite"), "{error}");
        assert!(!Db::file(folder.path()).exists(), "and none is made");
    }
}
