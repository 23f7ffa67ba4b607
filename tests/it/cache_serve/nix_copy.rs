//! What `nix copy --to` writes, piece by piece; the real one is in the real suite.

use super::*;

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 1);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A NAR as Nix would send it: the file's name, and its bytes.
fn packed(path: &TestPath, packing: &str) -> (String, Vec<u8>) {
    let bytes = match packing {
        ".xz" => xz(&path.nar),
        ".zst" => zstd::encode_all(&*path.nar, 1).unwrap(),
        _ => path.nar.clone(),
    };
    (
        format!("nar/{}.nar{packing}", sha256(&bytes).base32()),
        bytes,
    )
}

fn narinfo(path: &TestPath, name: &str, bytes: &[u8]) -> String {
    format!(
        "StorePath: /nix/store/{}\nURL: {name}\nCompression: any\nFileHash: {}\nFileSize: {}\nNarHash: {}\n\
         NarSize: {}\nReferences: {}\n",
        path.base,
        sha256(bytes),
        bytes.len(),
        path.nar_hash(),
        path.nar.len(),
        path.references.join(" "),
    )
}

async fn put(served: &Served, file: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
    let request = served.client().put(format!("{}/main/{file}", served.url));
    answer(
        request
            .basic_auth("flywheel", Some(PLANTED_TOKEN))
            .body(body),
    )
    .await
}

#[tokio::test]
async fn every_packing_becomes_the_same_zstd_file() {
    let served = Served::start(&[]);
    for (letter, packing) in [('a', ".xz"), ('b', ".zst"), ('c', "")] {
        let path = TestPath::new(letter, b"the same in all");
        let (name, bytes) = packed(&path, packing);
        let url = format!("{}/main/{name}", served.url);
        let head = || served.client().head(&url).send();
        assert_eq!(head().await.unwrap().status(), 404);
        assert_eq!(put(&served, &name, bytes.clone()).await.0, 201);
        assert_eq!(
            head().await.unwrap().status(),
            200,
            "Nix asks so that it need not send twice"
        );
        assert!(
            served.narinfo("main", &path).await.is_none(),
            "not before its narinfo"
        );
        let text = narinfo(&path, &name, &bytes) + "Sig: other-1:" + &foreign_signature() + "\n";
        assert_eq!(
            put(&served, &format!("{}.narinfo", path.hash()), text)
                .await
                .0,
            201
        );
        let info = served.narinfo("main", &path).await.unwrap();
        assert_eq!(info.compression, "zstd");
        assert_eq!(info.signatures.len(), 2);
        assert!(info.signatures[0].starts_with("other-1:"));
        let nar = served
            .client()
            .get(format!("{}/main/{}", served.url, info.url))
            .send()
            .await
            .unwrap();
        assert_eq!(
            zstd::decode_all(&*nar.bytes().await.unwrap()).unwrap(),
            path.nar
        );
    }
    assert_eq!(served.names("nars").len(), 1);
}

/// What a client gets by the name that it gave a NAR.
async fn fetch(served: &Served, cache: &str, name: &str) -> Option<Vec<u8>> {
    let url = format!("{}/{cache}/{name}", served.url);
    let response = served.client().get(&url).send().await.unwrap();
    if response.status() == 404 {
        return None;
    }
    assert_eq!(response.status(), 200, "{url}");
    let head = served.client().head(&url).send().await.unwrap();
    assert_eq!(head.status(), 200, "{url}");
    let announced = response.content_length();
    let bytes = response.bytes().await.unwrap();
    // Where it is compressed anew, the length is known only at the end.
    assert!(announced.is_none_or(|length| length == bytes.len() as u64));
    let unpacked = match name.rsplit_once('.').unwrap().1 {
        "xz" => {
            let mut nar = Vec::new();
            let mut decoder = liblzma::read::XzDecoder::new(&bytes[..]);
            decoder.read_to_end(&mut nar).unwrap();
            nar
        }
        "zst" => zstd::decode_all(&bytes[..]).unwrap(),
        _ => bytes.to_vec(),
    };
    Some(unpacked)
}

