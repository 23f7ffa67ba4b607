//! An issuer that changes its keys, is away, or answers with something else.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use flywheel_sys::http::{self, Roots};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

/// An issuer on this machine; what it answers can be changed.
#[derive(Clone)]
struct Server {
    url: String,
    keys: Arc<Mutex<String>>,
    /// In place of its description.
    description: Arc<Mutex<Option<String>>>,
    requests: Arc<AtomicUsize>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let server = Self {
            url,
            keys: Arc::default(),
            description: Arc::default(),
            requests: Arc::default(),
        };
        let answering = server.clone();
        tokio::spawn(async move {
            while let Ok((mut connection, _)) = listener.accept().await {
                let mut head = vec![0; 4096];
                let read = connection.read(&mut head).await.unwrap_or_default();
                let head = String::from_utf8_lossy(&head[..read]).into_owned();
                let (status, body) = answering.answer(&head);
                let answer = format!(
                    "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                    body.len()
                );
                let _ = connection.write_all(answer.as_bytes()).await;
            }
        });
        server
    }

    fn answer(&self, head: &str) -> (u16, String) {
        self.requests.fetch_add(1, Ordering::SeqCst);
        let keys = self.keys.lock().expect("no panic").clone();
        if keys.is_empty() {
            return (503, String::new());
        }
        if head.starts_with("GET /.well-known/openid-configuration ") {
            let usual =
                json!({"issuer": self.url, "jwks_uri": format!("{}/.well-known/jwks", self.url)});
            let named = self.description.lock().expect("no panic").clone();
            return (200, named.unwrap_or_else(|| usual.to_string()));
        }
        (200, keys)
    }

    fn publish(&self, keys: &[(&str, &str)]) {
        let keys: Vec<Value> = keys.iter().map(|(name, id)| published(name, id)).collect();
        *self.keys.lock().expect("no panic") = json!({ "keys": keys }).to_string();
    }

    fn verifier(&self) -> Verifier {
        let client = http::client(&Roots::default()).expect("a client");
        let issuer = Issuer {
            url: self.url.clone(),
            provider: Provider::GitHub,
            keys: IssuerKeys::new(KeySource::Issuer {
                url: self.url.clone(),
                client,
            }),
        };
        Verifier::new(AUDIENCE.into(), vec![issuer], UsedTokens::default())
    }

    /// A token of this issuer, valid at a time.
    fn token(&self, id: &str, key: &'static str, at: u64) -> String {
        let draft = Draft::github().claim("iss", self.url.clone());
        let draft = draft
            .claim("iat", at)
            .claim("nbf", at)
            .claim("exp", at + 300);
        let draft = draft.claim("jti", format!("{id} {at}"));
        draft.header("kid", id).sign(Sign::Rs256(key)).token()
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

const HOUR: u64 = 3600;

#[tokio::test]
async fn a_new_key_is_asked_for_once_a_minute_and_an_old_one_is_forgotten() {
    let server = Server::start().await;
    server.publish(&[("first", "old")]);
    let verifier = server.verifier();
    let verify = async |id: &str, key: &'static str, at: u64| {
        let token = server.token(id, key, at);
        verifier.verify(&token, time(at)).await.map(|_| ())
    };
    assert_eq!(verify("old", "first", NOW).await, Ok(()));
    assert_eq!(server.requests(), 2, "description and keys");
    // The issuer changes its key. Within the minute nothing is asked, however many names are made up.
    server.publish(&[("second", "new")]);
    for second in 1..30 {
        let refused = verify("new", "second", NOW + second).await;
        assert_eq!(refused, Err(Refusal::UnknownKey("new".into())));
    }
    assert_eq!(server.requests(), 2);
    assert_eq!(verify("old", "first", NOW + 59).await, Ok(()));
    assert_eq!(verify("new", "second", NOW + 60).await, Ok(()));
    assert_eq!(server.requests(), 4);
    assert_eq!(
        verify("old", "first", NOW + 61).await,
        Err(Refusal::UnknownKey("old".into()))
    );
    // A known key is good for an hour without a request.
    assert_eq!(verify("new", "second", NOW + 60 + HOUR - 1).await, Ok(()));
    assert_eq!(server.requests(), 4);
    assert_eq!(verify("new", "second", NOW + 60 + HOUR).await, Ok(()));
    assert_eq!(server.requests(), 6);
}

