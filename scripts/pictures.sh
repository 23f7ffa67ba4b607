#!/usr/bin/env bash
# Makes the pictures of the golden summaries, in light and dark, as GitHub shows them: its own Markdown, what it lets
# through, a copy of its style sheet, Mermaid, and Chromium.
#
#   usage: scripts/pictures.sh           tests/fixtures/summaries/*.md → docs/pictures/*.png and SHA256SUMS
#          scripts/pictures.sh --check   makes them anew and compares; docs/pictures stays as it is
#   env:   FLYWHEEL_DEBIAN    the Debian mirror (default: the machine's own)
#
# As root, because Chromium and its fonts are unpacked into target/tools, and run there. CI does not run this: the fast
# suite compares the sums.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
exec </dev/null
umask 022
tools=$root/target/tools
python=$tools/pictures/bin/python
chromium=$tools/chromium
golden=tests/fixtures/summaries
kept=docs/pictures
# Package, version and the sum of what the registry serves.
packages=(
  github-markdown-css 5.9.0 291a28816709426a8a348c8db497c6f2c625ec5e596d3406770dcfff975233b4
  mermaid 12.3.0 be0684e8d20bfc874df12c0f04927a5c482f57f2200eec54cca52a4583fd4040
)

fail() {
  printf 'pictures: %s\n' "$*" >&2
  exit 69
}

case ${1-} in
'' | --check) ;;
*)
  echo "pictures: the only option is \`--check\`, not \`$1\`" >&2
  exit 64
  ;;
esac
[ "$(id -u)" = 0 ] || fail "run this as root: Chromium runs in a root of its own"
for tool in npm python3 unshare chroot sha256sum timeout; do
  command -v "$tool" >/dev/null || fail "\`$tool\` is missing; on Debian: apt-get install npm python3-venv util-linux"
done

if ! cmp --silent scripts/pictures.txt "$tools/pictures/installed.txt"; then
  echo "pictures: installing the Markdown renderer into target/tools"
  rm -rf "$tools/pictures"
  python3 -m venv "$tools/pictures"
  "$python" -m pip install --quiet --no-input --no-deps --only-binary :all: --require-hashes -r scripts/pictures.txt
  cp scripts/pictures.txt "$tools/pictures/installed.txt"
fi

set -- "${1-}" "${packages[@]}"
option=$1
shift
while [ $# -gt 0 ]; do
  name=$1 version=$2 sum=$3
  shift 3
  [ ! -d "$tools/$name-$version" ] || continue
  echo "pictures: unpacking $name $version into target/tools"
  mkdir -p "$tools/$name.new"
  (cd "$tools/$name.new" && npm pack --silent "$name@$version" >/dev/null)
  echo "$sum  $tools/$name.new/$name-$version.tgz" | sha256sum --check --status ||
    fail "the registry's $name $version has another sum than $sum"
  tar --extract --gzip --strip-components 1 --file "$tools/$name.new/$name-$version.tgz" --directory "$tools/$name.new"
  mv "$tools/$name.new" "$tools/$name-$version"
done

# shellcheck source=/dev/null
. "$root/scripts/debian-packages.sh"
if [ ! -x "$chromium/usr/lib/chromium/chromium" ]; then
  echo "pictures: unpacking Chromium into target/tools"
  # shellcheck disable=SC2154 # The functions come with their folder and their mirror.
  state=$scratch/bookworm from=$mirror
  fetch_lists bookworm "$state" "$from" security || fail "$from: $(tail -n 1 "$state/errors")"
  download_packages "$state" chromium fonts-noto-core fonts-noto-color-emoji fonts-liberation ||
    fail "$from: $(tail -n 1 "$state/errors")"
  unpack_packages "$state" "$chromium"
  # No package makes these links: they are the installer's.
  for folder in bin sbin lib lib64; do [ -e "$chromium/$folder" ] || ln -s "usr/$folder" "$chromium/$folder"; done
fi

"$python" scripts/pictures.py pages "$scratch"

# Chromium in its root, without a network; each page has half a minute.
export chromium scratch
# shellcheck disable=SC2016 # The inner shell expands them.
unshare --mount --net --pid --fork --kill-child bash -euc '
  mkdir -p "$chromium"/{proc,dev,tmp,pages}
  mount -t proc none "$chromium/proc"
  mount --rbind /dev "$chromium/dev"
  mount -t tmpfs none "$chromium/tmp"
  mount --bind "$scratch" "$chromium/pages"
  for page in "$scratch"/*.html; do
    name=$(basename "$page" .html)
    timeout 30 env -i HOME=/tmp PATH=/usr/sbin:/usr/bin chroot "$chromium" /usr/lib/chromium/chromium --headless --no-sandbox \
      --disable-gpu --hide-scrollbars --force-device-scale-factor=2 --window-size=860,2400 --virtual-time-budget=5000 \
      --screenshot="/pages/$name.png" "file:///pages/$name.html" >"$scratch/log" 2>&1 ||
      { cat "$scratch/log" >&2; exit 69; }
  done'

if [ "$option" = --check ]; then
  sha256sum --check --strict --quiet "$kept/SHA256SUMS"
  "$python" scripts/pictures.py compare "$scratch" "$kept"
else
  mkdir -p "$kept"
  rm -f "$kept"/*.png
  "$python" scripts/pictures.py finish "$scratch" "$kept"
  sha256sum "$golden"/*.md "$kept"/*.png >"$kept/SHA256SUMS"
  echo "pictures: $(find "$kept" -name '*.png' | wc -l) in $kept, $(du -ch "$kept"/*.png | tail -n 1 | cut -f 1); look at them"
fi
