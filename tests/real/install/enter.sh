#!/bin/sh
# Makes a root with a busybox and nothing else, and runs a script of OUT in it as root. Called by `unshare` in fresh
# namespaces for mounts, processes and network. The closures of `scripts/nix-closure.sh` are in /fly/closure.
#
#   usage: enter.sh REPOSITORY FLYWHEEL OUT
set -eu
repository=$1 flywheel=$2 out=$3
tools=$repository/target/tools
debian=$tools/nix-2.34.8/usr
. "$repository/tests/guest/root.sh"

new=$out/root
mkdir -p "$new"
mount -t tmpfs -o mode=755,size=1g tmpfs "$new"
cd "$new"
mkdir bin fly fly/closure out
mount --bind "$out" out
mount --bind "$tools/nix-closure" fly/closure
: >fly/flywheel
mount --bind "$flywheel" fly/flywheel
cp "$debian/bin/busybox" bin/busybox
chroot . /bin/busybox --install -s /bin
# A debug build is not static.
if grep -q /lib64/ld-linux-x86-64.so.2 "$flywheel"; then
  mkdir lib lib64
  cp -L "$debian/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" lib64/
  for library in libc.so.6 libm.so.6 libgcc_s.so.1; do cp -L "$debian/lib/x86_64-linux-gnu/$library" lib/; done
fi
make_folders
make_users /bin/sh
leave_host /bin/busybox
exec /bin/busybox sh /out/script.sh
