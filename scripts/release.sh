#!/usr/bin/env bash
# The steps of a release, each of which `.github/workflows/release.yml` calls; docs/releasing.md has the order.
#
#   usage: scripts/release.sh check VERSION           whether this commit can be released as that version
#          scripts/release.sh binary VERSION          whether the committed binary for this machine is of that version
#          scripts/release.sh prove                   whether both binaries for Linux are what the sources build
#          scripts/release.sh notes VERSION           prints the version's section of CHANGELOG.md
#          scripts/release.sh stage VERSION IN OUT    puts the release's files into OUT: the binaries of dist/, those for
#                                                     macOS that are in IN, the sums, the list of dependencies; writes
#                                                     dist/SHA256SUMS and dist/RELEASE
#          scripts/release.sh tag VERSION             commits these two files, and tags the commit
#          scripts/release.sh publish VERSION FOLDER  pushes the tag, publishes FOLDER, and moves the major version's tag
#   env:   RELEASE_BRANCH      the branch that releases come from (default: main)
#          GITHUB_REPOSITORY, GITHUB_SERVER_URL   where the release will be; for `stage` and `publish`
#          GH_TOKEN            for `publish`, which calls `gh`
#
# What has happened already is not done twice, so that a failed job can be run again. Exit 64: wrong arguments.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)

fail() {
  printf 'release: %s\n' "$*" >&2
  exit 1
}

usage() {
  printf 'release: %s\n' "$*" >&2
  sed -n 's/^#   usage: /usage: /p; s/^#          \(scripts\/\)/       \1/p' "${BASH_SOURCE[0]}" >&2
  exit 64
}

# Prints the version's section of the changelog, without its heading.
notes() {
  awk -v "heading=## $version (" '
    index($0, "## ") == 1 { inside = index($0, heading) == 1; next }
    inside' "$root/CHANGELOG.md" | sed -e '/./,$!d'
}

check() {
  local written branch=${RELEASE_BRANCH:-main}
  written=$(sed -n '/^\[workspace\.package\]/,/^\[/s/^version = "\(.*\)"$/\1/p' Cargo.toml)
  [ "$written" = "$version" ] || fail "\`Cargo.toml\` has version $written, not $version; set it, and run \`just dist\`"
  grep -qE "^## ${version//./\\.} \([0-9]{4}-[0-9]{2}-[0-9]{2}\)\$" CHANGELOG.md ||
    fail "\`CHANGELOG.md\` has no heading \`## $version (YYYY-MM-DD)\`"
  [ -n "$(notes)" ] || fail "\`CHANGELOG.md\` says nothing about $version"
  if git rev-parse --verify --quiet "refs/tags/$tag" >/dev/null; then fail "the tag $tag is there already; a release is never made anew"; fi
  git merge-base --is-ancestor HEAD "refs/remotes/origin/$branch" 2>/dev/null ||
    fail "this commit is not on the branch \`$branch\`; release what has been merged"
  binary
}

binary() {
  local printed
  printed=$(dist/flywheel --version)
  [ "$printed" = "flywheel $version" ] || fail "the committed binary is \`$printed\`, not $version; run \`just dist\`"
}

prove() {
  local verdict
  verdict=$(FLYWHEEL_PROVE_ARM64=1 scripts/dist-check.sh | tee /dev/stderr | sed -n 1p)
  [ "$verdict" = 'dist-check: proved: x86_64 aarch64' ] ||
    fail "both binaries have to be proved, on the toolchain that dist/BUILT-WITH names; the proof says: $verdict"
}

stage() {
  local from=$1 out=$2 name
  : "${GITHUB_REPOSITORY:?}" "${GITHUB_SERVER_URL:?}"
  mkdir -p "$out"
  # Nothing but what is named here can get into a release.
  for name in flywheel-x86_64-linux flywheel-aarch64-linux; do
    install -m 755 "dist/$name" "$out/$name"
  done
  for name in flywheel-x86_64-darwin flywheel-aarch64-darwin; do
    if [ -f "$from/$name" ]; then
      install -m 755 "$from/$name" "$out/$name"
    else
      echo "release: there is no $name, and this release does without it"
    fi
  done
  scripts/sbom.py >"$out/flywheel.cdx.json"
  # Not those of the release before, whose files are elsewhere.
  rm -f "$out/SHA256SUMS"
  scripts/dist-sums.sh "$out"
  cp "$out/SHA256SUMS" dist/SHA256SUMS
  printf '%s/%s/releases/download/%s\n' "$GITHUB_SERVER_URL" "$GITHUB_REPOSITORY" "$tag" >dist/RELEASE
}

