# The README's own workflow under real act, as the machine's user: a repository, a cache server that the runner's hints
# name, and a Nix that comes from where the runner's hints say. Sourced; the machine is a Debian with git.

# Makes the repository whose workflow it is. What the README has is not changed.
make_repository() {
  mkdir -p "$1/.github/workflows" "$1/bin"
  cp /guest/workflow.nix "$1/flake.nix"
  cp /fly/busybox "$1/bin/busybox"
  {
    printf '%s\n' 'on: push' 'jobs:' '  build:' '    runs-on: ubuntu-latest' '    steps:' '      - uses: actions/checkout@v4'
    sed -n '/^## In a workflow/,/^## /p' /fly/README.md | sed -n '/^```yaml/,/^```$/p' | sed '/^```/d; s/^/      /'
  } >"$1/.github/workflows/ci.yml"
  grep -q 'uses: OWNER/flywheel/actions/nix-job@main' "$1/.github/workflows/ci.yml"
  chown -R "$USER_ID:$USER_ID" "$1"
  for words in 'init --quiet --initial-branch=main' 'add --all' 'commit --quiet --message=Begin'; do
    # shellcheck disable=SC2086
    as_user git -C "$1" -c user.name=octocat -c user.email=octocat@example.org $words
  done
}

workflow() {
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
    ATTIC_SERVER="$(cat /area/url)/" NIX_CLOSURE="$(cat /fly/closure/path)" \
    NIX_CLOSURE_SOURCE="http://127.0.0.1:8000/zstd $(cat /fly/closure/key.pub)"; do
    set -- "$@" --env "$fact"
  done
  cd /area/app
  timed as_user timeout -k 5 120 /fly/act push -P ubuntu-latest=-self-hosted --action-offline-mode --no-cache-server \
    --local-repository OWNER/flywheel@main=/fly/checkout --action-cache-path /area/actions \
    --eventpath /area/push.json --secret-file /area/secrets \
    --var ATTIC_PUBLIC_KEY="$(sed -n 's/^public-key //p' /out/server.log | head -n 1)" --actor octocat "$@"
}
