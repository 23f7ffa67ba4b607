# The machines: what each is made of. Sourced by `enter.sh`; what becomes of a job on each is in ../machines.rs.

# A daemon builds in its sandbox, where the example finds the shell that it is built with.
DAEMONS_SETTINGS='build-users-group = nixbld
substituters =
sandbox = true
extra-sandbox-paths = /bin/sh=/fly/busybox'

# Sets what a machine is made of:
#   DEBIAN        folders of unpacked packages that make its /usr, the first on top; `busybox` for busybox alone
#   USER_NAME     whose job it is: root, alice, or stranger, who has no entry in /etc/passwd
#   NIX_FOLDER    /nix: absent, empty (the user's), everyone's, root's, read-only, noexec, link, dangling (a link to nowhere),
#                 store (as an installation left it), or installed-read-only (with a Nix in it)
#   NAMESPACES    user namespaces: allowed, or forbidden by `sysctl` or `chroot`
#   SUDO          whether sudo asks the user for no password
#   DAEMON        none, alive, stale (a socket that nobody listens on), or socket (it is started by its socket)
#   SETTINGS      /etc/nix/nix.conf
#   HOME_FOLDER   set, unset, or read-only
#   FULL          whether the folders for temporary files, the system's and the runner's, are full
#   EVENT         the payload of the event: file, or fifo
#   GIT           whether git is there, if the Debian has it
#   PAGE          the page of docs/start whose workflow runs there
#   NIXBLD        whether the group of the build users is there
describe() {
  DEBIAN= USER_NAME=alice NIX_FOLDER=absent NAMESPACES=allowed SUDO=no DAEMON=none SETTINGS= HOME_FOLDER=set FULL=no
  EVENT=file NIXBLD=yes GIT=yes PAGE=hosted
  case $1 in
    # Without Nix, and with sudo, as GitHub's runners are.
    debian-12-sudo) DEBIAN=debian-12 SUDO=yes ;;
    debian-13-sudo) DEBIAN=debian-13 SUDO=yes ;;
    debian-sid-sudo) DEBIAN=debian-sid SUDO=yes ;;
    # The closure is made of Debian's Nix, whose sandbox has a shell that only Debian's package brings; upstream's has its own.
    hosted-runner) DEBIAN=debian-12 SUDO=yes SETTINGS='sandbox-paths = /bin/sh=/fly/busybox' ;;
    # A runner's pod, with a volume at /nix and nothing else; and a host whose root follows docs/start/host.md.
    pod) DEBIAN=debian-12 NIX_FOLDER="everyone's" NAMESPACES=sysctl PAGE=pods ;;
    own-host) DEBIAN=debian-12 NAMESPACES=sysctl PAGE=host ;;
    sudo-without-namespaces) DEBIAN=debian-12 SUDO=yes NAMESPACES=sysctl ;;
    # Without Nix, as root.
    debian-12-root) DEBIAN=debian-12 USER_NAME=root ;;
    debian-13-root) DEBIAN=debian-13 USER_NAME=root NIX_FOLDER="root's" ;;
    busybox-root) DEBIAN=busybox USER_NAME=root ;;
    root-read-only-nix) DEBIAN=debian-13 USER_NAME=root NIX_FOLDER=read-only ;;
    # Without Nix, as a user with a /nix of one kind or another, and without sudo.
    own-nix) DEBIAN=debian-12 NIX_FOLDER=empty NAMESPACES=sysctl ;;
    busybox-own-nix) DEBIAN=busybox NIX_FOLDER=empty NAMESPACES=sysctl ;;
    everyones-nix) DEBIAN=debian-13 NIX_FOLDER="everyone's" NAMESPACES=sysctl ;;
    roots-nix) DEBIAN=debian-13 NIX_FOLDER="root's" ;;
    roots-nix-without-namespaces) DEBIAN=debian-13 NIX_FOLDER="root's" NAMESPACES=sysctl ;;
    read-only-nix) DEBIAN=debian-12 NIX_FOLDER=read-only ;;
    read-only-nix-without-namespaces) DEBIAN=debian-12 NIX_FOLDER=read-only NAMESPACES=sysctl ;;
    noexec-nix) DEBIAN=debian-12 NIX_FOLDER=noexec NAMESPACES=sysctl ;;
    linked-nix-root) DEBIAN=debian-12 USER_NAME=root NIX_FOLDER=link ;;
    dangling-nix-sudo) DEBIAN=debian-12 NIX_FOLDER=dangling SUDO=yes ;;
    no-nix) DEBIAN=debian-12 ;;
    busybox-no-nix) DEBIAN=busybox ;;
    no-nix-home-unset) DEBIAN=debian-13 HOME_FOLDER=unset ;;
    no-nix-home-unset-stranger) DEBIAN=debian-12 HOME_FOLDER=unset USER_NAME=stranger ;;
    no-nix-home-read-only) DEBIAN=debian-sid HOME_FOLDER=read-only ;;
    no-nix-without-namespaces) DEBIAN=debian-12 NAMESPACES=sysctl ;;
    no-nix-in-chroot) DEBIAN=debian-sid NAMESPACES=chroot ;;
    nix-in-read-only-nix) DEBIAN='nix-2.34.8 debian-sid' NIX_FOLDER=installed-read-only ;;
    # Debian's package without a /nix.
    nix-bin-2.8) DEBIAN='nix-2.8.0 debian-12' ;;
    nix-bin-2.26) DEBIAN='nix-2.26.3 debian-13' ;;
    nix-bin-2.34) DEBIAN='nix-2.34.8 debian-sid' ;;
    nix-bin-sudo) DEBIAN='nix-2.8.0 debian-12' SUDO=yes ;;
    nix-bin-without-namespaces) DEBIAN='nix-2.8.0 debian-12' NAMESPACES=sysctl ;;
    # A daemon for all users.
    daemon-2.8) DEBIAN='nix-2.8.0 debian-12' NIX_FOLDER=store DAEMON=alive SETTINGS=$DAEMONS_SETTINGS ;;
    daemon-2.26) DEBIAN='nix-2.26.3 debian-13' NIX_FOLDER=store DAEMON=alive SETTINGS=$DAEMONS_SETTINGS ;;
    daemon-2.34) DEBIAN='nix-2.34.8 debian-sid' NIX_FOLDER=store DAEMON=alive SETTINGS=$DAEMONS_SETTINGS ;;
    daemon-by-socket) DEBIAN='nix-2.26.3 debian-13' NIX_FOLDER=store DAEMON=socket SETTINGS=$DAEMONS_SETTINGS ;;
    daemon-stale) DEBIAN='nix-2.26.3 debian-13' NIX_FOLDER=store DAEMON=stale NAMESPACES=sysctl SETTINGS=$DAEMONS_SETTINGS ;;
    daemon-stale-root) DEBIAN='nix-2.34.8 debian-sid' NIX_FOLDER=store DAEMON=stale USER_NAME=root SETTINGS=$DAEMONS_SETTINGS ;;
    # Settings that keep Nix from working.
    no-nix-command) DEBIAN='nix-2.8.0 debian-12' NIX_FOLDER=empty SETTINGS='experimental-features =' ;;
    no-nixbld) DEBIAN='nix-2.26.3 debian-13' NIX_FOLDER="root's" USER_NAME=root NIXBLD=no ;;
    no-git) DEBIAN='nix-2.8.0 debian-12' NIX_FOLDER=empty GIT=no ;;
    # Homes.
    home-unset) DEBIAN='nix-2.8.0 debian-12' NIX_FOLDER=empty HOME_FOLDER=unset ;;
    home-unset-stranger) DEBIAN='nix-2.26.3 debian-13' NIX_FOLDER=empty HOME_FOLDER=unset USER_NAME=stranger ;;
    home-read-only) DEBIAN='nix-2.34.8 debian-sid' NIX_FOLDER=empty HOME_FOLDER=read-only ;;
    # Files.
    tmp-full) DEBIAN='nix-2.26.3 debian-13' NIX_FOLDER=empty FULL=yes ;;
    fifo-event) DEBIAN='nix-2.26.3 debian-13' NIX_FOLDER=empty EVENT=fifo ;;
    # The judge's own: an ordinary machine with a store of root's.
    judge) DEBIAN='nix-2.34.8 debian-sid' NIX_FOLDER="root's" USER_NAME=root SETTINGS='build-users-group =' ;;
    *)
      echo "no machine is called $1" >&2
      exit 64
      ;;
  esac
  case $USER_NAME in
    root) USER_ID=0 USER_HOME=/root ;;
    alice) USER_ID=1000 USER_HOME=/home/alice ;;
    stranger) USER_ID=4242 USER_HOME=/home/stranger ;;
  esac
}
