//! The inputs that say how Nix comes to a machine that has none.

use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::address;
use super::value::{Invalid, boolean, one_of, value};
use super::{Hints, http_address, public_key};
use flywheel_core::exit::UsageError;
use flywheel_core::text::one_line;
use flywheel_nix::bootstrap::plan::{BinaryCache, Installer, Mirror, NixVersion, Wanted};
use flywheel_nix::bootstrap::releases;
use flywheel_nix::key::PublicKey;

/// How Nix is installed where there is none.
#[derive(Args, Clone, Debug)]
pub(crate) struct NixInputs {
    /// How Nix is installed where there is none: as a `closure` from a binary cache, as a `tarball`, which is a release
    /// archive, by the package manager of the distribution (`distro`; as root, on Debian and its like), or with `auto` by the first
    /// of these that works. With `none` the job ends where there is no Nix.
    #[arg(
        long,
        value_name = "WAY",
        value_parser = one_of(&INSTALLERS),
        default_value = "auto"
    )]
    nix_installer: Installer,

    /// The Nix to install where there is none: a version such as `2.31.2`, or a store path that `nix-source` has, such as
    /// `/nix/store/…-nix-2.34.8` (default: the runner's hint `NIX_CLOSURE`, then `2.31.2` as a closure, `2.34.7` as an
    /// archive).
    #[arg(long, value_name = "VERSION", value_parser = value(version))]
    nix_version: Option<NixVersion>,

    /// The binary cache that Nix itself is fetched from, and the public keys by which it is trusted, such as
    /// `https://cache.example.org/main main:6NCHdD59X431…=`; another one on each line (default: the runner's
    /// hint `NIX_CLOSURE_SOURCE`, else `https://cache.nixos.org`, then the job's own cache if its public key is known).
    #[arg(long, value_name = "URL KEY", value_parser = value(sources))]
    nix_source: Option<Sources>,

    /// Where the release archive of Nix is taken from: a URL, a file, or a folder, such as `/opt/nix` in the runner's image
    /// (default: `https://releases.nixos.org/nix/`).
    #[arg(long, value_name = "PLACE", value_parser = value(mirror))]
    nix_mirror: Option<Mirror>,

    /// Whether a Nix that is installed gets build users and a daemon; that takes root.
    #[arg(
        long,
        value_name = "BOOL",
        action = ArgAction::Set,
        value_parser = boolean(),
        default_value = "false"
    )]
    nix_daemon: bool,
}

/// For clap a `Vec` would be an input that may be given several times.
type Sources = Vec<BinaryCache>;

/// What the input `nix-installer` can be.
const INSTALLERS: [(&str, Installer); 5] = [
    ("auto", Installer::Auto),
    ("closure", Installer::Closure),
    ("tarball", Installer::Tarball),
    ("distro", Installer::Distro),
    ("none", Installer::None),
];

impl NixInputs {
    /// The inputs with the runner's hints in the place of those that are not given, so that the jobs of an offline host
    /// need not name where their Nix comes from.
    #[must_use]
    pub(crate) fn or_hints(&self, hints: &mut Hints) -> Self {
        let mut inputs = self.clone();
        // The other ways have no use for a closure.
        if !matches!(self.nix_installer, Installer::Auto | Installer::Closure) {
            return inputs;
        }
        if inputs.nix_version.is_none() {
            inputs.nix_version = hints.get("NIX_CLOSURE", closure);
        }
        if inputs.nix_source.is_none() {
            let read = |text: &str| sources(text).map_err(|invalid| invalid.to_string());
            inputs.nix_source = hints.get("NIX_CLOSURE_SOURCE", read);
        }
        inputs
    }

    /// What is wanted. `own` is the job's own cache, if its key is known.
    ///
    /// # Errors
    /// When the version is not to be had in the way that is asked for.
    pub(crate) fn wanted(&self, own: Option<BinaryCache>) -> Result<Wanted, UsageError> {
        self.check_version()?;
        if self.nix_daemon && self.nix_installer == Installer::Distro {
            let problem = "has no use for the distribution's package (`nix-installer: distro`), which brings its own";
            return Err(
                UsageError::new("nix-daemon", problem).with_hint("Leave one of the two out.")
            );
        }
        Ok(Wanted {
            installer: self.nix_installer,
            version: self.nix_version.clone(),
            sources: match &self.nix_source {
                Some(sources) => sources.clone(),
                // Who may push to the job's own cache can put other content under Nix's path, so that upstream comes first.
                None => [releases::upstream()].into_iter().chain(own).collect(),
            },
            mirror: self.nix_mirror.clone(),
            daemon: self.nix_daemon,
            is_for_children_alone: true,
        })
    }

