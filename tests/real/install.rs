//! Installing Nix as a closure: from caches that stock Nix has written and signed, in a root where there is nothing but
//! a busybox, which serves them.

use std::fs;
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::world::{PATH, binary, folders, need, root};

/// A script that takes longer has hung.
const LIMIT_SECONDS: &str = "150";

/// Runs lines of shell in such a root; what they printed. `tracer` goes before everything.
fn run(tracer: &[&str], script: &str) -> (String, TempDir) {
    let paths = root().join("target/tools/nix-closure/path");
    assert!(
        paths.exists(),
        "the closure is missing: scripts/nix-closure.sh makes it"
    );
    let out = TempDir::new().unwrap();
    let prelude = fs::read_to_string(root().join("tests/real/install/prelude.sh")).unwrap();
    fs::write(
        out.path().join("script.sh"),
        format!("set -u\n{prelude}\n{script}\necho the end\n"),
    )
    .unwrap();
    let trace = out.path().join("trace");
    let words = tracer
        .iter()
        .map(|word| word.replace("TRACE", trace.to_str().unwrap()));
    let mut command = Command::new("timeout");
    folders::isolate(&mut command, out.path())
        .args(["--kill-after=5", LIMIT_SECONDS])
        .args(words)
        .args(["unshare", "--mount", "--pid", "--net", "--ipc", "--fork"])
        .args(["--kill-child", "--propagation", "private", "sh"])
        .arg(root().join("tests/real/install/enter.sh"))
        .args([root(), &binary(), out.path()])
        .env("PATH", PATH)
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    let text = [&output.stdout[..], &output.stderr]
        .map(String::from_utf8_lossy)
        .concat();
    assert!(
        output.status.success() && text.contains("the end\n"),
        "{}\n{text}",
        output.status
    );
    (text, out)
}

