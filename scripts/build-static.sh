#!/usr/bin/env bash
# Builds the static release binary and prints its path. The one place that knows the flags.
#
#   usage: scripts/build-static.sh [x86_64|aarch64]   (default: x86_64)
#   env:   FLYWHEEL_DIST_TARGET   the folder to build in (default: target/dist of this checkout)
#
# The same sources and the same toolchain give the same bytes, wherever the checkout and CARGO_HOME are. A host that is
# not of the processor needs cross compilers: scripts/arm64-toolchain.sh has those that build what `dist/` holds.
#
# Beside the binary it leaves `flywheel.sources`: the sum of all that went in, which is the same for both processors.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
processor=${1:-x86_64}
target=$processor-unknown-linux-gnu
out=${FLYWHEEL_DIST_TARGET:-$root/target/dist}
mkdir -p "$out"
out=$(cd "$out" && pwd -P)
cargo_home=${CARGO_HOME:-$HOME/.cargo}
sysroot=$(rustc --print sysroot)
commit=$(rustc -vV | sed -n 's/^commit-hash: //p')

# Variables that the caller set for other builds would change the bytes of this one.
while IFS= read -r name; do
  case $name in
    RUSTFLAGS | CARGO_ENCODED_RUSTFLAGS | RUSTC_WRAPPER | RUSTC_WORKSPACE_WRAPPER | RUSTC_BOOTSTRAP | SOURCE_DATE_EPOCH | \
      CC | CC_* | AR | AR_* | CFLAGS | CFLAGS_* | CPPFLAGS | TARGET_C* | HOST_C* | LDFLAGS | \
      CARGO_PROFILE_* | CARGO_BUILD_* | CARGO_TARGET_*) unset "$name" ;;
  esac
done < <(compgen -e)

# No dynamic loader at run time; no call of a libc function that needs one (`getaddrinfo` is never
# linked in, `getrandom` asks the kernel); no path of this machine; no identity besides the content.
flags=(
  -C target-feature=+crt-static
  -C relocation-model=static
  --cfg 'getrandom_backend="linux_getrandom"'
  -C 'link-arg=-Wl,--build-id=none'
  "--remap-path-prefix=$root=/src"
  "--remap-path-prefix=$out=/target"
  "--remap-path-prefix=$cargo_home=/cargo"
  "--remap-path-prefix=$sysroot/lib/rustlib/src/rust=/rustc/$commit"
)
CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f' && printf '%s' "${flags[*]}")
export CARGO_ENCODED_RUSTFLAGS

# The C parts (SQLite, zstd, lzma, ring) have the names of their source files in the binary too.
export CC_SHELL_ESCAPED_FLAGS=1
export CFLAGS="'-ffile-prefix-map=$root=/src' '-ffile-prefix-map=$out=/target' '-ffile-prefix-map=$cargo_home=/cargo'"

# Debian's compilers have the processor in their names, those of the host too.
if [ "$processor" != "$(uname -m)" ]; then
  variable=${target//-/_}
  export "CARGO_TARGET_${variable^^}_LINKER=$processor-linux-gnu-gcc"
  export "CC_$variable=$processor-linux-gnu-gcc" "AR_$variable=$processor-linux-gnu-ar"
fi

cd "$root"
CARGO_TARGET_DIR=$out cargo build --quiet --release --locked --bin flywheel --target "$target" 1>&2
binary=$out/$target/release/flywheel

# Cargo lists what the compiler read, with a backslash before a space within a name.
mapfile -t read < <(sed 's/^.*flywheel: //; s/\\ /\x01/g' "$binary.d" | tr ' \001' '\n ')
mapfile -t sources < <(
  for file in "${read[@]}"; do
    case $file in "$root"/*) printf '%s\n' "${file#"$root"/}" ;; esac
  done
  printf '%s\n' Cargo.toml Cargo.lock .cargo/config.toml crates/*/Cargo.toml scripts/build-static.sh
)
mapfile -t sources < <(printf '%s\n' "${sources[@]}" | LC_ALL=C sort)
# A list of the manifests alone would fit whatever the sources are.
case "${sources[*]}" in *src/main.rs*) ;; *) echo "build-static: cargo does not list the sources in $binary.d" >&2 && exit 1 ;; esac
sha256sum -- "${sources[@]}" | sha256sum | cut -d' ' -f1 >"$binary.sources"

printf '%s\n' "$binary"