#[tokio::test]
async fn a_nar_is_served_under_every_name_that_it_came_by() {
    let served = Served::start(&[]);
    // Larger than what is read at once, and not worth compressing.
    let mut random = fastrand::Rng::with_seed(3);
    let content: Vec<u8> = (0..400_000).map(|_| random.u8(..)).collect();
    let mut names = Vec::new();
    for (letter, packing) in [('a', ".xz"), ('b', ".zst"), ('c', "")] {
        let path = TestPath::new(letter, &content);
        let (name, bytes) = packed(&path, packing);
        assert_eq!(fetch(&served, "main", &name).await, None);
        assert_eq!(put(&served, &name, bytes.clone()).await.0, 201);
        let file = format!("{}.narinfo", path.hash());
        let text = narinfo(&path, &name, &bytes);
        assert_eq!(put(&served, &file, text).await.0, 201);
        assert_eq!(fetch(&served, "main", &name).await, Some(path.nar.clone()));
        assert_eq!(fetch(&served, "team", &name).await, None, "not sent there");
        names.push((name, path));
    }
    // Neither a collection nor a new start takes a name away that a client may still know.
    let (_, folder) = served.stop();
    let old = SystemTime::now() - Duration::from_secs(86_400);
    for (name, _) in &names {
        let record = format!("cache/caches/main/uploads/{}", &name[4..]);
        let record = std::fs::File::open(folder.path().join(record)).unwrap();
        record.set_modified(old).unwrap();
    }
    let served = Served::in_folder(folder, &[]);
    served.until("a collection", || {
        served.names("caches/main/uploads").len() == names.len()
    });
    for (name, path) in &names {
        assert_eq!(fetch(&served, "main", name).await.as_ref(), Some(&path.nar));
    }
    let (ran, folder) = served.stop();
    assert!(ran.stderr.contains("gc: 0 paths"), "{}", ran.stderr);
    // With its paths a NAR loses its names.
    let mut run = Flywheel::new(&["cache", "gc", "--dir", "cache", "--max-size", "0"]);
    run.folder = folder;
    assert_eq!(run.run().code, 0);
    let left = std::fs::read_dir(run.path("cache/caches/main/uploads")).unwrap();
    assert_eq!(left.count(), 0);
}

#[tokio::test]
async fn our_own_narinfo_is_taken_back() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"x");
    assert_eq!(served.upload(&path).await.0, 200);
    let file = format!("{}.narinfo", path.hash());
    let ours = served.narinfo("main", &path).await.unwrap().to_string();
    let signed = format!("{ours}Sig: other-1:{}\n", foreign_signature());
    assert_eq!(put(&served, &file, signed).await.0, 201);
    assert_eq!(
        served
            .narinfo("main", &path)
            .await
            .unwrap()
            .signatures
            .len(),
        2
    );
    // The name alone proves nothing about a path that this cache has not.
    let other = ours.replace(&path.base, &TestPath::new('b', b"").base);
    let (status, json) = put(&served, &format!("{}.narinfo", "b".repeat(32)), other).await;
    assert_eq!(status, 400, "{json}");
    let size = format!("NarSize: {}", path.nar.len());
    let wrong = ours.replace(&size, "NarSize: 7");
    assert_eq!(put(&served, &file, wrong).await.0, 400);
}

#[tokio::test]
async fn a_compression_that_its_name_does_not_say_is_named() {
    let served = Served::start(&[]);
    // So Nix names NARs that it compresses with gzip and with lzma.
    for (begin, problem) in [
        (
            &b"\x1f\x8b\x08\0\0\0\0\0\x02\x03"[..],
            "compressed with gzip",
        ),
        (
            b"\x5d\0\0\x80\0\xff\xff\xff\xff\xff",
            "compressed with lzma",
        ),
        (b"BZh91AY&SY", "compressed with bzip2"),
    ] {
        let bytes = [begin, &[7; 500]].concat();
        let name = format!("nar/{}.nar", sha256(&bytes).base32());
        let (status, json) = put(&served, &name, bytes).await;
        let message = json["message"].as_str().unwrap();
        assert_eq!(status, 415, "{json}");
        assert!(
            message.contains(problem) && message.contains("?compression=zstd"),
            "{json}"
        );
    }
    assert!(served.names("nars").is_empty());
}

#[tokio::test]
async fn a_narinfo_with_a_wrong_content_address_replaces_no_good_one() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"x");
    let (name, bytes) = packed(&path, ".zst");
    let good = narinfo(&path, &name, &bytes);
    let file = format!("{}.narinfo", path.hash());
    assert_eq!(put(&served, &name, bytes.clone()).await.0, 201);
    assert_eq!(put(&served, &file, good.clone()).await.0, 201);
    let wrong = format!("{good}CA: fixed:r:{}\n", path.nar_hash());
    let (status, json) = put(&served, &file, wrong).await;
    assert_eq!(status, 400);
    let message = json["message"].as_str().unwrap();
    assert!(message.contains("the content address (`CA`) of"), "{json}");
    assert_eq!(served.narinfo("main", &path).await.unwrap().ca, None);
}

fn foreign_signature() -> String {
    let signature = flywheel_nix::key::SecretKey::generate("other-1")
        .unwrap()
        .sign("x");
    signature.split_once(':').unwrap().1.to_owned()
}

