//! What becomes of a job on each machine. What a machine is made of is in `guest/machines.sh`, by the same name.

/// What happens on a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Story {
    /// `nix-job` builds the example and publishes it to the embedded cache.
    Demo,
    /// `validate-builders`.
    Canary,
    /// The workflow of the machine's page in docs/start under act.
    Workflow,
    /// `flake-checks` with a token, while GitHub's API does not answer.
    Checks,
    /// `nix-job` in a Git checkout with a flake.
    Checkout,
    /// `watch-store` in a shell that goes on afterwards.
    Laptop,
    /// The README's second command on a machine without Rust.
    Fresh,
}

impl Story {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Demo => "demo",
            Self::Canary => "canary",
            Self::Workflow => "workflow",
            Self::Checks => "checks",
            Self::Checkout => "checkout",
            Self::Laptop => "laptop",
            Self::Fresh => "fresh",
        }
    }
}

/// How a story ends. The phrases are in the log.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End {
    /// Three paths are built and in the cache, none is lost.
    NothingLost(&'static [&'static str]),
    /// Exit code 69 within five seconds, with the obstacle and the remedy.
    Obstacle(&'static [&'static str]),
    /// Exit code 0.
    Passes(&'static [&'static str]),
    /// This exit code within five seconds.
    Refuses(&'static str, &'static [&'static str]),
}

pub(crate) struct Machine {
    pub(crate) name: &'static str,
    pub(crate) story: Story,
    pub(crate) end: End,
}

const fn demo(name: &'static str, end: End) -> Machine {
    told(name, Story::Demo, end)
}

const fn told(name: &'static str, story: Story, end: End) -> Machine {
    Machine { name, story, end }
}

use End::{NothingLost, Obstacle, Passes, Refuses};

const NO_NAMESPACES: &str = "user.max_user_namespaces";

pub(crate) const MACHINES: &[Machine] = &[
    demo("debian-12-sudo", NothingLost(&["`sudo` makes `/nix`"])),
    demo("debian-13-sudo", NothingLost(&["`sudo` makes `/nix`"])),
    demo("debian-sid-sudo", NothingLost(&["`sudo` makes `/nix`"])),
    demo(
        "sudo-without-namespaces",
        NothingLost(&["`sudo` makes `/nix`"]),
    ),
    demo(
        "debian-12-root",
        NothingLost(&[
            "Nix is installed by closure",
            "this machine has no certificates",
        ]),
    ),
    demo(
        "debian-13-root",
        NothingLost(&["Nix is installed by closure"]),
    ),
    demo(
        "busybox-root",
        NothingLost(&[
            "Nix is installed by closure",
            "because there is no bash on `PATH`",
        ]),
    ),
    demo(
        "root-read-only-nix",
        Obstacle(&[
            "`/nix` is mounted read-only",
            "so that it can be written to",
        ]),
    ),
    demo("own-nix", NothingLost(&["Nix is installed by closure"])),
    demo(
        "busybox-own-nix",
        NothingLost(&["Nix is installed by closure"]),
    ),
    demo(
        "everyones-nix",
        NothingLost(&["Nix is installed by closure"]),
    ),
    demo("roots-nix", NothingLost(&["rootless"])),
    demo(
        "roots-nix-without-namespaces",
        Obstacle(&["`/nix` is empty", NO_NAMESPACES, "install -d"]),
    ),
    demo("read-only-nix", NothingLost(&["rootless"])),
    demo(
        "read-only-nix-without-namespaces",
        Obstacle(&["`/nix` is mounted read-only", NO_NAMESPACES]),
    ),
    demo(
        "noexec-nix",
        Obstacle(&["`/nix` is mounted with `noexec`", "remount,exec"]),
    ),
    demo(
        "linked-nix-root",
        Obstacle(&["`/nix` is a symbolic link to `/other`", "mount --bind"]),
    ),
    demo("dangling-nix-sudo", NothingLost(&["rootless"])),
    demo("no-nix", NothingLost(&["rootless"])),
    demo("busybox-no-nix", NothingLost(&["rootless"])),
    demo(
        "no-nix-home-unset",
        NothingLost(&["rootless", "it is `/home/alice` for this job"]),
    ),
    demo(
        "no-nix-home-unset-stranger",
        NothingLost(&["rootless", "`/etc/passwd` names no home of this user"]),
    ),
    demo(
        "no-nix-home-read-only",
        NothingLost(&["rootless", "`/home/alice` cannot be written to"]),
    ),
    demo(
        "no-nix-without-namespaces",
        Obstacle(&["there is no `/nix`", NO_NAMESPACES, "install -d -o 1000"]),
    ),
    demo(
        "no-nix-in-chroot",
        Obstacle(&["there is no `/nix`", "chroot"]),
    ),
    demo(
        "nix-in-read-only-nix",
        Obstacle(&[
            "`/nix` is mounted read-only",
            "so that it can be written to",
        ]),
    ),
    demo("nix-bin-2.8", NothingLost(&["rootless"])),
    demo("nix-bin-2.26", NothingLost(&["rootless"])),
    demo("nix-bin-2.34", NothingLost(&["rootless"])),
    demo("nix-bin-sudo", NothingLost(&["`sudo` makes `/nix`"])),
    demo(
        "nix-bin-without-namespaces",
        Obstacle(&["there is no `/nix`", NO_NAMESPACES]),
    ),
    demo(
        "daemon-2.8",
        NothingLost(&["cannot evaluate nixpkgs of today"]),
    ),
    demo("daemon-2.26", NothingLost(&[])),
    demo("daemon-2.34", NothingLost(&[])),
    demo("daemon-by-socket", NothingLost(&[])),
    demo(
        "daemon-stale",
        Obstacle(&["does not answer", "systemctl restart nix-daemon"]),
    ),
    demo("daemon-stale-root", NothingLost(&[])),
    demo("no-nix-command", NothingLost(&[])),
    demo(
        "no-nixbld",
        NothingLost(&["plan: repair: the group `nixbld` does not exist"]),
    ),
    demo(
        "home-unset",
        NothingLost(&["it is `/home/alice` for this job, as in `/etc/passwd`"]),
    ),
    demo(
        "home-unset-stranger",
        NothingLost(&["`/etc/passwd` names no home of this user"]),
    ),
    demo(
        "home-read-only",
        NothingLost(&["`/home/alice` cannot be written to"]),
    ),
    // Its Nix works, so that its plan is no obstacle.
    demo(
        "tmp-full",
        Refuses(
            "69",
            &[
                "No space left on device",
                "There is no room on `/area/temp (tmpfs)`",
            ],
        ),
    ),
    // Without a payload there is no proof that this job may publish.
    demo(
        "fifo-event",
        Passes(&["0 lost (not publishing: the event payload is unreadable"]),
    ),
    told(
        "hosted-runner",
        Story::Workflow,
        Passes(&[
            "`sudo` makes `/nix`",
            "1 built, 2 published, 2 verified, 0 lost",
            "Job succeeded",
        ]),
    ),
    told(
        "pod",
        Story::Workflow,
        Passes(&[
            "Nix is installed by closure",
            "1 built, 2 published, 2 verified, 0 lost",
            "Job succeeded",
        ]),
    ),
    told(
        "own-host",
        Story::Workflow,
        Passes(&[
            "Nix is installed by closure",
            "1 built, 2 published, 2 verified, 0 lost",
            "Job succeeded",
            "took back Nix from",
            "no store is left",
        ]),
    ),
    told(
        "no-nix-command",
        Story::Canary,
        Passes(&["`nix-command` is off in the host's settings: `nix-job` repairs this"]),
    ),
    told(
        "no-nixbld",
        Story::Canary,
        Passes(&["the group `nixbld` does not exist: `nix-job` repairs this"]),
    ),
    told(
        "debian-12-sudo",
        Story::Canary,
        Passes(&["there is no Nix yet: `nix-job` repairs this"]),
    ),
    told("fifo-event", Story::Canary, Passes(&[])),
    told(
        "no-git",
        Story::Checkout,
        Refuses("1", &["there is no `git` on `PATH`", "apt-get install git"]),
    ),
    told("daemon-2.26", Story::Checks, Passes(&["3 built", "0 lost"])),
    told("no-nix-command", Story::Laptop, Passes(&["0 lost"])),
    told(
        "debian-12-root",
        Story::Fresh,
        Refuses("1", &["install Rust with clippy and rustfmt by rustup"]),
    ),
];
