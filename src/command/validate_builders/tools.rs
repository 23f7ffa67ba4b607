//! Checks of the classes that build without Nix: tools with their versions, a container builder, a kernel builder.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::check_list::{CheckFailure, CheckList, CheckSpec, Found};
use super::inputs::Plan;
use flywheel_core::contract::Requirement;
use flywheel_core::text::one_line;
use flywheel_nix::tool::on_path;
use flywheel_sys::process::capture::{Output, Tool};
use flywheel_sys::runner::env::Env;

const TOOL: CheckSpec = CheckSpec::required("tool", "tools", 10);
const ENDPOINT: CheckSpec = CheckSpec::required("container-endpoint", "docker", 15);
const IMAGE: CheckSpec = CheckSpec::required("image-build", "image-build", 60);
const HEADERS: CheckSpec = CheckSpec::required("kernel-headers", "headers", 5);
const MODULE: CheckSpec = CheckSpec::required("kernel-module", "module", 60);

/// The variables by which a container tool finds its server. None holds a secret.
const VARIABLES: [&str; 11] = [
    "PATH",
    "HOME",
    "LANG",
    "TMPDIR",
    "XDG_RUNTIME_DIR",
    "DOCKER_HOST",
    "DOCKER_TLS_VERIFY",
    "DOCKER_CERT_PATH",
    "DOCKER_CONFIG",
    "DOCKER_CONTEXT",
    "BUILDKIT_HOST",
];

fn tool(program: &Path, env: &Env) -> Tool {
    let given = VARIABLES
        .iter()
        .filter_map(|name| Some((*name, env.path(name)?)));
    Tool::new(program).envs(given)
}

/// Checks each tool that the contract names for the class, and its version. Nix has checks of its own.
pub(super) async fn tools(list: &mut CheckList, plan: &Plan, env: &Env) {
    for (name, wanted) in plan.tools.iter().filter(|(name, _)| name != "nix") {
        list.check(TOOL, |limit| versioned(name, wanted, env, limit))
            .await;
        let last = list
            .checks
            .last_mut()
            .expect("it has just been written down");
        last.name = format!("tool-{name}");
    }
}

async fn versioned(name: &str, wanted: &Requirement, env: &Env, limit: Duration) -> Found<()> {
    let hint = format!("Put {name} ({wanted}) into the image of this class.");
    let Some(program) = on_path(env, name) else {
        return Err(CheckFailure::new(
            format!("there is no `{name}` on `PATH`"),
            hint,
        ));
    };
    let output = tool(&program, env).arg("--version").run(limit).await;
    let output = output.map_err(|error| CheckFailure::new(error.to_string(), hint.clone()))?;
    let text = output.text();
    let line = one_line(text.lines().next().unwrap_or_default(), 100);
    if !output.status.success() {
        return Err(CheckFailure::new(
            format!("`{name} --version` fails: {}", last_line(&output)),
            hint,
        ));
    }
    if wanted.allows(&line) {
        Ok(((), line))
    } else {
        Err(CheckFailure::new(
            format!("it is `{line}`, and the class wants {wanted}"),
            hint,
        ))
    }
}

fn last_line(output: &Output) -> String {
    let line = output
        .stderr
        .lines()
        .rev()
        .find(|line| !line.trim().is_empty())
        .unwrap_or("it said nothing");
    one_line(line, 300)
}

/// The program that builds images here.
enum Builder {
    Docker(PathBuf),
    Buildctl(PathBuf, String),
}

/// Checks that the container endpoint answers, and that it builds an image from scratch.
pub(super) async fn container(list: &mut CheckList, plan: &Plan, env: &Env) {
    let builder = list.check(ENDPOINT, |limit| endpoint(env, limit)).await;
    match builder {
        Some(builder) => drop(
            list.check(IMAGE, |limit| image(&builder, plan, env, limit))
                .await,
        ),
        None => list.skip(IMAGE, "it stands on `container-endpoint`"),
    }
}

async fn endpoint(env: &Env, limit: Duration) -> Found<Builder> {
    let hint = "Start the Docker or BuildKit daemon beside the runner, and point `DOCKER_HOST` or `BUILDKIT_HOST` to it.";
    let (builder, command) = match (
        env.get("BUILDKIT_HOST"),
        on_path(env, "buildctl"),
        on_path(env, "docker"),
    ) {
        (Some(host), Some(program), _) => {
            let command = tool(&program, env).args(["--addr", host, "debug", "workers"]);
            (Builder::Buildctl(program, host.to_owned()), command)
        }
        (_, _, Some(program)) => {
            let command = tool(&program, env).args(["version", "--format", "{{.Server.Version}}"]);
            (Builder::Docker(program), command)
        }
        _ => {
            return Err(CheckFailure::new(
                "there is neither `docker` nor `buildctl` with `BUILDKIT_HOST`",
                hint,
            ));
        }
    };
    let output = command
        .run(limit)
        .await
        .map_err(|error| CheckFailure::new(error.to_string(), hint))?;
    if !output.status.success() {
        return Err(CheckFailure::new(
            format!("it does not answer: {}", last_line(&output)),
            hint,
        ));
    }
    let text = match &builder {
        Builder::Docker(_) => format!("Docker {}", one_line(output.text().trim(), 60)),
        Builder::Buildctl(..) => "BuildKit".to_owned(),
    };
    Ok((builder, text))
}

