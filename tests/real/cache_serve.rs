//! The embedded cache against real Nix, and its memory under paths of gigabytes.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use flywheel_nix::hash::Sha256;
use flywheel_nix::narinfo::NarInfo;
use flywheel_testing::nar_strings;
use futures_util::{StreamExt as _, stream};
use serde_json::json;
use sha2::Digest as _;
use tempfile::TempDir;

use crate::world::{flywheel, folders, must, need, with_private_nix};

const NIX_HOW: &str = "apt-get install nix-bin";
const MIB: usize = 1024 * 1024;

/// A server in a folder of its own.
struct Served {
    folder: TempDir,
    child: Child,
    url: String,
    keys: Vec<String>,
}

impl Served {
    fn start(more: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(flywheel());
        command.args([
            "cache",
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--quiet",
            "--stop-after",
            "10m",
            "--dir",
        ]);
        folders::isolate(&mut command, folder.path());
        command
            .arg(folder.path().join("cache"))
            .args(more)
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = first_lines(child.stdout.take().unwrap());
        let keys = lines
            .iter()
            .filter_map(|line| line.strip_prefix("public-key "))
            .map(str::to_owned)
            .collect();
        Self {
            folder,
            child,
            url: lines[0].to_owned(),
            keys,
        }
    }

    /// A path in the cache's folder.
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("cache").join(name)
    }

    fn token(&self) -> String {
        let text = std::fs::read_to_string(self.path("tokens")).unwrap();
        text.lines()
            .find_map(|line| line.strip_prefix("write "))
            .unwrap()
            .to_owned()
    }

    /// The most memory that the server ever had, in KiB.
    fn peak_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("VmHWM:"))
            .unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first lines of a server, up to the last that it prints at its start.
fn first_lines(stdout: ChildStdout) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        lines.push(line);
        if lines
            .last()
            .is_some_and(|line| line.starts_with("tokens-file "))
        {
            break;
        }
    }
    lines
}

/// A machine with a store of its own, a home, and a netrc for the cache.
struct Machine {
    folder: TempDir,
    config: String,
}

impl Machine {
    fn new(served: &Served, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let netrc = folder.path().join("netrc");
        std::fs::write(
            &netrc,
            format!(
                "machine 127.0.0.1 login flywheel password {}\n",
                served.token()
            ),
        )
        .unwrap();
        let config = format!(
            "experimental-features = nix-command flakes\nbuild-users-group =\nsandbox = false\nsubstituters =\n\
             netrc-file = {}\nfallback = false\n{more}\n",
            netrc.display()
        );
        Self { folder, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs a program with this machine's store as `/nix`; its standard output if it succeeds.
    fn run(&self, program: &Path, arguments: &[&str]) -> Result<String, String> {
        let mut command = with_private_nix(&self.path("nix"), program);
        folders::isolate(&mut command, self.folder.path());
        let output = command
            .args(arguments)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("XDG_CACHE_HOME", self.path("xdg"))
            .env("NIX_CONFIG", &self.config)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        println!("$ {} {}\n{printed}", program.display(), arguments.join(" "));
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
        } else {
            Err(printed)
        }
    }

    fn nix(&self, arguments: &[&str]) -> Result<String, String> {
        self.run(&need("nix", NIX_HOW), arguments)
    }

    /// Builds three paths, each with a reference to the one before.
    fn build_chain(&self) -> String {
        let expression = r#"
          let step = name: below: derivation {
                inherit name below; system = builtins.currentSystem; builder = "/bin/sh";
                args = [ "-c" "echo ${name} on $below, itself at $out > $out" ];
              };
          in step "three" (step "two" (step "one" "nothing"))"#;
        self.run(
            &need("nix-build", NIX_HOW),
            &["--no-out-link", "--expr", expression],
        )
        .unwrap()
    }
}

#[test]
fn real_nix_copies_to_it_and_substitutes_from_it() {
    let served = Served::start(&[
        "--private",
        "--cache",
        "xz",
        "--cache",
        "zst",
        "--cache",
        "plain",
    ]);
    let builder = Machine::new(&served, "");
    let path = builder.build_chain();
    for (cache, query) in [
        ("xz", ""),
        ("zst", "?compression=zstd"),
        ("plain", "?compression=none"),
    ] {
        let store = format!("{}/{cache}{query}", served.url);
        builder.nix(&["copy", "--to", &store, &path]).unwrap();
        // The second time there is nothing to send, and Nix asks no more than that.
        builder.nix(&["copy", "--to", &store, &path]).unwrap();

        let key = served
            .keys
            .iter()
            .find(|key| key.starts_with(&format!("{cache}:")))
            .unwrap();
        let from = format!("{}/{cache}", served.url);
        let trusting = format!("trusted-public-keys = {key}\nsubstituters = {from}\nmax-jobs = 0");
        let reader = Machine::new(&served, &trusting);
        reader
            .run(&need("nix-store", NIX_HOW), &["--realise", &path])
            .unwrap();
        let text =
            std::fs::read_to_string(reader.path("nix").join(path.strip_prefix("/nix/").unwrap()))
                .unwrap();
        assert!(
            text.starts_with("three on /nix/store/") && text.contains(&path),
            "{text}"
        );
        reader
            .run(
                &need("nix-store", NIX_HOW),
                &["--verify", "--check-contents"],
            )
            .unwrap();
        let closure = reader
            .run(&need("nix-store", NIX_HOW), &["-qR", &path])
            .unwrap();
        assert_eq!(closure.lines().count(), 3, "{closure}");

        let copying = Machine::new(&served, &trusting);
        copying.nix(&["copy", "--from", &from, &path]).unwrap();
        let stranger = Machine::new(&served, "trusted-public-keys =");
        let refused = stranger.nix(&["copy", "--from", &from, &path]).unwrap_err();
        assert!(refused.contains("lacks a valid signature"), "{refused}");
    }
    // Three caches, three paths, each NAR once.
    assert_eq!(std::fs::read_dir(served.path("nars")).unwrap().count(), 3);
}

/// `just matrix` does the same with each version of Nix.
#[test]
fn a_writer_reads_back_what_it_sent() {
    need("nix", NIX_HOW);
    let folder = tempfile::tempdir().unwrap();
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/matrix/guest/read-back.sh"
    );
    let mut command = with_private_nix(&folder.path().join("nix"), Path::new("/bin/bash"));
    folders::isolate(&mut command, folder.path());
    command
        .arg(script)
        .arg(flywheel())
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null());
    assert_eq!(must(&mut command).trim(), "read back");
}

