#!/bin/sh
# Makes a machine, and runs a script of /guest in it as root. Called by `unshare` in fresh namespaces for mounts,
# processes and network. What is planted here on the host's PATH, in its home and in its /nix must not be found there.
#
#   usage: enter.sh MACHINE FLYWHEEL OUT SCRIPT [ARGUMENT…]
set -eu
here=$(cd "$(dirname "$0")" && pwd -P)
repository=$(cd "$here/../../.." && pwd -P)
tools=$repository/target/tools
. "$here/machines.sh"
. "$repository/tests/guest/root.sh"
. "$here/elf.sh"
describe "$1"
flywheel=$2 out=$3
shift 3

# In memory, for this namespace alone: here it is the host's.
plant() {
  mount -t tmpfs tmpfs "$1"
  echo planted >"$1/flywheel-planted"
  chmod 755 "$1/flywheel-planted"
}
for folder in /nix /usr/local/bin /srv "${HOME:-/root}"; do
  # What the machine is made of stays in sight.
  case "$repository/ $flywheel $out/" in *"$folder/"*) continue ;; esac
  [ ! -d "$folder" ] || plant "$folder"
done

new=$out/root
mkdir -p "$new"
mount -t tmpfs -o mode=755,size=2g tmpfs "$new"
cd "$new"
mkdir fly out guest shared area
mount --bind "$out" out
mount --bind "$here" guest
mount --bind "$repository/tests/guest" shared
for file in flywheel busybox; do : >"fly/$file"; done
mount --bind "$flywheel" fly/flywheel
mount --bind "$tools/nix-2.34.8/usr/bin/busybox" fly/busybox
cp -r "$repository/examples/hello" fly/hello
cp -r "$repository/docs" fly/
# This checkout as a workflow uses it, with the binary that is tried, and act.
if [ -d "$repository/target/machines/checkout" ]; then
  mkdir fly/checkout
  mount --bind "$repository/target/machines/checkout" fly/checkout
  : >fly/act
  mount --bind "$tools/bin/act" fly/act
fi
if [ -d "$tools/nix-closure/zstd" ]; then
  mkdir fly/closure
  mount --bind "$tools/nix-closure" fly/closure
fi
make_folders

if [ "$DEBIAN" = busybox ]; then
  mkdir -p bin sbin usr/bin usr/sbin lib
  cp "$tools/nix-2.34.8/usr/bin/busybox" bin/busybox
  chroot . /bin/busybox --install -s /bin
  # A debug build is not static.
  if names_loader "$flywheel"; then
    echo "$flywheel is not static: this busybox machine gets a C library" >&2
    mkdir lib64
    libraries=$tools/debian-sid/usr/lib/x86_64-linux-gnu
    cp -L "$libraries/ld-linux-x86-64.so.2" lib64/
    for library in libc.so.6 libm.so.6 libgcc_s.so.1; do cp -L "$libraries/$library" lib/; done
  fi
  make_users /bin/sh
else
  mkdir usr
  for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$folder"; done
  layers=
  for tree in $DEBIAN; do
    [ -d "$tools/$tree/usr" ] || { echo "$tools/$tree is missing: scripts/machines.sh unpacks it" && exit 69; }
    layers=$layers${layers:+:}$tools/$tree/usr
  done
  case $layers in
    *:*) mount -t overlay -o "lowerdir=$layers" overlay usr ;;
    *) mount --bind "$layers" usr && mount -o remount,bind,ro usr ;;
  esac
  # No program any more.
  [ "$GIT" = yes ] || mount --bind /dev/null usr/bin/git
  make_users /bin/bash
fi
[ "$NIXBLD" = yes ] || sed -i /nixbld/d etc/passwd etc/group
mkdir -p "home/${USER_HOME##*/}" etc/nix
[ "$USER_ID" = 0 ] || chown "$USER_ID:$USER_ID" "home/${USER_HOME##*/}"
[ -z "$SETTINGS" ] || echo "$SETTINGS" >etc/nix/nix.conf

case $NIX_FOLDER in
  absent) ;;
  empty) mkdir nix && chown "$USER_ID:$USER_ID" nix ;;
  "everyone's") mkdir nix && mount -t tmpfs -o mode=777 tmpfs nix ;;
  "root's") mkdir nix ;;
  read-only) mkdir nix && mount -t tmpfs -o ro tmpfs nix ;;
  noexec) mkdir nix && mount -t tmpfs -o mode=777,noexec tmpfs nix ;;
  link) mkdir other && ln -s other nix ;;
  dangling) ln -s nowhere nix ;;
  installed-read-only)
    mkdir -p nix/store nix/var/nix/profiles/default/bin
    cp -L usr/bin/nix nix/var/nix/profiles/default/bin/
    mount --bind /dev/null usr/bin/nix
    mount --bind nix nix
    mount -o remount,bind,ro nix
    ;;
  store) mkdir -p nix/var/nix/daemon-socket && mkdir -m 1775 nix/store && chown 0:30000 nix/store ;;
esac
echo '127.0.0.1 machine' >>etc/hosts
if [ "$SUDO" = yes ]; then
  mkdir -p etc/sudoers.d etc/pam.d run/sudo
  printf '%s\n' 'root ALL=(ALL:ALL) ALL' "$USER_NAME ALL=(ALL:ALL) NOPASSWD: ALL" >etc/sudoers
  chmod 440 etc/sudoers
  for kind in auth account session; do echo "$kind required pam_permit.so"; done >etc/pam.d/sudo
fi
cat >fly/machine <<END_OF_MACHINE
USER_NAME=$USER_NAME USER_ID=$USER_ID USER_HOME=$USER_HOME HOME_FOLDER=$HOME_FOLDER DAEMON=$DAEMON FULL=$FULL EVENT=$EVENT PAGE=$PAGE
END_OF_MACHINE

leave_host /fly/busybox
/fly/busybox hostname machine
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
case $NAMESPACES in
  allowed) exec /fly/busybox sh "$@" ;;
  chroot)
    /fly/busybox mkdir /jail
    /fly/busybox mount --rbind / /jail
    exec /fly/busybox chroot /jail /fly/busybox sh "$@"
    ;;
esac

# In a user namespace of its own, with as many users as there are, the limit can be set without changing the host's.
/fly/busybox mkfifo /run/mapped
# shellcheck disable=SC2016
/fly/busybox unshare -U /fly/busybox sh -c '
  read -r _ </run/mapped
  exec /fly/busybox sh -c "echo 0 >/proc/sys/user/max_user_namespaces && exec /fly/busybox sh \"\$@\"" - "$@"' - "$@" &
inside=$!
until [ "$(/fly/busybox readlink /proc/$inside/ns/user)" != "$(/fly/busybox readlink /proc/self/ns/user)" ]; do
  /fly/busybox usleep 10000
done
echo '0 0 65536' >/proc/$inside/uid_map
echo '0 0 65536' >/proc/$inside/gid_map
echo >/run/mapped
wait $inside
