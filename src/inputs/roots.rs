//! The trusted certificates that the environment names.

use flywheel_nix::settings::word_in;
use flywheel_sys::http::Roots;
use flywheel_sys::runner::env::Env;

/// Nix's setting for a bundle of certificates; Nix 2.8 does not know it.
pub(crate) const SSL_CERT_FILE: &str = "ssl-cert-file";

/// The bundles that `NIX_SSL_CERT_FILE` and the lines of `NIX_CONFIG` name.
pub(crate) fn roots(env: &Env) -> Roots {
    let config = env.get("NIX_CONFIG").unwrap_or_default();
    let of_config = word_in(config, SSL_CERT_FILE).map(Into::into);
    Roots {
        files: env
            .path("NIX_SSL_CERT_FILE")
            .into_iter()
            .chain(of_config)
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_name_a_bundle_are_known() {
        let env = Env::from_pairs([
            ("NIX_SSL_CERT_FILE", "/a.pem"),
            ("NIX_CONFIG", "cores = 1\nssl-cert-file = /b.pem"),
        ]);
        let files = roots(&env).files;
        assert_eq!(files, ["/a.pem", "/b.pem"].map(std::path::PathBuf::from));
        assert!(roots(&Env::default()).files.is_empty());
    }
}
