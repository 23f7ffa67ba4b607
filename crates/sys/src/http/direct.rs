//! Connections for callers with an HTTP implementation of their own: directly to the server, never through a proxy.
//! This module owns names, sockets and TLS, but none of the bytes that are exchanged.

use std::sync::Arc;
use std::{fmt, io};

use hyper_util::client::proxy::matcher::Matcher;
use rustls_pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use url::Url;

use crate::http::{CONNECT_TIMEOUT, Layer, LookupError, Names};

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    #[error(transparent)]
    Name(#[from] LookupError),
    #[error("no connection: {0}")]
    Connect(io::Error),
    /// The handshake or the certificate.
    #[error("TLS: {0}")]
    Tls(io::Error),
}

impl ConnectError {
    pub fn layer(&self) -> Layer {
        match self {
            Self::Name(_) => Layer::Name,
            Self::Connect(_) => Layer::Connect,
            Self::Tls(_) => Layer::Tls,
        }
    }
}

/// A connection, encrypted or not.
pub trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

/// Makes connections. Cheap to clone.
#[derive(Clone)]
pub struct Direct {
    tls: TlsConnector,
    names: Names,
    proxies: Arc<Matcher>,
}

impl fmt::Debug for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Direct")
    }
}

impl Direct {
    pub(super) fn new(mut tls: rustls::ClientConfig) -> Self {
        // The callers implement HTTP/1.1 only.
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        // The rules and variables that reqwest uses for the other clients.
        let proxies = Arc::new(Matcher::from_env());
        Self {
            tls: TlsConnector::from(Arc::new(tls)),
            names: Names::default(),
            proxies,
        }
    }

    /// Whether the environment names a proxy for this address, so that a direct connection is not allowed.
    pub fn is_proxied(&self, url: &Url) -> bool {
        url.as_str()
            .parse()
            .is_ok_and(|uri| self.proxies.intercept(&uri).is_some())
    }

    /// Connects to the server of a URL, within [`CONNECT_TIMEOUT`] for each address and for TLS.
    ///
    /// # Errors
    /// When no address accepts the connection, or TLS fails.
    pub async fn connect(&self, url: &Url) -> Result<Box<dyn ByteStream>, ConnectError> {
        let host = url.host_str().unwrap_or_default();
        let port = url.port_or_known_default().unwrap_or(80);
        let late = || io::Error::from(io::ErrorKind::TimedOut);
        let names = tokio::time::timeout(CONNECT_TIMEOUT, self.names.lookup(host));
        let addresses = names.await.map_err(|_| ConnectError::Connect(late()))??;
        let mut refused = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            let connecting =
                tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect((address, port)));
            match connecting.await.unwrap_or_else(|_| Err(late())) {
                Ok(stream) => return self.secure(url, host, stream).await,
                Err(error) => refused = error,
            }
        }
        Err(ConnectError::Connect(refused))
    }

    async fn secure(
        &self,
        url: &Url,
        host: &str,
        stream: TcpStream,
    ) -> Result<Box<dyn ByteStream>, ConnectError> {
        // Requests are written in large pieces, so Nagle's algorithm would only delay the last one.
        stream.set_nodelay(true).map_err(ConnectError::Connect)?;
        if url.scheme() != "https" {
            return Ok(Box::new(stream));
        }
        // A certificate has an IPv6 address without the brackets of the URL.
        let bare = host
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let name = ServerName::try_from(bare)
            .map_err(|error| ConnectError::Tls(io::Error::other(error)))?;
        let handshake = tokio::time::timeout(CONNECT_TIMEOUT, self.tls.connect(name, stream));
        let secured = handshake
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        Ok(Box::new(secured.map_err(ConnectError::Tls)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::{Clients, Roots};

    #[tokio::test]
    async fn a_failed_connection_has_its_layer() {
        let direct = Clients::new(&Roots::default())
            .expect("settings hold")
            .direct;
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("loopback");
        let address = listener.local_addr().expect("bound");
        let url = |scheme: &str| {
            format!("{scheme}://{address}/")
                .parse::<Url>()
                .expect("URL")
        };
        assert!(direct.connect(&url("http")).await.is_ok());
        // It responds to anything with something that is not TLS.
        let answer = async {
            for _ in 0..2 {
                let (stream, _) = listener.accept().await.expect("accepted");
                let _ = stream.try_write(b"HTTP/1.1 400 What\r\n\r\n");
            }
        };
        let https = url("https");
        let ((), secured) = tokio::join!(answer, direct.connect(&https));
        assert_eq!(secured.err().map(|error| error.layer()), Some(Layer::Tls));
        // A port that is taken and not listened to stays closed, whatever other tests do.
        let closed = tokio::net::TcpSocket::new_v4().expect("a socket");
        closed
            .bind("127.0.0.1:0".parse().expect("an address"))
            .expect("loopback");
        let url = format!("http://{}/", closed.local_addr().expect("bound"))
            .parse::<Url>()
            .expect("URL");
        assert_eq!(
            direct.connect(&url).await.err().map(|error| error.layer()),
            Some(Layer::Connect)
        );
    }
}
