//! What is uploaded has to be a NAR, and what its content address says.

use super::*;

/// A text of Nix 2.8's own: content address, path, content.
const NIX_TEXT: (&str, &str, &str) = (
    "text:sha256:10a83a91g1r50bdw8g4hn47m7j7m6angpabwc80l9c16nx11cw9d",
    "wq4i5qfb91dkqqy9xi5cnrzb4w49grcd-fsrc",
    "x",
);

#[tokio::test]
async fn a_content_address_that_contradicts_the_nar_is_refused_and_replaces_nothing() {
    let served = Served::start(&[]);
    let (address, base, content) = NIX_TEXT;
    let text = |content: &str| TestPath {
        base: base.to_owned(),
        ..TestPath::new('a', content.as_bytes())
    };
    let good = text(content);
    let with_address = |path: &TestPath, address: &str| {
        let mut info = path.info("main");
        info["ca"] = json!(address);
        (info, path.nar.clone())
    };
    let (info, nar) = with_address(&good, address);
    assert_eq!(served.upload_as(PLANTED_TOKEN, &info, nar).await.0, 200);
    assert_eq!(
        served.narinfo("main", &good).await.unwrap().ca.as_deref(),
        Some(address)
    );
    let renamed = TestPath {
        base: base.replace("fsrc", "gsrc"),
        ..good.clone()
    };
    let zeros = format!("text:sha256:{}", "0".repeat(52));
    let nar = format!("fixed:r:{}", good.nar_hash());
    let large = text(&"y".repeat(400_000));
    for (path, address, problem) in [
        (&text("y"), address, "is not that of the received NAR"),
        (&large, address, "is not that of the received NAR"),
        (&renamed, address, "is not that of a path with this name"),
        (
            &good.clone().refers_to(&[&renamed]),
            address,
            "and these references",
        ),
        (&good, &zeros, "is not that of a path with this name"),
        (&good, &nar, "is not that of a path with this name"),
    ] {
        let (info, nar) = with_address(path, address);
        let (status, json) = served.upload_as(PLANTED_TOKEN, &info, nar).await;
        assert!(
            status == 400 && json["message"].as_str().unwrap().contains(problem),
            "{problem}: {json}"
        );
    }
    let info = served.narinfo("main", &good).await.unwrap();
    assert_eq!(info.nar_hash, good.nar_hash(), "the good one stays");
}

#[tokio::test]
async fn what_is_no_nar_is_neither_stored_nor_signed() {
    let served = Served::start(&[]);
    for size in [100, 400_000] {
        let mut path = TestPath::new('a', b"");
        path.nar = vec![b'n'; size];
        let (status, json) = served.upload(&path).await;
        assert_eq!(status, 400);
        let message = json["message"].as_str().unwrap();
        assert!(
            message.contains("Bad NAR Hash or Size") && message.contains("no NAR"),
            "{message}"
        );
        assert!(served.narinfo("main", &path).await.is_none());
    }
    served.until("the temporary files gone", || {
        served.names("tmp").is_empty()
    });
    assert!(served.names("nars").is_empty());
}
