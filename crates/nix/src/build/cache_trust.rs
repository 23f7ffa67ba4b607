//! Finds out for which paths a cache can be believed that it has them: those that it describes with a valid signature of
//! a key that the job trusts, and those that the job's settings take without one. Nix's own word that it would fetch a
//! path is no proof, because `nix build --dry-run` checks no signature.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::key::PublicKey;
use crate::path_info::PathInfo;
use crate::path_json;
use crate::settings::Settings;
use crate::store_path::StorePath;
use crate::tool::Nix;

/// How long all caches together may take to describe the paths. What is not described by then is built.
const LIMIT: Duration = Duration::from_secs(30);
/// How long one call may take. A cache that needs longer is asked no more.
const CALL_LIMIT: Duration = Duration::from_secs(10);
/// Paths per call. Nix asks for them one after the other, so a call has only a few, and several run at once.
const BATCH: usize = 50;
/// Calls of Nix at once, for each cache.
const CALLS: usize = 4;

/// The caches that gave no answer once. They are not asked again, since each query would wait for them anew.
#[derive(Clone, Debug, Default)]
struct Silent(Arc<Mutex<BTreeSet<String>>>);

impl Silent {
    fn has(&self, url: &str) -> bool {
        self.0.lock().is_ok_and(|silent| silent.contains(url))
    }

    fn add(&self, url: &str) {
        // The lock is poisoned only by a panic, and then the cache is merely asked again.
        if let Ok(mut silent) = self.0.lock() {
            silent.insert(url.to_owned());
        }
    }
}

/// What the job's settings say about the caches and their signatures.
#[derive(Clone, Debug)]
pub struct CacheTrust {
    substituters: Vec<String>,
    silent: Silent,
    keys: Vec<PublicKey>,
    /// The setting `require-sigs`.
    requires_signatures: bool,
}

/// Trusts nobody.
impl Default for CacheTrust {
    fn default() -> Self {
        Self {
            substituters: Vec::new(),
            silent: Silent::default(),
            keys: Vec::new(),
            requires_signatures: true,
        }
    }
}

/// The paths that caches can be believed to have.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Believed {
    /// With a valid signature of a trusted key.
    pub(super) signed: BTreeSet<StorePath>,
    /// Without one: the settings trust the cache itself (`?trusted=true`), or every cache (`require-sigs = false`).
    pub(super) unsigned: BTreeSet<StorePath>,
}

impl CacheTrust {
    /// The caches and keys of the settings in force.
    pub fn from_settings(settings: &Settings) -> Self {
        let keys = settings.list("trusted-public-keys");
        Self {
            substituters: settings.list("substituters"),
            silent: Silent::default(),
            keys: keys.iter().filter_map(|key| key.parse().ok()).collect(),
            requires_signatures: settings.text("require-sigs").as_deref() != Some("false"),
        }
    }

    /// Which of `paths`, each of which Nix would fetch from some cache, a cache can be believed to have.
    pub(super) async fn believed(&self, nix: &Nix, paths: &BTreeSet<StorePath>) -> Believed {
        let mut found = Believed::default();
        if paths.is_empty() {
            return found;
        }
        // A slow or dead cache costs at most this; the tasks end when the set is dropped.
        let _ = tokio::time::timeout(LIMIT, self.describe(nix, paths, &mut found)).await;
        if !self.requires_signatures {
            found.unsigned.extend(paths.iter().cloned());
        }
        let Believed { signed, unsigned } = &mut found;
        unsigned.retain(|path| !signed.contains(path));
        found
    }