/// Builds from nothing but a file that is new in every run, so that no layer can come from a cache.
async fn image(builder: &Builder, plan: &Plan, env: &Env, limit: Duration) -> Found<()> {
    let hint = "Build a small image by hand on the runner, and look at the daemon's log.";
    let broken = |text: String| CheckFailure::new(text, hint);
    let nonce = format!("{:032x}", fastrand::u128(..));
    let folder = tempfile::Builder::new()
        .prefix("flywheel-canary-")
        .tempdir_in(&plan.temporary);
    let folder = folder.map_err(|error| broken(error.to_string()).at("temporary-space"))?;
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
    write("Dockerfile", "FROM scratch\nCOPY nonce /nonce\n")
        .and_then(|()| write("nonce", &nonce))
        .map_err(|error| broken(error.to_string()).at("temporary-space"))?;
    let tag = format!("flywheel-canary:{nonce}");
    let (program, command) = match builder {
        Builder::Docker(program) => {
            let command = tool(program, env)
                .args(["build", "--quiet", "--tag", &tag])
                .arg(folder.path());
            (program, command)
        }
        Builder::Buildctl(program, host) => {
            let local = |name: &str| format!("{name}={}", folder.path().display());
            let command =
                tool(program, env).args(["--addr", host, "build", "--frontend", "dockerfile.v0"]);
            (
                program,
                command.args([
                    "--local",
                    &local("context"),
                    "--local",
                    &local("dockerfile"),
                ]),
            )
        }
    };
    let output = command
        .run(limit)
        .await
        .map_err(|error| broken(error.to_string()))?;
    if !output.status.success() {
        return Err(broken(format!("the build fails: {}", last_line(&output))));
    }
    if matches!(builder, Builder::Docker(_)) {
        // The image has a few bytes, so it does no harm if it cannot be removed.
        let _ = tool(program, env)
            .args(["image", "rm", "--force", &tag])
            .run(limit)
            .await;
    }
    Ok(((), "an image from scratch is built".to_owned()))
}

/// Checks that there are headers for a kernel, and that a module compiles with them.
pub(super) async fn kernel(list: &mut CheckList, plan: &Plan, env: &Env) {
    let release = plan.kernel_release.clone();
    let headers = list
        .check(HEADERS, |_| async move { headers(release.as_deref()) })
        .await;
    match headers {
        Some(folder) => drop(
            list.check(MODULE, |limit| module(&folder, plan, env, limit))
                .await,
        ),
        None => list.skip(MODULE, "it stands on `kernel-headers`"),
    }
}

fn headers(release: Option<&str>) -> Found<PathBuf> {
    let running = rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned();
    let release = release.unwrap_or(&running);
    let places = [
        format!("/lib/modules/{release}/build"),
        format!("/usr/src/kernels/{release}"),
        format!("/usr/src/linux-headers-{release}"),
    ];
    match places
        .iter()
        .map(PathBuf::from)
        .find(|folder| folder.join("Makefile").is_file())
    {
        Some(folder) => {
            let text = format!("for {release} in `{}`", folder.display());
            Ok((folder, text))
        }
        None => Err(CheckFailure::new(
            format!("there are none for {release} in {}", places.join(", ")),
            "Install the headers of that kernel, or name the kernel to build for in `kernel-release`.",
        )),
    }
}

async fn module(headers: &Path, plan: &Plan, env: &Env, limit: Duration) -> Found<()> {
    const SOURCE: &str = "#include <linux/module.h>\nMODULE_LICENSE(\"GPL\");\nstatic int __init hello(void) { return 0; }\nmodule_init(hello);\n";
    let hint = "Compile a module by hand on the runner; compiler and headers must fit each other.";
    let broken = |text: String| CheckFailure::new(text, hint);
    let Some(make) = on_path(env, "make") else {
        return Err(broken("there is no `make` on `PATH`".to_owned()).at("tools"));
    };
    let folder = tempfile::Builder::new()
        .prefix("flywheel-canary-")
        .tempdir_in(&plan.temporary);
    let folder = folder.map_err(|error| broken(error.to_string()).at("temporary-space"))?;
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text);
    write("hello.c", SOURCE)
        .and_then(|()| write("Makefile", "obj-m := hello.o\n"))
        .map_err(|error| broken(error.to_string()).at("temporary-space"))?;
    let command = tool(&make, env)
        .arg("-C")
        .arg(headers)
        .arg(format!("M={}", folder.path().display()))
        .arg("hello.o");
    let output = command
        .run(limit)
        .await
        .map_err(|error| broken(error.to_string()))?;
    if !output.status.success() {
        return Err(broken(format!(
            "it does not compile: {}",
            last_line(&output)
        )));
    }
    if !folder.path().join("hello.o").is_file() {
        return Err(broken("`make` ends well and leaves no object".to_owned()));
    }
    Ok(((), "a module's object compiles".to_owned()))
}