#[test]
fn real_nix_shows_the_whole_address_where_the_caches_name_is_missing() {
    let served = Served::start(&[]);
    let machine = Machine::new(&served, &format!("extra-substituters = {}", served.url));
    let path = "/nix/store/fvchs9i3c9f4d6lcsm7q2ybxwpbnz4yc-hello";
    let problem = machine
        .run(&need("nix-store", NIX_HOW), &["--realise", path])
        .unwrap_err();
    let whole = format!("has its name behind it: {}/main", served.url);
    assert!(problem.contains(&whole), "{problem}");
}

#[test]
fn real_nix_is_refused_where_it_has_no_token() {
    let served = Served::start(&[]);
    let mut machine = Machine::new(&served, "");
    let path = machine.build_chain();
    machine.config.push_str("netrc-file = /nonexistent\n");
    let refused = machine
        .nix(&["copy", "--to", &format!("{}/main", served.url), &path])
        .unwrap_err();
    assert!(refused.contains("403"), "{refused}");
    assert_eq!(std::fs::read_dir(served.path("nars")).unwrap().count(), 0);
}

/// The NAR of one file with these blocks, piece by piece.
fn big_nar(count: usize) -> impl Iterator<Item = Vec<u8>> + Send {
    let begin = [
        nar_strings(&["nix-archive-1", "(", "type", "regular", "contents"]),
        ((count * MIB) as u64).to_le_bytes().to_vec(),
    ];
    // The contents are a multiple of eight bytes.
    [begin.concat()]
        .into_iter()
        .chain(blocks(count))
        .chain([nar_strings(&[")"])])
}

/// Blocks of 1 MiB of which an eighth is new each time and does not compress.
fn blocks(count: usize) -> impl Iterator<Item = Vec<u8>> + Send {
    let mut random = fastrand::Rng::with_seed(1);
    let mut bytes = vec![0; MIB];
    random.fill(&mut bytes);
    (0..count).map(move |_| {
        random.fill(&mut bytes[..MIB / 8]);
        bytes.clone()
    })
}

#[tokio::test]
async fn two_gigabytes_pass_within_64_mib_of_memory() {
    const BLOCKS: usize = 2048;
    let served = Served::start(&[]);
    let mut hash = sha2::Sha256::new();
    let mut size = 0;
    for piece in big_nar(BLOCKS) {
        size += piece.len();
        hash.update(piece);
    }
    let hash = Sha256(hash.finalize().into());
    let letters = "a".repeat(32);
    let info = json!({
        "cache": "main", "store_path_hash": letters, "store_path": format!("/nix/store/{letters}-big"),
        "references": [], "sigs": [], "nar_hash": hash.to_string(), "nar_size": size,
    });
    let client = flywheel_sys::http::client(&flywheel_sys::http::Roots::default()).unwrap();
    let body =
        reqwest::Body::wrap_stream(stream::iter(big_nar(BLOCKS)).map(Ok::<_, std::io::Error>));
    let request = client
        .put(format!("{}/_api/v1/upload-path", served.url))
        .bearer_auth(served.token());
    let response = request
        .header("X-Attic-Nar-Info", info.to_string())
        .header("Content-Length", size)
        .body(body)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let after_upload = served.peak_kib();

    let narinfo = client
        .get(format!("{}/main/{letters}.narinfo", served.url))
        .send()
        .await
        .unwrap();
    let narinfo = NarInfo::parse(&narinfo.text().await.unwrap()).unwrap();
    let response = client
        .get(format!("{}/main/{}", served.url, narinfo.url))
        .send()
        .await
        .unwrap();
    assert!(
        narinfo.file_size.unwrap() > 256 * MIB as u64,
        "enough that buffering it would show"
    );
    let mut pieces = response.bytes_stream();
    let mut decoder = zstd::stream::write::Decoder::new(Hashing::default()).unwrap();
    while let Some(piece) = pieces.next().await {
        std::io::Write::write_all(&mut decoder, &piece.unwrap()).unwrap();
    }
    let came = decoder.finish().unwrap();
    assert_eq!(
        (Sha256(came.hash.finalize().into()), came.size),
        (hash, size as u64)
    );
    let after_download = served.peak_kib();
    println!("peak after upload {after_upload} KiB, after download {after_download} KiB");
    assert!(after_download < 64 * 1024, "{after_download} KiB");
}

#[derive(Default)]
struct Hashing {
    hash: sha2::Sha256,
    size: u64,
}

impl std::io::Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
