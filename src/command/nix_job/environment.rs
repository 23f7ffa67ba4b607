//! The environment of the user's command: the job's own, without tokens and inputs that are for Flywheel alone.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use flywheel_sys::runner::env::{Env, join_path, split_path};

/// What a shell searches where `PATH` names nothing.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The cache's token is for the publisher; Nix gets it through the netrc.
const TOKENS: [&str; 1] = ["ATTIC_TOKEN"];
/// The prefix of Flywheel's inputs, the command's text among them.
const INPUT_PREFIX: &str = "FLYWHEEL_";

/// The command's environment, with `config` as its `NIX_CONFIG` and the variables that repair Nix. `nix_folder` is put
/// first on its `PATH`; it is `None` where Nix is on `PATH` already.
pub(super) fn for_command(
    env: &Env,
    config: &str,
    nix_folder: Option<&Path>,
    repairs: &[(&str, &str)],
) -> BTreeMap<OsString, OsString> {
    let kept = env
        .all()
        .filter(|(name, _)| !TOKENS.contains(name) && !name.starts_with(INPUT_PREFIX));
    let mut variables: BTreeMap<OsString, OsString> = kept
        .map(|(name, value)| (OsString::from(name), value.clone()))
        .collect();
    variables.insert("NIX_CONFIG".into(), config.into());
    variables.extend(
        repairs
            .iter()
            .map(|(name, value)| (OsString::from(name), OsString::from(value))),
    );
    if let Some(folder) = nix_folder {
        let path = variables
            .remove(&OsString::from("PATH"))
            .unwrap_or_default();
        // Nothing on it is the current folder to a shell, and so the checkout.
        let path = if path.is_empty() {
            SYSTEM_PATH.into()
        } else {
            path
        };
        let folders = std::iter::once(folder.to_owned()).chain(split_path(&path));
        variables.insert("PATH".into(), join_path(folders).unwrap_or(path));
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_path_the_checkout_is_not_searched() {
        for pairs in [&[][..], &[("PATH", "")]] {
            let env = Env::from_pairs(pairs.iter().copied());
            let variables = for_command(&env, "", Some(Path::new("/opt/nix/bin")), &[]);
            let path = variables[&OsString::from("PATH")].to_str().expect("text");
            assert!(
                path.starts_with("/opt/nix/bin:") && path.contains(":/usr/bin:"),
                "{path}"
            );
            assert!(
                path.split(':').all(|folder| folder.starts_with('/')),
                "{path}"
            );
        }
    }

    #[test]
    fn tokens_and_inputs_stay_outside_and_the_rest_comes_along() {
        let env = Env::from_pairs([
            ("ATTIC_TOKEN", "secret"),
            ("FLYWHEEL_COMMAND", "nix build"),
            ("NIX_CONFIG", "cores = 1"),
            ("PATH", "/usr/bin:/bin"),
            ("EMPTY", ""),
            ("GITHUB_TOKEN", "put there on purpose"),
        ]);
        let variables = for_command(
            &env,
            "cores = 2",
            Some(Path::new("/opt/nix/bin")),
            &[("NIX_REMOTE", "local")],
        );
        let of = |name: &str| {
            variables
                .get(&OsString::from(name))
                .and_then(|value| value.to_str())
        };
        assert_eq!(of("ATTIC_TOKEN"), None);
        assert_eq!(of("FLYWHEEL_COMMAND"), None);
        assert_eq!(of("NIX_CONFIG"), Some("cores = 2"));
        assert_eq!(of("PATH"), Some("/opt/nix/bin:/usr/bin:/bin"));
        assert_eq!(of("NIX_REMOTE"), Some("local"));
        assert_eq!(of("EMPTY"), Some(""));
        assert_eq!(of("GITHUB_TOKEN"), Some("put there on purpose"));
    }
}
