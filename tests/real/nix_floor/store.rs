//! What the store has to show for a job: the paths that it added, their closures, the links to results.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::time::{Duration, SystemTime};

use flywheel_nix::path_info::{Origin, PathInfo};
use flywheel_nix::store::Store;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::Nix;

use super::{CONFIG, Daemon, Inside, in_private_nix, isolate, names, printed, wait_for};

/// Paths of a store, and the size and the references of each.
type Listed = BTreeMap<String, (u64, BTreeSet<String>)>;

/// All valid paths as `nix` itself lists them, read without our parser.
fn listed(nix: &Nix) -> Listed {
    let whole =
        serde_json::from_str(&printed(nix, "nix", &["path-info", "--all", "--json"])).unwrap();
    let entries: Vec<(String, serde_json::Value)> = match whole {
        serde_json::Value::Array(list) => list
            .into_iter()
            .map(|facts| (facts["path"].as_str().unwrap().to_owned(), facts))
            .collect(),
        serde_json::Value::Object(object) => object.into_iter().collect(),
        other => panic!("{other}"),
    };
    let references = |facts: &serde_json::Value| {
        facts["references"]
            .as_array()
            .unwrap()
            .iter()
            .map(|name| name.as_str().unwrap().to_owned())
            .collect()
    };
    entries
        .into_iter()
        .map(|(path, facts)| {
            (
                path,
                (facts["narSize"].as_u64().unwrap(), references(&facts)),
            )
        })
        .collect()
}

fn sorted(mut infos: Vec<PathInfo>) -> Vec<PathInfo> {
    infos.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    infos
}

/// The same store seen in two ways: by its database, and by asking Nix, behind the socket of a daemon.
struct BothWays {
    nix: Nix,
    by_database: Store,
    by_command: Store,
    _daemon: Daemon,
}

impl BothWays {
    async fn open(inside: &Inside, nix: Nix) -> Self {
        let by_database = Store::open(&nix).await.unwrap();
        assert_eq!(by_database.database_error(), None);
        // A store behind a socket of another place has no database that we could read, so Nix is asked.
        let socket = inside.folder.join("elsewhere");
        let daemon = Daemon::start(&nix, &socket);
        let remote = nix
            .clone()
            .with_variable("NIX_REMOTE", Some(&format!("unix://{}", socket.display())));
        let by_command = Store::open(&remote).await.unwrap();
        assert!(by_command.database_error().is_some());
        Self {
            nix,
            by_database,
            by_command,
            _daemon: daemon,
        }
    }

    /// Compares what was added with what Nix lists now and did not list `before`.
    fn check_added(&self, added: &[PathInfo], before: &Listed) {
        let mut expected = listed(&self.nix);
        expected.retain(|path, _| !before.contains_key(path));
        let found: Listed = added
            .iter()
            .map(|info| {
                let references = info.references.iter().map(ToString::to_string).collect();
                (info.path.to_string(), (info.nar_size, references))
            })
            .collect();
        assert_eq!(found, expected);
        for info in added {
            let origin = match info.path.name() {
                "source" => Origin::Added,
                name if name.ends_with(".drv") => Origin::Added,
                _ => Origin::Built,
            };
            assert_eq!(info.origin(), origin, "{:?}", info.path);
            let path = info.path.to_string();
            let hash = printed(
                &self.nix,
                "nix-hash",
                &["--type", "sha256", "--base32", &path],
            );
            assert_eq!(hash.trim(), info.nar_hash.base32());
        }
    }

    /// Compares the closure of a path with the one that Nix lists.
    async fn check_closure(&self, paths: &[StorePath]) {
        let closure = self.by_database.closure(paths).await.unwrap();
        let listed = printed(&self.nix, "nix-store", &["-q", "-R", &paths[0].to_string()]);
        let mut listed: Vec<StorePath> = listed.lines().map(|line| line.parse().unwrap()).collect();
        listed.sort_unstable();
        let found: Vec<StorePath> = closure.infos.iter().map(|info| info.path.clone()).collect();
        assert_eq!(found, listed);
        assert_eq!(self.by_command.closure(paths).await.unwrap(), closure);
    }
}

#[test]
fn the_store_tells_exactly_what_the_job_added() {
    in_private_nix(
        "nix_floor::store::the_store_tells_exactly_what_the_job_added",
        |inside| wait_for(what_the_job_added(inside)),
    );
}

async fn what_the_job_added(inside: &Inside) {
    let nix = inside
        .nix(&[("NIX_CONFIG", &format!("{CONFIG}build-users-group =\n"))])
        .await;
    inside.build(&nix, &["old"]);
    let before = listed(&nix);
    let both = BothWays::open(inside, nix).await;
    let (nix, store, by_command) = (&both.nix, &both.by_database, &both.by_command);
    let (mark, other_mark) = (
        store.mark().await.unwrap(),
        by_command.mark().await.unwrap(),
    );

    let app = inside.build(nix, &["app"]);
    let pair = inside.build(nix, &["pair"]);
    let added = store.added_since(&mark).await.unwrap();
    both.check_added(&added.infos, &before);
    assert_eq!(added.unreadable, []);
    let all = [
        "app",
        "app.drv",
        "dependency",
        "dependency.drv",
        "pair",
        "pair-dev",
        "pair.drv",
        "source",
    ];
    assert_eq!(names(&added.infos), all);
    let again = by_command.added_since(&other_mark).await.unwrap();
    assert_eq!(
        sorted(again.infos),
        sorted(added.infos),
        "both ways give the same"
    );
    both.check_closure(&app).await;

    printed(nix, "nix-store", &["--delete", &pair[0].to_string()]);
    let asked = [app[0].clone(), pair[0].clone()];
    assert_eq!(names(&store.infos(&asked).await.unwrap().infos), ["app"]);
    assert_eq!(
        store.infos(&asked).await.unwrap(),
        by_command.infos(&asked).await.unwrap()
    );
    assert!(
        !names(&store.added_since(&mark).await.unwrap().infos).contains(&"pair"),
        "it is gone again"
    );
}

#[test]
fn result_links_are_results_even_if_nothing_is_built() {
    in_private_nix(
        "nix_floor::store::result_links_are_results_even_if_nothing_is_built",
        |inside| {
            wait_for(async {
                let nix = inside
                    .nix(&[("NIX_CONFIG", &format!("{CONFIG}build-users-group =\n"))])
                    .await;
                let app = inside.build(&nix, &["app"]);
                let store = Store::open(&nix).await.unwrap();
                let (mark, started) = (store.mark().await.unwrap(), SystemTime::now());
                let job = inside.folder.join("job");
                std::fs::create_dir_all(job.join("deep")).unwrap();
                for (folder, link) in [
                    (job.join("deep"), "out"),
                    (inside.folder.join("home"), "result"),
                ] {
                    let mut build = Command::new(&nix.program);
                    isolate(&mut build)
                        .args(["build", "-f"])
                        .arg(inside.folder.join("work/default.nix"))
                        .args(["app", "-o", link]);
                    assert!(
                        build
                            .current_dir(folder)
                            .envs(nix.variables())
                            .status()
                            .unwrap()
                            .success()
                    );
                }
                assert_eq!(store.added_since(&mark).await.unwrap().infos, []);
                assert_eq!(store.result_links(&job, started).await.unwrap(), app);
                let later = SystemTime::now() + Duration::from_secs(60);
                assert_eq!(store.result_links(&job, later).await.unwrap(), []);
            });
        },
    );
}
