//! Checks of the cache, layer by layer: name, connection, TLS, answer, authorisation, and what it really serves. Where
//! the trust gate allows it, a path is written and read back. And checks of the Bazel remote cache, if there is one.

use std::time::{Duration, Instant};

use super::check_list::{CheckFailure, CheckList, CheckSpec, Found};
use super::inputs::Plan;
use flywheel_cache::client::attic::Attic;
use flywheel_cache::client::bazel::BazelProber;
use flywheel_cache::client::destination::{BodyCheck, ByteCounter};
use flywheel_cache::client::endpoint::Endpoint;
use flywheel_cache::client::probe::{Layer, Probe, probe};
use flywheel_core::contract::shared_cache::{Given, judge};
use flywheel_core::secret::Secret;
use flywheel_core::text::count;
use flywheel_core::trust::{Decision, PublishPermit};
use flywheel_nix::key::PublicKey;
use flywheel_nix::narinfo::NarInfo;
use flywheel_nix::path_info::PathInfo;
use flywheel_nix::store::Store;
use flywheel_nix::store_path::StorePath;
use flywheel_nix::tool::Nix;
use flywheel_sys::http::{Clients, Names};
use flywheel_sys::runner::env::Env;

const NAME: CheckSpec = CheckSpec::advisory("cache-name", "cache-name", 5);
const CONNECT: CheckSpec = CheckSpec::advisory("cache-connect", "cache-connect", 5);
const TLS: CheckSpec = CheckSpec::advisory("cache-tls", "cache-tls", 5);
const ANSWER: CheckSpec = CheckSpec::advisory("cache-answer", "cache-answer", 5);
const AUTHORISED: CheckSpec = CheckSpec::advisory("cache-authorised", "cache-authorised", 5);
const EXISTS: CheckSpec = CheckSpec::advisory("cache-exists", "cache-exists", 5);
const NARINFO: CheckSpec = CheckSpec::advisory("cache-narinfo", "cache-narinfo", 10);
const NAR: CheckSpec = CheckSpec::advisory("cache-nar", "cache-nar", 20);
const SIGNATURE: CheckSpec = CheckSpec::advisory("cache-signature", "cache-signature", 5);
const WRITE: CheckSpec = CheckSpec::advisory("cache-write", "cache-write", 15);
const READ_BACK: CheckSpec = CheckSpec::advisory("cache-read-back", "cache-read-back", 15);
const BAZEL_CACHE: CheckSpec = CheckSpec::advisory("bazel-cache", "bazel-cache", 5);
const BAZEL_EXECUTOR: CheckSpec = CheckSpec::advisory("bazel-executor", "bazel-executor", 5);
const LAYERS: [CheckSpec; 6] = [NAME, CONNECT, TLS, ANSWER, AUTHORISED, EXISTS];
const READ: [CheckSpec; 3] = [NARINFO, NAR, SIGNATURE];

/// How long all layers of the probe may take together.
const PROBE_LIMIT: Duration = Duration::from_secs(5);

/// How many paths of the store are looked up in the cache, until one is found …
const CANDIDATES: u32 = 16;
/// … and how large each may be in bytes: the one that is found is downloaded.
const CANDIDATE_SIZE: u64 = 32 << 20;

/// A cache that can be read from.
pub(super) struct Usable {
    attic: Attic,
    key: Option<PublicKey>,
}

/// Probes the cache, and reads the path that the caller names from it.
pub(super) async fn read(
    list: &mut CheckList,
    plan: &Plan,
    token: Option<&Secret>,
    clients: &Clients,
) -> Option<Usable> {
    let Some(endpoint) = &plan.cache else {
        list.skip_all(&LAYERS, "no cache is named");
        list.skip_all(&READ, "no cache is named");
        return None;
    };
    let usable = probe_layers(list, plan, endpoint, token, clients).await;
    match (&usable, &plan.cache_path) {
        (Some(usable), Some(path)) => served(list, usable, path).await,
        // Without a named path, `read_any` takes one from the store, which has to be opened first.
        (Some(_), None) => {}
        (None, _) => list.skip_all(&READ, "it depends on the layers below"),
    }
    usable
}