    /// Has each cache describe the paths, and judges the descriptions as they come.
    async fn describe(&self, nix: &Nix, paths: &BTreeSet<StorePath>, found: &mut Believed) {
        let paths: Vec<StorePath> = paths.iter().cloned().collect();
        let mut described = JoinSet::new();
        for url in &self.substituters {
            // Each cache has calls of its own, so that a dead one holds up no other.
            let calls = Arc::new(Semaphore::new(CALLS));
            for batch in paths.chunks(BATCH) {
                let (nix, url, batch) = (nix.clone(), url.clone(), batch.to_vec());
                let (calls, silent) = (Arc::clone(&calls), self.silent.clone());
                described.spawn(async move {
                    let _permit = calls.acquire().await;
                    if silent.has(&url) {
                        return (false, Vec::new());
                    }
                    let infos = infos(&nix, &url, batch).await;
                    if infos.is_none() {
                        silent.add(&url);
                    }
                    (is_trusted(&url), infos.unwrap_or_default())
                });
            }
        }
        // A task that panicked has described nothing, and its panic has been printed.
        while let Some(ended) = described.join_next().await {
            let (is_trusted, infos) = ended.unwrap_or_default();
            for info in infos.into_iter().filter(|info| paths.contains(&info.path)) {
                if self.keys.iter().any(|key| info.signed_by(key)) {
                    found.signed.insert(info.path);
                } else if is_trusted {
                    found.unsigned.insert(info.path);
                }
            }
            // A cache that is slow or dead does not matter once another has vouched for everything.
            if found.signed.len() == paths.len() {
                break;
            }
        }
    }
}

/// What the cache at `url` says of these paths; `None` if it gives no answer in time.
async fn infos(nix: &Nix, url: &str, paths: Vec<StorePath>) -> Option<Vec<PathInfo>> {
    let (mut found, mut ahead) = (Vec::new(), vec![paths]);
    // Not as an argument, which every user of the machine could read: the address may hold a password.
    // That a path was absent, Nix remembers for an hour; here another cache may have made it known as present since.
    let config = format!(
        "{}\nsubstitute = false\nnarinfo-cache-negative-ttl = 0\nstore = {url}",
        nix.config()
    );
    let nix = nix.clone().with_config(&config);
    // In some versions this variable has precedence over the setting.
    let nix = nix.with_variable("NIX_REMOTE", None);
    while let Some(batch) = ahead.pop() {
        let names: Vec<String> = batch.iter().map(ToString::to_string).collect();
        let mut arguments = nix.version.path_info_as_json().to_vec();
        arguments.extend(names.iter().map(String::as_str));
        let output = nix.run(&arguments, CALL_LIMIT).await.ok()?;
        if output.status.success() {
            // What cannot be parsed vouches for nothing.
            found.extend(path_json::parse(&output.stdout).unwrap_or_default().infos);
        } else if batch.len() > 1 && output.stderr.contains("is not valid") {
            // Some versions of Nix fail as a whole when one of several paths is absent.
            let (one, other) = batch.split_at(batch.len() / 2);
            ahead.extend([one.to_vec(), other.to_vec()]);
        }
    }
    Some(found)
}

/// Whether the job's settings take what this cache has without a signature.
fn is_trusted(url: &str) -> bool {
    let parameters = url.split_once('?').map_or("", |(_, parameters)| parameters);
    url::form_urlencoded::parse(parameters.as_bytes())
        // The words that Nix takes for true.
        .any(|(name, value)| name == "trusted" && matches!(&*value, "true" | "yes" | "1"))
}

#[cfg(test)]
mod tests {
    use flywheel_sys::runner::env::Env;
    use flywheel_testing::script;
    use serde_json::json;

    use super::*;
    use crate::hash::Sha256;
    use crate::key::SecretKey;
    use crate::path_info::fingerprint;

    fn path(letter: &str) -> StorePath {
        let text = format!("/nix/store/{}-x", letter.repeat(32));
        text.parse().expect("valid")
    }

    /// The description of a path with these signatures, as `nix path-info --json` prints it.
    fn description(path: &StorePath, signatures: &[String]) -> serde_json::Value {
        json!({
            "path": path.to_string(), "narHash": Sha256([7; 32]).to_string(), "narSize": 120, "references": [],
            "signatures": signatures,
        })
    }

