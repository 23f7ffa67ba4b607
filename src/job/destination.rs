//! Where a job's paths go, and how: with the built-in client, with Attic's own, or with `nix copy`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::inputs::value::{Invalid, value, variant};
use crate::job::attach::Cache;
use crate::job::backend::Backend;
use crate::report::job::CacheState;
use flywheel_cache::client::attic::Attic;
use flywheel_cache::client::attic_cli::{self, AtticCli, Search};
use flywheel_cache::client::copy::{StoreCopy, StoreUrl, StoreUrlError};
use flywheel_cache::client::destination::Target;
use flywheel_core::exit::Explain as _;
use flywheel_core::progress::Sink;
use flywheel_nix::tool::Nix;
use flywheel_sys::http::Clients;
use flywheel_sys::runner::env::Env;

/// How long opening another kind of store may take before the job begins.
pub(crate) const PING_LIMIT: Duration = Duration::from_secs(10);

/// The inputs that choose the client that publishes, or another kind of store.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Destination")]
pub(crate) struct DestinationInputs {
    /// Another kind of store instead of an Attic cache, such as `s3://bucket?region=eu-west-1`,
    /// `file:///var/cache/nix`, `ssh-ng://host` or `https://cache.example.org/nix`: read as a
    /// substituter, written to by `nix copy`. Credentials come from the environment (default: none).
    #[arg(long, value_name = "URL", value_parser = value(store_url))]
    cache: Option<StoreUrl>,

    /// Who sends paths to the Attic server.
    #[arg(long, value_name = "WHO", value_parser = variant::<PublisherKind>(), default_value = "auto")]
    publisher: PublisherKind,

    /// Where Attic's own client is substituted from: a flake reference with an attribute, such as
    /// `nixpkgs#attic-client`.
    #[arg(
        long,
        value_name = "FLAKEREF",
        value_parser = value(attic_client),
        default_value = attic_cli::REFERENCE
    )]
    attic_client: String,
}

/// The input `publisher`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PublisherKind {
    /// The built-in client, and Attic's own where the server does not know the protocol.
    #[default]
    Auto,
    /// The built-in client.
    BuiltIn,
    /// Attic's own client, from `PATH` or substituted, never compiled.
    AtticClient,
}

/// The checked inputs of a destination.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DestinationConfig {
    /// Another kind of store, in place of an Attic server.
    pub(crate) store: Option<StoreUrl>,
    pub(crate) publisher: PublisherKind,
    /// The flake reference that Attic's own client is substituted from.
    pub(crate) reference: String,
    /// The folder of a flake that may provide the client, too.
    pub(crate) folder: PathBuf,
}

impl DestinationInputs {
    /// What the inputs amount to in the current folder.
    pub(crate) fn config(&self) -> DestinationConfig {
        DestinationConfig {
            store: self.cache.clone(),
            publisher: self.publisher,
            reference: self.attic_client.clone(),
            folder: ".".into(),
        }
    }
}

/// What is malformed may hold a password, and is not quoted.
fn store_url(text: &str) -> Result<StoreUrl, Invalid> {
    text.parse().map_err(|error: StoreUrlError| {
        let invalid = Invalid::new(match error {
            StoreUrlError::Malformed(_) => "is not the URL of a store".to_owned(),
            _ => format!("names no store: {error}"),
        });
        invalid.with_hint(error.hint().unwrap_or_default())
    })
}

fn attic_client(text: &str) -> Result<String, Invalid> {
    if text.starts_with('-') || text.contains(char::is_whitespace) {
        return Err(Invalid::new("is not a flake reference").with_hint(format!(
            "Give one with its attribute, such as `{}`.",
            attic_cli::REFERENCE
        )));
    }
    Ok(text.to_owned())
}

/// What it takes to open a destination.
#[derive(Debug)]
pub(crate) struct DestinationOpener<'a> {
    pub(crate) env: &'a Env,
    /// Nix with the job's settings, credentials included.
    pub(crate) nix: &'a Nix,
    pub(crate) http: &'a Clients,
    /// The folder for secret files.
    pub(crate) private: &'a Path,
}

