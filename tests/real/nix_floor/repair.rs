//! A Nix that is not ready is made ready, or named: a database that only another user may write, a dead daemon,
//! build users that do not exist.

use std::path::Path;
use std::time::Duration;

use flywheel_core::progress::Sink;
use flywheel_nix::bootstrap::plan::{Installer, Wanted};
use flywheel_nix::bootstrap::{self, Ready};
use flywheel_nix::db::Db;
use flywheel_nix::ping::{Ping, PingFailure, ping};
use flywheel_nix::settings::{WantedSettings, compose};
use flywheel_nix::store::{Store, open_db};
use flywheel_nix::store_location::STATE_DIR;
use flywheel_nix::store_path::STORE_DIR;
use flywheel_sys::http::Roots;
use flywheel_sys::runner::env::Env;

use super::{
    CONFIG, Daemon, Inside, LIMIT, SHARED_MEMORY, SOCKET, in_private_nix, names, until, wait_for,
};

/// Makes the Nix ready that is there; none is installed.
async fn ready(env: &Env, sink: &Sink, limit: Duration) -> Result<Ready, bootstrap::Error> {
    let wanted = Wanted {
        installer: Installer::None,
        ..Wanted::default()
    };
    bootstrap::ready(env, &wanted, &Roots::default(), sink, limit).await
}

#[test]
fn a_user_of_a_daemon_reads_the_database() {
    in_private_nix(
        "nix_floor::repair::a_user_of_a_daemon_reads_the_database",
        |inside| {
            wait_for(async {
                if inside.role.is_empty() {
                    inside.system_settings("build-users-group =\nsandbox = false\n");
                    let nix = inside.nix(&[]).await;
                    inside.build(&nix, &["old"]);
                    let _daemon = Daemon::start(&nix, Path::new(SOCKET));
                    // Newer versions keep the database open, or leave its shared memory behind.
                    until(|| nix.version.at_least(2, 9) || !Path::new(SHARED_MEMORY).exists());
                    return inside.as_nobody("user");
                }
                let nix = inside.nix(&[("NIX_REMOTE", "daemon")]).await;
                if !Path::new(SHARED_MEMORY).exists() {
                    assert!(
                        Db::open(&Db::file(Path::new(STATE_DIR))).is_err(),
                        "nobody has it open"
                    );
                }
                let opened = open_db(Path::new(STATE_DIR), Path::new(STORE_DIR)).unwrap();
                assert!(opened.last_id().unwrap() > 0);
                drop(opened);
                let store = Store::open(&nix).await.unwrap();
                assert_eq!(store.database_error(), None);
                let mark = store.mark().await.unwrap();
                inside.build(&nix, &["dependency"]);
                let added = store.added_since(&mark).await.unwrap();
                assert_eq!(
                    names(&added.infos),
                    ["dependency", "dependency.drv", "source"]
                );
            });
        },
    );
}

#[test]
fn a_dead_daemon_is_revived_by_root_and_named_to_others() {
    let test = "nix_floor::repair::a_dead_daemon_is_revived_by_root_and_named_to_others";
    in_private_nix(test, |inside| {
        wait_for(async {
            let env = inside.env(&[("NIX_REMOTE", "daemon")]);
            if inside.role == "without daemon" {
                let env = inside.env(&[]);
                let error = ready(&env, &Sink::silent(), LIMIT).await.err().unwrap();
                assert!(
                    error.to_string().contains("belongs to another user"),
                    "{error}"
                );
                return;
            }
            if inside.role == "dead daemon" {
                let error = ready(&env, &Sink::silent(), LIMIT).await.err().unwrap();
                assert!(
                    error.to_string().contains("daemon does not answer"),
                    "{error}"
                );
                assert!(error.to_string().contains(SOCKET), "{error}");
                return;
            }
            inside.system_settings("build-users-group =\n");
            let alone = inside.nix(&[]).await;
            inside.build(&alone, &["old"]);
            inside.as_nobody("without daemon");
            // A daemon that died leaves a socket behind at which nothing answers.
            drop(Daemon::start(&alone, Path::new(SOCKET)));
            assert!(Path::new(SOCKET).exists());
            inside.as_nobody("dead daemon");

            for socket_was_there in [true, false] {
                revived(inside, &env, socket_was_there).await;
            }
        });
    });
}

/// Root gets a daemon for the job, which is gone afterwards; so is its socket, if none was there.
async fn revived(inside: &Inside, env: &Env, socket_was_there: bool) {
    if !socket_was_there {
        std::fs::remove_file(SOCKET).unwrap();
    }
    let ready = ready(env, &Sink::silent(), LIMIT).await.unwrap();
    assert_eq!(
        (ready.repairs.len(), ready.variables(), ready.settings()),
        (1, vec![], vec![])
    );
    let Ping::Open(opened) = ping(&ready.nix, LIMIT).await.unwrap() else {
        panic!("it does not open")
    };
    assert_eq!(opened.url, "daemon");
    inside.build(&ready.nix, &["app"]);
    let nix = ready.nix.clone();
    ready.stop().await;
    let answer = ping(&nix, LIMIT).await.unwrap();
    assert!(
        matches!(answer, Ping::Failed(PingFailure::NoDaemon(_))),
        "{answer:?}"
    );
    assert_eq!(Path::new(SOCKET).exists(), socket_was_there);
}

#[test]
fn build_users_that_do_not_exist_are_done_without() {
    in_private_nix(
        "nix_floor::repair::build_users_that_do_not_exist_are_done_without",
        |inside| {
            wait_for(async {
                for (group, attribute) in [("no-such-group", "old"), ("nogroup", "app")] {
                    inside.system_settings(&format!("build-users-group = {group}\n"));
                    let ready = ready(&inside.env(&[]), &Sink::silent(), LIMIT)
                        .await
                        .unwrap();
                    assert_eq!(ready.settings(), ["build-users-group ="], "{group}");
                    assert!(!ready.installed && ready.folder.is_none());
                    let wanted = WantedSettings {
                        repairs: ready.settings(),
                        ..WantedSettings::default()
                    };
                    let nix = ready.nix.clone().with_config(&compose(CONFIG, &wanted));
                    inside.build(&nix, &[attribute]);
                }
            });
        },
    );
}

#[test]
fn jobs_that_open_a_new_store_at_once_all_get_it() {
    in_private_nix(
        "nix_floor::repair::jobs_that_open_a_new_store_at_once_all_get_it",
        |inside| {
            wait_for(async {
                for round in 0..6 {
                    let state = format!("/nix/new-{round}");
                    let env = inside.env(&[("NIX_STATE_DIR", &state)]);
                    let sink = Sink::silent();
                    let jobs = (0..6).map(|_| ready(&env, &sink, LIMIT));
                    for opened in futures_util::future::join_all(jobs).await {
                        opened.map(drop).unwrap();
                    }
                }
            });
        },
    );
}
