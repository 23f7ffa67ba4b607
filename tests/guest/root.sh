# What roots of machines made for a test have in common. Sourced by the scripts that make them, in fresh namespaces and in
# the folder that becomes the root.

# Folders that every root has, with the kernel's file systems and the devices that programs expect.
make_folders() {
  mkdir -p etc dev proc sys tmp home root var/empty run old
  chmod 1777 tmp
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
}

# Two ordinary users, and the build users of a daemon.
make_users() {
  cat >etc/passwd <<END_OF_USERS
root:x:0:0:root:/root:${1-/bin/bash}
alice:x:1000:1000:alice:/home/alice:${1-/bin/bash}
bob:x:1001:1001:bob:/home/bob:${1-/bin/bash}
nobody:x:65534:65534:nobody:/nonexistent:/bin/false
END_OF_USERS
  cat >etc/group <<END_OF_GROUPS
root:x:0:
alice:x:1000:
bob:x:1001:
nogroup:x:65534:
nixbld:x:30000:nixbld1,nixbld2,nixbld3,nixbld4
END_OF_GROUPS
  for n in 1 2 3 4; do echo "nixbld$n:x:3000$n:30000::/var/empty:/bin/false" >>etc/passwd; done
  echo '127.0.0.1 localhost' >etc/hosts
  echo 'hosts: files' >etc/nsswitch.conf
  ln -s ../proc/self/mounts etc/mtab
  mkdir -p home/alice home/bob
  chown 1000:1000 home/alice
  chown 1001:1001 home/bob
}

# Makes this folder the root. Afterwards nothing of the host is in sight but what was bound into it. The network is the
# machine's own unless NETWORK says otherwise. With no address but 127.0.0.1 Nix takes itself to be offline, and asks no
# substituter at all.
leave_host() {
  busybox=$1
  pivot_root . old
  cd /
  "$busybox" umount -l /old
  "$busybox" rmdir /old
  if [ "${NETWORK-own}" = own ]; then
    "$busybox" ip link set lo up
    "$busybox" ip addr add 10.0.0.1/32 dev lo
  fi
}
