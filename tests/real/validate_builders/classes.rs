//! The classes that build containers and kernel modules, on a real Docker, a real compiler and real headers.

use std::fs::File;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use tempfile::TempDir;

use super::{Builder, broken};
use crate::world::processes::{signal, wait_until};
use crate::world::{PATH, folders, must, need, root};

/// A Docker daemon of the test's own, with no network; it ends with this value.
struct Docker {
    folder: TempDir,
    child: Child,
    path: String,
}

impl Docker {
    /// Starts it: the one that `scripts/bootstrap.sh tools` unpacked, else the host's.
    fn start() -> Self {
        let unpacked = root().join("target/tools/docker/usr");
        let path = format!(
            "{}:{}:{PATH}",
            unpacked.join("sbin").display(),
            unpacked.join("bin").display()
        );
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let plugins = folder.path().join("config/cli-plugins");
        std::fs::create_dir_all(&plugins).unwrap();
        let buildx = unpacked.join("libexec/docker/cli-plugins/docker-buildx");
        if buildx.is_file() {
            symlink(buildx, plugins.join("docker-buildx")).unwrap();
        }
        let log = File::create(folder.path().join("log")).unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let mut command = Command::new(need("unshare", "apt-get install util-linux"));
        command.args([
            "--mount",
            "--propagation",
            "private",
            "dockerd",
            "--bridge=none",
            "--iptables=false",
        ]);
        command.args([
            "--ip6tables=false",
            "--storage-driver=vfs",
            "--data-root",
            &at("data"),
            "--exec-root",
            &at("exec"),
        ]);
        command.args([
            "--pidfile",
            &at("pid"),
            "--host",
            &format!("unix://{}", at("docker.sock")),
        ]);
        folders::isolate(&mut command, folder.path()).env("PATH", &path);
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        let docker = Self {
            child: child.expect("unshare starts"),
            path,
            folder,
        };
        let up = wait_until(Duration::from_secs(60), || {
            docker.printed().contains("API listen on")
        });
        assert!(
            up,
            "dockerd does not listen (`scripts/bootstrap.sh tools` unpacks it):\n{}",
            docker.printed()
        );
        docker
    }

    fn printed(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    fn host(&self) -> String {
        format!(
            "unix://{}",
            self.folder.path().join("docker.sock").display()
        )
    }

    fn images(&self) -> String {
        must(
            Command::new("docker")
                .args(["image", "ls", "--quiet"])
                .env("PATH", &self.path)
                .env("DOCKER_HOST", self.host()),
        )
    }

    fn stop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            signal(self.child.id().try_into().unwrap(), Signal::TERM);
            self.child.wait().unwrap();
        }
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.stop();
    }
}

#[test]
fn a_docker_that_builds_an_image_is_healthy_until_it_dies() {
    let mut docker = Docker::start();
    let config = docker.folder.path().join("config").display().to_string();
    let builder = || {
        let builder = Builder::new()
            .args(&["--class", "container"])
            .env("PATH", &docker.path);
        builder
            .env("DOCKER_HOST", &docker.host())
            .env("DOCKER_CONFIG", &config)
    };
    let canary = builder().run();
    assert_eq!(
        (canary.code, canary.layer()),
        (0, ""),
        "{}\n{}",
        canary.log,
        docker.printed()
    );
    for check in ["container-endpoint", "image-build"] {
        assert_eq!(
            canary.check(check)["verdict"],
            "passed",
            "{check}\n{}",
            canary.log
        );
    }
    assert_eq!(docker.images(), "", "the canary's image is gone");
    let builder = builder();
    docker.stop();
    broken("Docker is dead", &builder, "docker");
}

/// Headers of Debian's kernel laid over `/usr` by a shell line, and their release; or the running kernel's.
fn headers() -> (String, String) {
    let unpacked = root().join("target/tools/kernel/usr");
    let release_of = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        Some(
            name.strip_prefix("linux-headers-")
                .filter(|release| !release.ends_with("-common"))?
                .to_owned(),
        )
    };
    match std::fs::read_dir(unpacked.join("src")) {
        Ok(entries) => {
            let release = entries
                .flatten()
                .find_map(release_of)
                .expect("unpacked headers");
            (
                format!(
                    "mount -t overlay -o lowerdir={}:/usr overlay /usr",
                    unpacked.display()
                ),
                release,
            )
        }
        Err(_) => (
            String::new(),
            rustix::system::uname()
                .release()
                .to_str()
                .unwrap()
                .to_owned(),
        ),
    }
}

fn include_of(release: &str) -> PathBuf {
    let debian = Path::new("/usr/src").join(format!("linux-headers-{release}"));
    let build = Path::new("/lib/modules").join(release).join("build");
    if build.is_dir() { build } else { debian }.join("include/generated/autoconf.h")
}

#[test]
fn headers_that_a_module_compiles_with_are_healthy_until_one_is_empty() {
    let (laid, release) = headers();
    let builder = || {
        let builder = Builder::new().args(&["--class", "kernel", "--kernel-release", &release]);
        builder.broken_by(&laid)
    };
    let canary = builder().run();
    assert_eq!((canary.code, canary.layer()), (0, ""), "{}", canary.log);
    for check in ["kernel-headers", "kernel-module"] {
        assert_eq!(
            canary.check(check)["verdict"],
            "passed",
            "{check}\n{}",
            canary.log
        );
    }
    let emptied = format!("mount --bind /dev/null {}", include_of(&release).display());
    broken("no configuration", &builder().broken_by(&emptied), "module");
}
