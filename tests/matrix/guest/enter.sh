#!/bin/sh
# Makes a root of its own in memory, with the Nix that is named, an empty /nix and two ordinary users, and becomes RUN
# in it. Called by `unshare` in fresh namespaces for mounts, processes and network; after this nothing of the host is
# in sight but OUT.
#
#   usage: enter.sh NIX-FOLDER FLYWHEEL GUEST-SCRIPTS OUT RUN [ARGUMENT…]
set -eu
nix=$1 flywheel=$2 guest=$3 out=$4
shift 4

new=$out/root
mkdir -p "$new"
mount -t tmpfs -o mode=755,size=2g tmpfs "$new"
cd "$new"
mkdir usr etc dev proc sys tmp nix home root var run area out fly guest old
chmod 1777 tmp
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$folder"; done
mount --bind "$nix/usr" usr
mount -o remount,bind,ro usr
mount --bind "$out" out
mount --bind "$guest" guest
touch fly/flywheel
mount --bind "$flywheel" fly/flywheel
mount --rbind /sys sys
mount -t proc proc proc

for device in null zero full random urandom tty; do
  touch "dev/$device"
  mount --bind "/dev/$device" "dev/$device"
done
mkdir -m 1777 dev/shm
mkdir dev/pts
mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr

cat >etc/passwd <<END
root:x:0:0:root:/root:/bin/bash
alice:x:1000:1000:alice:/home/alice:/bin/bash
bob:x:1001:1001:bob:/home/bob:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
END
cat >etc/group <<END
root:x:0:
alice:x:1000:
bob:x:1001:
nogroup:x:65534:
nixbld:x:30000:nixbld1,nixbld2,nixbld3,nixbld4
END
for n in 1 2 3 4; do echo "nixbld$n:x:3000$n:30000::/var/empty:/bin/false" >>etc/passwd; done
echo '127.0.0.1 localhost' >etc/hosts
echo 'hosts: files' >etc/nsswitch.conf
ln -s ../proc/self/mounts etc/mtab
mkdir -p var/empty etc/nix home/alice home/bob
chown 1000:1000 home/alice area
chown 1001:1001 home/bob
chmod 755 area

pivot_root . old
cd /
busybox umount -l /old
rmdir /old
# With no address but 127.0.0.1 Nix takes itself to be offline, and asks no substituter at all.
if [ "${NETWORK-own}" = own ]; then
  busybox ip link set lo up
  busybox ip addr add 10.0.0.1/32 dev lo
fi
exec "$@"
