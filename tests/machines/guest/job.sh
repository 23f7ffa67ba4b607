# A job on this machine, as GitHub's runner would start it, and the services that it finds. Sourced.

# Runs a command as the user, with nothing in its environment but what a login gives it.
as_user() {
  if [ "$HOME_FOLDER" != unset ]; then set -- HOME="$USER_HOME" "$@"; fi
  if [ "$USER_NAME" != stranger ]; then set -- USER="$USER_NAME" LOGNAME="$USER_NAME" "$@"; fi
  set -- /fly/busybox env -i PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin LANG=C.UTF-8 "$@"
  if [ "$USER_ID" != 0 ]; then set -- /fly/busybox nsenter -S "$USER_ID" -G "$USER_ID" "$@"; fi
  "$@"
}

# Waits for a condition, a command, for ten seconds.
await() {
  end=$(($(/fly/busybox date +%s) + 10))
  until "$@"; do
    [ "$(/fly/busybox date +%s)" -lt "$end" ] || { echo "not after 10 s: $*" && exit 70; }
    /fly/busybox usleep 20000
  done
}

# Starts what runs on the machine before any job does.
bring_up() {
  socket=/nix/var/nix/daemon-socket/socket
  case $DAEMON in
    alive)
      /fly/busybox env -i PATH="$PATH" HOME=/root nix-daemon --daemon </dev/null >/out/daemon.log 2>&1 &
      await test -S $socket
      ;;
    socket)
      /fly/busybox env -i PATH="$PATH" HOME=/root systemd-socket-activate --listen=$socket nix-daemon --daemon \
        </dev/null >/out/daemon.log 2>&1 &
      await test -S $socket
      /fly/busybox chmod 666 $socket
      ;;
    stale)
      /fly/busybox env -i PATH="$PATH" HOME=/root nix-daemon --daemon </dev/null >/out/daemon.log 2>&1 &
      await test -S $socket
      kill -9 $!
      ;;
  esac
  if [ -d /fly/closure ]; then
    /fly/busybox httpd -f -p 127.0.0.1:8000 -h /fly/closure >/out/httpd.log 2>&1 &
  fi
  area=/area
  for folder in temp checkout tmp; do /fly/busybox mkdir -p $area/$folder; done
  /fly/busybox cp -r /fly/hello $area/checkout/
  payload >$area/push.json
  if [ "$EVENT" = fifo ]; then
    /fly/busybox rm $area/push.json
    /fly/busybox mkfifo $area/push.json
  fi
  /fly/busybox mkdir -p /out/files /out/cache
  for file in OUTPUT ENV PATH STEP_SUMMARY STATE; do : >/out/files/$file; done
  /fly/busybox chown -R "$USER_ID:$USER_ID" $area /out/files /out/cache
  /fly/busybox chmod 755 /out
  if [ "$HOME_FOLDER" = read-only ]; then
    /fly/busybox mount --bind "$USER_HOME" "$USER_HOME"
    /fly/busybox mount -o remount,bind,ro "$USER_HOME"
  fi
  if [ "$FULL" = yes ]; then
    for folder in $area/tmp $area/temp; do
      /fly/busybox mount -t tmpfs -o size=4k,mode=1777 tmpfs $folder
      ! /fly/busybox dd if=/dev/zero of=$folder/filler bs=4096 count=2 2>/dev/null
    done
  fi
}

payload() {
  echo '{"ref":"refs/heads/main","before":"2222222222222222222222222222222222222222",' \
    '"after":"1111111111111111111111111111111111111111","created":false,"deleted":false,"forced":false,' \
    '"repository":{"full_name":"octo-org/octo-repo","default_branch":"main","fork":false}}'
}

# Becomes a command, as the user, in the environment of a job.
in_job() {
  area=/area
  set -- CI=true GITHUB_ACTIONS=true GITHUB_EVENT_NAME=push GITHUB_REF=refs/heads/main GITHUB_REF_TYPE=branch \
    GITHUB_REF_NAME=main GITHUB_REF_PROTECTED=true GITHUB_REPOSITORY=octo-org/octo-repo GITHUB_JOB=demo \
    GITHUB_SHA=1111111111111111111111111111111111111111 GITHUB_RUN_ID=1 GITHUB_RUN_ATTEMPT=1 \
    GITHUB_EVENT_PATH=$area/push.json GITHUB_WORKSPACE=$area/checkout \
    GITHUB_OUTPUT=/out/files/OUTPUT GITHUB_ENV=/out/files/ENV GITHUB_PATH=/out/files/PATH \
    GITHUB_STATE=/out/files/STATE GITHUB_STEP_SUMMARY=/out/files/STEP_SUMMARY \
    RUNNER_TEMP=$area/temp RUNNER_OS=Linux RUNNER_ARCH=X64 RUNNER_ENVIRONMENT=self-hosted \
    RUNNER_TRACKING_ID=github_demo TMPDIR=$area/tmp \
    FLYWHEEL_PUSH_CACHE=true FLYWHEEL_EXTRA_NIX_CONFIG='sandbox = false' FLYWHEEL_EMBEDDED_CACHE=/out/cache \
    FLYWHEEL_WORKING_DIRECTORY=$area/checkout "$@"
  if [ -d /fly/closure ]; then
    set -- FLYWHEEL_NIX_SOURCE="http://127.0.0.1:8000/zstd $(/fly/busybox cat /fly/closure/key.pub)" \
      FLYWHEEL_NIX_VERSION="$(/fly/busybox cat /fly/closure/path)" "$@"
  fi
  cd $area/checkout
  as_user "$@"
}

# Runs a command; leaves its log, its exit code and the seconds that it took.
timed() {
  code=0
  started=$(/fly/busybox awk '{print $1}' /proc/uptime)
  "$@" </dev/null >/out/log 2>&1 || code=$?
  ended=$(/fly/busybox awk '{print $1}' /proc/uptime)
  echo "$code" >/out/exit
  /fly/busybox awk "BEGIN { print $ended - $started }" >/out/seconds
}

# Leaves what `setup --plan` says a job would do, and its exit code.
plan() {
  code=0
  in_job /fly/busybox timeout -k 5 30 /fly/flywheel setup --plan </dev/null >/out/plan 2>/out/plan-errors || code=$?
  echo "$code" >/out/plan-exit
}

# Runs a verb as the job.
job() {
  timed in_job /fly/busybox timeout -k 5 100 /fly/flywheel "$@"
}
