#!/bin/bash
# What a job does, by its shape. Runs as the command of `nix-job`, in the folder of its flake, as its user.
# Names its results in OUT/attributes and OUT/added; what it does not print there is no result.
#
#   usage: job.sh SHAPE OUT [FORGED-PATH]
set -euo pipefail
shape=$1 out=$2

# Notes the attributes whose outputs are results of this job.
results() { printf '%s\n' "$@" >>"$out/attributes"; }

# Runs a command up to four times, until it succeeds.
again() {
  local left=3
  until "$@"; do
    [ "$left" -gt 0 ] || return 1
    left=$((left - 1))
  done
}

case $shape in
  one)
    nix build --out-link ../result path:.#one
    results one
    ;;
  twelve)
    for n in 0 1 2 3 4 5 6 7 8 9 10 11; do
      nix build --no-link "path:.#p$n"
      results "p$n"
    done
    ;;
  no-link)
    # An earlier job has built `warm` and left it in the store.
    nix build --no-link path:.#warm
    nix build --no-link path:.#cold
    results warm cold
    ;;
  run)
    nix run path:.#tool
    nix run path:.#app
    results tool app
    ;;
  added)
    nix-store --add ./one-file >>"$out/added"
    nix store add-path ./folder >>"$out/added"
    nix store add-file ./other-file >>"$out/added" 2>"$out/add-file" || nix store add ./other-file >>"$out/added"
    ;;
  ca)
    # Nix 2.8 closes a file descriptor twice when it asks a cache for a realisation, and now and then fails of it.
    again nix build --no-link path:.#catop
    results ca catop
    again nix build --no-link path:.#usesca
    results usesca
    ;;
  gc)
    nix build --no-link path:.#p0
    nix build --no-link path:.#p1
    results p0 p1
    case $(($(cat seed) % 2)) in
      0) nix-store --gc >/dev/null ;;
      1) nix-collect-garbage >/dev/null ;;
    esac
    nix build --no-link path:.#cold
    results cold
    ;;
  two-a)
    for n in 0 1 2 3 4 5; do
      nix build --no-link "path:.#p$n"
      results "p$n"
    done
    nix build --no-link path:.#cold
    results cold
    ;;
  two-b)
    for n in 0 1 2 3 4 5; do
      nix build --no-link "path:.#q$n"
      results "q$n"
    done
    nix build --no-link path:.#one
    results one
    nix-store --add ./one-file >>"$out/added"
    ;;
  dies)
    nix build --no-link path:.#p0
    results p0
    touch /area/meet/a
    for _ in $(seq 600); do
      [ ! -e /area/meet/other ] || break
      sleep 0.05
    done
    # Nix 2.8 aborts when a substituter is gone in the middle of a job; then there is no such result.
    if nix build --no-link path:.#one; then results one; fi
    ;;
  trust-after)
    # The other job has been here, and `cold` is valid already.
    nix build --no-link path:.#p0
    nix build --no-link path:.#cold
    results p0 cold
    nix-store --add ./one-file >>"$out/added"
    ;;
  trust-at-once)
    nix build --no-link path:.#p0
    touch /area/meet/a
    for _ in $(seq 600); do
      [ ! -e /area/meet/other ] || break
      sleep 0.05
    done
    nix build --no-link path:.#cold
    results p0 cold
    nix-store --add ./one-file >>"$out/added"
    ;;
  trust-other)
    # Where the store does not trust its user, the import is refused; then nothing is forged.
    nix copy --no-check-sigs --from file:///area/forged "$3" || echo refused >"$out/refused"
    nix-store --add ./one-file >>"$out/added"
    touch /area/meet/other
    ;;
esac
