//! Installations that are taken back, whole and half.

use super::*;
use crate::bootstrap::closure::Entered;

const NIX: &str = "3zc6lr3rxv7sljj2gsxigvkpkm3d9dmr-nix-2.99.1";

/// An installation as its manifest describes it.
fn installed() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("temporary folder");
    let nix = folder.path().join("nix");
    let made = [
        "",
        "var",
        "var/flywheel",
        "var/nix",
        "var/nix/profiles",
        "store",
    ];
    for name in made {
        fs::create_dir(nix.join(name)).expect("made");
    }
    fs::create_dir_all(nix.join("store").join(NIX).join("bin")).expect("made");
    fs::create_dir(nix.join("store/.links")).expect("made");
    let link = nix.join("var/nix/profiles/default");
    std::os::unix::fs::symlink(nix.join("store").join(NIX), &link).expect("linked");
    let folders = ["", "var", "var/flywheel", "var/nix", "store"].map(|name| match name {
        "" => nix.clone(),
        name => nix.join(name),
    });
    let manifest = serde_json::json!({
        "version": 1, "complete": true, "source": "https://cache.example",
        "nix": format!("/nix/store/{NIX}"), "paths": [format!("/nix/store/{NIX}")],
        "folders": folders, "links": [link],
    });
    fs::write(Manifest::file(&nix), manifest.to_string()).expect("written");
    folder
}

#[test]
fn what_was_put_there_goes_and_nothing_is_left() {
    let folder = installed();
    let nix = folder.path().join("nix");
    let text = remove(&nix, folder.path())
        .expect("nothing needs it")
        .expect("installed");
    assert_eq!(
        text,
        "took back Nix from https://cache.example: 1 store path"
    );
    assert!(!nix.exists());
    assert_eq!(remove(&nix, folder.path()).expect("nothing"), None);
}

#[test]
fn what_is_not_in_the_manifest_stays() {
    let folder = installed();
    let nix = folder.path().join("nix");
    fs::write(nix.join("var/own"), "x").expect("written");
    remove(&nix, folder.path()).expect("nothing needs it");
    assert!(nix.join("var/own").exists() && !nix.join("store").exists());
}

#[test]
fn a_profile_that_somebody_changed_is_a_reason_to_refuse() {
    let folder = installed();
    let nix = folder.path().join("nix");
    let link = nix.join("var/nix/profiles/default");
    fs::remove_file(&link).expect("removed");
    std::os::unix::fs::symlink("default-1-link", &link).expect("linked");
    let refused = remove(&nix, folder.path()).expect_err("another generation");
    assert!(
        refused.obstacle.contains("leads to something else"),
        "{}",
        refused.obstacle
    );
    assert!(nix.join("store").join(NIX).exists());
}

/// Makes the installation one that was killed before it had this many of its paths.
fn interrupt(nix: &Path, paths: &[String]) {
    let file = Manifest::file(nix);
    let bytes = fs::read(&file).expect("there");
    let mut manifest: serde_json::Value = serde_json::from_slice(&bytes).expect("valid");
    manifest["complete"] = false.into();
    manifest["source"] = "".into();
    manifest["paths"] = paths.into();
    manifest["links"] = serde_json::json!([]);
    fs::write(&file, manifest.to_string()).expect("written");
    fs::remove_file(nix.join("var/nix/profiles/default")).expect("there");
}

/// A database of Nix with these valid paths; the size of one is a number.
fn register(nix: &Path, paths: &[(&str, i64)]) {
    let file = Db::file(&nix.join("var/nix"));
    fs::create_dir(file.parent().expect("a folder")).expect("made");
    let database = rusqlite::Connection::open(file).expect("opened");
    database
        .execute_batch(flywheel_testing::NIX_DATABASE)
        .expect("made");
    let hash = format!("sha256:{}", "0".repeat(64));
    for (name, size) in paths {
        let path = format!("/nix/store/{name}");
        let insert =
            "insert into ValidPaths (path, hash, registrationTime, narSize) values (?1, ?2, 1, ?3)";
        database
            .execute(insert, rusqlite::params![path, hash, size])
            .expect("inserted");
    }
}

#[tokio::test]
async fn what_an_interrupted_installation_left_goes() {
    let folder = installed();
    let nix = folder.path().join("nix");
    interrupt(&nix, &[]);
    fs::remove_dir_all(nix.join("store")).expect("ours");
    fs::create_dir_all(nix.join("store.partial/half")).expect("made");
    fs::write(nix.join("var/flywheel/registration"), "x").expect("written");
    // What a killed `nix-store` leaves has no tables.
    fs::create_dir(nix.join("var/nix/db")).expect("made");
    fs::write(nix.join("var/nix/db/db.sqlite"), "").expect("written");
    let text = remove_alone(&nix, folder.path()).await;
    let text = text.expect("nothing needs it").expect("begun");
    assert_eq!(
        text,
        "removed what an interrupted installation of Nix had left"
    );
    assert!(!nix.exists());
    let again = remove_alone(&nix, folder.path()).await;
    assert_eq!(again.expect("nothing"), None);
    assert!(!nix.exists(), "the lock makes no folder");
}

