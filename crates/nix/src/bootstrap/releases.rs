//! The releases of Nix that Flywheel knows by name: their store paths in a binary cache, and the sums of their archives.
//! Each value has its source; the inputs `nix-version`, `nix-source` and `nix-mirror` name others.

use super::plan::BinaryCache;
use crate::key::NIXOS_CACHE_KEY;
use crate::store_path::StorePath;

/// The system that this program runs on, in Nix's words.
pub const SYSTEM: &str = if cfg!(target_arch = "aarch64") {
    "aarch64-linux"
} else {
    "x86_64-linux"
};

/// The release whose store path is asked for, unless the input names another.
pub const CLOSURE_VERSION: &str = "2.31.2";
/// The release whose archive is taken, unless the input names another.
pub const ARCHIVE_VERSION: &str = "2.34.7";

/// The cache that upstream serves released store paths from.
const CACHE: &str = "https://cache.nixos.org";
/// Where upstream has its release archives, in folders `nix-VERSION`.
pub const ARCHIVES: &str = "https://releases.nixos.org/nix/";

/// Store paths: version, system, base name.
///
/// From nixpkgs, `nixos/modules/installer/tools/nix-fallback-paths.nix` of commit 0148e16d. A NixOS machine substitutes
/// Nix itself from these, so upstream's cache keeps them.
const CLOSURES: [(&str, &str, &str); 2] = [
    (
        "2.31.2",
        "x86_64-linux",
        "x30lnlgk1s16rynrfslbf8phr6h6rqf2-nix-2.31.2",
    ),
    (
        "2.31.2",
        "aarch64-linux",
        "xnybj9lk0kwvmr2va253avanq7m3cpyg-nix-2.31.2",
    ),
];

/// SHA-256 of `nix-VERSION-SYSTEM.tar.xz`: version, system, sum.
///
/// From the script `install` that upstream publishes with each release (`https://releases.nixos.org/nix/nix-VERSION/install`).
const ARCHIVE_SUMS: [(&str, &str, &str); 4] = [
    (
        "2.34.7",
        "x86_64-linux",
        "eafe5042404e818505e28c5ca3d0885f3ec45c31f955489a25bb38258f87560e",
    ),
    (
        "2.34.7",
        "aarch64-linux",
        "f1cee64ae7a02330c6421924c28f597c41813f2214ff108622087d8056378b08",
    ),
    (
        "2.34.0",
        "x86_64-linux",
        "5676b0887f1274e62edd175b6611af49aa8170c69c16877aa9bc6cebceb19855",
    ),
    (
        "2.34.0",
        "aarch64-linux",
        "cfddd4008b57a71464a16d5232cba79b1c76ae9dc81bbf71b4972b0118bc29c5",
    ),
];

/// Upstream's cache.
pub fn upstream() -> BinaryCache {
    BinaryCache {
        address: CACHE.parse().expect("the constant is a URL"),
        keys: vec![NIXOS_CACHE_KEY.parse().expect("the constant is a key")],
    }
}

/// The store path of a release for this system.
pub fn closure(version: &str) -> Option<StorePath> {
    let name = look_up(&CLOSURES, version)?;
    Some(StorePath::from_base_name(name).expect("the table has store paths"))
}

/// The sum of a release's archive for this system, in hexadecimal.
pub fn archive_sum(version: &str) -> Option<&'static str> {
    look_up(&ARCHIVE_SUMS, version)
}

/// The versions whose archive's sum is known for this system, for messages.
pub fn archives_known() -> String {
    let known = ARCHIVE_SUMS.iter().filter(|row| row.1 == SYSTEM);
    known.map(|row| row.0).collect::<Vec<_>>().join(" and ")
}

fn look_up(table: &[(&str, &str, &'static str)], version: &str) -> Option<&'static str> {
    let row = table.iter().find(|row| (row.0, row.1) == (version, SYSTEM));
    row.map(|row| row.2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_hold_what_they_are_read_as() {
        for (version, system, name) in CLOSURES {
            let path = StorePath::from_base_name(name).expect("a store path");
            assert_eq!(path.name(), format!("nix-{version}"), "{system}");
        }
        for (_, _, sum) in ARCHIVE_SUMS {
            assert!(
                sum.len() == 64 && sum.bytes().all(|byte| byte.is_ascii_hexdigit()),
                "{sum}"
            );
        }
        assert!(closure(CLOSURE_VERSION).is_some() && archive_sum(ARCHIVE_VERSION).is_some());
        assert!(closure("9.9").is_none());
        assert_eq!(archives_known(), "2.34.7 and 2.34.0");
        assert_eq!(upstream().keys.len(), 1);
    }
}
