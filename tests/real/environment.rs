//! What a job's environment may lack: a home, room in the temporary folder, a bash. The job is the same all the same, or
//! ends with what is at fault.

use crate::nix_job::{Job, left_nothing, output};
use crate::world::cache::Cache;
use crate::world::runner::Report;
use crate::world::{flake, need, root};

const BUILD: &str = "nix build --no-link path:.#default";
/// A user that `/etc/passwd` does not know, as on OpenShift.
const STRANGER: &str = "64321";

#[track_caller]
fn published(report: &Report, cache: &Cache) {
    assert_eq!(report.code, 0, "{}", report.log);
    assert_eq!(output(report, "lost"), "0", "{}", report.log);
    let names = cache.names();
    for name in ["app", "base", "bin", "lib"] {
        assert!(
            names.iter().any(|found| found == name),
            "{names:?}\n{}",
            report.log
        );
    }
    left_nothing(report);
}

/// Lines of shell by which the step goes on as `STRANGER`, with what `lines` export.
fn as_stranger(job: Job, lines: &str) -> Job {
    let top = job.step.folder().display().to_string();
    let setpriv = need("setpriv", "apt-get install util-linux");
    let setpriv = setpriv.display();
    let again = format!(
        r#"if [ "$(id -u)" = 0 ]; then
  chmod 755 {top}
  chown -R {STRANGER} {top} /nix
  {lines}
  exec {setpriv} --reuid {STRANGER} --regid {STRANGER} --clear-groups --pdeathsig keep bash -e "$0"
fi"#
    );
    Job {
        step: job.step.after(&again),
        nix: job.nix,
    }
}

#[test]
fn without_a_home_to_write_to_a_job_publishes_all_the_same() {
    let unset = "unset HOME XDG_STATE_HOME XDG_RUNTIME_DIR";
    for (lines, note) in [
        ("", "`HOME` is not set, and `/etc/passwd` names no home"),
        ("export HOME=/", "`/` cannot be written to"),
        (
            "export HOME=/nonexistent",
            "`/nonexistent` cannot be written to",
        ),
        (
            "mkdir -m 1777 \"$TMPDIR/home\"; export HOME=$TMPDIR/home",
            "belongs to another user, and Nix refuses it",
        ),
        (
            "mkdir \"$TMPDIR/home\"; mount -t tmpfs -o ro,mode=755,uid=64321 none \"$TMPDIR/home\"; export HOME=$TMPDIR/home",
            "home` cannot be written to",
        ),
        // What serves this folder answers nobody, like a server that is gone.
        (
            "mkdir -m 755 \"$TMPDIR/served\"; mkfifo \"$TMPDIR/pipe\"; exec 8<>\"$TMPDIR/pipe\"; mount -t autofs -o fd=8,pgrp=1,minproto=5,maxproto=5,indirect none \"$TMPDIR/served\"; export HOME=$TMPDIR/served/runner",
            "served/runner` does not answer within 3 s",
        ),
    ] {
        let cache = Cache::start(&["--private"]);
        let job = as_stranger(Job::new(&cache, BUILD), &format!("{unset}; {lines}"));
        let report = job.step.run();
        assert!(report.log.contains(note), "{lines}: {}", report.log);
        published(&report, &cache);
    }
}

#[test]
fn without_the_variable_the_home_is_that_of_passwd() {
    let cache = Cache::start(&["--private"]);
    let job = Job::new(&cache, &format!("echo \"home: $HOME\"; {BUILD}"));
    let report = job.step.after("unset HOME").run();
    assert!(report.log.contains("home: /root\n"), "{}", report.log);
    assert!(
        report
            .log
            .contains("`HOME` is not set: it is `/root` for this job"),
        "{}",
        report.log
    );
    published(&report, &cache);
}

#[test]
fn a_full_temporary_folder_is_the_hosts_fault() {
    let cache = Cache::start(&["--private"]);
    // Room for the folders and the files without content, and for nothing that is in one.
    let fill = "mount -t tmpfs -o size=64k,mode=1777 none \"$RUNNER_TEMP\"
! dd if=/dev/zero of=\"$RUNNER_TEMP/full\" bs=4k 2>/dev/null";
    let job = Job::new(&cache, BUILD);
    let temp = job.step.temp();
    let report = job.step.after(fill).run();
    assert_eq!(report.code, 69, "{}", report.log);
    assert_eq!(output(&report, "outcome"), "not-started");
    let log = &report.log;
    assert!(log.contains("No space left on device"), "{log}");
    let disk = format!("{} (tmpfs)`: 0 B of 64.0 KiB are left", temp.display());
    assert!(log.contains(&disk), "{log}");
    assert!(!log.contains("`command`"), "{log}");
}

