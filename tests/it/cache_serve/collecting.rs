//! Garbage collection, by the server and by `flywheel cache gc`.

use super::*;

/// Makes a path look as if it was last used so many hours ago.
fn age(served: &Served, path: &TestPath, hours: u64) {
    let then = SystemTime::now() - Duration::from_secs(hours * 3600);
    let nar = format!("nars/{}.nar.zst", path.nar_hash().base32());
    for file in [format!("caches/main/{}.narinfo", path.hash()), nar] {
        std::fs::File::open(served.path(&file))
            .unwrap()
            .set_modified(then)
            .unwrap();
    }
}

/// The letters of the paths in `main`.
fn letters(served: &Served) -> String {
    let names = served.names("caches/main");
    names
        .iter()
        .filter(|name| name.ends_with(".narinfo"))
        .map(|name| &name[..1])
        .collect()
}

/// `a` (used 50 h ago) → `b` (90 h) → `c` (99 h); `d` (70 h) alone; `e` just now.
async fn fill(served: &Served) {
    let c = TestPath::new('c', &[3; 9_000]);
    let b = TestPath::new('b', &[2; 9_000]).refers_to(&[&c]);
    let a = TestPath::new('a', &[1; 9_000]).refers_to(&[&b]);
    let (d, e) = (
        TestPath::new('d', &[4; 9_000]),
        TestPath::new('e', &[5; 9_000]),
    );
    for path in [&c, &b, &a, &d] {
        assert_eq!(served.upload(path).await.0, 200);
    }
    assert_eq!(
        served
            .upload_as("team-token", &d.info("team"), d.nar.clone())
            .await
            .0,
        200
    );
    let e = TestPath {
        base: format!("{}-e", "f".repeat(32)),
        ..e
    };
    assert_eq!(served.upload(&e).await.0, 200);
    for (path, hours) in [(&c, 99), (&b, 90), (&a, 50), (&d, 70)] {
        age(served, path, hours);
    }
    let then = SystemTime::now() - Duration::from_secs(70 * 3600);
    let of_team = served.path(&format!("caches/team/{}.narinfo", d.hash()));
    std::fs::File::open(of_team)
        .unwrap()
        .set_modified(then)
        .unwrap();
}

fn gc(folder: tempfile::TempDir, limits: &[&str]) -> (String, tempfile::TempDir) {
    let mut run = Flywheel::new(&[&["cache", "gc", "--dir", "cache"], limits].concat());
    run.folder = folder;
    let ran = run.run();
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    (ran.stdout, run.folder)
}

#[tokio::test]
async fn by_age_and_by_size_the_least_recently_used_go_and_no_closure_breaks() {
    let served = Served::start(&[]);
    fill(&served).await;
    let (_, folder) = served.stop();
    let (printed, folder) = gc(folder, &[]);
    assert!(
        printed.starts_with("gc: 0 paths and 0 NARs removed (0 B), 6 paths kept"),
        "{printed}"
    );
    // `b` and `c` are older than 60 h, but `a` needs them; `d` goes from both caches.
    let (printed, folder) = gc(folder, &["--max-age", "60h"]);
    assert!(
        printed.starts_with("gc: 2 paths and 1 NAR removed"),
        "{printed}"
    );
    let served = Served::in_folder(folder, &[]);
    assert_eq!(letters(&served), "abcf");
    let (_, folder) = served.stop();
    let (printed, folder) = gc(folder, &["--max-size", "0"]);
    assert!(
        printed.starts_with("gc: 4 paths and 4 NARs removed"),
        "{printed}"
    );
    let served = Served::in_folder(folder, &[]);
    assert_eq!(letters(&served), "");
    for folder in ["nars", "caches/main/nars", "caches/team/nars"] {
        assert!(served.names(folder).is_empty(), "{folder}");
    }
}

#[tokio::test]
async fn a_server_collects_at_its_start_and_spares_what_is_in_use() {
    let served = Served::start(&[]);
    fill(&served).await;
    let (_, folder) = served.stop();
    let served = Served::in_folder(
        folder,
        &["--max-size", "0", "--gc-interval", "1s", "--grace", "0s"],
    );
    served.until("the collection", || letters(&served) == "f");
    served.until("their NARs gone", || served.names("nars").len() == 1);
    let (ran, _) = served.stop();
    assert!(
        ran.stderr.contains("gc: 5 paths and 4 NARs removed"),
        "{}",
        ran.stderr
    );
}

#[tokio::test]
async fn reading_and_asking_count_as_use() {
    let served = Served::start(&[]);
    fill(&served).await;
    let (c, d) = (
        TestPath::new('c', &[3; 9_000]),
        TestPath::new('d', &[4; 9_000]),
    );
    assert!(served.narinfo("main", &c).await.is_some());
    let ask = json!({"cache": "main", "store_path_hashes": [d.hash()]});
    let url = format!("{}/_api/v1/get-missing-paths", served.url);
    assert_eq!(
        answer(
            served
                .client()
                .post(url)
                .bearer_auth(PLANTED_TOKEN)
                .json(&ask)
        )
        .await
        .0,
        200
    );
    let (_, folder) = served.stop();
    let (printed, folder) = gc(folder, &["--max-age", "1h"]);
    assert!(
        printed.starts_with("gc: 3 paths and 2 NARs removed"),
        "{printed}"
    );
    assert_eq!(letters(&Served::in_folder(folder, &[])), "cdf");
}

#[tokio::test]
async fn a_nar_that_no_narinfo_claims_goes_after_a_while() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"unclaimed");
    let request = served.client().put(format!(
        "{}/main/nar/{}.nar",
        served.url,
        path.nar_hash().base32()
    ));
    assert_eq!(
        answer(request.bearer_auth(PLANTED_TOKEN).body(path.nar.clone()))
            .await
            .0,
        201
    );
    let files = ["nars", "caches/main/uploads"]
        .map(|folder| served.path(folder).join(&served.names(folder)[0]));
    let (_, folder) = served.stop();
    let served = Served::in_folder(folder, &["--gc-interval", "1s"]);
    assert!(served.names("nars").len() == 1, "an hour's grace");
    for file in files {
        let old = SystemTime::now() - Duration::from_secs(2 * 3600);
        let moved = served.path(
            file.strip_prefix(file.ancestors().find(|a| a.ends_with("cache")).unwrap())
                .unwrap()
                .to_str()
                .unwrap(),
        );
        std::fs::File::open(moved)
            .unwrap()
            .set_modified(old)
            .unwrap();
    }
    served.until("it is gone", || {
        served.names("nars").is_empty() && served.names("caches/main/uploads").is_empty()
    });
}

#[test]
fn a_folder_that_is_no_cache_is_not_touched() {
    let run = Flywheel::new(&["cache", "gc", "--dir", "home", "--max-size", "0"]);
    let ran = run.run();
    assert_eq!(ran.code, 64, "{}", ran.stderr);
    assert!(
        ran.stderr.contains("is no cache's folder: `home`"),
        "{}",
        ran.stderr
    );
    assert_eq!(std::fs::read_dir(run.path("home")).unwrap().count(), 0);
}
