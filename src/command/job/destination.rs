//! Where a job's paths go, and by whose hand: the built-in client, Attic's own, or `nix copy`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::cache::attic::Attic;
use crate::cache::copy::{Copy, StoreUrl};
use crate::cache::destination::Target;
use crate::cache::stock::{self, Search, Stock};
use crate::command::inputs::{Text, choice};
use crate::command::job::attach::Cache;
use crate::exit::{Explain as _, UsageError};
use crate::http::Clients;
use crate::nix::tool::Nix;
use crate::progress::Sink;
use crate::report::job::CacheState;
use crate::runner::env::Env;

/// How long a store is looked at before the job begins.
pub const PING_LIMIT: Duration = Duration::from_secs(10);

/// The inputs that say by whose hand paths are published, and to which other kind of store.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Destination")]
pub struct DestinationInputs {
    /// Another kind of store instead of an Attic cache, such as `s3://bucket?region=eu-west-1`,
    /// `file:///var/cache/nix`, `ssh-ng://host` or `https://cache.example.org/nix`: read as a
    /// substituter, written to by `nix copy` (default: none). Credentials come from the environment.
    #[arg(
        long,
        value_name = "URL",
        default_value = "",
        hide_default_value = true
    )]
    pub cache: Text,

    /// Who talks to the Attic server: `built-in`, `attic-client` (Attic's own client, never
    /// compiled), or `auto`, the default: built-in, and Attic's own where the server does not know
    /// the protocol.
    #[arg(
        long,
        value_name = "WHO",
        default_value = "",
        hide_default_value = true
    )]
    pub publisher: Text,

    /// Where Attic's own client is substituted from, such as `github:NixOS/nixpkgs/nixos-24.11#attic-client`,
    /// the default.
    #[arg(
        long,
        value_name = "FLAKEREF",
        default_value = "",
        hide_default_value = true
    )]
    pub attic_client: Text,
}

/// The input `publisher`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hand {
    /// Ours, unless the server does not understand it.
    #[default]
    Auto,
    /// Ours.
    BuiltIn,
    /// Attic's own.
    AtticClient,
}

/// Checked inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Way {
    /// Another kind of store.
    pub store: Option<StoreUrl>,
    /// Who talks to an Attic server.
    pub hand: Hand,
    /// Where Attic's own client is substituted from.
    pub reference: String,
    /// The folder of the flake that may have it, too.
    pub folder: PathBuf,
}

impl DestinationInputs {
    /// Checks them.
    ///
    /// # Errors
    /// For the first that is wrong.
    pub fn read(&self) -> Result<Way, UsageError> {
        let store = self
            .cache
            .get()
            .map(str::parse::<StoreUrl>)
            .transpose()
            .map_err(|error| {
                UsageError::new("cache", format!("names no store: {error}"))
                    .with_hint(error.hint().unwrap_or_default())
            })?;
        let words = [
            ("auto", Hand::Auto),
            ("built-in", Hand::BuiltIn),
            ("attic-client", Hand::AtticClient),
        ];
        let reference = self.attic_client.get().unwrap_or(stock::REFERENCE);
        if reference.starts_with('-') || reference.contains(char::is_whitespace) {
            return Err(
                UsageError::new("attic-client", "is no flake reference").with_hint(format!(
                    "Give one with its attribute, such as `{}`.",
                    stock::REFERENCE
                )),
            );
        }
        Ok(Way {
            store,
            hand: choice("publisher", &self.publisher, &words)?.unwrap_or_default(),
            reference: reference.to_owned(),
            folder: ".".into(),
        })
    }
}

/// What it takes to open a destination.
#[derive(Debug)]
pub struct Opening<'a> {
    /// The job's environment.
    pub env: &'a Env,
    /// Nix with the job's settings, credentials included.
    pub nix: &'a Nix,
    /// The connections.
    pub http: &'a Clients,
    /// Where secret files go.
    pub private: &'a Path,
}