#[test]
fn without_certificates_nix_is_given_some() {
    let cache = Cache::start(&["--private"]);
    let command = format!("grep -c 'BEGIN CERTIFICATE' \"$NIX_SSL_CERT_FILE\"; {BUILD}");
    let job = Job::new(&cache, &command);
    // Every place where a distribution has them.
    let hide = "for folder in /etc/ssl /etc/pki; do [ ! -d \"$folder\" ] || mount -t tmpfs none \"$folder\"; done";
    let report = job.step.after(hide).run();
    assert!(
        report.log.contains("this machine has no certificates"),
        "{}",
        report.log
    );
    published(&report, &cache);
}

/// A root in which there is nothing but a busybox, and Nix with what it is linked to. What follows runs there.
const BUSYBOX_ONLY: &str = r#"
new=$TMPDIR/root
mkdir "$new"
mount -t tmpfs -o mode=755 none "$new"
cd "$new"
mkdir -p bin usr/bin etc proc dev nix tmp ".$TOP"
cp "$BUSYBOX" bin/busybox
chroot . /bin/busybox --install -s /bin
rm -f bin/bash
for folder in /lib /lib64 /usr/lib /usr/libexec; do
  [ -d "$folder" ] || continue
  mkdir ".$folder"
  mount --rbind "$folder" ".$folder"
done
for tool in nix nix-store nix-build nix-env nix-daemon; do
  touch "usr/bin/$tool"
  mount --bind "$(command -v "$tool")" "usr/bin/$tool"
done
echo root:x:0:0::/root:/bin/sh >etc/passwd
mount --rbind /dev dev
mount -t proc proc proc
mount --rbind /nix nix
mount --bind "$TOP" ".$TOP"
cp "$FLYWHEEL" bin/flywheel
chroot=$(command -v chroot)
export FLYWHEEL_BIN=/bin/flywheel PATH=/usr/bin:/bin
"#;

#[test]
fn an_image_without_bash_runs_the_action() {
    let action = std::fs::read_to_string(root().join("actions/nix-job/action.yml")).unwrap();
    // As the runner does it: `sh -e {0}`.
    assert!(action.contains("\n      shell: sh\n"));
    let (_, run) = action.rsplit_once("\n      run: ").unwrap();
    let cache = Cache::start(&["--private"]);
    let command = format!("if command -v bash; then exit 1; fi; {BUILD}");
    let job = Job::new(&cache, &command);
    let workspace = job.step.workspace();
    flake::write(&workspace);
    let top = job.step.folder().to_owned();
    let (own, dist) = (top.join("action/actions/nix-job"), top.join("action/dist"));
    for folder in [&own, &dist] {
        std::fs::create_dir_all(folder).unwrap();
    }
    std::fs::copy(root().join("dist/flywheel"), dist.join("flywheel")).unwrap();
    std::fs::write(top.join("run.sh"), run).unwrap();
    let busybox = need("busybox", "apt-get install busybox-static");
    let enter = format!(
        "{BUSYBOX_ONLY}exec \"$chroot\" . /bin/sh -c 'cd {} && exec sh -e {}/run.sh'",
        workspace.display(),
        top.display()
    );
    let report = job
        .step
        .with_env("TOP", top.to_str().unwrap())
        .with_env("BUSYBOX", busybox.to_str().unwrap())
        .with_env("FLYWHEEL", crate::world::binary().to_str().unwrap())
        .with_env("GITHUB_ACTION_PATH", own.to_str().unwrap())
        // There are no user namespaces within `chroot`.
        .with_env("NIX_CONFIG", "sandbox = false\nsubstituters =")
        .after(&enter)
        .run();
    assert!(
        report
            .log
            .contains("the command runs under `/bin/sh` with `-e`"),
        "{}",
        report.log
    );
    published(&report, &cache);
}
