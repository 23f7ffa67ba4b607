# Two jobs on one store that do not trust each other. Sourced.
#
# Job a is a push to main. The other one is of a pull request, or of another repository: it imports an unsigned path
# under the name of an output that job a asks for next, and adds a file of its own. Job a may publish neither.

# Prepares in /area/forged a binary cache that has wrong content for the output `cold`; sets FORGED.
forge() {
  local real derivation
  mkdir -p /area/forge/flake
  cp -R /area/a/flake/. /area/forge/flake/
  rig() { env -i PATH="$PATH" HOME=/root NIX_REMOTE=/area/forge/store "$@"; }
  cd /area/forge/flake
  FORGED=$(rig nix eval --raw path:.#cold.outPath)
  derivation=$(rig nix eval --raw path:.#cold.drvPath)
  real=/area/forge/store$FORGED
  mkdir -p "${real%/*}"
  echo "forged $SEED" >"$real"
  chmod 444 "$real"
  touch -d @1 "$real"
  printf '%s\n' "$FORGED" "$(nix-hash --type sha256 "$real")" "$(rig nix-store --dump "$real" | wc -c)" \
    "$derivation" 0 | rig nix-store --load-db
  rig nix copy --no-check-sigs --to file:///area/forged "$FORGED"
  chmod -R a+rX /area/forged
  cd /
}

# Runs the other job as a user, with the verdict that the seed chooses for it.
other_job() {
  local user=$1 EVENT=pull_request REPOSITORY=octo-org/octo-repo SHARED_HOST=
  if [ $((SEED % 2)) = 1 ]; then
    EVENT=push REPOSITORY=other-org/other-repo
  fi
  prepare other "$user"
  nix_job other "$user" bash /guest/job.sh trust-other /out/other "$FORGED"
}

# Runs job a, which may share the host with others.
trusted_job() {
  local EVENT=push REPOSITORY=octo-org/octo-repo
  nix_job a "$USER_NAME" bash /guest/job.sh "$@"
}

# Makes both jobs, at once or one after the other. Whether job a was told that the host is shared, or has to find it out
# by itself, is the seed's choice; it cannot find it out where the other user's files are hidden from it.
two_trusts() {
  local user=$USER_NAME
  RUNNER=self-hosted SHARED_HOST=auto
  case $KIND$((SEED / 2 % 2)) in
    trusted1 | untrusted1) user=bob SHARED_HOST=true ;;
    *1) SHARED_HOST=true ;;
  esac
  (REPOSITORY=octo-org/octo-repo && prepare a "$USER_NAME")
  forge >/out/forge.log 2>&1
  mkdir -m 1777 /area/meet
  case $SHAPE in
    trust-after)
      other_job "$user"
      trusted_job trust-after /out/a
      ;;
    trust-at-once)
      trusted_job trust-at-once /out/a &
      # The other job begins when job a is at work, and job a goes on when it has done what it came for.
      wait_for /area/meet/a
      other_job "$user"
      wait $!
      ;;
  esac
}

# Waits until a file is there, for half a minute at most.
wait_for() {
  local end=$((SECONDS + 30))
  until [ -e "$1" ]; do
    [ "$SECONDS" -lt "$end" ] || { echo "no $1 after 30 s" && exit 70; }
    sleep 0.02
  done
}

# Writes into /out/a/forged what job a has published and must not: the other job's file, and the forged content. What the
# other job put into the store is in /out/a/foreign, a word and a path a line.
find_forged() {
  local path imported=import
  # Where the import was refused, the path is job a's own build.
  [ ! -e /out/other/refused ] || imported=refused
  {
    echo "$imported $FORGED"
    sed 's/^/file /' /out/other/added
  } >/out/a/foreign
  : >/out/a/forged
  for path in "$FORGED" $(cat /out/other/added); do
    fresh nix-store --realise "$path" >/dev/null 2>>/out/a/judge.log || continue
    if [ "$path" != "$FORGED" ] || grep -q '^forged' "/judge/store$path"; then
      echo "$path" >>/out/a/forged
    fi
  done
}
