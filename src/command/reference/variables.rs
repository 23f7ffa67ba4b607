//! The variables that are read and are no flag: the part of the reference about them.

use std::fmt::Write as _;

/// Each group of variables, and what they are for. A name that ends in `…` stands for all that begin so.
const VARIABLES: [(&str, &str); 14] = [
    (
        "`ATTIC_TOKEN`, `GITHUB_TOKEN`, `ACTIONS_RUNTIME_TOKEN`",
        "Tokens: for the cache; for Check Runs and for fetchers from GitHub; the runner's own, which is kept from what \
         outlives a step.",
    ),
    (
        "`AWS_…`",
        "Credentials for `cache: s3://…`, handed on to `nix copy`.",
    ),
    (
        "`ATTIC_SERVER`, `ATTIC_CACHE`, `ATTIC_PUBLIC_KEY`",
        "Hints: the cache of the machine's jobs. An input goes before them.",
    ),
    (
        "`NIX_CLOSURE`, `NIX_CLOSURE_SOURCE`",
        "Hints: the Nix that is installed where there is none, and where it comes from.",
    ),
    (
        "`BAZEL_REMOTE_CACHE`, `BAZEL_REMOTE_EXECUTOR`, `GF_BAZEL_SUBSTRATE_MODE`, `GF_FLYWHEEL_PROFILE_STATE`",
        "Hints: the shared cache of Bazel, and what the machine says of it.",
    ),
    (
        "`FLYWHEEL_BIN`, `FLYWHEEL_RELEASE_MIRROR`, `FLYWHEEL_SKIP_CHECKSUM`",
        "For the launcher: another binary, by its absolute path; where it takes the binary of a platform that the checkout \
         lacks, an `https://` URL or the absolute path of a folder (default: the release); `1` runs the checkout's own binary \
         without a check where the machine cannot compute SHA-256.",
    ),
    (
        "`FLYWHEEL_EVENT_DEFAULT_BRANCH`",
        "The default branch as the server knows it; the actions set it.",
    ),
    (
        "`GITHUB_ACTIONS`, `GITHUB_EVENT_NAME`, `GITHUB_EVENT_PATH`, `GITHUB_REF`, `GITHUB_REF_TYPE`, \
         `GITHUB_REF_PROTECTED`, `GITHUB_REPOSITORY`, `GITHUB_SHA`, `GITHUB_RUN_ID`, `GITHUB_RUN_ATTEMPT`, `GITHUB_JOB`, \
         `GITHUB_WORKFLOW`, `GITHUB_ACTION`, `GITHUB_ACTION_PATH`, `GITHUB_WORKSPACE`, `GITHUB_API_URL`, \
         `GITHUB_SERVER_URL`, `GITHUB_OUTPUT`, `GITHUB_ENV`, `GITHUB_PATH`, `GITHUB_STEP_SUMMARY`, `RUNNER_TEMP`, \
         `RUNNER_TOOL_CACHE`, `RUNNER_TRACKING_ID`, `RUNNER_ENVIRONMENT`, `RUNNER_NAME`",
        "The facts of a job on GitHub, or GitHub Enterprise Server, and where its reports go.",
    ),
    (
        "`GITLAB_CI`, `CI_PIPELINE_SOURCE`, `CI_DEFAULT_BRANCH`, `CI_COMMIT_…`, `CI_PROJECT_…`, `CI_JOB_ID`, \
         `CI_MERGE_REQUEST_…`, `CI_EXTERNAL_PULL_REQUEST_…`, `CI_OPEN_MERGE_REQUESTS`",
        "The facts of a job on GitLab.",
    ),
    (
        "`JENKINS_URL`, `BUILDKITE`, `CIRCLECI`, `TRAVIS`, `TF_BUILD`, `TEAMCITY_VERSION`, `DRONE`",
        "That this is a job of another CI. The trust gate does not know its facts, so it only reads.",
    ),
    (
        "`NIX_CONFIG`, `NIX_CONF_DIR`, `NIX_USER_CONF_FILES`, `NIX_REMOTE`, `NIX_DAEMON_SOCKET_PATH`, `NIX_STORE`, \
         `NIX_STORE_DIR`, `NIX_STATE_DIR`, `NIX_LOG_DIR`, `NIX_DATA_HOME`",
        "Nix's own, as Nix reads them.",
    ),
    (
        "`SSL_CERT_FILE`, `SSL_CERT_DIR`, `NIX_SSL_CERT_FILE`, `HTTP_PROXY`, `HTTPS_PROXY`, `NO_PROXY`",
        "Certificates and proxies of the network; the proxies in small letters as well.",
    ),
    (
        "`HOME`, `TMPDIR`, `XDG_CONFIG_HOME`, `XDG_CACHE_HOME`, `XDG_DATA_HOME`, `XDG_STATE_HOME`, `XDG_RUNTIME_DIR`",
        "Where files go: [below](#files).",
    ),
    (
        "`BUILDKIT_HOST`, `DOCKER_…`",
        "For the canary: where BuildKit and Docker are.",
    ),
];

/// The section about variables.
pub(super) fn page() -> String {
    let mut text = "## Variables\n\nWhat is read from the environment besides the variables of flags. Whoever names a thing by \
                    an input need not set its hint.\n\n| variables | meaning |\n|---|---|\n"
        .to_owned();
    for (names, meaning) in VARIABLES {
        let _ = writeln!(text, "| {names} | {meaning} |");
    }
    text
}