impl DestinationOpener<'_> {
    /// Opens the destination that `cache` is. `None` where the cache was left out, unless it is a server that answers:
    /// such a cache can be written to although Nix does not read from it.
    ///
    /// # Errors
    /// With the reason why publication is skipped, when Attic's own client cannot be had.
    pub(crate) async fn open(
        &self,
        cache: &Cache,
        config: &DestinationConfig,
        sink: &Sink,
    ) -> Result<Option<Target>, String> {
        let endpoint = match &cache.backend {
            None => return Ok(None),
            Some(Backend::Store(url)) => {
                let open = || StoreCopy::new(self.nix_for(url), url.clone()).into();
                return Ok(cache.is_attached().then(open));
            }
            Some(Backend::Attic(endpoint) | Backend::Embedded { endpoint, .. }) => endpoint.clone(),
        };
        if !cache.probe.answers && !cache.is_attached() {
            return Ok(None);
        }
        let attic = Attic::new(endpoint, cache.token.clone(), self.http.clone());
        let with_attic_cli = match config.publisher {
            PublisherKind::BuiltIn => false,
            PublisherKind::AtticClient => true,
            // If the probe has read a configuration, the server speaks Attic's protocol, and no request is needed.
            PublisherKind::Auto => {
                cache.probe.config.is_none() && !attic_cli::has_attic_api(&attic).await
            }
        };
        if with_attic_cli {
            self.open_attic_cli(attic, cache, config, sink)
                .await
                .map(Some)
        } else {
            Ok(Some(attic.into()))
        }
    }

    async fn open_attic_cli(
        &self,
        attic: Attic,
        cache: &Cache,
        config: &DestinationConfig,
        sink: &Sink,
    ) -> Result<Target, String> {
        let (env, nix, links) = (self.env, self.nix, self.private);
        let client = attic_cli::find(&Search {
            env,
            nix,
            reference: &config.reference,
            folder: &config.folder,
            links,
        })
        .await?;
        sink.note(format!("flywheel: publishing with {client}"));
        let token = cache
            .token
            .as_ref()
            .ok_or("Attic's own client needs a token")?;
        AtticCli::new(&client, nix, attic, token, self.private)
            .map(Into::into)
            .map_err(|error| error.to_string())
    }

    /// Nix with the credentials that this store takes from the environment, which our calls of Nix lack otherwise.
    fn nix_for(&self, url: &StoreUrl) -> Nix {
        // Only the S3 store reads `AWS_*`, and a child that does not need a secret must not get it.
        let is_credential =
            |name: &str| name.starts_with("AWS_") && url.as_str().starts_with("s3:");
        let credentials = self.env.all().filter(|(name, _)| is_credential(name));
        credentials.fold(self.nix.clone(), |nix, (name, value)| {
            nix.with_variable(name, value.to_str())
        })
    }

    /// Opens another kind of store once for a try, and leaves the cache out if that fails.
    pub(crate) async fn ping(&self, cache: &mut Cache, sink: &Sink) {
        let Some(Backend::Store(url)) = &cache.backend else {
            return;
        };
        if let Err(error) = StoreCopy::ping(&self.nix_for(url), url, PING_LIMIT).await {
            let text = format!("Nix cannot open the store `{url}`: {error}");
            sink.degraded("cache", format!("left out: {text}"));
            cache.state = CacheState::LeftOut {
                layer: "cache",
                text,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::parse::tests::read;

    fn config(cache: &str, publisher: &str, client: &str) -> Result<DestinationConfig, String> {
        let inputs = [
            ("cache", cache),
            ("publisher", publisher),
            ("attic-client", client),
        ];
        let inputs = read::<DestinationInputs>(&inputs).map_err(|error| error.to_string())?;
        Ok(inputs.config())
    }

    #[test]
    fn what_is_not_given_is_the_built_in_client_if_the_server_knows_it() {
        let default = DestinationConfig {
            store: None,
            publisher: PublisherKind::Auto,
            reference: attic_cli::REFERENCE.to_owned(),
            folder: ".".into(),
        };
        assert_eq!(config("", "", ""), Ok(default));
        assert_eq!(
            config("", "Attic-Client", "path:/x#attic").map(|config| config.publisher),
            Ok(PublisherKind::AtticClient)
        );
        assert_eq!(
            config("s3://b", "", "").map(|config| config.store.map(|url| url.to_string())),
            Ok(Some("s3://b".into()))
        );
    }

    #[tokio::test]
    async fn a_bucket_gets_its_credentials_from_the_environment_and_nothing_else_does() {
        let folder = tempfile::tempdir().expect("folder");
        let program =
            flywheel_testing::script(folder.path(), "nix", "echo 'nix (Nix) 2.24.1'").await;
        let env = Env::from_pairs([
            ("AWS_SECRET_ACCESS_KEY", "k"),
            ("AWS_SESSION_TOKEN", "t"),
            ("ATTIC_TOKEN", "x"),
        ]);
        let nix = Nix::detect(&program, &env).await.expect("a nix");
        let http = Clients::new(&flywheel_sys::http::Roots::default()).expect("clients");
        let opener = DestinationOpener {
            env: &env,
            nix: &nix,
            http: &http,
            private: folder.path(),
        };
        let of = |url: &str| opener.nix_for(&url.parse().expect("a store"));
        let bucket = of("s3://bucket");
        assert_eq!(bucket.variable("AWS_SECRET_ACCESS_KEY"), Some("k"));
        assert_eq!(
            (
                bucket.variable("AWS_SESSION_TOKEN"),
                bucket.variable("ATTIC_TOKEN")
            ),
            (Some("t"), None)
        );
        assert_eq!(
            of("file:///srv/nix").variable("AWS_SECRET_ACCESS_KEY"),
            None
        );
    }

    #[test]
    fn wrong_words_are_refused() {
        for (cache, publisher, client) in [
            ("main", "", ""),
            ("", "attic", ""),
            ("", "", "--help"),
            ("", "", "a b"),
        ] {
            assert!(
                config(cache, publisher, client).is_err(),
                "{cache} {publisher} {client}"
            );
        }
    }
}
