//! Where a job's paths go, and how: with the built-in client, with Attic's own, or with `nix copy`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::cache::attic::Attic;
use crate::cache::copy::{Copy, StoreUrl, StoreUrlError};
use crate::cache::destination::Target;
use crate::cache::stock::{self, Search, Stock};
use crate::command::job::attach::Cache;
use crate::command::value::{Invalid, value, variant};
use crate::exit::Explain as _;
use crate::http::Clients;
use crate::nix::tool::Nix;
use crate::progress::Sink;
use crate::report::job::CacheState;
use crate::runner::env::Env;

/// How long a store is looked at before the job begins.
pub const PING_LIMIT: Duration = Duration::from_secs(10);

/// The inputs that choose the client that publishes, or another kind of store.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Destination")]
pub struct DestinationInputs {
    /// Another kind of store instead of an Attic cache, such as `s3://bucket?region=eu-west-1`,
    /// `file:///var/cache/nix`, `ssh-ng://host` or `https://cache.example.org/nix`: read as a
    /// substituter, written to by `nix copy`. Credentials come from the environment (default: none).
    #[arg(long, value_name = "URL", value_parser = value(store_url))]
    cache: Option<StoreUrl>,

    /// Who sends paths to the Attic server.
    #[arg(long, value_name = "WHO", value_parser = variant::<Hand>(), default_value = "auto")]
    publisher: Hand,

    /// Where Attic's own client is substituted from: a flake reference with an attribute, such as
    /// `nixpkgs#attic-client`.
    #[arg(
        long,
        value_name = "FLAKEREF",
        value_parser = value(attic_client),
        default_value = stock::REFERENCE
    )]
    attic_client: String,
}

/// The input `publisher`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Hand {
    /// The built-in client, and Attic's own where the server does not know the protocol.
    #[default]
    Auto,
    /// The built-in client.
    BuiltIn,
    /// Attic's own client, from `PATH` or substituted, never compiled.
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
    /// What the inputs amount to in the current folder.
    pub fn way(&self) -> Way {
        Way {
            store: self.cache.clone(),
            hand: self.publisher,
            reference: self.attic_client.clone(),
            folder: ".".into(),
        }
    }
}

/// What is malformed may hold a password, and is not quoted.
fn store_url(text: &str) -> Result<StoreUrl, Invalid> {
    text.parse().map_err(|error: StoreUrlError| {
        let invalid = Invalid::new(match error {
            StoreUrlError::Malformed(_) => "names no store: it is not the URL of one".to_owned(),
            _ => format!("names no store: {error}"),
        });
        invalid.with_hint(error.hint().unwrap_or_default())
    })
}

fn attic_client(text: &str) -> Result<String, Invalid> {
    if text.starts_with('-') || text.contains(char::is_whitespace) {
        return Err(Invalid::new("is no flake reference").with_hint(format!(
            "Give one with its attribute, such as `{}`.",
            stock::REFERENCE
        )));
    }
    Ok(text.to_owned())
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
    use crate::cli::tests::read;

    fn way(cache: &str, publisher: &str, client: &str) -> Result<Way, String> {
        let inputs = [
            ("cache", cache),
            ("publisher", publisher),
            ("attic-client", client),
        ];
        let inputs = read::<DestinationInputs>(&inputs).map_err(|error| error.to_string())?;
        Ok(inputs.way())
    }

    #[test]
    fn what_is_not_given_is_the_built_in_client_if_the_server_knows_it() {
        let default = Way {
            store: None,
            hand: Hand::Auto,
            reference: stock::REFERENCE.to_owned(),
            folder: ".".into(),
        };
        assert_eq!(way("", "", ""), Ok(default));
        assert_eq!(
            way("", "Attic-Client", "path:/x#attic").map(|way| way.hand),
            Ok(Hand::AtticClient)
        );
        assert_eq!(
            way("s3://b", "", "").map(|way| way.store.map(|url| url.to_string())),
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
                way(cache, publisher, client).is_err(),
                "{cache} {publisher} {client}"
            );
        }
    }
}