/// Two of Nix's paths, registered, and half of the second one gone with all that comes before it.
fn killed_while_it_was_taken_back(moment: usize) -> (tempfile::TempDir, PathBuf) {
    let folder = installed();
    let nix = folder.path().join("nix");
    register(&nix, &[(NIX, 120)]);
    let file = Manifest::file(&nix);
    let going = fs::read_to_string(&file).expect("there");
    let going = going.replace(r#""complete":true"#, r#""complete":false"#);
    fs::write(&file, going).expect("written");
    let steps: [&dyn Fn(); 3] = [
        &|| fs::remove_file(nix.join("var/nix/profiles/default")).expect("there"),
        &|| fs::rename(nix.join("var/nix"), Staging::aside(&nix)).expect("moved"),
        &|| fs::remove_dir(nix.join("store").join(NIX).join("bin")).expect("there"),
    ];
    steps.iter().take(moment).for_each(|step| step());
    (folder, nix)
}

#[tokio::test]
async fn what_was_killed_while_it_was_taken_back_goes_by_the_next_call_or_the_next_installation() {
    for moment in 0..=3 {
        let (folder, nix) = killed_while_it_was_taken_back(moment);
        let text = remove_alone(&nix, folder.path()).await;
        text.expect("nothing needs it").expect("begun");
        assert!(!nix.exists(), "{moment}");
        if moment < 2 {
            continue;
        }
        let (_folder, nix) = killed_while_it_was_taken_back(moment);
        let deadline = Instant::now() + LOCK_LIMIT;
        let entered = Staging::enter(&nix, &Sink::silent(), deadline).await;
        let Ok(Entered::Staging(staging)) = entered else {
            panic!("{moment}: it begins");
        };
        assert!(!nix.join("store").join(NIX).exists(), "{moment}");
        assert!(!Staging::aside(&nix).exists(), "{moment}");
        drop(staging);
    }
}

/// A job that finds no Nix installs it anew, over what is valid still.
#[tokio::test]
async fn what_an_installation_finds_of_an_earlier_one_stays_ours() {
    let (folder, nix) = killed_while_it_was_taken_back(1);
    let deadline = Instant::now() + LOCK_LIMIT;
    let entered = Staging::enter(&nix, &Sink::silent(), deadline).await;
    let Ok(Entered::Staging(staging)) = entered else {
        panic!("it begins");
    };
    let ours = || {
        let manifest = Manifest::read(&nix).expect("valid").expect("written");
        let paths = manifest.paths.iter();
        paths
            .map(|path| path.base_name().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(ours(), [NIX]);
    // Also when that installation fails.
    drop(staging);
    assert_eq!(ours(), [NIX]);
    remove_alone(&nix, folder.path())
        .await
        .expect("nothing needs it");
    assert!(!nix.exists());
}

#[test]
fn what_a_job_is_at_work_with_stays() {
    let folder = installed();
    let nix = folder.path().join("nix");
    let held = Manifest::hold(&nix).expect("installed");
    let also = Manifest::hold(&nix).expect("two jobs may");
    let refused = remove(&nix, folder.path()).expect_err("in use");
    assert!(
        refused.obstacle.contains("a job is at work"),
        "{}",
        refused.obstacle
    );
    drop(held);
    drop(also);
    remove(&nix, folder.path()).expect("nothing needs it");
    assert!(!nix.exists());
}

#[test]
fn the_logs_of_what_was_built_go_as_well() {
    let folder = installed();
    let nix = folder.path().join("nix");
    fs::create_dir_all(nix.join("var/log/nix/drvs/ab")).expect("made");
    fs::write(nix.join("var/log/nix/drvs/ab/cd.bz2"), "").expect("written");
    remove(&nix, folder.path()).expect("nothing needs it");
    assert!(!nix.exists());
}

#[test]
fn an_interrupted_installation_leaves_the_store_it_came_into() {
    let folder = installed();
    let nix = folder.path().join("nix");
    interrupt(&nix, &[]);
    // Somebody else's Nix has come since.
    register(&nix, &[(NIX, 120)]);
    fs::create_dir_all(nix.join("store/.flywheel-partial/half")).expect("made");
    remove(&nix, folder.path()).expect("nothing needs it");
    assert!(nix.join("store").join(NIX).exists() && nix.join("var/nix/db").exists());
    assert!(!nix.join("store/.flywheel-partial").exists());
    assert!(!nix.join("var/flywheel").exists());
}

#[test]
fn paths_that_were_registered_before_the_interruption_go() {
    let folder = installed();
    let nix = folder.path().join("nix");
    interrupt(&nix, &[format!("/nix/store/{NIX}")]);
    register(&nix, &[(NIX, 120)]);
    remove(&nix, folder.path()).expect("nothing needs it");
    assert!(!nix.exists());
}

#[test]
fn a_valid_path_that_cannot_be_described_is_a_reason_to_refuse() {
    let folder = installed();
    let nix = folder.path().join("nix");
    let other = "0g1fw1hyk0jjcfi1cjbxvh6g1s6m3r7k-other";
    register(&nix, &[(NIX, 120), (other, 0)]);
    let refused = remove(&nix, folder.path()).expect_err("a path came");
    assert!(refused.obstacle.contains(other), "{}", refused.obstacle);
    assert!(nix.join("store").join(NIX).exists());
}

#[tokio::test]
async fn an_installation_that_runs_is_waited_for() {
    let folder = installed();
    let nix = folder.path().join("nix");
    let lock = fs::File::open(nix.join("var/flywheel")).expect("there");
    lock.try_lock().expect("nobody has it");
    let mut removed = Box::pin(remove_alone(&nix, folder.path()));
    let early = tokio::time::timeout(Duration::from_millis(200), &mut removed).await;
    assert!(early.is_err() && nix.join("store").join(NIX).exists());
    drop(lock);
    removed.await.expect("nothing needs it").expect("installed");
    assert!(!nix.exists());
}