    fn signature(key: &SecretKey, path: &StorePath) -> String {
        key.sign(&fingerprint(path, &Sha256([7; 32]), 120, &[]))
    }

    /// What is believed of `a` and `b`, where `http://cache` describes `a` with these signatures, and nothing else.
    async fn believed(settings: CacheTrust, signatures: &[String]) -> Believed {
        let folder = tempfile::tempdir().expect("temporary folder");
        let infos = folder.path().join("infos");
        let a = description(&path("a"), signatures);
        std::fs::write(
            &infos,
            json!([a, description(&path("c"), signatures)]).to_string(),
        )
        .expect("written");
        let text = format!(
            "case \"$*\" in --version) echo 'nix (Nix) 2.8.0'; exit ;; *http*) exit 2 ;; esac
            [ -z \"${{NIX_REMOTE+x}}\" ] || exit 2
            case \"$NIX_CONFIG $*\" in
            *http://cache*b-x*a-x*|*http://cache*a-x*b-x*) echo \"error: path '{}' is not valid\" >&2; exit 1 ;;
            *http://cache*a-x*) cat {} ;;
            *) echo 'error: no' >&2; exit 1 ;; esac",
            path("b"),
            infos.display()
        );
        let program = script(folder.path(), "nix", &text).await;
        let env = Env::from_pairs([("PATH", "/usr/bin:/bin"), ("NIX_REMOTE", "daemon")]);
        let nix = Nix::detect(&program, &env).await.expect("a version");
        let asked = BTreeSet::from([path("a"), path("b")]);
        settings.believed(&nix, &asked).await
    }

    #[tokio::test]
    async fn only_a_valid_signature_of_a_trusted_key_vouches_for_a_path() {
        let key = SecretKey::generate("main").expect("random");
        let impostor = SecretKey::generate("main").expect("random");
        let trust = |url: &str| CacheTrust {
            substituters: vec!["http://dead".to_owned(), url.to_owned()],
            silent: Silent::default(),
            keys: vec![key.public()],
            requires_signatures: true,
        };
        let (good, nothing) = (BTreeSet::from([path("a")]), BTreeSet::new());
        let is = |found: Believed, signed: &BTreeSet<StorePath>, unsigned: &BTreeSet<StorePath>| {
            assert_eq!((&found.signed, &found.unsigned), (signed, unsigned));
        };
        let valid = signature(&key, &path("a"));
        let found = believed(trust("http://cache"), std::slice::from_ref(&valid)).await;
        is(found, &good, &nothing);
        let forged = [
            signature(&impostor, &path("a")),
            signature(&key, &path("b")),
            "main:AAAA".to_owned(),
        ];
        is(
            believed(trust("http://cache"), &forged).await,
            &nothing,
            &nothing,
        );
        is(
            believed(trust("http://cache"), &[]).await,
            &nothing,
            &nothing,
        );
        // The settings may take a path without a signature, and then it is said which.
        let trusted = || trust("http://cache?trusted=true");
        is(believed(trusted(), &forged).await, &nothing, &good);
        is(believed(trusted(), &[valid]).await, &good, &nothing);
        let careless = CacheTrust {
            requires_signatures: false,
            ..trust("http://cache")
        };
        let both = BTreeSet::from([path("a"), path("b")]);
        is(believed(careless, &forged).await, &nothing, &both);
    }

    #[test]
    fn only_the_word_that_nix_reads_makes_a_cache_trusted() {
        for url in [
            "http://c?trusted=true",
            "http://c?priority=1&trusted=1",
            "file:///c?trusted=yes",
        ] {
            assert!(is_trusted(url), "{url}");
        }
        for url in [
            "http://c",
            "http://c?trusted=false",
            "http://trusted=true/",
            "http://c?untrusted=true",
            "http://c?trusted",
        ] {
            assert!(!is_trusted(url), "{url}");
        }
    }
}
