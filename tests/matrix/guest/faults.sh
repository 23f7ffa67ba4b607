# Jobs whose cache fails. Sourced.

# Serves the cache of job a as a server of its own; sets SERVER and TOKEN.
start_server() {
  serve_cache /area/a/cache /out/a/serve.log as "$USER_NAME"
  SERVER=${URL%/main}/
  TOKEN=$(sed -n 's/^write \([^ ]*\).*/\1/p' /area/a/cache/tokens | head -n 1)
}

stop_server() {
  local -a servers
  # The server is the only child of the shell that `as` runs in.
  # The file ends without a line break, which `read` calls an error.
  read -ra servers <"/proc/$SERVED/task/$SERVED/children" || [ ${#servers[@]} -gt 0 ]
  kill -9 "${servers[@]}"
  # A killed process has no other end than a failure.
  ! wait "$SERVED"
}

# Makes job a with the fault that SHAPE names.
faulty_job() {
  local -a nars
  mkdir -m 1777 /area/meet
  prepare a "$USER_NAME"
  case $SHAPE in
    down)
      # The server has an address and a key, and does not answer when the job begins.
      start_server
      stop_server
      push a bash /guest/job.sh one /out/a
      ;;
    dies)
      # It is there when the job begins, and dies after the first build.
      start_server
      DRAIN=20
      push a bash /guest/job.sh dies /out/a &
      wait_for /area/meet/a
      stop_server
      touch /area/meet/other
      wait $!
      ;;
    torn)
      # An earlier job has published everything; then the bodies in the cache's folder are cut short. A sample of them
      # need not show it, so the job is to read all of them.
      push a bash /guest/job.sh one /out/a
      mapfile -t nars < <(find /area/a/cache -type f -size +0 -name '*.nar*' ! -name '*.narinfo')
      [ ${#nars[@]} -gt 0 ]
      truncate --size -8 "${nars[@]}"
      : >/out/a/STEP_SUMMARY
      VERIFY=full
      push a bash /guest/job.sh one /out/a
      ;;
  esac
}
