//! From numbers to warnings and outcomes.

use super::*;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn room(total: u64, free: u64) -> Room {
    Room {
        total,
        free,
        inodes: None,
    }
}

fn inodes(total: u64, free: u64) -> Room {
    Room {
        inodes: Some(Inodes { total, free }),
        ..room(100 * GIB, 50 * GIB)
    }
}

fn disk(lowest: Room) -> DiskUse {
    DiskUse {
        name: "/nix (tmpfs)".into(),
        holds: vec!["the store /nix/store".into()],
        has_store: true,
        lowest,
        last: lowest,
        full_before_end: lowest.is_full().then_some(Duration::ZERO),
        refuses: false,
    }
}

#[test]
fn low_and_full_are_absolute_on_large_disks_and_relative_on_small_ones() {
    for (room, low, full) in [
        (room(1000 * GIB, 2 * GIB), false, false),
        (room(1000 * GIB, GIB - 1), true, false),
        (room(1000 * GIB, 30 * MIB), true, true),
        (room(64 * MIB, 7 * MIB), false, false),
        (room(64 * MIB, 6 * MIB), true, false),
        (room(64 * MIB, MIB / 4), true, true),
        (room(8192, 8192), false, false),
        (room(1 << 20, 150_000), true, true),
        (inodes(6_000_000, 60_000), false, false),
        (inodes(6_000_000, 49_999), true, false),
        (inodes(1000, 1), true, true),
        (inodes(1000, 51), false, false),
        // A network drive of which nothing is known.
        (room(0, 0), false, false),
        (inodes(0, 0), false, false),
    ] {
        assert_eq!((room.is_low(), room.is_full()), (low, full), "{room:?}");
    }
}

#[test]
fn the_next_look_comes_before_a_disk_can_be_full() {
    assert_eq!(room(1000 * GIB, 500 * GIB).next_look(), POLL_MOST);
    let near = room(1000 * GIB, GIB).next_look();
    assert!(near <= Duration::from_millis(250), "{near:?}");
    assert_eq!(room(64 * MIB, 0).next_look(), POLL_LEAST);
    assert_eq!(inodes(1000, 100).next_look(), POLL_LEAST);
}

#[test]
fn only_a_failed_command_whose_disk_was_full_failed_of_it() {
    let full = disk(room(64 * MIB, 0));
    let well = disk(room(64 * MIB, 32 * MIB));
    let low = disk(room(64 * MIB, 5 * MIB));
    let found = |disk: &DiskUse, failed, reported| {
        disk_full(std::slice::from_ref(disk), failed, reported).is_some()
    };
    assert!(found(&full, true, false));
    assert!(!found(&full, false, false), "it succeeded in spite of it");
    assert!(!found(&well, true, true), "words without evidence");
    assert!(!found(&low, true, false));
    assert!(found(&low, true, true), "words with evidence");
    let long_ago = DiskUse {
        full_before_end: Some(Duration::from_secs(3600)),
        last: well.last,
        ..full.clone()
    };
    assert!(!found(&long_ago, true, false));
    let quota = DiskUse {
        refuses: true,
        ..well
    };
    assert!(found(&quota, true, false));
}

#[test]
fn the_text_names_disk_room_largest_path_and_remedy() {
    let own = OwnPaths {
        number: 2,
        size: 50 * MIB,
        largest: vec![("/nix/store/x-big".into(), 48 * MIB)],
    };
    let full = disk(room(64 * MIB, 0));
    let temp = DiskUse {
        name: "/tmp (ext4)".into(),
        has_store: false,
        ..full.clone()
    };
    let found = disk_full(&[temp.clone(), full], true, false).expect("full");
    let text = found.text(&own, false);
    for part in [
        "`/nix (tmpfs)`",
        "the store /nix/store",
        "was full when the command failed",
        "0 B of 64.0 MiB",
        "/nix/store/x-big (48.0 MiB)",
        "`reclaim: true`",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let text = disk_full(&[temp], true, false)
        .expect("full")
        .text(&own, false);
    assert!(
        !text.contains("reclaim") && !text.contains("x-big"),
        "{text}"
    );
    let ended = disk(inodes(1000, 0));
    let text = disk_full(&[ended], true, false)
        .expect("full")
        .text(&own, true);
    assert!(
        text.contains("ran out of inodes") && text.contains("0 of 1000 inodes"),
        "{text}"
    );
    assert!(!text.contains("Set `reclaim"), "{text}");
}

#[test]
fn the_least_of_two_looks_keeps_each_number() {
    let one = Room {
        inodes: Some(Inodes { total: 10, free: 9 }),
        ..room(100, 5)
    };
    let two = Room {
        inodes: Some(Inodes { total: 10, free: 3 }),
        ..room(100, 50)
    };
    let least = one.least(two);
    assert_eq!((least.free, least.inodes.map(|it| it.free)), (5, Some(3)));
}

#[test]
fn a_log_that_says_so_is_recognized() {
    assert!(reports_full(
        "tar: x: Cannot write: No space left on device"
    ));
    assert!(reports_full(
        "error: executing SQLite statement: database or disk is full"
    ));
    assert!(!reports_full("error: builder failed with exit code 1"));
}
