//! What the machine lacks that a job needs: made up for where a variable can do it, and else named before the command
//! meets it.

use std::path::Path;

use super::private_base;
use crate::inputs::roots::SSL_CERT_FILE;
use flywheel_core::exit::Failure;
use flywheel_nix::settings::sets;
use flywheel_nix::tool::{Version, on_path};
use flywheel_sys::host::home::Home;
use flywheel_sys::host::private::PrivateFolder;
use flywheel_sys::http::bundle::{self, Bundle};
use flywheel_sys::runner::env::Env;
use flywheel_sys::runner::workflow::Workflow;

/// The environment with what it lacks for Nix and for this program: a home, and a bundle of certificates.
///
/// # Errors
/// When the private folder for them cannot be made.
pub(crate) fn complete(env: &Env) -> Result<Env, Failure> {
    let home = Home::find(|name| env.path(name).map(Into::into), &private_base(env))?;
    let mut env = env.with(home.variables);
    let mut notes = Vec::from_iter(home.note);
    let (bundle, note) = certificates(&env, Path::new("/"));
    env = env.with(bundle);
    notes.extend(note);
    let workflow = Workflow::new(env.in_github_actions());
    for note in notes {
        workflow.log(&format!("flywheel: {note}"));
    }
    Ok(env)
}

type Variable = Option<(&'static str, std::ffi::OsString)>;

/// The variable that names a bundle, where Nix would find none on the machine with this root; and the line for the log.
fn certificates(env: &Env, root: &Path) -> (Variable, Option<String>) {
    const NIX: &str = "NIX_SSL_CERT_FILE";
    let config = env.get("NIX_CONFIG").unwrap_or_default();
    let named = [NIX, "SSL_CERT_FILE"]
        .iter()
        .any(|name| env.get(name).is_some());
    if named || sets(config, SSL_CERT_FILE) {
        return (None, None);
    }
    match Bundle::find(root) {
        Bundle::Known => (None, None),
        Bundle::Elsewhere(file) => (Some((NIX, file.into())), None),
        Bundle::Missing => {
            let folder = PrivateFolder::shared(&private_base(env));
            let written = folder.map(|folder| bundle::write(&folder));
            let Ok(Ok(file)) = written else {
                let note = "this machine has no certificates (`ca-certificates`), so that Nix reaches nothing over HTTPS";
                return (None, Some(note.to_owned()));
            };
            let note = format!(
                "this machine has no certificates (`ca-certificates`): Nix takes Flywheel's own from `{}`; a Nix daemon, \
                 where there is one, does without",
                file.display()
            );
            (Some((NIX, file.into())), Some(note))
        }
    }
}

/// What a job that works in `folder` is likely to miss, a sentence each.
pub(super) fn remarks(version: &Version, folder: &Path, env: &Env) -> Vec<String> {
    let mut found = Vec::from_iter(version.too_old());
    let in_git = folder
        .ancestors()
        .any(|folder| folder.join(".git").exists());
    let is_flake = folder.join("flake.nix").exists();
    if version.needs_git() && in_git && is_flake && on_path(env, "git").is_none() {
        found.push(format!(
            "there is no `git` on `PATH`, with which {version} reads a flake in a Git checkout: install it (Debian and \
             Ubuntu: `apt-get install git`), or name the flake by its folder alone (`path:.`)"
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_machine_without_certificates_gets_some() {
        let root = tempfile::tempdir().expect("temporary folder");
        let temp = root.path().to_str().expect("text");
        let found = |more: &[(&str, &str)]| {
            let env = Env::from_pairs(
                [("RUNNER_TEMP", temp)]
                    .into_iter()
                    .chain(more.iter().copied()),
            );
            certificates(&env, root.path())
        };
        let (variable, note) = found(&[]);
        let (name, file) = variable.expect("a file");
        assert!(name == "NIX_SSL_CERT_FILE" && Path::new(&file).is_file());
        assert!(note.is_some_and(|note| note.contains("ca-certificates")));
        // What is named is left alone, whatever it is.
        for named in [
            ("NIX_SSL_CERT_FILE", "/none"),
            ("SSL_CERT_FILE", "/none"),
            ("NIX_CONFIG", "ssl-cert-file = /none"),
        ] {
            assert_eq!(found(&[named]), (None, None));
        }
        fs::create_dir_all(root.path().join("etc/ssl/certs")).expect("made");
        fs::write(root.path().join("etc/ssl/certs/ca-certificates.crt"), "").expect("written");
        assert_eq!(found(&[]), (None, None));
    }

    #[test]
    fn git_is_missed_by_an_old_nix_in_a_checkout_with_a_flake() {
        let folder = tempfile::tempdir().expect("temporary folder");
        let work = folder.path().join("below");
        fs::create_dir(&work).expect("made");
        let missed = |line: &str| {
            let version = Version::parse(line).expect("a version");
            let env = Env::from_pairs([("PATH", "/nonexistent")]);
            let found = remarks(&version, &work, &env);
            found.iter().any(|text| text.contains("no `git`"))
        };
        let old = "nix (Nix) 2.18.1";
        fs::write(work.join("flake.nix"), "").expect("written");
        assert!(!missed(old), "no checkout");
        fs::create_dir(folder.path().join(".git")).expect("made");
        assert!(missed(old));
        assert!(missed("nix (Lix, like Nix) 2.91.1"));
        assert!(!missed("nix (Nix) 2.26.3"), "it has its own");
        fs::remove_file(work.join("flake.nix")).expect("removed");
        assert!(!missed(old), "no flake");
    }
}
