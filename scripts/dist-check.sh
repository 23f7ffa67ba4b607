#!/usr/bin/env bash
# Proves that the sources of this checkout build the binaries in `dist/`: builds them again in another folder, with
# another CARGO_HOME, and compares them byte for byte.
#
#   usage: scripts/dist-check.sh
#   env:   FLYWHEEL_PROVE_ARM64=1   builds the one for arm64 again too, which takes minutes more; otherwise the sum of
#                                   the sources that it was built from has to be that of this checkout
#
# The bytes depend on the toolchain too. Where it is not the recorded one, this script prints the difference, and
# proves only that the sources build and that both binaries have the same version. The first line that it prints at
# its end says which binaries are proved, and which are not.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# Every job downloads the checkout. The limit is 14 MiB for each.
size_limit=14680064

fail() {
  printf 'dist-check: %s\n' "$*" >&2
  exit 1
}

# Prints what is recorded of a binary, without its heading.
record() {
  sed -n "/^# flywheel-$1-linux\$/,/^# /{/^#/!p}" "$root/dist/BUILT-WITH"
}

for file in SHA256SUMS BUILT-WITH; do
  [ -f "$root/dist/$file" ] || fail "\`dist/$file\` is missing; \`just dist\` makes it"
done
# What a release alone has is not here. Both binaries that have to be are looked at below.
(cd "$root/dist" && sha256sum --check --strict --quiet --ignore-missing SHA256SUMS) || fail "\`dist/SHA256SUMS\` does not have the sums"
for processor in x86_64 aarch64; do
  name=flywheel-$processor-linux
  grep -q "  $name\$" "$root/dist/SHA256SUMS" || fail "\`dist/SHA256SUMS\` has no sum of $name; \`just dist\` makes it"
  size=$(stat -c %s "$root/dist/$name")
  [ "$size" -lt "$size_limit" ] || fail "$name has $size bytes, and $size_limit is the limit"
  # Captured first: a reader that stops early would end `readelf` by SIGPIPE, which `pipefail` counts as a failure.
  headers=$(readelf --program-headers --wide "$root/dist/$name")
  case $headers in *INTERP*) fail "$name asks for a dynamic loader" ;; esac
done

work=$(mktemp -d "${TMPDIR:-/tmp}/flywheel dist check.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM

# A clean copy: every file that Git does not ignore, or all but the build folder where there is no Git.
mkdir "$work/sources"
if git -C "$root" rev-parse --git-dir >/dev/null 2>&1; then
  (cd "$root" && git ls-files --cached --others --exclude-standard -z |
    tar --create --null --ignore-failed-read --files-from=- --file=-) | tar --extract --directory "$work/sources"
else
  tar --create --directory "$root" --exclude=./target --file=- . | tar --extract --directory "$work/sources"
fi

# The same downloads in a folder of another name, so that the comparison fails if the name is in the binary.
cargo_home=${CARGO_HOME:-$HOME/.cargo}
(cd "$root" && cargo fetch --quiet --locked)
mkdir "$work/cargo home"
for part in registry git config.toml; do
  if [ -e "$cargo_home/$part" ]; then ln -s "$cargo_home/$part" "$work/cargo home/$part"; fi
done

# Prints the version of a binary for a processor.
version_in() {
  case $1 in
    "$(uname -m)") "$2" --version ;;
    *) "$root/target/tools/bin/qemu-$1-static" "$2" --version ;;
  esac
}

proved=() unproved=() details=()

# Builds a binary again with the command that comes after its processor, and compares it with the committed one.
prove() {
  local processor=$1 committed=$root/dist/flywheel-$1-linux rebuilt toolchain version difference
  shift
  rebuilt=$(CARGO_HOME="$work/cargo home" FLYWHEEL_DIST_TARGET="$work/sources/target/dist" "$@")
  sources=$(cat "$rebuilt.sources")
  toolchain=$("$root/scripts/toolchain.sh" "$processor")
  if cmp --silent "$rebuilt" "$committed"; then
    proved+=("$processor")
    details+=("$processor: rebuilt byte for byte: $(sha256sum <"$committed" | cut -d' ' -f1), $(stat -c %s "$committed") bytes")
  elif [ "$toolchain" = "$(record "$processor" | tail -n +2)" ]; then
    sha256sum "$committed" "$rebuilt" >&2
    fail "the sources build another binary for $processor with the recorded toolchain; \`just dist\` makes \`dist/\` anew"
  else
    version=$(version_in "$processor" "$rebuilt")
    [ "$version" = "$(version_in "$processor" "$committed")" ] ||
      fail "the sources build $version for $processor, and \`dist/\` holds $(version_in "$processor" "$committed")"
    # It ends with 1 where there is a difference.
    difference=$(diff --label recorded --label here -U0 <(record "$processor" | tail -n +2) - <<<"$toolchain" | tail -n +3) ||
      [ $? -eq 1 ]
    unproved+=("$processor")
    details+=("$processor: NOT compared byte for byte, because the toolchain is not the recorded one:"
      "$difference"
      "$processor: the sources build here, and give the same version: $version")
  fi
}

prove x86_64 "$work/sources/scripts/build-static.sh"
if [ -n "${FLYWHEEL_PROVE_ARM64-}" ]; then
  # The compilers are unpacked once, for this checkout.
  "$root/scripts/arm64-toolchain.sh"
  mkdir -p "$work/sources/target/tools"
  ln -s "$root/target/tools/arm64" "$work/sources/target/tools/arm64"
  prove aarch64 "$work/sources/scripts/arm64-toolchain.sh" scripts/build-static.sh aarch64
fi
for processor in x86_64 aarch64; do
  [ "$(record "$processor" | head -n 1)" = "sources $sources" ] ||
    fail "the binary for $processor was built from other sources; \`just dist\` makes \`dist/\` anew"
done
[ -n "${FLYWHEEL_PROVE_ARM64-}" ] ||
  details+=("aarch64: not built again here; it is recorded as built from these sources ($sources)")

# The verdict comes first, because tables show one line.
if [ ${#unproved[@]} -gt 0 ]; then verdict="NOT PROVED: ${unproved[*]}"; else verdict="proved: ${proved[*]}"; fi
[ -n "${FLYWHEEL_PROVE_ARM64-}" ] || verdict+='; aarch64 by the sum of its sources'
printf 'dist-check: %s\n' "$verdict" "${details[@]}"