#[tokio::test]
async fn an_issuer_that_is_away_is_believed_for_a_day_and_then_the_token_is_not_to_blame() {
    let server = Server::start().await;
    let verifier = server.verifier();
    let verify = async |id: &str, at: u64| {
        let token = server.token(id, "first", at);
        verifier.verify(&token, time(at)).await.map(|_| ())
    };
    let refusal = verify("key", NOW).await.expect_err("no keys yet");
    assert!(
        refusal.is_passing() && refusal.to_string().contains("HTTP status 503"),
        "{refusal}"
    );
    server.publish(&[("first", "key")]);
    let refusal = verify("key", NOW + 1)
        .await
        .expect_err("asked a second ago");
    assert!(refusal.is_passing(), "{refusal}");
    assert_eq!(verify("key", NOW + 60).await, Ok(()));
    server.keys.lock().expect("no panic").clear();
    assert_eq!(verify("key", NOW + 60 + 23 * HOUR).await, Ok(()));
    // A name that is not among them may be one of those that could not be fetched.
    let refusal = verify("other", NOW + 61 + 23 * HOUR)
        .await
        .expect_err("not there");
    assert!(refusal.is_passing(), "{refusal}");
    let refusal = verify("key", NOW + 60 + 24 * HOUR)
        .await
        .expect_err("too old");
    assert!(refusal.is_passing(), "{refusal}");
    server.publish(&[("first", "key")]);
    assert_eq!(verify("key", NOW + 120 + 24 * HOUR).await, Ok(()));
}

#[tokio::test]
async fn what_an_issuer_may_not_answer_is_named() {
    let server = Server::start().await;
    server.publish(&[("first", "key")]);
    let (url, elsewhere) = (&server.url, "http://127.0.0.1:9/jwks");
    let descriptions = [
        (
            json!({"issuer": "https://other.example", "jwks_uri": format!("{url}/jwks")}),
            "another issuer's",
        ),
        (
            json!({"issuer": format!("{url}/"), "jwks_uri": format!("{url}/jwks")}),
            "another issuer's",
        ),
        (
            json!({"issuer": url, "jwks_uri": elsewhere}),
            "on another host",
        ),
        (json!({"issuer": url}), "missing field"),
        (json!([]), "not usable"),
    ];
    for (description, words) in descriptions {
        *server.description.lock().expect("no panic") = Some(description.to_string());
        let token = server.token("key", "first", NOW);
        let refusal = server.verifier().verify(&token, time(NOW)).await;
        let refusal = refusal.expect_err("not its own");
        assert!(
            refusal.is_passing() && refusal.to_string().contains(words),
            "{refusal}"
        );
    }
    *server.description.lock().expect("no panic") = None;
    let key = published("first", "key");
    let sets = [
        (json!({"keys": []}), "no key that signs"),
        (json!({"keys": [key, key]}), "twice"),
        (
            json!({"keys": [{"kty": "RSA", "kid": "key", "n": "*", "e": "AQAB"}]}),
            "no number",
        ),
        (
            json!({"keys": [{"kty": "RSA", "kid": "key", "use": "enc", "n": key["n"], "e": "AQAB"}]}),
            "no key that signs",
        ),
        (json!("x".repeat(300_000)), "more than"),
    ];
    for (set, words) in sets {
        *server.keys.lock().expect("no panic") = set.to_string();
        let token = server.token("key", "first", NOW);
        let refusal = server.verifier().verify(&token, time(NOW)).await;
        let refusal = refusal.expect_err("no set");
        assert!(
            refusal.is_passing() && refusal.to_string().contains(words),
            "{refusal}"
        );
    }
}
