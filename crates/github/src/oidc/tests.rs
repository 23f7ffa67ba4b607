//! Tokens as issuers make them, and tokens that differ from a good one in one thing.

mod good;
mod hostile;
mod rotation;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{
    RSA_PKCS1_SHA256, RSA_PKCS1_SHA512, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair,
    RsaPublicKeyComponents,
};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use super::keys::KeySource;
use super::*;

const GITHUB: &str = "https://token.actions.githubusercontent.com";
const GITLAB: &str = "https://gitlab.example.org";
const AUDIENCE: &str = "https://cache.example.org";
/// When all of this happens, in seconds since 1970.
const NOW: u64 = 1_787_166_800;
const ISSUED: u64 = NOW - 43;
/// A modulus of 1,024 bits, which nobody should believe any more.
const SHORT: &str = "\
    ae2808097ada7d9306ad932deaa5d3cde5cff5c3879ec1742114c8503d647a0c8f6c28e4379295c9c8c5c531e48fc513c01254df976ac0393e4c6e\
    98d4e4685a425cb8eb0b86a31b1e7b7da3de8be54c07779fe1925a0c9d59689b367354a1f41a0cac79cf20fef092a9b667d7a899a3a645e76991f8\
    9b1094ae2deb3f597e43";

fn time(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

/// A key pair of the fixtures: `first` or `second`.
fn pair(name: &str) -> RsaKeyPair {
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/oidc")
        .join(format!("{name}.pk8"));
    let bytes = std::fs::read(file).expect("a fixture");
    RsaKeyPair::from_pkcs8(&bytes).expect("a key")
}

/// The public half of a key pair, as an issuer publishes it.
fn published(name: &str, id: &str) -> Value {
    let components = RsaPublicKeyComponents::<Vec<u8>>::from(pair(name).public());
    json!({
        "kty": "RSA", "alg": "RS256", "use": "sig", "kid": id,
        "n": encode(&components.n), "e": encode(&components.e), "x5t": "ignored",
    })
}

/// How a token is signed.
#[derive(Clone, Copy)]
enum Sign {
    Rs256(&'static str),
    Rs512,
    Ps256,
    /// With the modulus of the public key as the secret.
    Hs256,
    Nothing,
}

/// A token in the making.
#[derive(Clone)]
struct Draft {
    header: Value,
    claims: Value,
    /// In place of `claims`.
    claims_text: Option<String>,
    /// In place of `header`.
    header_text: Option<String>,
    sign: Sign,
}

impl Draft {
    fn github() -> Self {
        Self::new(json!({
            "iss": GITHUB, "aud": AUDIENCE, "iat": ISSUED, "nbf": ISSUED - 300, "exp": ISSUED + 300, "jti": "1e41-1",
            "sub": "repo:octo-org@123456/octo-repo@456789:ref:refs/heads/main",
            "repository": "octo-org/octo-repo", "repository_id": "456789",
            "repository_owner": "octo-org", "repository_owner_id": "123456", "repository_visibility": "private",
            "event_name": "push", "ref": "refs/heads/main", "ref_type": "branch", "ref_protected": "true",
            "sha": "b896", "run_id": "32000000001", "run_attempt": "1", "run_number": "7",
            "workflow_ref": "octo-org/octo-repo/.github/workflows/ci.yaml@refs/heads/main",
            "job_workflow_ref": "octo-org/octo-repo/.github/workflows/ci.yaml@refs/heads/main",
            "runner_environment": "github-hosted", "actor": "octocat", "base_ref": "", "head_ref": "",
        }))
    }

    fn gitlab() -> Self {
        Self::new(json!({
            "iss": GITLAB, "aud": AUDIENCE, "iat": ISSUED, "nbf": ISSUED - 5, "exp": ISSUED + 3600, "jti": "2f52-1",
            "sub": "project_path:group/project:ref_type:branch:ref:main",
            "project_path": "group/project", "project_id": "22", "namespace_path": "group", "namespace_id": "11",
            "pipeline_source": "push", "ref": "main", "ref_type": "branch", "ref_path": "refs/heads/main",
            "ref_protected": "true", "sha": "c907", "pipeline_id": "301", "job_id": "302", "runner_id": 1,
            "ci_config_ref_uri": "gitlab.example.org/group/project//.gitlab-ci.yml@refs/heads/main",
            "runner_environment": "self-hosted",
        }))
    }

    fn new(claims: Value) -> Self {
        Self {
            header: json!({"alg": "RS256", "kid": "key-1", "typ": "JWT", "x5t": "ignored"}),
            claims,
            claims_text: None,
            header_text: None,
            sign: Sign::Rs256("first"),
        }
    }

    fn claim(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.claims[name] = value.into();
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.claims.as_object_mut().expect("an object").remove(name);
        self
    }

    fn header(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.header[name] = value.into();
        self
    }

    fn sign(mut self, sign: Sign) -> Self {
        self.sign = sign;
        self
    }

    fn token(&self) -> String {
        let header = self.header_text.clone();
        let claims = self.claims_text.clone();
        let signed = format!(
            "{}.{}",
            encode(header.unwrap_or_else(|| self.header.to_string())),
            encode(claims.unwrap_or_else(|| self.claims.to_string())),
        );
        let signature = match self.sign {
            Sign::Rs256(key) => rsa(key, &RSA_PKCS1_SHA256, &signed),
            Sign::Rs512 => rsa("first", &RSA_PKCS1_SHA512, &signed),
            Sign::Ps256 => rsa("first", &RSA_PSS_SHA256, &signed),
            Sign::Hs256 => {
                let public = RsaPublicKeyComponents::<Vec<u8>>::from(pair("first").public());
                let key = hmac::Key::new(hmac::HMAC_SHA256, &public.n);
                hmac::sign(&key, signed.as_bytes()).as_ref().to_vec()
            }
            Sign::Nothing => Vec::new(),
        };
        format!("{signed}.{}", encode(signature))
    }
}

fn rsa(key: &str, by: &'static dyn RsaEncoding, signed: &str) -> Vec<u8> {
    let pair = pair(key);
    let mut signature = vec![0; pair.public().modulus_len()];
    pair.sign(by, &SystemRandom::new(), signed.as_bytes(), &mut signature)
        .expect("long enough");
    signature
}

/// A server that takes both issuers' tokens. Their keys have the same names.
struct World {
    verifier: Verifier,
    _folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("temporary folder");
        let short = hex::decode(SHORT).expect("hexadecimal");
        let short = json!({"kty": "RSA", "kid": "short", "n": encode(short), "e": "AQAB"});
        let file = |name: &str, keys: Value| {
            let file = folder.path().join(name);
            std::fs::write(&file, json!({ "keys": keys }).to_string()).expect("written");
            IssuerKeys::new(KeySource::File(file))
        };
        // GitLab's `key-1` is GitHub's `key-2`.
        let github = [
            published("first", "key-1"),
            json!({"kty": "EC", "kid": "other-kind", "crv": "P-256", "x": "", "y": ""}),
            short,
            published("second", "key-2"),
        ];
        let gitlab = [published("second", "key-1")];
        let issuers = vec![
            Issuer {
                url: GITHUB.into(),
                provider: Provider::GitHub,
                keys: file("github", github.into_iter().collect()),
            },
            Issuer {
                url: GITLAB.into(),
                provider: Provider::GitLab,
                keys: file("gitlab", gitlab.into_iter().collect()),
            },
        ];
        Self {
            verifier: Verifier::new(AUDIENCE.into(), issuers, UsedTokens::default()),
            _folder: folder,
        }
    }

    async fn verify(&self, token: &str) -> Result<Identity, Refusal> {
        self.verifier.verify(token, time(NOW)).await
    }
}