tag() {
  local date
  # With the dates of the commit before, so that another try makes the same commit and the same tag.
  date=$(git show --no-patch --format=%cI HEAD)
  export GIT_AUTHOR_DATE=$date GIT_COMMITTER_DATE=$date
  export GIT_AUTHOR_NAME=flywheel-release GIT_AUTHOR_EMAIL=flywheel-release@users.noreply.github.com
  export GIT_COMMITTER_NAME=$GIT_AUTHOR_NAME GIT_COMMITTER_EMAIL=$GIT_AUTHOR_EMAIL
  git add dist/SHA256SUMS dist/RELEASE
  # Nothing has changed where the tag has been merged.
  if ! git diff --cached --quiet; then
    git commit --quiet --message "dist: Record the sums of $version" \
      --message 'The launcher takes what is not in dist/ from the release, and compares it with these sums.'
  fi
  if git rev-parse --verify --quiet "refs/tags/$tag" >/dev/null; then
    [ "$(git rev-parse "$tag^{commit}")" = "$(git rev-parse HEAD)" ] || fail "the tag $tag names another commit already"
  else
    git tag --annotate --message "Flywheel $version" "$tag"
  fi
}

# Git with gh's credentials: the token is in no argument and in no file.
push() {
  git -c credential.helper= -c 'credential.helper=!gh auth git-credential' push --quiet "$@"
}

publish() {
  local folder=$1 state major=v${version%%.*} text
  : "${GITHUB_REPOSITORY:?}"
  [ -f "$folder/SHA256SUMS" ] || fail "\`$folder\` holds no release; \`stage\` makes one"
  cmp --silent "$folder/SHA256SUMS" <(git show "$tag:dist/SHA256SUMS") || fail "the commit that $tag names has other sums than \`$folder\`"
  (cd "$folder" && sha256sum --check --strict --quiet SHA256SUMS) || fail "\`$folder\` has other files than its sums say"
  # Never forced: a tag that is there with another commit stops the release.
  push origin "refs/tags/$tag"
  state=$(gh release view "$tag" --json isDraft --jq .isDraft 2>/dev/null || echo none)
  if [ "$state" = true ]; then
    # What an earlier try has left may lack files.
    gh release delete "$tag" --yes
    state=none
  fi
  if [ "$state" = none ]; then
    text=$(mktemp)
    notes >"$text"
    # A draft first: what is published cannot be added to where releases are immutable.
    gh release create "$tag" --draft --verify-tag --title "Flywheel $version" --notes-file "$text" "$folder"/*
    rm "$text"
    gh release edit "$tag" --draft=false
  fi
  [ "$(gh api "repos/$GITHUB_REPOSITORY/releases/tags/$tag" --jq .immutable)" = true ] ||
    fail "$tag is published and can be altered: turn on immutable releases in the repository's settings, then run this again"
  # A mended older version does not take it back.
  if [ "$(git tag --list "$major.*" --sort=-version:refname | head -n 1)" = "$tag" ]; then
    git tag --force "$major" "$tag^{commit}" >/dev/null
    push --force origin "refs/tags/$major"
    echo "release: $tag is published, and $major names it"
  else
    echo "release: $tag is published; $major names a newer one"
  fi
}

cd "$root"
verb=${1-}
[ $# -eq 0 ] || shift
case $verb in
  check | binary | notes | tag) [ $# -eq 1 ] || usage "\`$verb\` takes a version" ;;
  prove) [ $# -eq 0 ] || usage "\`prove\` takes no argument" ;;
  stage) [ $# -eq 3 ] || usage "\`stage\` takes a version and two folders" ;;
  publish) [ $# -eq 2 ] || usage "\`publish\` takes a version and a folder" ;;
  *) usage "no such step: \`$verb\`" ;;
esac
if [ "$verb" != prove ]; then
  version=$1
  shift
  [[ $version =~ ^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)$ ]] ||
    usage "a version is three numbers, such as 0.2.0, and not \`$version\`"
  tag=v$version
fi
"$verb" "$@"
