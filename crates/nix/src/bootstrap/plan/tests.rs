//! Every row of the machines that people run.

mod combinations;

use super::*;
use crate::bootstrap::machine::{BuildGroup, Socket, User};
use crate::tool::FoundProgram;

const CLOSURE_KNOWN: &str = releases::CLOSURE_VERSION;

impl Machine {
    /// An ordinary user of a fresh machine without Nix, `sudo` or user namespaces.
    fn bare() -> Self {
        Self {
            is_nix_below: false,
            user: User {
                uid: 1001,
                gid: 100,
                name: Some("runner".into()),
                home: Some("/home/runner".into()),
            },
            sudo: Sudo::None,
            folder: Folder::Absent { makeable: false },
            is_folder_open: false,
            nix: None,
            is_elsewhere: false,
            is_daemon_named: false,
            socket: Socket::Absent,
            build_group: BuildGroup::Missing,
            namespaces: Namespaces::Forbidden {
                obstacle: "user namespaces are forbidden by `user.max_user_namespaces = 0`".into(),
                remedy: "Run `sysctl -w user.max_user_namespaces=15000` on the host.".into(),
            },
            apt: None,
            is_interrupted: false,
            opening: Opening::Untried,
        }
    }

    fn root(mut self) -> Self {
        self.user = User {
            uid: 0,
            gid: 0,
            name: Some("root".into()),
            home: Some("/root".into()),
        };
        self.sudo = Sudo::None;
        if let Folder::Absent { makeable } = &mut self.folder {
            *makeable = true;
        }
        self
    }

    fn sudo(self) -> Self {
        Self {
            sudo: Sudo::Allowed("/usr/bin/sudo".into()),
            ..self
        }
    }

    fn debian(self) -> Self {
        Self {
            apt: Some("/usr/bin/apt-get".into()),
            ..self
        }
    }

    fn namespaces(self) -> Self {
        Self {
            namespaces: Namespaces::Allowed,
            ..self
        }
    }

    fn folder(self, folder: Folder) -> Self {
        Self { folder, ..self }
    }

    fn nix(self, program: &str) -> Self {
        Self {
            is_nix_below: program.starts_with("/nix/"),
            nix: Some(FoundProgram {
                program: program.into(),
                on_path: true,
            }),
            ..self
        }
    }

    fn socket(self) -> Self {
        Self {
            socket: Socket::Present,
            ..self
        }
    }

    fn opening(self, opening: Opening) -> Self {
        Self { opening, ..self }
    }
}

/// What a job asks for that gives no input.
fn job() -> Wanted {
    Wanted {
        is_for_children_alone: true,
        ..Wanted::default()
    }
}

fn check(machine: &Machine, expected: &str) {
    check_wanted(machine, &job(), expected);
}

fn check_wanted(machine: &Machine, wanted: &Wanted, expected: &str) {
    assert_eq!(plan(machine, wanted).summary(), expected, "{machine:?}");
}

const OURS: Folder = Folder::Used {
    writable: true,
    owner: 1001,
};
const OTHERS: Folder = Folder::Used {
    writable: false,
    owner: 0,
};

#[test]
fn a_hosted_runner_installs_through_sudo_and_asks_it_for_the_folder_alone() {
    check(
        &Machine::bare().debian().namespaces().sudo(),
        "install: `sudo` makes `/nix` for this user; Nix is installed by closure, else tarball",
    );
    let empty = Folder::Empty {
        writable: false,
        owner: 0,
    };
    check(
        &Machine::bare().sudo().folder(empty),
        "install: `sudo` makes `/nix` for this user; Nix is installed by closure, else tarball",
    );
}

#[test]
fn a_folder_that_the_user_can_write_to_needs_nobody() {
    for folder in [
        Folder::Empty {
            writable: true,
            owner: 1001,
        },
        OURS,
    ] {
        check(
            &Machine::bare().sudo().folder(folder),
            "install: Nix is installed by closure, else tarball",
        );
    }
}

#[test]
fn root_needs_nothing_of_the_distribution() {
    check(
        &Machine::bare().root(),
        "install: Nix is installed by closure, else tarball",
    );
    check(
        &Machine::bare().debian().root(),
        "install: Nix is installed by closure, else tarball, else distro",
    );
}