impl Opening<'_> {
    /// Opens what the cache is. `None` where it takes nothing: it was left out, and is not even one
    /// that answers and may be written to without being read.
    ///
    /// # Errors
    /// With the reason, where publication is to be skipped: Attic's own client cannot be had.
    pub async fn open(
        &self,
        cache: &Cache,
        way: &Way,
        sink: &Sink,
    ) -> Result<Option<Target>, String> {
        if let Some(url) = &cache.store {
            return Ok(cache
                .is_attached()
                .then(|| Copy::new(self.nix_for(url), url.clone()).into()));
        }
        let Some(endpoint) = cache
            .endpoint
            .clone()
            .filter(|_| cache.probe.answers || cache.is_attached())
        else {
            return Ok(None);
        };
        let attic = Attic::new(endpoint, cache.token.clone(), self.http.clone());
        let own = match way.hand {
            Hand::BuiltIn => false,
            Hand::AtticClient => true,
            // A cache that describes itself as Attic's needs no further question.
            Hand::Auto => cache.probe.config.is_none() && !stock::speaks_attic(&attic).await,
        };
        if own {
            self.stock(attic, cache, way, sink).await.map(Some)
        } else {
            Ok(Some(attic.into()))
        }
    }

    async fn stock(
        &self,
        attic: Attic,
        cache: &Cache,
        way: &Way,
        sink: &Sink,
    ) -> Result<Target, String> {
        let (env, nix, links) = (self.env, self.nix, self.private);
        let client = stock::find(&Search {
            env,
            nix,
            reference: &way.reference,
            folder: &way.folder,
            links,
        })
        .await?;
        sink.note(format!("flywheel: publishing with {client}"));
        let token = cache
            .token
            .as_ref()
            .ok_or("the stock client needs a token")?;
        Stock::new(&client, nix, attic, token, self.private)
            .map(Into::into)
            .map_err(|error| error.to_string())
    }

    /// Our calls of Nix have no credentials but those that this store takes from the environment.
    fn nix_for(&self, url: &StoreUrl) -> Nix {
        let mine = |name: &str| name.starts_with("AWS_") && url.as_str().starts_with("s3:");
        let given = self.env.all().filter(|(name, _)| mine(name));
        given.fold(self.nix.clone(), |nix, (name, value)| {
            nix.with_variable(name, value.to_str())
        })
    }

    /// Looks whether another kind of store opens; one that does not is left out.
    pub async fn ping(&self, cache: &mut Cache, sink: &Sink) {
        let Some(url) = cache.store.clone() else {
            return;
        };
        if let Err(error) = Copy::ping(&self.nix_for(&url), &url, PING_LIMIT).await {
            let text = format!("`{url}` does not open: {error}");
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

    fn read(cache: &str, publisher: &str, client: &str) -> Result<Way, String> {
        let text = |text: &str| text.parse::<Text>().expect("infallible");
        let inputs = DestinationInputs {
            cache: text(cache),
            publisher: text(publisher),
            attic_client: text(client),
        };
        inputs.read().map_err(|error| error.to_string())
    }

    #[test]
    fn what_is_not_given_is_the_built_in_client_if_the_server_knows_it() {
        let way = Way {
            store: None,
            hand: Hand::Auto,
            reference: stock::REFERENCE.to_owned(),
            folder: ".".into(),
        };
        assert_eq!(read("", "", ""), Ok(way));
        assert_eq!(
            read("", "Attic-Client", "path:/x#attic").map(|way| way.hand),
            Ok(Hand::AtticClient)
        );
        assert_eq!(
            read("s3://b", "", "").map(|way| way.store.map(|url| url.to_string())),
            Ok(Some("s3://b".into()))
        );
    }

    #[tokio::test]
    async fn a_bucket_gets_its_credentials_from_the_environment_and_nothing_else_does() {
        let folder = tempfile::tempdir().expect("folder");
        let program =
            crate::nix::tool::tests::script(folder.path(), "nix", "echo 'nix (Nix) 2.24.1'").await;
        let env = Env::from_pairs([
            ("AWS_SECRET_ACCESS_KEY", "k"),
            ("AWS_SESSION_TOKEN", "t"),
            ("ATTIC_TOKEN", "x"),
        ]);
        let nix = Nix::at(&program, &env).await.expect("a nix");
        let http = Clients::new(&crate::http::Roots::default()).expect("clients");
        let opening = Opening {
            env: &env,
            nix: &nix,
            http: &http,
            private: folder.path(),
        };
        let of = |url: &str| opening.nix_for(&url.parse().expect("a store"));
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
                read(cache, publisher, client).is_err(),
                "{cache} {publisher} {client}"
            );
        }
    }
}
