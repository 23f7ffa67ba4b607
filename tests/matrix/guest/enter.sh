#!/bin/sh
# Makes a root of its own in memory, with the Nix that is named, an empty /nix and two ordinary users, and becomes RUN
# in it. Called by `unshare` in fresh namespaces for mounts, processes and network; after this nothing of the host is
# in sight but OUT.
#
#   usage: enter.sh NIX-FOLDER FLYWHEEL GUEST-SCRIPTS OUT RUN [ARGUMENT…]
set -eu
shared=$(cd "$(dirname "$0")/../../guest" && pwd -P)
. "$shared/root.sh"
nix=$1 flywheel=$2 guest=$3 out=$4
shift 4

new=$out/root
mkdir -p "$new"
mount -t tmpfs -o mode=755,size=2g tmpfs "$new"
cd "$new"
mkdir usr nix area out fly guest shared
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$folder"; done
mount --bind "$nix/usr" usr
mount -o remount,bind,ro usr
mount --bind "$out" out
mount --bind "$guest" guest
mount --bind "$shared" shared
touch fly/flywheel
mount --bind "$flywheel" fly/flywheel
make_folders
make_users
mkdir -p etc/nix
chown 1000:1000 area
chmod 755 area

leave_host busybox
exec "$@"
