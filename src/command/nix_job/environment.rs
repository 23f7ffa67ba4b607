//! The environment of the user's command: the job's own, less what the command has no business with.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use flywheel_sys::runner::env::{Env, join_path, split_path};

/// The cache token: it is for the publisher, and reaches Nix by the netrc.
const TOKENS: [&str; 1] = ["ATTIC_TOKEN"];
/// Our own inputs, the command's text among them.
const OURS: &str = "FLYWHEEL_";

/// The command's environment: `config` as its `NIX_CONFIG`, Nix's folder on its `PATH` if `nix_folder`
/// says that it is not there yet, the variables that repair Nix, and none of our inputs or tokens.
pub(super) fn impurity_in_command(
    env: &Env,
    config: &str,
    nix_folder: Option<&Path>,
    repairs: &[(&str, &str)],
) -> BTreeMap<OsString, OsString> {
    let kept = env
        .all()
        .filter(|(name, _)| !TOKENS.contains(name) && !name.starts_with(OURS));
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
        let folders = std::iter::once(folder.to_owned()).chain(split_path(&path));
        variables.insert("PATH".into(), join_path(folders).unwrap_or(path));
    }
    variables
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let variables = impurity_in_command(
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
