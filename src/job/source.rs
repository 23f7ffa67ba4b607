//! Which cache a job uses: the one that an input names, else a hint of the environment, else on a laptop the embedded
//! cache.

use std::path::{Path, PathBuf};

use crate::inputs::NamedCache;
use flywheel_cache::client::copy::StoreUrl;
use flywheel_cache::client::endpoint::Endpoint;
use flywheel_nix::bootstrap::plan::BinaryCache;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::PublicKey;
use flywheel_sys::runner::context::in_ci;
use flywheel_sys::runner::env::Env;

/// The cache that a job uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// `attic-enabled: false`.
    Off,
    /// No input and no hint names one.
    NotNamed,
    Server(Endpoint),
    Store(StoreUrl),
    Embedded {
        folder: PathBuf,
        cache: CacheName,
    },
}

impl Source {
    /// Finds it: an input goes before the embedded cache, that before a hint, and a laptop has one anyway.
    pub(crate) fn find(named: &NamedCache, embedded: Option<&Path>, env: &Env) -> Self {
        if !named.enabled {
            return Self::Off;
        }
        let Some(name) = &named.name else {
            return Self::NotNamed;
        };
        let server = |url: &url::Url| Self::Server(Endpoint::new(url.clone(), name.clone()));
        let embed = |folder: PathBuf| Self::Embedded {
            folder,
            cache: name.clone(),
        };
        match (&named.given, embedded, &named.hinted) {
            (Some(url), ..) => server(url),
            (None, Some(folder), _) => embed(folder.into()),
            (None, None, Some(url)) => server(url),
            (None, None, None) if in_ci(env) => Self::NotNamed,
            (None, None, None) => laptop_folder(env).map_or(Self::NotNamed, embed),
        }
    }

    /// It as a cache that Nix itself can be fetched from, if it is one that is reached without a token's help and its key is
    /// known.
    pub(crate) fn as_binary_cache(&self, key: Option<&PublicKey>) -> Option<BinaryCache> {
        let address = match self {
            Self::Server(endpoint) => endpoint.substituter().parse().ok()?,
            Self::Store(url) => url.http_host().and_then(|_| url.as_str().parse().ok())?,
            Self::Off | Self::NotNamed | Self::Embedded { .. } => return None,
        };
        Some(BinaryCache {
            address,
            keys: vec![key?.clone()],
        })
    }

    /// The name of this cache in a journal, the same in every job.
    pub(crate) fn identity(&self) -> Option<String> {
        match self {
            Self::Off | Self::NotNamed => None,
            Self::Server(endpoint) => Some(endpoint.substituter()),
            Self::Store(url) => Some(url.as_str().to_owned()),
            Self::Embedded { folder, cache } => {
                Some(format!("embedded:{}#{cache}", folder.display()))
            }
        }
    }
}

/// The folder of the user's data (`XDG_DATA_HOME`, freedesktop.org's base directory specification).
fn laptop_folder(env: &Env) -> Option<PathBuf> {
    let data = env
        .path("XDG_DATA_HOME")
        .or_else(|| env.path("HOME").map(|home| home.join(".local/share")));
    data.map(|data| data.join("flywheel/cache"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::CacheInputs;
    use crate::inputs::parse::tests::read;

    fn find(input: &str, embedded: &str, env: &[(&str, &str)]) -> Source {
        let env = Env::from_pairs(env.iter().copied());
        let inputs: CacheInputs = read(&[("attic-server", input)]).expect("well-formed");
        let embedded = (!embedded.is_empty()).then_some(Path::new(embedded));
        Source::find(&inputs.resolve(&env), embedded, &env)
    }

    #[test]
    fn a_name_that_only_a_malformed_hint_gives_is_no_caches() {
        let server = ("ATTIC_SERVER", "https://hint.example/attic");
        let name = ("ATTIC_CACHE", "no/such");
        let home = ("HOME", "/h");
        for (input, embedded) in [("", ""), ("http://h:1", ""), ("", "/c")] {
            assert_eq!(
                find(input, embedded, &[server, name, home]),
                Source::NotNamed,
                "{input} {embedded}"
            );
        }
    }

    #[test]
    fn an_input_goes_before_the_embedded_cache_and_that_before_a_hint() {
        let hint = ("ATTIC_SERVER", "https://hint.example/attic");
        let home = ("HOME", "/h");
        let identity = |source: Source| source.identity();
        assert_eq!(
            identity(find("http://h:1", "/c", &[hint])).as_deref(),
            Some("http://h:1/main")
        );
        assert_eq!(
            identity(find("", "/c", &[hint])).as_deref(),
            Some("embedded:/c#main")
        );
        assert_eq!(
            identity(find("", "", &[hint, home])).as_deref(),
            Some("https://hint.example/attic/main")
        );
        assert_eq!(
            find("", "", &[home, ("GITHUB_ACTIONS", "true")]),
            Source::NotNamed
        );
        let laptop = identity(find("", "", &[home]));
        assert_eq!(
            laptop.as_deref(),
            Some("embedded:/h/.local/share/flywheel/cache#main")
        );
    }
}