    fn check_version(&self) -> Result<(), UsageError> {
        let Some(version) = &self.nix_version else {
            return Ok(());
        };
        let installer = self.nix_installer.as_str();
        let problem = match (self.nix_installer, version) {
            (Installer::Distro, _) => "cannot be chosen with `nix-installer: distro`".to_owned(),
            (Installer::Tarball, NixVersion::Path(_)) => {
                format!("is a store path, which `nix-installer: {installer}` has no use for")
            }
            (Installer::Closure, NixVersion::Number(number))
                if releases::closure(number).is_none() =>
            {
                format!("is {number}, whose store path is not known")
            }
            _ => return Ok(()),
        };
        Err(UsageError::new("nix-version", problem).with_hint(
            "Give a whole store path for a binary cache, a version such as `2.34.7` for a release archive, or leave \
             `nix-installer` out.",
        ))
    }
}

fn version(text: &str) -> Result<NixVersion, String> {
    text.parse()
}

/// The hint names a store path; a version by its number would not do for every way.
fn closure(text: &str) -> Result<NixVersion, String> {
    match version(text)? {
        path @ NixVersion::Path(_) => Ok(path),
        NixVersion::Number(_) => Err("is no store path".to_owned()),
    }
}

fn sources(text: &str) -> Result<Sources, Invalid> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(source).collect()
}

fn source(line: &str) -> Result<BinaryCache, Invalid> {
    let mut words = line.split_whitespace();
    let address = http_address(words.next().unwrap_or_default())?.url;
    let keys = words.map(key).collect::<Result<Vec<_>, _>>()?;
    let upstream = releases::upstream();
    if keys.is_empty() && address.host_str() == upstream.address.host_str() {
        return Ok(BinaryCache {
            keys: upstream.keys,
            address,
        });
    }
    if keys.is_empty() {
        let problem = "names a cache without a public key, so that nothing of it could be trusted";
        return Err(Invalid::new(problem)
            .with_hint("Give the key behind the URL, such as `main:6NCHdD59X431…=`."));
    }
    Ok(BinaryCache { address, keys })
}

fn key(word: &str) -> Result<PublicKey, Invalid> {
    public_key(word).map_err(|problem| {
        // A secret key that was taken for the public one must not be in the log.
        let name = word
            .split_once(':')
            .map_or(word.to_owned(), |(name, _)| format!("{name}:…"));
        Invalid::new(format!("names `{}`, which {problem}", one_line(&name, 60))).with_hint(
            "Give the URL and behind it the public key, such as `https://cache.example.org/main main:6NCHdD59X431…=`; \
             another cache stands on a line of its own.",
        )
    })
}