#[tokio::test]
async fn a_nar_that_is_not_what_its_name_says_is_refused() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"x");
    let (name, bytes) = packed(&path, ".xz");
    let (_, other) = packed(&path, ".zst");
    assert_eq!(put(&served, &name, other).await.0, 400, "no xz");
    assert_eq!(
        put(&served, &name, bytes[..bytes.len() - 4].to_vec())
            .await
            .0,
        400,
        "cut"
    );
    assert_eq!(
        put(&served, &name, xz(b"another")).await.0,
        400,
        "another hash"
    );
    assert_eq!(put(&served, &name, "").await.0, 400, "empty");
    assert_eq!(
        put(&served, "nar/x.nar.xz", bytes.clone()).await.0,
        400,
        "no hash"
    );
    let (status, json) = put(&served, &name.replace(".xz", ".bz2"), bytes).await;
    assert_eq!(status, 415);
    assert!(
        json["message"]
            .as_str()
            .unwrap()
            .contains("?compression=zstd"),
        "{json}"
    );
    let nothing = sha256(b"").base32();
    assert_eq!(
        put(
            &served,
            &format!("nar/{nothing}.nar"),
            reqwest::Body::wrap_stream(empty())
        )
        .await
        .0,
        400
    );
    served.until("the temporary files gone", || {
        served.names("tmp").is_empty()
    });
    assert!(served.names("nars").is_empty() && served.names("caches/main/uploads").is_empty());
}

fn empty() -> impl futures_util::Stream<Item = std::io::Result<Vec<u8>>> {
    futures_util::stream::empty()
}

#[tokio::test]
async fn a_narinfo_that_does_not_fit_its_nar_is_refused() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"x");
    let (name, bytes) = packed(&path, ".xz");
    let good = narinfo(&path, &name, &bytes);
    let file = format!("{}.narinfo", path.hash());
    let (_, json) = put(&served, &file, good.clone()).await;
    assert!(
        json["message"]
            .as_str()
            .unwrap()
            .contains("must be uploaded before its narinfo"),
        "{json}"
    );
    assert_eq!(put(&served, &name, bytes.clone()).await.0, 201);
    let zeros = format!("sha256:{}", "0".repeat(52));
    let cases = [
        (
            good.replace(&path.nar_hash().to_string(), &zeros),
            "`NarHash`",
        ),
        (
            good.replace(&sha256(&bytes).to_string(), &zeros),
            "`FileHash`",
        ),
        (good.replace("NarSize: ", "NarSize: 1"), "`NarSize`"),
        (good.replace("FileSize: ", "FileSize: 1"), "`FileSize`"),
        (good.replace("URL: nar/", "URL: http://elsewhere/"), "`URL`"),
        (good.replace("URL: nar/", "URL: nar/../"), "`URL`"),
        (good.clone() + "CA: nonsense\n", "`ca`"),
        (
            good.clone() + &format!("Deriver: {}\n", path.base),
            "`deriver`",
        ),
        (good.clone() + "Sig: x\n", "`sigs`"),
        (
            good.replace("References: ", "References: nonsense"),
            "`References`",
        ),
        (good.replace(&path.base, &"b".repeat(32)), "`StorePath`"),
        (
            good.replace(&path.base, &TestPath::new('b', b"").base),
            "the narinfo describes",
        ),
    ];
    for (text, problem) in cases {
        let (status, json) = put(&served, &file, text).await;
        assert!(
            status == 400 && json["message"].as_str().unwrap().contains(problem),
            "{problem}: {json}"
        );
    }
    assert!(served.narinfo("main", &path).await.is_none());
    assert_eq!(put(&served, &file, good).await.0, 201);
    assert!(served.narinfo("main", &path).await.is_some());
}

#[tokio::test]
async fn writing_needs_a_token_for_this_cache() {
    let served = Served::start(&[]);
    let path = TestPath::new('a', b"x");
    let (name, bytes) = packed(&path, "");
    for (token, status) in [
        ("reader-token", 403),
        ("team-token", 403),
        ("garbage-token", 403),
    ] {
        for file in [name.clone(), format!("{}.narinfo", path.hash())] {
            let request = served
                .client()
                .put(format!("{}/main/{file}", served.url))
                .basic_auth("x", Some(token));
            assert_eq!(
                answer(request.body(bytes.clone())).await.0,
                status,
                "{token} {file}"
            );
        }
    }
    // A NAR that another cache was sent cannot be claimed here.
    assert_eq!(put(&served, &name, bytes.clone()).await.0, 201);
    let request = served
        .client()
        .put(format!("{}/team/{}.narinfo", served.url, path.hash()));
    let (status, _) = answer(
        request
            .bearer_auth("team-token")
            .body(narinfo(&path, &name, &bytes)),
    )
    .await;
    assert_eq!(status, 400);
}