#[test]
fn without_sudo_the_job_has_a_store_of_its_own_or_the_obstacles_are_named() {
    check(
        &Machine::bare().namespaces(),
        "rootless: there is no `/nix`, and user runner cannot make it, so the job gets a `/nix` that it alone sees",
    );
    let refused = Machine {
        sudo: Sudo::Refused("a password is required".into()),
        ..Machine::bare()
    };
    let Plan::Impossible(Impossible { obstacle, remedy }) = plan(&refused, &job()) else {
        panic!("nothing is left");
    };
    assert_eq!(
        obstacle,
        "Nix is not installed on this machine: there is no `/nix`, and user runner cannot make it, and `sudo -n` \
         refuses (a password is required), and user namespaces are forbidden by `user.max_user_namespaces = 0`"
    );
    assert!(
        remedy.contains("install -d -o 1001 -g 100 -m 755 /nix"),
        "{remedy}"
    );
    assert!(
        remedy.contains("sysctl -w user.max_user_namespaces=15000"),
        "{remedy}"
    );
    // Later steps would not see it.
    let Plan::Impossible(Impossible { obstacle, .. }) =
        plan(&Machine::bare().namespaces(), &Wanted::default())
    else {
        panic!("a namespace would not do");
    };
    assert!(obstacle.contains("later steps"), "{obstacle}");
}

#[test]
fn a_packaged_nix_without_a_store_gets_one_and_the_reason_is_the_true_one() {
    let packaged = Machine::bare().nix("/usr/bin/nix");
    check(
        &packaged.clone().sudo(),
        "repair: `sudo` makes `/nix` for this user",
    );
    check(
        &packaged.clone().namespaces(),
        "rootless: there is no `/nix`, and user runner cannot make it, so the job gets a `/nix` that it alone sees",
    );
    // A job is not begun without a store that it can show to its commands.
    check(
        &packaged,
        "impossible: Nix is installed, and has no store: there is no `/nix`, and user runner cannot make it, and user \
         namespaces are forbidden by `user.max_user_namespaces = 0`",
    );
    // Some versions have a store in the home folder, which every step sees.
    let ready = "ready: the Nix of this machine is used as it is";
    check_wanted(&packaged, &Wanted::default(), ready);
    let denied = packaged.opening(Opening::Denied(
        "creating directory '/nix': Permission denied".into(),
    ));
    check(
        &denied,
        "impossible: Nix is installed, and has no store: there is no `/nix`, and user runner cannot make it, and user \
         namespaces are forbidden by `user.max_user_namespaces = 0`",
    );
    // A store that somebody named is none of this.
    let elsewhere = Machine {
        is_elsewhere: true,
        ..denied
    };
    assert!(plan(&elsewhere, &job()).summary().contains("names"));
}

#[test]
fn a_nix_with_a_store_or_a_daemon_is_used_whoever_owns_it() {
    for machine in [
        Machine::bare().nix("/usr/bin/nix").folder(OURS),
        Machine::bare().nix("/usr/bin/nix").folder(OTHERS).socket(),
        Machine::bare().nix("/usr/bin/nix").root(),
        Machine {
            is_elsewhere: true,
            ..Machine::bare().nix("/usr/bin/nix").sudo()
        },
    ] {
        check(&machine, "ready: the Nix of this machine is used as it is");
    }
}

#[test]
fn what_others_have_put_at_nix_is_neither_taken_nor_hidden() {
    let machine = Machine::bare().sudo().namespaces().folder(OTHERS);
    check(
        &machine,
        "rootless: `/nix` belongs to user 0, and user runner cannot write to it, so the job gets a `/nix` that it \
         alone sees",
    );
    let inside = machine.nix("/nix/store/0-nix/bin/nix");
    check(&inside, "ready: the Nix of this machine is used as it is");
    assert!(
        plan(&inside.opening(Opening::Denied("big-lock".into())), &job())
            .summary()
            .contains("belongs to another user")
    );
}

/// Root can start one for the job.
#[test]
fn a_daemon_that_is_named_and_is_not_there_is_known_before_anything_is_fetched() {
    let named = Machine {
        is_daemon_named: true,
        ..Machine::bare().sudo()
    };
    let Plan::Impossible(found) = plan(&named, &job()) else {
        panic!("the Nix that was installed would not be used");
    };
    assert!(
        found.obstacle.contains("`NIX_REMOTE`") && found.remedy.contains("`NIX_REMOTE`"),
        "{found:?}"
    );
    assert!(matches!(plan(&named.root(), &job()), Plan::Install(_)));
}