fn mirror(text: &str) -> Result<Mirror, String> {
    if text.contains("://") {
        return Ok(Mirror::Url(
            address(text, &["http", "https"]).map(|address| address.url)?,
        ));
    }
    let path = PathBuf::from(text);
    if path.is_absolute() {
        return Ok(Mirror::Path(path));
    }
    Err(format!(
        "must be a URL or an absolute path, not `{}`",
        one_line(text, 100)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::parse::tests::read;
    use flywheel_sys::runner::env::Env;

    const KEY: &str = "main:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

    fn wanted(inputs: &[(&str, &str)]) -> Result<Wanted, UsageError> {
        read::<NixInputs>(inputs)?.wanted(None)
    }

    #[test]
    fn without_inputs_the_jobs_own_cache_is_asked_behind_upstream() {
        let own = BinaryCache {
            address: "https://cache.example/main".parse().expect("a URL"),
            keys: vec![KEY.parse().expect("a key")],
        };
        let inputs = read::<NixInputs>(&[]).expect("defaults");
        let wanted = inputs.wanted(Some(own.clone())).expect("nothing is wrong");
        assert_eq!(wanted.sources, [releases::upstream(), own]);
        assert_eq!(wanted.installer, Installer::Auto);
    }

    #[test]
    fn a_source_is_named_with_its_keys() {
        let text = format!("https://a.example/x {KEY} {KEY}\n\nhttps://cache.nixos.org\n");
        let wanted = wanted(&[("nix-source", &text)]).expect("well formed");
        let keys: Vec<usize> = wanted.sources.iter().map(|one| one.keys.len()).collect();
        assert_eq!(keys, [2, 1]);
    }

    #[test]
    fn hints_stand_in_for_what_is_not_given() {
        let path = "/nix/store/x30lnlgk1s16rynrfslbf8phr6h6rqf2-nix-2.31.2";
        let source = format!("http://a.example/zstd {KEY}");
        let env = Env::from_pairs([
            ("NIX_CLOSURE", path),
            ("NIX_CLOSURE_SOURCE", source.as_str()),
        ]);
        let check = |given: &[(&str, &str)], version: Option<&str>, host: &str| {
            let mut hints = Hints::from_env(&env);
            let inputs = read::<NixInputs>(given).expect("well formed");
            let wanted = inputs
                .or_hints(&mut hints)
                .wanted(None)
                .expect("nothing is wrong");
            assert_eq!(
                wanted.version.map(|one| one.to_string()).as_deref(),
                version
            );
            assert_eq!(wanted.sources[0].address.host_str(), Some(host));
            assert_eq!(hints.bad, [""; 0]);
        };
        check(&[], Some(path), "a.example");
        check(&[("nix-version", "2.31.2")], Some("2.31.2"), "a.example");
        let other = format!("https://b.example {KEY}");
        check(&[("nix-source", &other)], Some(path), "b.example");
        check(&[("nix-installer", "tarball")], None, "cache.nixos.org");
    }

    #[test]
    fn a_hint_that_is_malformed_is_not_used() {
        let env = Env::from_pairs([("NIX_CLOSURE", "2.31.2"), ("NIX_CLOSURE_SOURCE", "nowhere")]);
        let mut hints = Hints::from_env(&env);
        let inputs = read::<NixInputs>(&[]).expect("defaults");
        let wanted = inputs
            .or_hints(&mut hints)
            .wanted(None)
            .expect("nothing is wrong");
        assert_eq!((wanted.version, hints.bad.len()), (None, 2));
    }

    #[test]
    fn what_cannot_be_is_an_error_that_names_the_input() {
        for (input, bad) in [
            ("nix-installer", "curl"),
            ("nix-version", "latest"),
            ("nix-source", "https://a.example/"),
            ("nix-source", "https://a.example/ nokey"),
            ("nix-source", "ftp://a.example/"),
            ("nix-source", "https://u:sesame@a.example/"),
            ("nix-mirror", "opt/nix"),
            ("nix-mirror", "ftp://a.example/"),
            ("nix-daemon", "maybe"),
        ] {
            let error = wanted(&[(input, bad)]).expect_err(bad);
            assert!(error.to_string().contains(input), "{error}");
            assert!(!error.to_string().contains("sesame"), "{error}");
        }
    }

    #[test]
    fn a_key_that_is_none_is_named_without_what_may_be_secret() {
        for (text, shown) in [
            ("https://a.example foo", "`foo`"),
            ("https://a.example main:c2VzYW1l", "`main:…`"),
        ] {
            let error = wanted(&[("nix-source", text)]).expect_err(text);
            let message = error.to_string();
            assert!(
                message.contains(shown) && !message.contains("c2VzYW1l"),
                "{message}"
            );
            assert!(
                format!("{error:?}").contains("behind it the public key"),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_version_fits_the_way_that_it_comes_by() {
        let path = "/nix/store/x30lnlgk1s16rynrfslbf8phr6h6rqf2-nix-2.31.2";
        for (installer, version, fits) in [
            ("closure", path, true),
            ("closure", "2.31.2", true),
            ("closure", "2.34.7", false),
            ("tarball", "2.34.7", true),
            ("tarball", path, false),
            ("distro", "2.34.7", false),
            ("auto", "2.30.0", true),
        ] {
            let read = wanted(&[("nix-installer", installer), ("nix-version", version)]);
            assert_eq!(read.is_ok(), fits, "{installer} {version}");
        }
    }
}
