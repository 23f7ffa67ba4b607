//! What one process answers for the folder: its caches with their keys, its tokens, and its options. Two processes
//! that share a folder may differ in all of it; the folder's server answers each one's clients by that one's terms.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::server::folder::{self, Layout};
use crate::server::live_tokens::{self, LiveTokens};
use crate::server::state::Cache;
use crate::server::token::{self, Tokens, WireToken};
use crate::server::{OpenError, Options};
use flywheel_core::secret::Secret;
use flywheel_nix::cache_name::CacheName;
use flywheel_nix::key::SecretKey;

#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) tokens: LiveTokens,
    /// Whether they are those of the folder's own file, which all processes of that kind share.
    pub(crate) are_tokens_the_folders: bool,
    pub(crate) caches: BTreeMap<String, Cache>,
    pub(crate) options: Options,
}

impl Terms {
    /// Reads tokens and keys, and creates those that are missing. Needs no lock: of two processes that create the same
    /// file, both use the first one's. Also returns the file of the tokens.
    ///
    /// # Errors
    /// When one of them cannot be read or created.
    pub(crate) fn open(layout: &Layout, options: Options) -> Result<(Self, PathBuf), OpenError> {
        let file = options.tokens.clone().unwrap_or_else(|| layout.tokens());
        let before = live_tokens::stamp(&file).ok();
        let tokens = match &options.tokens {
            Some(_) => Tokens::open(&file)?,
            None => Tokens::open_or_create(&file)?,
        };
        let tokens = LiveTokens::of_file(&file, before, tokens);
        if is_open_to_others(&file) {
            let text = format!(
                "`{}` can be read by other users; `chmod 600` it",
                file.display()
            );
            options.log.degraded("tokens", text);
        }
        let caches = open_caches(layout, &options.caches)?;
        let terms = Self {
            tokens,
            are_tokens_the_folders: options.tokens.is_none(),
            caches,
            options,
        };
        Ok((terms, file))
    }

    pub(crate) fn to_wire(&self) -> WireTerms {
        WireTerms {
            caches: self
                .options
                .caches
                .iter()
                .map(ToString::to_string)
                .collect(),
            public: self.options.public,
            require_proof: self.options.require_proof,
            priority: self.options.priority,
            upstream_keys: self.options.upstream_keys.clone(),
            max_age: self.options.limits.max_age.map(|age| age.as_secs()),
            tokens: self.tokens.current().to_wire(),
            are_tokens_the_folders: self.are_tokens_the_folders,
        }
    }

    /// The terms of another process that shares this one's folder. What concerns the folder itself (the log, the level
    /// of compression) is `own`.
    ///
    /// # Errors
    /// When a name or a token is invalid, or a key cannot be read.
    pub(crate) fn from_wire(
        wire: WireTerms,
        layout: &Layout,
        own: &Options,
    ) -> Result<Self, String> {
        let caches: Vec<CacheName> = wire
            .caches
            .iter()
            .map(|name| name.parse().map_err(|error| format!("{error}")))
            .collect::<Result<_, _>>()?;
        folder::prepare_caches(layout, &caches).map_err(|error| error.to_string())?;
        let mut options = Options {
            caches,
            public: wire.public,
            require_proof: wire.require_proof,
            priority: wire.priority,
            upstream_keys: wire.upstream_keys,
            ..own.clone()
        };
        options.limits.max_age = wire.max_age.map(std::time::Duration::from_secs);
        Ok(Self {
            tokens: LiveTokens::fixed(Tokens::from_wire(&wire.tokens)?),
            are_tokens_the_folders: wire.are_tokens_the_folders,
            caches: open_caches(layout, &options.caches).map_err(|error| error.to_string())?,
            options,
        })
    }
}

/// Terms as one process sends them to another. Of the tokens it holds hashes only.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct WireTerms {
    caches: Vec<String>,
    public: bool,
    require_proof: bool,
    priority: u32,
    upstream_keys: Vec<String>,
    /// Seconds.
    max_age: Option<u64>,
    tokens: Vec<WireToken>,
    #[serde(default)]
    are_tokens_the_folders: bool,
}

fn open_caches(layout: &Layout, names: &[CacheName]) -> Result<BTreeMap<String, Cache>, OpenError> {
    let mut caches = BTreeMap::new();
    for name in names {
        let cache = Cache {
            name: name.clone(),
            key: std::sync::Arc::new(open_key(&layout.key(name), name)?),
        };
        caches.insert(name.to_string(), cache);
    }
    Ok(caches)
}

fn is_open_to_others(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|about| about.permissions().mode() & 0o077 != 0)
}

fn open_key(file: &Path, cache: &CacheName) -> Result<SecretKey, OpenError> {
    let key_error = |source| OpenError::Key {
        file: file.to_owned(),
        source,
    };
    let file_error = |source| OpenError::KeyFile {
        file: file.to_owned(),
        source,
    };
    let make = || -> io::Result<Secret> {
        // The key's name is the cache's, which clients see in signatures.
        let key = SecretKey::generate(cache.as_str()).map_err(io::Error::other)?;
        Secret::new(&key.encode()).ok_or_else(|| io::Error::other("the new key is empty"))
    };
    let text = token::read_or_create(file, make).map_err(file_error)?;
    SecretKey::parse(text.expose()).map_err(key_error)
}
