#!/usr/bin/env bash
# Proves that the sources of this checkout build the binary in `dist/`: builds them again in another folder, with
# another CARGO_HOME, and compares the two byte for byte.
#
# The bytes depend on the toolchain too. Where it is not the recorded one, this script prints the difference, and
# proves only that the sources build and that both binaries have the same version.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
name=flywheel-x86_64-linux
committed=$root/dist/$name
# Every job downloads the binary. The limit is in millions of bytes, as Docker and GitHub count.
size_limit=12000000

fail() {
  printf 'dist-check: %s\n' "$*" >&2
  exit 1
}

for file in "$committed" "$root/dist/SHA256SUMS" "$root/dist/BUILT-WITH"; do
  [ -f "$file" ] || fail "\`${file#"$root"/}\` is missing; \`just dist\` makes it"
done
(cd "$root/dist" && sha256sum --check --strict --quiet SHA256SUMS) || fail "\`dist/SHA256SUMS\` is not the binary's sum"
size=$(stat -c %s "$committed")
[ "$size" -lt "$size_limit" ] || fail "the binary has $size bytes, and $size_limit is the limit"
# Captured first: a reader that stops early would end `readelf` by SIGPIPE, which `pipefail` counts as a failure.
headers=$(readelf --program-headers --wide "$committed")
case $headers in *INTERP*) fail "the binary asks for a dynamic loader" ;; esac

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

rebuilt=$(CARGO_HOME="$work/cargo home" FLYWHEEL_DIST_TARGET="$work/sources/target/dist" "$work/sources/scripts/build-static.sh")

if cmp --silent "$rebuilt" "$committed"; then
  echo "dist-check: rebuilt byte for byte: $(sha256sum <"$committed" | cut -d' ' -f1), $size bytes"
elif toolchain=$("$root/scripts/toolchain.sh") && [ "$toolchain" = "$(cat "$root/dist/BUILT-WITH")" ]; then
  sha256sum "$committed" "$rebuilt" >&2
  fail "the sources build another binary with the recorded toolchain; \`just dist\` makes \`dist/\` anew"
else
  [ "$("$rebuilt" --version)" = "$("$committed" --version)" ] ||
    fail "the sources build $("$rebuilt" --version), and \`dist/\` holds $("$committed" --version)"
  printf 'dist-check: NOT compared byte for byte, because the toolchain is not the recorded one:\n'
  diff --label recorded --label here -U0 "$root/dist/BUILT-WITH" - <<<"$toolchain" | tail -n +3 || [ $? -eq 1 ]
  printf 'dist-check: the sources build here, and give the same version: %s\n' "$("$rebuilt" --version)"
fi