/// Reads the first path of the store that the cache has, where the caller names none.
pub(super) async fn read_any(
    list: &mut CheckList,
    plan: &Plan,
    usable: Option<&Usable>,
    nix: Option<&Nix>,
) {
    let (Some(usable), None) = (usable, &plan.cache_path) else {
        return;
    };
    let looked = tokio::time::timeout(NARINFO.limit, first_served(usable, nix)).await;
    match looked.unwrap_or_default() {
        (Some(path), _) => served(list, usable, &path).await,
        (None, looked) => {
            let candidates = count(looked as u64, "path");
            list.skip_all(
                &READ,
                &format!(
                    "the cache has none of {candidates} of this store; `cache-path` names another"
                ),
            );
        }
    }
}

/// Finds a path of the store that the cache has. Gives how many were looked up, too.
async fn first_served(usable: &Usable, nix: Option<&Nix>) -> (Option<StorePath>, usize) {
    let Some(nix) = nix else { return (None, 0) };
    let Ok(store) = Store::open(nix).await else {
        return (None, 0);
    };
    let key = usable.key.as_ref().map(PublicKey::name);
    let candidates = store
        .likely_served(key, CANDIDATE_SIZE, CANDIDATES)
        .await
        .unwrap_or_default();
    for path in &candidates {
        // A lookup that fails ends the search, too: the check of the path then reports the error.
        if !matches!(usable.attic.nar_info(&path.hash()).await, Ok(None)) {
            return (Some(path.clone()), candidates.len());
        }
    }
    (None, candidates.len())
}

fn spec(layer: Layer) -> CheckSpec {
    match layer {
        Layer::Name => NAME,
        Layer::Connect => CONNECT,
        Layer::Tls => TLS,
        Layer::Http => ANSWER,
        Layer::Authorised => AUTHORISED,
        Layer::Cache => EXISTS,
    }
}

async fn probe_layers(
    list: &mut CheckList,
    plan: &Plan,
    endpoint: &Endpoint,
    token: Option<&Secret>,
    clients: &Clients,
) -> Option<Usable> {
    let probed = probe(
        endpoint,
        token,
        &clients.api,
        &Names::default(),
        PROBE_LIMIT,
    )
    .await;
    record_layers(list, endpoint, &probed);
    if !probed.usable {
        return None;
    }
    let announced = probed.config.and_then(|config| config.public_key);
    let key = plan.public_key.clone().or(announced);
    Some(Usable {
        attic: Attic::new(endpoint.clone(), token.cloned(), clients.clone()),
        key,
    })
}

/// Records a check for each layer of the probe. Its time is the one since the layer below was reached.
fn record_layers(list: &mut CheckList, endpoint: &Endpoint, probed: &Probe) {
    let mut reached = Duration::ZERO;
    for layer in [
        Layer::Name,
        Layer::Connect,
        Layer::Tls,
        Layer::Http,
        Layer::Authorised,
        Layer::Cache,
    ] {
        let spec = spec(layer);
        let at = probed
            .layers
            .iter()
            .find(|(known, _)| *known == layer)
            .map(|(_, at)| *at);
        match (&probed.failed, at) {
            (Some((failed, text)), _) if *failed == layer => {
                let (what, hint) = text.rsplit_once(". ").unwrap_or((text, ""));
                list.put(
                    spec,
                    PROBE_LIMIT,
                    at.unwrap_or(probed.took).saturating_sub(reached),
                    Err(CheckFailure::new(what, hint)),
                );
            }
            (_, Some(at)) => {
                list.put(
                    spec,
                    PROBE_LIMIT,
                    at.saturating_sub(reached),
                    Ok(endpoint.to_string()),
                );
                reached = reached.max(at);
            }
            (_, None) if layer == Layer::Tls && endpoint.server.scheme() == "http" => {
                list.skip(spec, "the cache is named by `http`");
            }
            (_, None) => list.skip(spec, "it depends on the layers below"),
        }
    }
}

