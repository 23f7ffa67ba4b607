# Unpacks packages of any release of Debian into folders, without installing them. Sourced, after `fail` is defined.
#
#   env: FLYWHEEL_DEBIAN    the Debian mirror (default: the machine's own)
#        FLYWHEEL_SNAPSHOT  an archive with what the mirror has no longer, such as a snapshot of Debian's (default: none)

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
snapshot=${FLYWHEEL_SNAPSHOT-}
# The first is where the packages run; with `amd64,arm64` those of the other have names such as `libc6:arm64`.
architectures=amd64

command -v apt-get >/dev/null || fail "\`apt-get\` is missing; the matrix unpacks Debian packages with it"
[ -e "$keyring" ] || fail "$keyring is missing: apt-get install debian-archive-keyring"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# shellcheck disable=SC2016 # They are apt's variables.
mirror=$(apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' | sed -n 's/^Debian //p' | head -n 1)
mirror=${FLYWHEEL_DEBIAN:-$mirror}
[ -n "$mirror" ] || fail "apt names no mirror of Debian's; name one with FLYWHEEL_DEBIAN"

# A program of apt's on the lists of one release alone, as if no package were installed, so that it takes whole closures.
apt() {
  local state=$1 program=$2
  shift 2
  "$program" -qq -o APT::Sandbox::User="$(id -un)" \
    -o APT::Architecture="${architectures%%,*}" -o APT::Architectures="$architectures" \
    -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o Dir::State::Lists="$state/lists" -o Dir::Cache="$state/cache" -o Dir::State::status="$state/status" \
    -o Acquire::Check-Valid-Until=false -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20 "$@" </dev/null
}

# Fetches the lists of a release, and of its security fixes if the last argument is `security`, from the mirror that is
# named; what it complains of is in STATE/errors.
fetch_lists() {
  local release=$1 state=$2 from=$3 fixes=${4-}
  rm -rf "$state"
  mkdir -p "$state"/{lists,cache}/partial
  # Beside this file apt has its lock.
  : >"$state/status"
  echo "deb [signed-by=$keyring] $from $release main" >"$state/sources.list"
  # They lie beside `debian`, also those of a snapshot: `debian-security/20261130T000000Z`.
  if [ "$fixes" = security ]; then
    from=$(sed 's|/debian\(/[^/]*\)\?$|/debian-security\1|' <<<"${from%/}")
    echo "deb [signed-by=$keyring] $from $release-security main" >>"$state/sources.list"
  fi
  apt "$state" apt-get update >/dev/null 2>"$state/errors"
}

# Downloads the closure of packages into STATE/cache/archives.
download_packages() {
  local state=$1
  shift
  apt "$state" apt-get install --download-only --no-install-recommends --yes "$@" >/dev/null 2>"$state/errors"
}

# Unpacks what was downloaded. The folder counts only when it is whole.
unpack_packages() {
  local state=$1 into=$2 fresh=$2.new deb folder
  rm -rf "$fresh"
  mkdir -p "$fresh"
  for deb in "$state"/cache/archives/*.deb; do dpkg-deb -x "$deb" "$fresh"; done
  # Packages of before the merge of / and /usr put some of their files beside it.
  for folder in bin sbin lib lib64; do
    if [ -d "$fresh/$folder" ] && [ ! -L "$fresh/$folder" ]; then
      mkdir -p "$fresh/usr/$folder"
      cp -a "$fresh/$folder/." "$fresh/usr/$folder/"
      rm -rf "${fresh:?}/$folder"
    fi
  done
  rm -rf "$into"
  mv "$fresh" "$into"
}