/// Builds with the Nix that has come, and sees that it is whole.
const USES: &str = r#"
cat >/root/default.nix <<'END'
derivation { name = "x"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo built > $out" ]; }
END
job 'set -e
nix --version
[ "$(cat "$(nix-build --no-out-link /root/default.nix)")" = built ]' || fail "exit code $?"
export PATH=$path/bin:/bin
whole
[ "$(readlink /nix/var/nix/profiles/default)" = "$path" ] || fail 'the profile'
nix-store --gc >/dev/null 2>&1 || fail 'no garbage collection'
nix --version || fail 'the collector took Nix'
"#;

#[test]
fn a_closure_of_xz_runs_where_there_is_nothing_else() {
    run(&[], &format!("serve /fly/closure/xz 8080\n{USES}"));
}

#[test]
fn no_program_runs_before_nix_itself() {
    need("strace", "apt-get install strace");
    let tracer = [
        "strace",
        "-f",
        "-e",
        "trace=execve",
        "-s",
        "400",
        "-o",
        "TRACE",
    ];
    let (_, out) = run(&tracer, &format!("serve /fly/closure/zstd 8080\n{USES}"));
    let trace = fs::read_to_string(out.path().join("trace")).unwrap();
    let started: Vec<&str> = trace
        .lines()
        .filter(|line| line.contains(" execve("))
        .skip_while(|line| !line.contains("\"/fly/flywheel\""))
        .skip(1)
        .collect();
    assert!(
        started[0].contains("-nix-2.34.8/bin/nix-store\"") && started[0].contains("\"--load-db\""),
        "{started:#?}"
    );
}

#[test]
fn what_is_damaged_is_named_and_nothing_is_left() {
    run(
        &[],
        r#"
fresh() {
  rm -rf /cache/*
  cp -r /fly/closure/zstd/. /cache/
}
mkdir /cache
serve /cache 8080
hash=${path#/nix/store/}
info=/cache/${hash%%-*}.narinfo

fresh
nar=/cache/$(sed -n 's/^URL: //p' "$info")
printf 'harmless' | dd of="$nar" bs=1 seek=100000 conv=notrunc 2>/dev/null
refused 'is not what was signed'

fresh
truncate -s 1000000 "$nar"
refused 'it ends after 1000000 of'

fresh
sed -i 's/^NarSize: 1/NarSize: 2/' "$info"
refused 'has no valid signature by `flywheel-test-1`'

fresh
other=$(ls /cache/*.narinfo | grep -v "$info" | head -n 1)
cp "$other" "$info"
refused 'answers with the description of'

fresh
rm "$other"
refused 'does not have'

fresh
rm "/cache/$(sed -n 's/^URL: //p' "$info")"
refused 'HTTP status 404'

fresh
key=another-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=
refused 'has no valid signature by `another-1`'

key=$(cat /fly/closure/key.pub)
mkdir /nix
mount -t tmpfs -o size=30m tmpfs /nix
refused 'the disk is full'
umount /nix
mount -t tmpfs -o nr_inodes=60 tmpfs /nix
refused 'the disk is full'
umount /nix

rm "$info"
serve /fly/closure/xz 8081
SOURCE="http://127.0.0.1:8080 $key
http://127.0.0.1:8081 $key"
job 'nix --version' || fail 'the second cache has it'
export PATH=$path/bin:/bin
whole
"#,
    );
}

/// Kills a job at many points, in an empty /nix and in one with an empty store, as root and as an ordinary user.
#[test]
fn a_kill_at_any_moment_leaves_nothing_half_installed() {
    run(
        &[],
        r#"
serve /fly/closure/zstd 8080
cat >/tmp/install.sh <<END
exec /fly/flywheel nix-job --nix-installer closure --nix-source 'http://127.0.0.1:8080 $key' --nix-version '$path' --command 'nix --version'
END
# A subshell's process becomes the binary.
as() {
  if [ "$1" = root ]; then exec sh /tmp/install.sh; fi
  exec su -s /bin/sh "$1" -c 'exec sh /tmp/install.sh'
}
# So many paths are unpacked, or in their place, or registered.
reached() {
  case $1 in
    registration) [ -e /nix/var/flywheel/registration ] ;;
    database) [ -e /nix/var/nix/db/db.sqlite ] ;;
    *) [ "$(ls /nix/store.partial /nix/store/.flywheel-partial 2>/dev/null | wc -l)" -ge "$1" ] ;;
  esac
}
for user in root alice; do
  for store in absent empty; do
    rm -rf /nix
    mkdir /nix
    [ $store = absent ] || mkdir /nix/store
    chown -R "$user" /nix
    for point in 1 10 30 50 registration database; do
      (as "$user") >/out/killed 2>&1 &
      job=$!
      tries=0
      until reached "$point" || [ ! -e "/proc/$job/exe" ]; do
        tries=$((tries + 1))
        [ $tries -lt 1000000 ] || fail "never reached: $point"
      done
      kill -9 $job 2>/dev/null
      wait $job
      echo "killed at $point, $store, $user: $(ls /nix /nix/store 2>/dev/null | wc -l)"
      if [ -e /nix/var/nix/profiles/default ]; then
        "$path/bin/nix" --version || fail "found, and does not run"
        [ "$point" = database ] || [ "$point" = registration ] || fail "it was faster than the test: $point"
        break
      fi
    done
    (as "$user") || fail 'the next one does not start clean'
    (
      export PATH=$path/bin:/bin
      whole
    ) || exit 1
  done
done
"#,
    );
}

/// Costs the time that an installation waits for a cache which hangs in the middle.
mod faults {
    use super::run;

    #[test]
    fn a_cache_that_hangs_in_the_middle_is_given_up() {
        run(
            &[],
            r#"
serve /fly/closure/zstd 8080
server=$(pidof httpd)
(
  until [ "$(ls /nix/store.partial 2>/dev/null | wc -l)" -ge 3 ]; do usleep 1000; done
  kill -STOP $server $(pidof httpd)
) &
refused 'nothing came for 5 s'
"#,
        );
    }
}

#[test]
fn a_release_archive_is_installed_and_taken_back() {
    run(
        &[],
        r#"
archive() {
  /fly/flywheel nix-job --nix-installer tarball --nix-mirror "$@" --command 'nix --version'
}
gone() {
  /fly/flywheel setup --undo || fail "it was not taken back: $?"
  [ -z "$(ls -A /nix 2>/dev/null)" ] || fail "something is left: $(find /nix | head -n 20)"
}
sed -i '/^nixbld/d' /etc/passwd /etc/group
cp /etc/passwd /etc/group /root/

archive /fly/closure || fail "exit code $?"
(export PATH=$path/bin:/bin && whole) || exit 1
gone

mkdir /mirror
name=nix-2.34.8-x86_64-linux.tar.xz
cp "/fly/closure/$name" /mirror/
sha256sum "/mirror/$name" >"/mirror/$name.sha256"
serve /mirror 8081
archive "http://127.0.0.1:8081/$name" --nix-daemon true || fail "exit code $?"
grep -q '^nixbld32:' /etc/passwd || fail 'no build users'
echo text >/root/file
added=$("$path/bin/nix-store" --add /root/file)
/fly/flywheel setup --undo >/out/undo 2>&1 && fail 'it was taken from under a store path'
grep -q "1 store path came into the store since, such as .$added" /out/undo || fail "$(cat /out/undo)"
"$path/bin/nix-store" --gc >/dev/null 2>&1 || fail 'no garbage collection'
gone
cmp /etc/passwd /root/passwd && cmp /etc/group /root/group || fail 'build users are left'

tr 0-9a-f 1-9a-f0 <"/mirror/$name.sha256" >/root/sum; mv /root/sum "/mirror/$name.sha256"
archive "http://127.0.0.1:8081/$name" >/out/refused 2>&1
[ $? = 69 ] || fail 'another sum was taken'
grep -q 'the sum of' /out/refused || fail "$(cat /out/refused)"
[ -z "$(ls -A /nix 2>/dev/null)" ] || fail 'something is left'
"#,
    );
}