/// Checks what the cache serves of a path that it should have.
async fn served(list: &mut CheckList, usable: &Usable, path: &StorePath) {
    let found = list.check(NARINFO, |_| narinfo(usable, path)).await;
    let Some(info) = found else {
        return list.skip_all(&READ[1..], "it depends on `cache-narinfo`");
    };
    list.check(NAR, |_| body(usable, &info)).await;
    if usable.key.is_some() {
        list.check(SIGNATURE, |_| async { signature(usable, &info) })
            .await;
    } else {
        list.skip(SIGNATURE, "no key is known: give `attic-public-key`");
    }
}

async fn narinfo(usable: &Usable, path: &StorePath) -> Found<NarInfo> {
    let hint = "Look at the cache server and at its storage, and publish the path again.";
    match usable.attic.nar_info(&path.hash()).await {
        Ok(Some(info)) if info.path == *path => Ok((info, path.to_string())),
        Ok(Some(info)) => Err(CheckFailure::new(
            format!("it describes `{}` instead of `{path}`", info.path),
            hint,
        )),
        Ok(None) => Err(CheckFailure::new(
            format!("the cache does not have `{path}`"),
            hint,
        )),
        Err(error) => Err(CheckFailure::new(error.to_string(), hint)),
    }
}

async fn body(usable: &Usable, info: &NarInfo) -> Found<()> {
    let hint = "The cache has lost or spoiled it: look at its storage, and publish the path again.";
    match usable.attic.check_body(info, &ByteCounter::default()).await {
        Ok(BodyCheck::Good) => Ok(((), format!("all {} bytes, and their hash", info.nar_size))),
        Ok(BodyCheck::Bad(text) | BodyCheck::BrokenOff(text) | BodyCheck::Unsupported(text)) => {
            Err(CheckFailure::new(text, hint))
        }
        Err(error) => Err(CheckFailure::new(error.to_string(), hint)),
    }
}

fn signature(usable: &Usable, info: &NarInfo) -> Found<()> {
    let Some(key) = &usable.key else {
        return Ok(((), "no key is known".to_owned()));
    };
    if info.signed_by(key) {
        return Ok(((), format!("good, by `{}`", key.name())));
    }
    let text = format!(
        "no good signature by `{}`, so that Nix refuses every hit",
        key.name()
    );
    Err(CheckFailure::new(
        text,
        "Compare `attic-public-key` with what the cache says of itself (`attic cache info`).",
    ))
}

/// Writes what the canary has built, if the trust gate allows it, and reads it back.
pub(super) async fn write(
    list: &mut CheckList,
    usable: Option<&Usable>,
    built: Option<(&Nix, &StorePath)>,
    decision: &Decision,
) {
    let why = match (usable, built, decision.permit()) {
        (None, ..) => "there is no cache that answers".to_owned(),
        (_, None, _) => "there is nothing new to write".to_owned(),
        (.., None) => decision.reason(),
        (Some(usable), Some((nix, path)), Some(permit)) => {
            let begun = Instant::now();
            let wrote = list
                .check(WRITE, |_| upload(usable, nix, path, &permit))
                .await;
            match wrote {
                Some(()) => drop(
                    list.check(READ_BACK, |_| read_back(usable, path, begun))
                        .await,
                ),
                None => list.skip(READ_BACK, "it depends on `cache-write`"),
            }
            return;
        }
    };
    list.skip_all(&[WRITE, READ_BACK], &why);
}

/// Uploads a path. The permit is the proof that the trust gate allows it.
async fn upload(
    usable: &Usable,
    nix: &Nix,
    path: &StorePath,
    _permit: &PublishPermit,
) -> Found<()> {
    let hint =
        "Check the rights of `ATTIC_TOKEN` (`push` on this cache), and the cache server's log.";
    let broken = |text: String| CheckFailure::new(text, hint);
    let store = Store::open(nix)
        .await
        .map_err(|error| broken(error.to_string()).at("store"))?;
    let found = store
        .infos(std::slice::from_ref(path))
        .await
        .map_err(|error| broken(error.to_string()).at("store"))?;
    let info: &PathInfo = found
        .infos
        .first()
        .ok_or_else(|| broken(format!("`{path}` is gone from the store")).at("store"))?;
    let file = store.file_of(path);
    usable
        .attic
        .upload(info, &file, &ByteCounter::default())
        .await
        .map_err(|error| broken(error.to_string()))?;
    Ok(((), path.to_string()))
}

