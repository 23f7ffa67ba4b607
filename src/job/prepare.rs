//! Nix and the cache made ready for a job, side by side, and the settings that follow from both.

use std::time::{Duration, Instant};

use super::attach::{self, Cache};
use super::backend::Backend;
use super::begin::Session;
use super::destination::DestinationOpener;
use super::lacking;
use super::reading::{self, ReadInputs};
use super::settings::{self, NixSettings, SettingsInputs};
use crate::inputs::roots::{SSL_CERT_FILE, roots};
use flywheel_cache::client::destination::Target;
use flywheel_core::exit::Failure;
use flywheel_nix::bootstrap::plan::Wanted;
use flywheel_nix::bootstrap::{self, Ready};
use flywheel_nix::effective_settings::EffectiveSettings;
use flywheel_nix::settings::{Settings, word_in};
use flywheel_nix::store::{self, Store};
use flywheel_nix::tool::Nix;
use flywheel_sys::http::{Clients as HttpClients, Roots};
use flywheel_sys::process::signals::Signals;
use flywheel_sys::runner::workflow::{Level, Workflow};

/// Making Nix ready may include installing it.
const BOOTSTRAP_LIMIT: Duration = Duration::from_secs(600);

/// Nix and the cache, ready.
pub(crate) struct Prepared {
    pub(crate) ready: Ready,
    /// The cache, attached or left out.
    pub(crate) cache: Cache,
    /// Where paths go, if the job publishes and the destination opened.
    pub(crate) to: Option<Target>,
    pub(crate) settings: NixSettings,
    /// What Nix reports under these settings; `None` before it was asked, and where it gave no answer.
    pub(crate) in_force: Option<EffectiveSettings>,
    /// How long the preparation took.
    pub(crate) took: Duration,
}

impl Prepared {
    /// How long the parts of the preparation took, where Nix was installed.
    pub(crate) fn bootstrap_parts(&self) -> Vec<(&'static str, Duration)> {
        if !self.ready.installed {
            return Vec::new();
        }
        let mut parts = self.ready.parts.clone();
        let known: Duration = parts.iter().map(|(_, time)| *time).sum();
        parts.push(("settings", self.took.saturating_sub(known)));
        parts
    }

    /// Nix with the job's settings.
    pub(crate) fn nix(&self) -> Nix {
        self.ready.nix.clone().with_config(&self.settings.config)
    }

    /// Opens the job's store.
    ///
    /// # Errors
    /// When Nix cannot.
    pub(crate) async fn open_store(&self) -> Result<Store, store::Error> {
        match &self.in_force {
            // Reading the settings back has opened the store already, and one more call of Nix takes long.
            Some(EffectiveSettings {
                opened: Some(opened),
                settings,
                ..
            }) => Store::from_opened(&self.nix(), opened, settings).await,
            _ => Store::open(&self.nix()).await,
        }
    }

    /// Ends what was started for this job: the embedded cache, the proxy that Nix reads through, a Nix daemon.
    pub(crate) async fn stop(self) {
        self.cache.stop().await;
        self.ready.stop().await;
    }
}

