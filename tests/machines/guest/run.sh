#!/bin/sh
# What a job comes to on this machine: its log, exit code and seconds are left in /out. As root, under busybox alone.
#
#   usage: run.sh STORY
set -eu
. /fly/machine
. /guest/job.sh
. /guest/workflow.sh

bring_up
story=$1
case $story in
  demo)
    plan
    job nix-job --command 'nix build --no-link path:hello'
    ;;
  canary) job validate-builders ;;
  workflow) workflow ;;
  checkout)
    mkdir /area/checkout/hello/.git
    timed in_job FLYWHEEL_WORKING_DIRECTORY=/area/checkout/hello /fly/flywheel nix-job --command 'nix build .#default'
    ;;
  checks)
    # GitHub's API takes connections, and answers none.
    /fly/busybox nc -ll -p 8001 -e /fly/busybox sleep 600 &
    timed in_job GITHUB_TOKEN=github-token GITHUB_API_URL=http://127.0.0.1:8001 \
      /fly/flywheel flake-checks --flake path:hello --flake-attr packages
    ;;
  laptop)
    cd /area/checkout
    timed as_user sh /guest/laptop.sh
    ;;
  fresh)
    cp -r /fly/checkout /area/fresh
    cd /area/fresh
    timed as_user scripts/test.sh
    ;;
  hand)
    shift
    in_job "$@"
    exit
    ;;
  *) echo "no story is called $story" && exit 64 ;;
esac

# Nothing of the host: not its files, and not by the processes that are in sight.
{
  /fly/busybox find / -path /proc -prune -o -path /sys -prune -o -name flywheel-planted -print
  for process in /proc/[0-9]*; do
    for folder in srv usr/local/bin nix root; do
      [ ! -e "$process/root/$folder/flywheel-planted" ] || echo "$process/root/$folder"
    done
  done
} >/out/planted || true
echo judged >/out/done