async fn read_back(usable: &Usable, path: &StorePath, begun: Instant) -> Found<()> {
    let (info, _) = narinfo(usable, path).await?;
    body(usable, &info).await?;
    if usable.key.is_some() {
        signature(usable, &info)?;
    }
    Ok((
        (),
        format!(
            "whole, {:.2} s after the upload began",
            begun.elapsed().as_secs_f64()
        ),
    ))
}

/// The Bazel remote cache and executor that the runner's hints name.
pub(super) async fn bazel(list: &mut CheckList, plan: &Plan, env: &Env, prober: &BazelProber) {
    let hint = |name: &str| env.get(name).map(str::to_owned);
    let given = Given {
        cache: plan
            .bazel_cache
            .clone()
            .or_else(|| hint("BAZEL_REMOTE_CACHE")),
        executor: hint("BAZEL_REMOTE_EXECUTOR"),
        ..Given::default()
    };
    let judgement = judge(&plan.shared_cache, &given);
    for (about, spec, is_given) in [
        ("cache", BAZEL_CACHE, given.cache.is_some()),
        ("executor", BAZEL_EXECUTOR, given.executor.is_some()),
    ] {
        let wrong = judgement
            .findings
            .iter()
            .find(|finding| finding.about == about);
        let endpoint = judgement
            .endpoints
            .iter()
            .find(|endpoint| endpoint.about == about);
        match (wrong, endpoint) {
            _ if !is_given => list.skip(spec, "none is named"),
            (Some(finding), _) => {
                let broken = CheckFailure::new(
                    finding.text.clone(),
                    "Correct the hint; `flywheel cache-contract` says more.",
                );
                list.put(spec, spec.limit, Duration::ZERO, Err(broken));
            }
            (None, Some(endpoint)) => drop(
                list.check(spec, |limit| try_endpoint(prober, endpoint, limit))
                    .await,
            ),
            (None, None) => list.skip(spec, "none is named"),
        }
    }
}

async fn try_endpoint(
    prober: &BazelProber,
    endpoint: &flywheel_core::contract::shared_cache::Endpoint,
    limit: Duration,
) -> Found<()> {
    let hint = "Check that the server is up and that the runner may reach it.";
    let shown = flywheel_core::contract::shared_cache::redact(endpoint.url.as_str());
    let failed = |text: String| CheckFailure::new(format!("{shown}: {text}"), hint);
    let can = prober
        .probe(&endpoint.url, limit)
        .await
        .map_err(|failure| failed(format!("{} ({})", failure.text, failure.layer)))?;
    match endpoint.about {
        "executor" if !can.execution => Err(failed("it answers, but executes nothing".to_owned())),
        "cache" if !can.cache => Err(failed("it answers, but offers no cache".to_owned())),
        _ => Ok(((), shown)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::check_list::Weights;
    use super::*;

    #[test]
    fn a_layer_that_failed_has_the_time_that_it_took() {
        let ms = Duration::from_millis;
        let server = "http://h:1".parse().expect("URL");
        let endpoint = Endpoint::new(server, "main".parse().expect("name"));
        let probed = Probe {
            layers: vec![
                (Layer::Name, ms(1)),
                (Layer::Connect, ms(2)),
                (Layer::Http, ms(9)),
            ],
            failed: Some((
                Layer::Authorised,
                "the server answered 403. Look".to_owned(),
            )),
            took: ms(12),
            ..Probe::default()
        };
        let deadline = tokio::time::Instant::now() + PROBE_LIMIT;
        let mut list = CheckList::new(Weights::default(), deadline);
        record_layers(&mut list, &endpoint, &probed);
        let took = list
            .checks
            .iter()
            .find(|check| check.name == "cache-authorised")
            .map(|check| check.took);
        assert_eq!(took, Some(ms(3)));
    }
}
