#!/bin/bash
# One run of the matrix, from an empty /nix to the judge's finding, which it leaves in /out.
#
#   usage: run.sh VERSION KIND SHAPE SEED RUNNER
set -euo pipefail
VERSION=$1 KIND=$2 SHAPE=$3 SEED=$4 RUNNER=$5
REPOSITORY=octo-org/octo-repo

. /guest/kinds.sh
. /guest/push.sh
. /guest/trust.sh
. /guest/judge.sh
. /guest/faults.sh

# Leaves the output of an attribute in the store without publishing it, as an earlier job may have done.
leave() {
  (cd /area/a/flake && as "$USER_NAME" nix build --no-link "$1") >/out/leave.log 2>&1
}

make_store "$KIND"
case $SHAPE in
  two)
    prepare a "$USER_NAME"
    prepare b "$USER_NAME"
    push a bash /guest/job.sh two-a /out/a &
    # The second one comes up to 0.6 s later.
    sleep "0.$((SEED * 37 % 60 + 10))"
    push b bash /guest/job.sh two-b /out/b
    wait $!
    ;;
  trust-*)
    two_trusts
    ;;
  down | dies | torn)
    faulty_job
    ;;
  *)
    prepare a "$USER_NAME"
    case $SHAPE in
      no-link) leave path:.#warm ;;
      run) leave path:.#tool ;;
    esac
    push a bash /guest/job.sh "$SHAPE" /out/a
    ;;
esac

judge a
case $SHAPE in
  two) judge b ;;
  trust-*) find_forged ;;
esac
echo judged >/out/done