#[test]
fn a_read_only_folder_is_named_as_that() {
    let machine = Machine::bare().root().folder(Folder::ReadOnly);
    check(
        &machine,
        "impossible: Nix is not installed on this machine: `/nix` is mounted read-only",
    );
    check(
        &Machine::bare()
            .root()
            .folder(Folder::Absent { makeable: false }),
        "impossible: Nix is not installed on this machine: there is no `/nix`, and `/` cannot be written to",
    );
}

fn linked() -> Folder {
    Folder::Link {
        place: "/nix".into(),
        target: "/data/nix".into(),
        leads_to_folder: true,
    }
}

/// Nothing is fetched for a folder that no Nix can be used in, and `sudo` gives away no folder that a link leads to.
#[test]
fn a_folder_of_no_use_is_covered_or_named_with_its_own_remedy() {
    let nix = |machine: &Machine| machine.clone().nix("/nix/var/nix/profiles/default/bin/nix");
    for (folder, obstacle, line) in [
        (
            linked(),
            "`/nix` is a symbolic link to `/data/nix`",
            "mount --bind /data/nix /nix",
        ),
        (
            Folder::NoExec,
            "`/nix` is mounted with `noexec`",
            "mount -o remount,exec /nix",
        ),
        (
            Folder::NoFolder,
            "`/nix` is no folder",
            "Remove the file `/nix`",
        ),
    ] {
        let user = Machine::bare().sudo().folder(folder.clone());
        let covered = plan(&user.clone().namespaces(), &job());
        assert!(matches!(covered, Plan::Rootless(_)), "{covered:?}");
        for machine in [user, Machine::bare().debian().root().folder(folder)] {
            let planned = plan(&machine, &job());
            let Plan::Impossible(found) = planned else {
                panic!("{planned:?}");
            };
            assert!(found.obstacle.contains(obstacle), "{found:?}");
            assert!(!found.obstacle.contains("later steps"), "{found:?}");
            assert!(found.remedy.contains(line), "{found:?}");
        }
    }
    // With a Nix in it, opening the store decides; what is wrong is named then.
    for (folder, line) in [
        (linked(), "mount --bind"),
        (Folder::ReadOnly, "can be written to"),
    ] {
        let machine = nix(&Machine::bare().namespaces().folder(folder));
        check(&machine, "ready: the Nix of this machine is used as it is");
        let closed = plan(&machine.opening(Opening::Closed("big-lock".into())), &job());
        let Plan::Impossible(found) = closed else {
            panic!("{closed:?}");
        };
        assert!(
            found.obstacle.contains("big-lock") && found.remedy.contains(line),
            "{found:?}"
        );
    }
}

#[test]
fn what_opening_the_store_has_shown_is_repaired_by_root_alone() {
    let nix = Machine::bare().nix("/usr/bin/nix").folder(OTHERS);
    let dead = || Opening::DeadDaemon {
        socket: "/s".into(),
        problem: "Connection refused".into(),
    };
    let no_users = || Opening::Local {
        no_build_users: Some("the group `nixbld` does not exist".into()),
    };
    check(
        &nix.clone().opening(dead()),
        "impossible: the Nix daemon does not answer at `/s`: Connection refused",
    );
    let root = nix.root();
    check(
        &root.clone().opening(dead()),
        "repair: the daemon does not answer (Connection refused), so one is started for the job",
    );
    check(
        &root.clone().opening(no_users()),
        "repair: the group `nixbld` does not exist, so builds run as this user",
    );
    check(
        &root.opening(Opening::Closed("database disk image is malformed".into())),
        "impossible: the Nix store does not open: database disk image is malformed",
    );
    for (problem, word) in [
        ("database disk image is malformed", "db.sqlite"),
        ("no such setting", "NIX_CONFIG"),
    ] {
        let remedy = does_not_open(problem).remedy;
        assert!(remedy.contains(word), "{remedy}");
    }
}

