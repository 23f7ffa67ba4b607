# A job of a push to main with a cache of its own, as GitHub's runner would start it. Sourced.

# Prepares the job NAME: the runner's files below /work/NAME, its flake, its results in /out/NAME.
prepare() {
  local job=/work/$1 out=/out/$1
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
  printf '{"ref":"refs/heads/main","before":"%040d","after":"%040d","created":false,"deleted":false,"forced":false,"repository":{"full_name":"octo-org/octo-repo","default_branch":"main","fork":false}}' 2 1 >"$job/event.json"
  chown -R "$USER_NAME" "$job" "$out"
}

# Runs `nix-job` as the job NAME with the command that follows; its log is /out/NAME/log, its exit code /out/NAME/exit.
push() {
  local name=$1 job=/work/$1 out=/out/$1 code=0
  shift
  local environment=(
    CI=true GITHUB_ACTIONS=true GITHUB_EVENT_NAME=push GITHUB_REF=refs/heads/main GITHUB_REF_TYPE=branch
    GITHUB_REF_NAME=main GITHUB_REF_PROTECTED=true GITHUB_REPOSITORY=octo-org/octo-repo GITHUB_JOB="$name"
    GITHUB_SHA=0000000000000000000000000000000000000001 GITHUB_RUN_ID=1 GITHUB_RUN_ATTEMPT=1
    GITHUB_EVENT_PATH="$job/event.json" GITHUB_WORKSPACE="$job"
    GITHUB_OUTPUT="$out/OUTPUT" GITHUB_ENV="$out/ENV" GITHUB_PATH="$out/PATH" GITHUB_STATE="$out/STATE"
    GITHUB_STEP_SUMMARY="$out/STEP_SUMMARY"
    RUNNER_TEMP="$job/temp" RUNNER_OS=Linux RUNNER_ARCH=X64 RUNNER_ENVIRONMENT="$RUNNER" RUNNER_TRACKING_ID="github_$name"
    FLYWHEEL_PUSH_CACHE=true FLYWHEEL_EMBEDDED_CACHE="$job/cache"
    FLYWHEEL_WORKING_DIRECTORY="$job/flake"
  )
  local INTO=(timeout -k 5 120 "${ENCLOSURE[@]}")
  as "$USER_NAME" env "${environment[@]}" /fly/flywheel nix-job --command "$*" \
    </dev/null >"$out/log" 2>&1 || code=$?
  echo "$code" >"$out/exit"
}
