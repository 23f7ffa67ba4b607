//! Servers for a test: a cache of which every answer is scripted, one good NAR, and a TLS server with a
//! self-signed certificate.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};

use flywheel_nix::hash::Sha256;
use flywheel_nix::key::SecretKey;
use flywheel_nix::path_info::fingerprint;
use flywheel_nix::store_path::StorePath;
use sha2::Digest as _;

use crate::world::port::Port;
use crate::world::{must, need};

/// A whole HTTP answer.
pub fn answer(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let headers: String = headers
        .iter()
        .map(|(name, value)| format!("{name}: {value}\r\n"))
        .collect();
    let head = format!(
        "HTTP/1.1 {status} x\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// A server that answers by a function of method and path; it ends with the test's process.
pub struct Scripted {
    /// `http://127.0.0.1:<port>`.
    pub url: String,
}

impl Scripted {
    /// Starts it.
    pub fn start(script: impl Fn(&str, &str) -> Vec<u8> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let mut reader = BufReader::new(stream);
                let mut request = String::new();
                let mut length = 0;
                // A client that hangs up early gets no answer.
                while let Ok(1..) = reader.read_line(&mut request) {
                    let line = request.lines().last().unwrap_or_default().to_lowercase();
                    if let Some(number) = line.strip_prefix("content-length:") {
                        length = number.trim().parse().unwrap();
                    }
                    if line.is_empty() {
                        break;
                    }
                }
                let _ = reader.by_ref().take(length).read_to_end(&mut Vec::new());
                let mut words = request.split_whitespace();
                let (method, path) = (
                    words.next().unwrap_or_default(),
                    words.next().unwrap_or_default(),
                );
                let _ = reader.get_mut().write_all(&script(method, path));
            }
        });
        Self { url }
    }
}

/// A store path that a cache serves, with its signature.
#[derive(Clone)]
pub struct Nar {
    pub path: String,
    /// The cache's public key.
    pub key: String,
    body: Vec<u8>,
    info: String,
}

impl Nar {
    /// One that is all right: a regular file.
    pub fn new() -> Self {
        let body = flywheel_testing::nar_of_file("the whole body of a NAR");
        let path = "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-flywheel-probe".to_owned();
        let key = SecretKey::generate("scripted-1").unwrap();
        let hash = Sha256(sha2::Sha256::digest(&body).into());
        let size = u64::try_from(body.len()).unwrap();
        let store_path: StorePath = path.parse().unwrap();
        let signature = key.sign(&fingerprint(&store_path, &hash, size, &[]));
        let info = format!(
            "StorePath: {path}\nURL: nar/it.nar\nCompression: none\nFileHash: {hash}\nFileSize: {size}\nNarHash: {hash}\nNarSize: {size}\nReferences: \nSig: {signature}\n"
        );
        Self {
            path,
            key: key.public().to_string(),
            body,
            info,
        }
    }

    /// What a good cache answers.
    pub fn serve(&self, path: &str) -> Vec<u8> {
        match path.rsplit('.').next() {
            Some("narinfo") => answer(200, &[], self.info.as_bytes()),
            Some("nar") => answer(200, &[], &self.body),
            _ if path.ends_with("nix-cache-info") => answer(200, &[], b"StoreDir: /nix/store\n"),
            _ => answer(404, &[], b""),
        }
    }

    /// What a cache answers that is broken in one way.
    pub fn serve_broken(&self, path: &str, how: &str) -> Vec<u8> {
        let (of_info, of_nar) = (path.ends_with(".narinfo"), path.ends_with(".nar"));
        match how {
            "narinfo 404" if of_info => answer(404, &[], b""),
            "nar 404" if of_nar => answer(404, &[], b""),
            "nar empty" if of_nar => answer(200, &[], b""),
            "nar other" if of_nar => answer(200, &[], &vec![b'x'; self.body.len()]),
            "signature" if of_info => {
                let other = SecretKey::generate("scripted-1")
                    .unwrap()
                    .sign("something else");
                let lines = self.info.lines().filter(|line| !line.starts_with("Sig: "));
                let lines: Vec<&str> = lines.collect();
                answer(
                    200,
                    &[],
                    format!("{}\nSig: {other}\n", lines.join("\n")).as_bytes(),
                )
            }
            _ => self.serve(path),
        }
    }
}

/// A TLS server with a self-signed certificate; it ends with this value.
pub struct Tls {
    /// `https://127.0.0.1:<port>`.
    pub url: String,
    child: Child,
    _port: Port,
    _folder: tempfile::TempDir,
}

impl Tls {
    pub fn start() -> Self {
        let openssl = need("openssl", "apt-get install openssl");
        let folder = tempfile::tempdir().unwrap();
        let mut request = Command::new(&openssl);
        request.args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=127.0.0.1",
        ]);
        request.args([
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ]);
        must(request.current_dir(folder.path()));
        let port = Port::reserve();
        let address = port.address();
        let mut serve = Command::new(openssl);
        serve.args([
            "s_server", "-quiet", "-www", "-key", "key.pem", "-cert", "cert.pem", "-accept",
        ]);
        serve.arg(&address).current_dir(folder.path());
        let child = serve
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let limit = std::time::Duration::from_secs(10);
        let up = crate::world::processes::wait_until(limit, || {
            std::net::TcpStream::connect(&address).is_ok()
        });
        assert!(up, "openssl does not listen");
        Self {
            url: format!("https://{address}"),
            child,
            _port: port,
            _folder: folder,
        }
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        // It fails only if the server has ended by itself.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
}
