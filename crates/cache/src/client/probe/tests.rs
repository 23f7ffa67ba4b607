//! Each way in which a cache cannot be used: it is named, and found within the deadline.

use super::*;
use crate::client::fake::{Fake, GOOD, PULL_ONLY, PUSH_ONLY};

async fn probe_at(endpoint: &Endpoint, token: Option<&str>, limit: Duration) -> Probe {
    let client = http::client(&http::Roots::default()).expect("settings hold");
    let token = token.and_then(Secret::new);
    let began = Instant::now();
    let found = probe(endpoint, token.as_ref(), &client, &Names::default(), limit).await;
    assert!(
        began.elapsed() < limit + Duration::from_secs(1),
        "{:?}",
        began.elapsed()
    );
    assert_ne!(found.usable, found.failed.is_some(), "{found:?}");
    found
}

async fn of(fake: &Fake, token: Option<&str>) -> Probe {
    probe_at(&fake.endpoint(), token, Duration::from_secs(2)).await
}

fn failed(probe: &Probe) -> (Layer, &str) {
    probe
        .failed
        .as_ref()
        .map(|(layer, text)| (*layer, text.as_str()))
        .expect("failed")
}

#[tokio::test]
async fn a_good_cache_is_known_on_every_layer() {
    let fake = Fake::start().await;
    let private = of(&fake, Some(GOOD)).await;
    assert!(
        private.usable && !private.public && private.answers,
        "{private:?}"
    );
    assert_eq!(
        private.config.and_then(|config| config.public_key),
        Some(fake.server.key.public())
    );
    let layers: Vec<Layer> = private.layers.iter().map(|(layer, _)| *layer).collect();
    assert_eq!(
        layers,
        [
            Layer::Name,
            Layer::Connect,
            Layer::Http,
            Layer::Authorised,
            Layer::Cache
        ]
    );
    assert!(private.layers.is_sorted_by_key(|(_, time)| *time));
    fake.server.faults().public = true;
    let public = of(&fake, None).await;
    assert!(
        public.usable && public.public && public.config.is_some(),
        "{public:?}"
    );
}

#[tokio::test]
async fn a_plain_nix_cache_is_usable() {
    let fake = Fake::start().await;
    (fake.server.faults().plain, fake.server.faults().public) = (true, true);
    let probe = of(&fake, None).await;
    assert!(probe.usable && probe.config.is_none(), "{probe:?}");
}

#[tokio::test]
async fn a_refusal_shows_whether_a_token_is_missing_or_wrong() {
    let fake = Fake::start().await;
    let none = of(&fake, None).await;
    assert_eq!(failed(&none).0, Layer::Authorised);
    assert!(
        failed(&none).1.contains("give a token in `ATTIC_TOKEN`"),
        "{none:?}"
    );
    let expired = of(&fake, Some("expired")).await;
    assert!(failed(&expired).1.contains("it has ended"), "{expired:?}");
    assert!(
        !format!("{expired:?}").contains("expired"),
        "the token is not shown"
    );
    let push_only = of(&fake, Some(PUSH_ONLY)).await;
    assert_eq!(failed(&push_only).0, Layer::Authorised);
    assert!(push_only.answers, "publishing may be tried");
    assert!(of(&fake, Some(PULL_ONLY)).await.usable);
    fake.server.faults().unknown_cache = true;
    let unknown = of(&fake, Some(GOOD)).await;
    assert_eq!(failed(&unknown).0, Layer::Cache);
    assert!(
        failed(&unknown)
            .1
            .contains("Check the name in `attic-cache`"),
        "{unknown:?}"
    );
}

#[tokio::test]
async fn servers_that_are_no_caches_are_named() {
    let fake = Fake::start().await;
    for (status, words) in [(200, "web page"), (500, "500"), (502, "Welcome to nginx")] {
        fake.server.faults().html = Some(status);
        let probe = of(&fake, Some(GOOD)).await;
        assert_eq!(failed(&probe).0, Layer::Http);
        assert!(failed(&probe).1.contains(words), "{probe:?}");
        assert!(!probe.answers);
    }
    fake.server.faults().html = None;
    fake.server.faults().redirect = true;
    let probe = of(&fake, Some(GOOD)).await;
    assert!(
        failed(&probe)
            .1
            .contains("it redirects to https://elsewhere.example/x."),
        "{probe:?}"
    );
}

#[tokio::test]
async fn silence_and_closed_ports_are_bounded() {
    let mut fake = Fake::start().await;
    fake.server.faults().hang = true;
    let silent = probe_at(&fake.endpoint(), Some(GOOD), Duration::from_millis(300)).await;
    assert_eq!(failed(&silent).0, Layer::Http);
    assert!(
        failed(&silent).1.contains("no answer within 0.3 s"),
        "{silent:?}"
    );
    assert!(
        silent
            .layers
            .iter()
            .any(|(layer, _)| *layer == Layer::Connect)
    );
    fake.stop().await;
    let closed = of(&fake, None).await;
    assert_eq!(failed(&closed).0, Layer::Connect);
    let nowhere = Endpoint::new(
        "http://no-such-host.invalid/".parse().expect("URL"),
        fake.endpoint().cache,
    );
    let nameless = probe_at(&nowhere, None, Duration::from_secs(2)).await;
    assert_eq!(failed(&nameless).0, Layer::Name);
}

#[tokio::test]
async fn plain_http_behind_an_https_address_is_a_matter_of_tls() {
    let fake = Fake::start().await;
    let url = format!("https://{}/", fake.address).parse().expect("URL");
    let probe = probe_at(
        &Endpoint::new(url, fake.endpoint().cache),
        None,
        Duration::from_secs(2),
    )
    .await;
    assert_eq!(failed(&probe).0, Layer::Tls, "{probe:?}");
}

/// A listener with a full queue drops further SYNs, as a firewall does.
#[tokio::test]
async fn dropped_connections_are_bounded() {
    let listener = tokio::net::TcpSocket::new_v4().expect("socket");
    listener.bind(([127, 0, 0, 1], 0).into()).expect("bound");
    let listener = listener.listen(0).expect("listening");
    let address = listener.local_addr().expect("bound");
    let mut filling = Vec::new();
    for _ in 0..4 {
        let filled =
            tokio::time::timeout(Duration::from_millis(100), TcpStream::connect(address)).await;
        filling.extend(filled.ok().and_then(Result::ok));
    }
    let url = format!("http://{address}/").parse().expect("URL");
    let endpoint = Endpoint::new(url, "main".parse().expect("name"));
    let probe = probe_at(&endpoint, None, Duration::from_millis(300)).await;
    assert_eq!(failed(&probe).0, Layer::Connect, "{probe:?}");
}
