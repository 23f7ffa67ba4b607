//! Trusted certificates: rustls' own verification, with roots that are read only when the first certificate arrives.
//! Reading them takes some 30 ms of a start, and a cache on the same host uses plain HTTP.

use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::http::Roots;

/// Delegates everything to rustls' verifier, which it creates on first use.
#[derive(Debug)]
pub(super) struct Verifier {
    roots: Roots,
    provider: Arc<CryptoProvider>,
    inner: OnceLock<Result<Arc<WebPkiServerVerifier>, String>>,
}

impl Verifier {
    pub(crate) fn new(roots: Roots, provider: Arc<CryptoProvider>) -> Self {
        Self {
            roots,
            provider,
            inner: OnceLock::new(),
        }
    }

    fn inner(&self) -> Result<&WebPkiServerVerifier, Error> {
        // The error is kept as text, because every later handshake has to report it, too.
        let made = self.inner.get_or_init(|| {
            let roots = Arc::new(root_store(&self.roots));
            let builder =
                WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&self.provider));
            builder.build().map_err(|error| error.to_string())
        });
        made.as_deref()
            .map_err(|error| Error::General(error.clone()))
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.inner()?
            .verify_server_cert(certificate, intermediates, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner()?
            .verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner()?
            .verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// The roots of the environment and of the system: private authorities are common on runners. The roots in the binary
/// are used only on a machine that has none at all.
fn root_store(roots: &Roots) -> RootCertStore {
    let mut store = RootCertStore::empty();
    for file in &roots.files {
        if let Ok(certificates) = CertificateDer::pem_file_iter(file) {
            store.add_parsable_certificates(certificates.flatten());
        }
    }
    // This reads `SSL_CERT_FILE` and `SSL_CERT_DIR`, else the system's bundle.
    store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if store.is_empty() {
        store.add_parsable_certificates(webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().cloned());
    }
    store
}
