# Jobs with a cache of their own, as GitHub's runner would start them. Sourced.

# Prepares the job NAME of USER: the runner's files below /area/NAME, its flake, its results in /out/NAME.
prepare() {
  local job=/area/$1 out=/out/$1 file
  mkdir -p "$job/temp" "$job/flake/bin" "$job/flake/folder" "$out"
  for file in OUTPUT ENV PATH STEP_SUMMARY STATE; do : >"$out/$file"; done
  : >"$out/attributes"
  : >"$out/added"
  cp /guest/flake.nix "$job/flake/"
  cp /usr/bin/busybox "$job/flake/bin/"
  printf '%s' "$SEED" >"$job/flake/seed"
  echo "one $SEED $1" >"$job/flake/one-file"
  echo "other $SEED $1" >"$job/flake/other-file"
  echo "inner $SEED $1" >"$job/flake/folder/inner"
  printf '%s' '{"ref":"refs/heads/main","before":"2222222222222222222222222222222222222222",' \
    '"after":"1111111111111111111111111111111111111111","created":false,"deleted":false,"forced":false,' \
    '"repository":{"full_name":"'"$REPOSITORY"'","default_branch":"main","fork":false}}' >"$job/push.json"
  printf '%s' '{"action":"synchronize","number":7,"pull_request":{"number":7,' \
    '"head":{"ref":"topic","sha":"1111111111111111111111111111111111111111","repo":{"full_name":"bob/octo-repo","fork":true}},' \
    '"base":{"ref":"main","sha":"2222222222222222222222222222222222222222","repo":{"full_name":"'"$REPOSITORY"'","fork":false}}},' \
    '"repository":{"full_name":"'"$REPOSITORY"'","default_branch":"main","fork":false}}' >"$job/pull_request.json"
  chown -R "$2" "$job" "$out"
}

# Runs `nix-job` as the job NAME of USER with the command that follows; its log is /out/NAME/log, its exit code
# /out/NAME/exit. EVENT (push or pull_request), REPOSITORY, RUNNER and SHARED_HOST say what kind of job it is; with SERVER
# it has that server as its cache instead of one of its own, and DRAIN and VERIFY are inputs.
nix_job() {
  local name=$1 user=$2 job=/area/$1 out=/out/$1 code=0 ref=refs/heads/main ref_name=main
  shift 2
  if [ "$EVENT" = pull_request ]; then
    ref=refs/pull/7/merge ref_name=7/merge
  fi
  local environment=(
    CI=true GITHUB_ACTIONS=true GITHUB_EVENT_NAME="$EVENT" GITHUB_REF="$ref" GITHUB_REF_TYPE=branch
    GITHUB_REF_NAME="$ref_name" GITHUB_REF_PROTECTED=true GITHUB_REPOSITORY="$REPOSITORY" GITHUB_JOB="$name"
    GITHUB_SHA=1111111111111111111111111111111111111111 GITHUB_RUN_ID=1 GITHUB_RUN_ATTEMPT=1
    GITHUB_EVENT_PATH="$job/$EVENT.json" GITHUB_WORKSPACE="$job"
    GITHUB_OUTPUT="$out/OUTPUT" GITHUB_ENV="$out/ENV" GITHUB_PATH="$out/PATH" GITHUB_STATE="$out/STATE"
    GITHUB_STEP_SUMMARY="$out/STEP_SUMMARY"
    RUNNER_TEMP="$job/temp" RUNNER_OS=Linux RUNNER_ARCH=X64 RUNNER_ENVIRONMENT="$RUNNER" RUNNER_TRACKING_ID="github_$name"
    FLYWHEEL_PUSH_CACHE=true FLYWHEEL_SHARED_HOST="$SHARED_HOST" FLYWHEEL_WORKING_DIRECTORY="$job/flake"
    FLYWHEEL_DRAIN_TIMEOUT="${DRAIN-}" FLYWHEEL_VERIFY="${VERIFY-}"
  )
  if [ -n "${SERVER-}" ]; then
    environment+=(FLYWHEEL_ATTIC_SERVER="$SERVER" FLYWHEEL_ATTIC_PUBLIC_KEY="$KEY" ATTIC_TOKEN="$TOKEN")
  else
    environment+=(FLYWHEEL_EMBEDDED_CACHE="$job/cache")
  fi
  local INTO=(timeout -k 5 120 "${ENCLOSURE[@]}")
  as "$user" env "${environment[@]}" /fly/flywheel nix-job --command "$*" </dev/null >"$out/log" 2>&1 || code=$?
  echo "$code" >"$out/exit"
}

# A push to main.
push() {
  local EVENT=push REPOSITORY=octo-org/octo-repo SHARED_HOST=
  nix_job "$1" "$USER_NAME" "${@:2}"
}
