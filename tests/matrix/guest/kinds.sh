# The kinds of stores: how each is laid out, whose it is, and how a job reaches it. Sourced by the scripts beside it.
# Sets USER_NAME (who runs the job), REMOTE (its NIX_REMOTE) and ENCLOSURE (what a job is put into); defines `as`.

PATH=/usr/sbin:/usr/bin
export PATH
# What `as` puts a command into, before it becomes another user: nothing, but for jobs.
INTO=()

# Runs a command as a user, with nothing in its environment but what a login gives it and REMOTE.
as() {
  local user=$1 home=/home/$1 id=0
  shift
  case $user in
    root) home=/root ;;
    alice) id=1000 ;;
    bob) id=1001 ;;
  esac
  local variables=(HOME="$home" USER="$user" LOGNAME="$user" PATH=/usr/sbin:/usr/bin LANG=C.UTF-8 TMPDIR=/tmp)
  [ -z "$REMOTE" ] || variables+=(NIX_REMOTE="$REMOTE")
  if [ "$id" = 0 ]; then
    "${INTO[@]}" env -i "${variables[@]}" "$@"
  else
    "${INTO[@]}" setpriv --reuid "$id" --regid "$id" --clear-groups --inh-caps=-all env -i "${variables[@]}" "$@"
  fi
}

# Lines of nix.conf that all kinds share.
settings() {
  local features='nix-command flakes'
  [ "$SHAPE" != ca ] || features="$features ca-derivations"
  printf '%s\n' "experimental-features = $features" 'substituters =' 'sandbox-fallback = false' "$@" >/etc/nix/nix.conf
}

# Starts a daemon as its service does, and waits until it takes connections.
daemon() {
  REMOTE=daemon
  env -i PATH="$PATH" HOME=/root "$@" </dev/null >/out/daemon.log 2>&1 &
  local end=$((SECONDS + 10))
  until [ -S /nix/var/nix/daemon-socket/socket ]; do
    [ "$SECONDS" -lt "$end" ] || { echo 'no daemon after 10 s' && cat /out/daemon.log && exit 70; }
    sleep 0.02
  done
}

# Makes the store of the kind that is named.
make_store() {
  REMOTE=
  USER_NAME=alice
  ENCLOSURE=()
  case $1 in
    root)
      USER_NAME=root
      settings 'sandbox = false' 'build-users-group ='
      ;;
    owner)
      settings 'sandbox = false' 'build-users-group ='
      # Without this folder newer versions go to a store in the home folder, as `rootless` has it.
      mkdir -p /nix/store /nix/var/nix
      chown -R alice:alice /nix
      ;;
    bare)
      settings 'sandbox = true' 'build-users-group = nixbld'
      daemon nix-daemon
      ;;
    trusted)
      settings 'sandbox = true' 'build-users-group = nixbld' 'trusted-users = root alice bob'
      daemon nix-daemon --daemon
      ;;
    untrusted)
      settings 'sandbox = true' 'build-users-group = nixbld'
      daemon nix-daemon --daemon
      ;;
    pidns)
      # Daemon and job have a namespace each, and neither sees the other's processes, as with containers in a pod.
      # The first process of each is a shell, which ends when the other does.
      # shellcheck disable=SC2016
      ENCLOSURE=(unshare --pid --fork --mount-proc --kill-child bash -c '"$@"; exit' -)
      settings 'sandbox = true' 'build-users-group = nixbld'
      daemon "${ENCLOSURE[@]}" nix-daemon --daemon
      ;;
    rootless)
      # Newer versions go there by themselves where the user may not write /nix; 2.8 has to be told.
      settings 'sandbox = true'
      case $VERSION in 2.8.*) REMOTE=/home/alice/.local/share/nix/root ;; esac
      ;;
    chroot)
      USER_NAME=root
      settings 'sandbox = true' 'build-users-group ='
      REMOTE=/var/store
      ;;
    *)
      echo "no kind of store is called $1"
      exit 70
      ;;
  esac
}