impl Session<'_> {
    /// Makes Nix and the cache ready side by side, then the settings, which are read back from Nix.
    ///
    /// # Errors
    /// When there is no usable Nix. A cache that fails is left out.
    pub(crate) async fn make_ready(&self) -> Result<Prepared, Failure> {
        let mut prepared = self.make_ready_unread().await?;
        prepared.in_force = self.read_back(&prepared).await;
        Ok(prepared)
    }

    /// Does the same without reading the settings back, for a caller that does so beside other calls of Nix.
    async fn make_ready_unread(&self) -> Result<Prepared, Failure> {
        let begun = Instant::now();
        let sink = &self.sink;
        let roots = roots(self.env);
        let wanted = Wanted {
            is_for_children_alone: !self.is_for_later_steps,
            ..self.plan.nix.clone()
        };
        let bootstrapping = async {
            let ready = bootstrap::ready(self.env, &wanted, &roots, sink, BOOTSTRAP_LIMIT);
            Ok(Box::pin(ready).await?)
        };
        // Nix comes first in the join: the system's certificates are read while Nix answers.
        let attaching = self.attach_cache(&roots);
        let (ready, (mut http, mut cache)) = tokio::try_join!(bootstrapping, attaching)?;
        if cache.is_left_out_by_tls()
            && let Some(roots) = self.roots_of_nix(&ready).await
        {
            (http, cache) = self.attach_cache(&roots).await?;
        }
        attach::report(&cache, sink);
        // The embedded cache makes a token of its own, which the runner does not know yet.
        if let Some(secret) = &cache.token {
            self.workflow.mask(secret);
        }
        let reads = ReadInputs {
            ready: &ready,
            http: &http,
            base: self.env.get("NIX_CONFIG").unwrap_or_default(),
            extra: &self.plan.extra_nix_config,
            is_for_later_steps: self.is_for_later_steps,
        };
        cache.reading = reading::start(&reads, &cache, sink).await;
        if let Some(key) = cache.read_key() {
            self.workflow.mask(key);
        }
        let mut settings = self.prepare_settings(&ready, &cache).await;
        let nix = ready.nix.clone().with_config(&settings.config);
        let opener = DestinationOpener {
            env: self.env,
            nix: &nix,
            http: &http,
            private: self.private(),
        };
        opener.ping(&mut cache, sink).await;
        // A store that turned out not to open must not stay among Nix's substituters.
        if matches!(cache.backend, Some(Backend::Store(_))) && !cache.is_attached() {
            settings = self.prepare_settings(&ready, &cache).await;
        }
        let to = self.open_destination(&opener, &mut cache).await;
        sink.note(format!(
            "flywheel: {} at {}",
            ready.nix.version,
            ready.nix.program.display()
        ));
        let folder = &self.plan.destination.folder;
        for remark in lacking::remarks(&ready.nix.version, folder, self.env) {
            sink.note(format!("flywheel: {remark}"));
        }
        if let Some(address) = cache.address().filter(|_| cache.is_attached()) {
            sink.note(format!("flywheel: cache {address} attached"));
        }
        Ok(Prepared {
            ready,
            cache,
            to,
            settings,
            in_force: None,
            took: begun.elapsed(),
        })
    }

    /// The roots with those of Nix's setting `ssl-cert-file`, if that names a file of its own.
    async fn roots_of_nix(&self, ready: &Ready) -> Option<Roots> {
        let settings = match &ready.settings_before {
            Some(settings) => settings.clone(),
            None => Settings::read(&ready.nix).await.unwrap_or_default(),
        };
        // Nix 2.8 does not know the setting, and shows none.
        let file = word_in(&self.plan.extra_nix_config, SSL_CERT_FILE)
            .or_else(|| settings.text(SSL_CERT_FILE))
            .filter(|file| !file.is_empty())?;
        let mut roots = roots(self.env);
        roots.files.push(file.into());
        Some(roots)
    }

    async fn attach_cache(&self, roots: &Roots) -> Result<(HttpClients, Cache), Failure> {
        let http = HttpClients::new(roots)?;
        let (plan, token) = (self.plan, self.secrets.attic.as_ref());
        let key = plan.public_key.as_ref();
        let cache = attach::attach(&plan.source, key, token, &http, &self.sink).await;
        Ok((http, cache))
    }

    /// Opens the destination of a job that publishes. One that cannot be opened is a notice, and `cache` keeps why.
    async fn open_destination(
        &self,
        opener: &DestinationOpener<'_>,
        cache: &mut Cache,
    ) -> Option<Target> {
        if !self.decision.publishes() {
            return None;
        }
        match opener.open(cache, &self.plan.destination, &self.sink).await {
            Ok(to) => to,
            Err(reason) => {
                self.workflow.annotate(
                    Level::Notice,
                    "not publishing",
                    &format!("publication is skipped: {reason}"),
                );
                cache.skipped = Some(reason);
                None
            }
        }
    }

    async fn prepare_settings(&self, ready: &Ready, cache: &Cache) -> NixSettings {
        let inputs = SettingsInputs {
            env: self.env,
            ready,
            cache,
            github_token: self.secrets.github.as_ref(),
            publishes: self.decision.publishes(),
            extra: &self.plan.extra_nix_config,
            private: self.private(),
        };
        settings::prepare(&inputs, &self.sink).await
    }

    /// Asks Nix which of the job's settings are in force, and warns of each that Nix ignores.
    pub(crate) async fn read_back(&self, prepared: &Prepared) -> Option<EffectiveSettings> {
        settings::report_ignored(
            &prepared.ready,
            &prepared.settings,
            &self.plan.extra_nix_config,
            &self.sink,
        )
        .await
    }

    /// Makes everything ready within a group of the log. `None` when a signal asked the job to stop first.
    ///
    /// # Errors
    /// As `make_ready`.
    pub(crate) async fn prepare(&self, signals: &mut Signals) -> Result<Option<Prepared>, Failure> {
        in_group(&self.workflow, signals, self.make_ready()).await
    }

    /// Does the same for a caller that reads the settings back beside other calls of Nix.
    ///
    /// # Errors
    /// As `make_ready`.
    pub(crate) async fn prepare_unread(
        &self,
        signals: &mut Signals,
    ) -> Result<Option<Prepared>, Failure> {
        in_group(&self.workflow, signals, self.make_ready_unread()).await
    }
}

async fn in_group(
    workflow: &Workflow,
    signals: &mut Signals,
    making: impl Future<Output = Result<Prepared, Failure>>,
) -> Result<Option<Prepared>, Failure> {
    workflow.group("flywheel: prepare");
    let prepared = tokio::select! {
        biased;
        _ = signals.next() => Ok(None),
        prepared = Box::pin(making) => prepared.map(Some),
    };
    workflow.end_group();
    prepared
}
