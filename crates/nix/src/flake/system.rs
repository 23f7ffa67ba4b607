//! The names of systems, such as `x86_64-linux`. Only known processors and kernels count: an output that is mistaken for a
//! system that nobody asks for would not be built.

/// Processors, by the names that nixpkgs uses (`lib.systems`).
const CPUS: [&str; 52] = [
    "aarch64",
    "aarch64_be",
    "alpha",
    "arc",
    "arm",
    "armv5tel",
    "armv6l",
    "armv6m",
    "armv7a",
    "armv7l",
    "armv7m",
    "armv7r",
    "armv8a",
    "armv8m",
    "armv8r",
    "avr",
    "hppa",
    "i386",
    "i486",
    "i586",
    "i686",
    "ia64",
    "javascript",
    "loongarch64",
    "m68k",
    "m88k",
    "microblaze",
    "microblazeel",
    "mips",
    "mips64",
    "mips64el",
    "mipsel",
    "mmix",
    "msp430",
    "nios2",
    "or1k",
    "powerpc",
    "powerpc64",
    "powerpc64le",
    "powerpcle",
    "riscv32",
    "riscv64",
    "rx",
    "s390",
    "s390x",
    "sh4",
    "sparc",
    "sparc64",
    "vc4",
    "wasm32",
    "wasm64",
    "x86_64",
];
/// Kernels, by the same names. Those of the BSDs may end in a version.
const KERNELS: [&str; 17] = [
    "cygwin", "darwin", "freebsd", "genode", "ghcjs", "ios", "linux", "macos", "mmixware",
    "netbsd", "none", "openbsd", "redox", "solaris", "uefi", "wasi", "windows",
];

/// Whether a name within an attribute path is a system's.
pub fn is_system(name: &str) -> bool {
    name.split_once('-').is_some_and(|(cpu, kernel)| {
        let kernel = kernel.trim_end_matches(|digit: char| digit.is_ascii_digit());
        CPUS.contains(&cpu) && KERNELS.contains(&kernel)
    })
}

/// The pattern of a system's name for `builtins.match`, an extended regular expression of POSIX.
pub(super) fn pattern() -> String {
    format!("({})-({})[0-9]*", CPUS.join("|"), KERNELS.join("|"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_processors_and_kernels_make_a_system() {
        let systems = [
            "x86_64-linux",
            "aarch64-darwin",
            "riscv64-linux",
            "javascript-ghcjs",
            "x86_64-freebsd13",
            "wasm32-wasi",
            "mmix-mmixware",
            "x86_64-genode",
        ];
        for name in systems {
            assert!(is_system(name), "{name}");
        }
        for name in [
            "app-linux",
            "x86_64",
            "-linux",
            "x86_64-",
            "x86_64-linux-gnu",
            "app-x86_64-linux",
            "x86_64-tests",
            "X86_64-linux",
            "linux-x86_64",
            "",
        ] {
            assert!(!is_system(name), "{name}");
        }
    }
}
