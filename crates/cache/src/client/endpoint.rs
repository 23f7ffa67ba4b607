//! The address of a cache: the server that the user named, and the cache's name on it. Pure.
//! It knows no other host: addresses that a server announces for itself are compared, never contacted.

use std::fmt;

use url::Url;

use flywheel_nix::cache_name::CacheName;
use flywheel_sys::http::redact;

/// A cache on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// The server's URL with a slash at its end, without query or credentials.
    pub server: Url,
    pub(crate) cache: CacheName,
}

impl Endpoint {
    /// Adds a missing slash at the end of the server's URL, so that joining keeps its path.
    pub fn new(mut server: Url, cache: CacheName) -> Self {
        server.set_query(None);
        server.set_fragment(None);
        // Setting fails only for URLs that cannot have a user, which have none to hide.
        let _ = server.set_username("");
        let _ = server.set_password(None);
        if !server.path().ends_with('/') {
            server.set_path(&format!("{}/", server.path()));
        }
        Self { server, cache }
    }

    /// The URL for Nix's setting `substituters`: `<server>/<cache>`.
    pub fn substituter(&self) -> String {
        format!("{}{}", self.server, self.cache)
    }

    /// The URL of an API call, such as `get-missing-paths`.
    pub(crate) fn api(&self, call: &str) -> Url {
        self.join(&format!("_api/v1/{call}"))
    }

    /// The URL of this cache's configuration.
    pub(crate) fn config(&self) -> Url {
        self.api(&format!("cache-config/{}", self.cache))
    }

    /// The URL of a file that the cache serves, such as `nix-cache-info`.
    pub fn read(&self, file: &str) -> Url {
        self.join(&format!("{}/{file}", self.cache))
    }

    /// The URL of a NAR. A narinfo holds it relative to the cache, or absolute.
    pub(crate) fn nar(&self, url: &str) -> Option<Url> {
        self.read("").join(url).ok()
    }

    /// Whether this URL has the scheme, host and port that the user named, so that the token may be sent there.
    pub(crate) fn owns(&self, url: &Url) -> bool {
        self.server.origin() == url.origin()
    }

    fn join(&self, below: &str) -> Url {
        // Cache names and the API's own segments hold nothing that a URL's path would have to escape.
        let mut url = self.server.clone();
        url.set_path(&format!("{}{below}", self.server.path()));
        url
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", redact(&self.server), self.cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(server: &str) -> Endpoint {
        Endpoint::new(server.parse().expect("URL"), "main".parse().expect("name"))
    }

    #[test]
    fn a_base_path_survives_without_its_slash() {
        for server in ["https://h/attic", "https://h/attic/", "https://h/attic?x#y"] {
            let endpoint = endpoint(server);
            assert_eq!(endpoint.substituter(), "https://h/attic/main");
            assert_eq!(
                endpoint.config().as_str(),
                "https://h/attic/_api/v1/cache-config/main"
            );
            assert_eq!(
                endpoint.read("nix-cache-info").as_str(),
                "https://h/attic/main/nix-cache-info"
            );
            assert_eq!(
                endpoint.nar("nar/x.nar").expect("URL").as_str(),
                "https://h/attic/main/nar/x.nar"
            );
        }
        assert_eq!(
            endpoint("http://h:8080").substituter(),
            "http://h:8080/main"
        );
    }

    #[test]
    fn only_the_named_host_is_owned() {
        let endpoint = endpoint("https://h/attic");
        let owns = |url: &str| endpoint.owns(&url.parse().expect("URL"));
        assert!(owns("https://h/elsewhere"));
        assert!(!owns("http://h/attic/"));
        assert!(!owns("https://h:444/attic/"));
        assert!(!owns("https://s3.example/x"));
        assert_eq!(
            endpoint
                .nar("https://s3.example/x")
                .map(|url| endpoint.owns(&url)),
            Some(false)
        );
    }
}