#[test]
fn an_input_chooses_among_the_ways() {
    let root = Machine::bare().debian().root();
    let with = |installer, version: Option<&str>| Wanted {
        installer,
        version: version.map(|text| text.parse().expect("a version")),
        ..job()
    };
    let path = "/nix/store/x30lnlgk1s16rynrfslbf8phr6h6rqf2-nix-2.31.2";
    for (installer, version, expected) in [
        (
            Installer::Tarball,
            None,
            "install: Nix is installed by tarball",
        ),
        (
            Installer::Distro,
            None,
            "install: Nix is installed by distro",
        ),
        (
            Installer::Auto,
            Some(path),
            "install: Nix is installed by closure",
        ),
        (
            Installer::Auto,
            Some("2.34.7"),
            "install: Nix is installed by tarball",
        ),
        (
            Installer::Auto,
            Some(CLOSURE_KNOWN),
            "install: Nix is installed by closure, else tarball",
        ),
        (
            Installer::Distro,
            Some("2.34.7"),
            "impossible: Nix is not installed on this machine and cannot be installed: Nix 2.34.7 is not to be had by \
             `nix-installer: distro`",
        ),
        (
            Installer::None,
            None,
            "impossible: Nix is not installed on this machine, and `nix-installer` is `none`",
        ),
    ] {
        check_wanted(&root, &with(installer, version), expected);
    }
    let mirror = Wanted {
        mirror: Some(Mirror::Path("/opt/nix".into())),
        ..job()
    };
    check_wanted(
        &root,
        &mirror,
        "install: Nix is installed by tarball, else closure, else distro",
    );
    let daemon = Wanted {
        daemon: true,
        ..job()
    };
    check_wanted(
        &Machine::bare().root(),
        &daemon,
        "install: Nix is installed by closure, else tarball, with build users and a daemon",
    );
    assert!(
        plan(&Machine::bare().sudo(), &daemon)
            .summary()
            .contains("takes root"),
        "a daemon of an ordinary user serves nobody"
    );
}

#[test]
fn a_version_is_that_of_a_nix_that_is_there_or_not() {
    let path = "/nix/store/x30lnlgk1s16rynrfslbf8phr6h6rqf2-nix-2.31.2";
    let program = format!("{path}/bin/nix");
    for (wanted, version, expected) in [
        ("2.31.2", "2.31.2", true),
        ("2.31", "2.31.2", true),
        ("2.31.2", "2.34.8", false),
        ("2.3", "2.31.2", false),
        ("2.31", "2.31pre2024", false),
        (path, "2.31.2", true),
        (
            "/nix/store/fvchs9i3c9f4d6lcsm7q2ybxwpbnz4yc-nix-2.31.2",
            "2.31.2",
            false,
        ),
    ] {
        let wanted: NixVersion = wanted.parse().expect("a version");
        assert_eq!(
            wanted.is(version, program.as_ref()),
            expected,
            "{wanted} {version}"
        );
    }
}

#[test]
fn a_version_is_a_number_or_a_store_path() {
    for good in [
        "2.31.2",
        "2.34",
        "/nix/store/x30lnlgk1s16rynrfslbf8phr6h6rqf2-nix-2.31.2",
    ] {
        assert_eq!(good.parse::<NixVersion>().expect(good).to_string(), good);
    }
    for bad in [
        "",
        "2",
        "latest",
        "2.31.2.1",
        "2..3",
        "v2.31",
        "/nix/store/x",
        "../2.31",
        "2.31.x",
        "20241.1",
    ] {
        bad.parse::<NixVersion>().expect_err(bad);
    }
}

#[test]
fn the_facts_say_who_else_can_write_to_the_folder() {
    let row = |owner, is_folder_open| {
        let machine = Machine {
            folder: Folder::Empty {
                writable: true,
                owner,
            },
            is_folder_open,
            ..Machine::bare()
        };
        let facts = machine.facts().into_iter();
        let mut texts = facts.filter_map(|(name, text)| (name == "/nix").then_some(text));
        texts.next().expect("a row")
    };
    for owner in [0, 1001] {
        assert_eq!(row(owner, false), "empty, writable");
        assert_eq!(
            row(owner, true),
            "empty, writable, by every user of this machine"
        );
    }
    assert_eq!(row(7, false), "empty, writable, and by user 7, whose it is");
}
