# The workflow of a page of docs/start under real act, as the machine's user: a repository, a cache server that the
# repository's variables or the runner's hints name, and a Nix that comes from where the runner's hints say. Sourced; the
# machine is a Debian with git.

# What a page has between fences of a language and marks for a machine, without the fences.
#   usage: marked LANGUAGE PAGE
marked() {
  sed -n "/^<!-- test: machine -->\$/,/^\`\`\`\$/p" "/fly/docs/$2.md" | sed -n "/^\`\`\`$1\$/,/^\`\`\`\$/p" | sed '/^```/d'
}

# Makes the repository whose workflow it is. What the page has is not changed.
make_repository() {
  mkdir -p "$1/.github/workflows" "$1/bin"
  cp /guest/workflow.nix "$1/flake.nix"
  cp /fly/busybox "$1/bin/busybox"
  marked yaml "start/$PAGE" >"$1/.github/workflows/ci.yml"
  grep -q 'uses: OWNER/flywheel/actions/nix-job@main' "$1/.github/workflows/ci.yml"
  chown -R "$USER_ID:$USER_ID" "$1"
  for words in 'init --quiet --initial-branch=main' 'add --all' 'commit --quiet --message=Begin'; do
    # shellcheck disable=SC2086
    as_user git -C "$1" -c user.name=octocat -c user.email=octocat@example.org $words
  done
}

workflow() {
  # What the page has root do, for the user that it calls `runner`.
  marked sh "start/$PAGE" | sed "s/runner/$USER_NAME/g" >/area/as-root.sh
  sh -eu /area/as-root.sh
  mkdir /area/server
  /fly/flywheel cache serve --dir /area/server --listen 127.0.0.1:0 --ready-file /area/url --stop-after 10m \
    </dev/null >/out/server.log 2>&1 &
  await grep -q '^public-key ' /out/server.log
  await test -s /area/url
  make_repository /area/app
  commit=$(as_user git -C /area/app rev-parse HEAD)
  sed -i "s/1111111111111111111111111111111111111111/$commit/" /area/push.json
  echo "ATTIC_TOKEN=$(sed -n 's/^write \([^ ]*\).*/\1/p' /area/server/tokens | head -n 1)" >/area/secrets
  chown "$USER_ID" /area/secrets
  # The facts that GitHub's runner gives and act leaves out or gets wrong, and the runner's hints.
  set --
  for fact in GITHUB_REF=refs/heads/main GITHUB_REF_TYPE=branch GITHUB_REF_PROTECTED=true \
    GITHUB_REPOSITORY=octo-org/octo-repo GITHUB_REPOSITORY_OWNER=octo-org RUNNER_ENVIRONMENT=self-hosted \
    NIX_CLOSURE="$(cat /fly/closure/path)" \
    NIX_CLOSURE_SOURCE="http://127.0.0.1:8000/zstd $(cat /fly/closure/key.pub)"; do
    set -- "$@" --env "$fact"
  done
  key=$(sed -n 's/^public-key //p' /out/server.log | head -n 1)
  # A pod has the cache by its hints, a repository by its variables.
  if [ "$PAGE" = pods ]; then
    set -- "$@" --env ATTIC_SERVER="$(cat /area/url)/" --env ATTIC_PUBLIC_KEY="$key"
  else
    set -- "$@" --var ATTIC_SERVER="$(cat /area/url)/" --var ATTIC_PUBLIC_KEY="$key"
  fi
  for label in ubuntu-latest self-hosted my-pods; do set -- "$@" -P "$label=-self-hosted"; done
  cd /area/app
  timed as_user timeout -k 5 120 /fly/act push --action-offline-mode --no-cache-server \
    --local-repository OWNER/flywheel@main=/fly/checkout --action-cache-path /area/actions \
    --eventpath /area/push.json --secret-file /area/secrets --actor octocat "$@"
  # Afterwards the user takes Flywheel away from his host, as the page about that says.
  if [ "$PAGE" = host ] && [ "$code" = 0 ]; then
    marked sh when-it-goes-wrong >/area/away.sh
    cd /
    rm -rf /area/app
    as_user env PATH="/fly:$PATH" sh -eu /area/away.sh >>/out/log 2>&1 || echo "away: $?" >/out/exit
    [ -e /nix/store ] || echo 'no store is left' >>/out/log
  fi
}
