#!/bin/bash
# One run of the matrix, from an empty /nix to the judge's finding, which it leaves in /out.
#
#   usage: run.sh VERSION KIND SHAPE SEED RUNNER
set -euo pipefail
VERSION=$1 KIND=$2 SHAPE=$3 SEED=$4 RUNNER=$5

. /guest/kinds.sh
. /guest/push.sh
. /guest/judge.sh

make_store "$KIND"

# What an earlier job has left in the store without publishing it.
leave() {
  (cd "/work/$1/flake" && shift && as "$USER_NAME" nix build --no-link "$@") >/out/leave.log 2>&1
}

date +%s.%N >/out/times
case $SHAPE in
  two)
    prepare a
    prepare b
    push a bash /guest/job.sh two-a /out/a &
    first=$!
    push b bash /guest/job.sh two-b /out/b
    wait "$first"
    ;;
  no-link)
    prepare a
    leave a path:.#warm
    push a bash /guest/job.sh "$SHAPE" /out/a
    ;;
  run)
    prepare a
    leave a path:.#tool
    push a bash /guest/job.sh "$SHAPE" /out/a
    ;;
  *)
    prepare a
    push a bash /guest/job.sh "$SHAPE" /out/a
    ;;
esac
date +%s.%N >>/out/times

for job in /out/a /out/b; do
  [ ! -d "$job" ] || judge "${job##*/}"
done
date +%s.%N >>/out/times
echo judged >/out/done
