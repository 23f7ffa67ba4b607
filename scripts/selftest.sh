#!/bin/sh
# The rows of `selftest.yml`, one for each machine, and the table of its summary. POSIX sh, because Alpine has no bash.
#
#   usage: scripts/selftest.sh row NAME FILE        judges what `nix-job` has set as outputs, and writes a row
#          scripts/selftest.sh table FOLDER NAME…   prints the table of the rows in FOLDER; a name that ends in `?` may fail
#   env:   for `row` the outputs: OUTCOME, EXIT_CODE, CACHE_STATE, TRUST, PUBLISHED, VERIFIED, LOST; and GITHUB_EVENT_NAME
#
# Exit 1: something was not as it should be. A machine that has left no row has failed.
set -eu

row() {
  verdict=failed
  if [ "$OUTCOME $EXIT_CODE $CACHE_STATE" = 'success 0 attached' ]; then
    case $GITHUB_EVENT_NAME:$TRUST in
      push:may-publish) [ "$PUBLISHED" -gt 0 ] && [ "$VERIFIED" = "$PUBLISHED" ] && [ "$LOST" = 0 ] && verdict=passed ;;
      push:*) ;;
      *:read-only) [ "$PUBLISHED" = 0 ] && verdict=passed ;;
    esac
  fi
  printf '%s | %s | %s | %s | %s | %s | %s\n' \
    "$verdict" "${OUTCOME:--}" "${CACHE_STATE:--}" "${TRUST:--}" "${PUBLISHED:--}" "${VERIFIED:--}" "${LOST:--}" >"$2"
  echo "selftest: $1: $(cat "$2")"
  [ "$verdict" = passed ]
}

table() {
  folder=$1
  failed=0
  shift
  printf '| machine | verdict | outcome | cache | trust | published | verified | lost |\n'
  printf '|---|---|---|---|---|---|---|---|\n'
  for name; do
    row='failed | no row | - | - | - | - | -'
    if [ -s "$folder/${name%\?}" ]; then row=$(cat "$folder/${name%\?}"); fi
    case $row:$name in
      'passed '*) ;;
      *\?) row="not yet${row#failed}" ;;
      *) failed=1 ;;
    esac
    printf '| %s | %s |\n' "${name%\?}" "$row"
  done
  return "$failed"
}

case ${1-}:$# in
  row:3 | table:[3-9] | table:1[0-9]) ;;
  *) sed -n 's/^#   usage: /usage: /p' "$0" >&2 && exit 64 ;;
esac
"$@"
