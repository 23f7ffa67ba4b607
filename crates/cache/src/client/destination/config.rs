//! The description that an Attic cache gives of itself. It is read leniently: every field may be missing, and unknown
//! ones are kept.

use serde_json::{Map, Value};
use url::Url;

use crate::client::endpoint::Endpoint;
use flywheel_nix::key::PublicKey;

/// The response to `cache-config`. A field that is absent or of another type is `None`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CacheConfig {
    /// The key with which the cache claims to sign.
    pub public_key: Option<PublicKey>,
    /// Whether everybody may read the cache without a token.
    pub(crate) is_public: Option<bool>,
    /// Names of the keys of upstream caches: paths that they have signed need not be published.
    pub(crate) upstream_keys: Vec<String>,
    /// The whole response, for fields that later versions add.
    pub(crate) raw: Map<String, Value>,
}

impl CacheConfig {
    pub(crate) fn from_json(raw: Map<String, Value>) -> Self {
        let text = |name: &str| raw.get(name).and_then(Value::as_str);
        let keys = raw
            .get("upstream_cache_key_names")
            .and_then(Value::as_array);
        Self {
            public_key: text("public_key").and_then(|key| key.parse().ok()),
            is_public: raw.get("is_public").and_then(Value::as_bool),
            upstream_keys: keys
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            raw,
        }
    }

    /// Hosts in the server's own addresses that differ from the one that the user named.
    /// They deserve a warning and are never contacted: that would send them the token.
    pub fn foreign_hosts(&self, endpoint: &Endpoint) -> Vec<String> {
        let announced = ["api_endpoint", "substituter_endpoint"]
            .map(|name| self.raw.get(name).and_then(Value::as_str));
        let urls = announced
            .into_iter()
            .flatten()
            .filter_map(|text| text.parse::<Url>().ok());
        let mut hosts: Vec<String> = urls
            .filter(|url| url.host() != endpoint.server.host())
            .filter_map(|url| url.host_str().map(str::to_owned))
            .collect();
        // Both addresses usually have the same host.
        hosts.dedup();
        hosts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> CacheConfig {
        CacheConfig::from_json(serde_json::from_str(text).expect("JSON"))
    }

    #[test]
    fn a_configuration_is_read_leniently() {
        assert_eq!(config("{}").public_key, None);
        let config = config(
            r#"{"public_key": 7, "is_public": true, "upstream_cache_key_names": ["a-1", 2], "new": {}}"#,
        );
        assert_eq!((config.public_key, config.is_public), (None, Some(true)));
        assert_eq!(config.upstream_keys, ["a-1"]);
        assert!(config.raw.contains_key("new"));
    }

    #[test]
    fn foreign_hosts_are_named_once() {
        let endpoint = Endpoint::new(
            "http://attic.svc:8080".parse().expect("URL"),
            "main".parse().expect("name"),
        );
        let config = config(
            r#"{"api_endpoint": "https://attic.example/", "substituter_endpoint": "https://attic.example/main"}"#,
        );
        assert_eq!(config.foreign_hosts(&endpoint), ["attic.example"]);
        let own = Endpoint::new(
            "https://attic.example".parse().expect("URL"),
            "main".parse().expect("name"),
        );
        assert!(config.foreign_hosts(&own).is_empty());
    }
}
