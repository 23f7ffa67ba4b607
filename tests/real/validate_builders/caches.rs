//! Faults of the caches, and of the hints that name them. The builder is healthy in spite of them.

use super::scripted::{self, Nar, Scripted};
use super::{Builder, SMALL, broken, degraded};
use crate::bazel::{Answer, Server};
use crate::faults::{Fault, Plan, When};
use crate::world::cache::Cache;
use crate::world::port::Port;

#[test]
fn a_broken_hint_is_named() {
    let hint = |name: &str, value: &str| {
        let canary = Builder::new().env(name, value).run();
        assert_eq!(
            (canary.layer(), canary.code),
            ("hints", 0),
            "{}",
            canary.log
        );
        assert!(
            canary.check("hints")["text"]
                .as_str()
                .unwrap()
                .contains(name),
            "{}",
            canary.log
        );
    };
    hint("ATTIC_SERVER", "${ATTIC_SERVER}");
    hint("ATTIC_CACHE", "a/b");
    hint("ATTIC_PUBLIC_KEY", "main:short");
    degraded(
        "hints",
        Builder::new().env("ATTIC_SERVER", "attic.example"),
        "hints",
    );
}

#[test]
fn a_cache_that_cannot_be_reached_is_named_by_its_layer() {
    let closed = Port::reserve();
    degraded(
        "name unknown",
        Builder::new().cache("http://cache.flywheel.invalid"),
        "cache-name",
    );
    degraded(
        "port closed",
        Builder::new().cache(&format!("http://{}", closed.address())),
        "cache-connect",
    );
    let front = |fault: Fault| Plan::new().fault("", When::Always, fault).alone();
    degraded(
        "port silent",
        Builder::new().cache(&front(Fault::Hang).url()),
        "cache-answer",
    );
    degraded(
        "500",
        Builder::new().cache(&front(Fault::Status(500)).url()),
        "cache-answer",
    );
    degraded(
        "a proxy's page",
        Builder::new().cache(&front(Fault::Html(200)).url()),
        "cache-answer",
    );
    degraded(
        "403",
        Builder::new().cache(&front(Fault::Status(403)).url()),
        "cache-authorised",
    );
    let private = Cache::start(&["--private"]);
    degraded(
        "401",
        Builder::new().cache(&private.url),
        "cache-authorised",
    );
    let cache = Cache::start(&[]);
    degraded(
        "no such cache",
        Builder::new().cache(&cache.url).env("ATTIC_CACHE", "other"),
        "cache-exists",
    );
    degraded(
        "no TLS",
        Builder::new().cache(&cache.url.replace("http", "https")),
        "cache-tls",
    );
    let stranger = scripted::Tls::start();
    degraded(
        "a certificate of nobody's",
        Builder::new().cache(&stranger.url),
        "cache-tls",
    );
}

#[test]
fn a_clock_that_is_wrong_is_named() {
    let server = Scripted::start(|_, _| {
        scripted::answer(
            200,
            &[("Date", "Thu, 01 Jan 2015 00:00:00 GMT")],
            b"StoreDir: /nix/store\n",
        )
    });
    broken("clock", &Builder::new().cache(&server.url), "clock");
}

#[test]
fn a_cache_that_serves_what_it_should_not_is_named() {
    let nar = Nar::new();
    let check = |name: &str, server: &Scripted, layer: &str| {
        let builder = Builder::new()
            .cache(&server.url)
            .env("ATTIC_PUBLIC_KEY", &nar.key)
            .args(&["--cache-path", &nar.path]);
        degraded(name, builder, layer);
    };
    let good = nar.clone();
    let server = Scripted::start(move |_, path| good.serve(path));
    let builder = Builder::new()
        .cache(&server.url)
        .env("ATTIC_PUBLIC_KEY", &nar.key)
        .args(&["--cache-path", &nar.path]);
    let canary = builder.run();
    assert_eq!(
        (
            canary.layer(),
            canary.check("cache-nar")["verdict"].as_str()
        ),
        ("", Some("passed")),
        "{}",
        canary.log
    );
    assert_eq!(
        canary.check("cache-signature")["verdict"],
        "passed",
        "{}",
        canary.log
    );
    for (name, layer, broken) in [
        ("no narinfo", "cache-narinfo", "narinfo 404"),
        ("narinfo without NAR", "cache-nar", "nar 404"),
        ("empty NAR", "cache-nar", "nar empty"),
        ("another NAR", "cache-nar", "nar other"),
        ("bad signature", "cache-signature", "signature"),
    ] {
        let nar = nar.clone();
        check(
            name,
            &Scripted::start(move |_, path| nar.serve_broken(path, broken)),
            layer,
        );
    }
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let tokens = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(tokens.path(), "write the-writer\nread the-reader\n").unwrap();
    let cache = Cache::start_with_tokens(tokens.path());
    let builder = Builder::new()
        .cache(&cache.url)
        .env("ATTIC_TOKEN", "the-reader")
        .args(&["--publish"]);
    degraded("write refused", builder, "cache-write");
    let forgetful = Scripted::start(|method, path| match (method, path) {
        ("PUT", _) => scripted::answer(200, &[], br#"{"kind":"uploaded"}"#),
        (_, path) if path.ends_with("nix-cache-info") => {
            scripted::answer(200, &[], b"StoreDir: /nix/store\n")
        }
        _ => scripted::answer(404, &[], b""),
    });
    let builder = Builder::new()
        .cache(&forgetful.url)
        .env("ATTIC_TOKEN", "x")
        .args(&["--publish"]);
    degraded("written and not there", builder, "cache-read-back");
}

#[test]
fn a_bazel_cache_that_does_not_answer_is_named() {
    let allowed = || {
        Builder::new().file(
            "flywheel.yml",
            &format!("{SMALL}shared-cache: {{allow-localhost: true}}\n"),
        )
    };
    let closed = Port::reserve();
    let bazel = |url: &str| allowed().env("BAZEL_REMOTE_CACHE", url);
    degraded(
        "dead",
        bazel(&format!("grpc://{}", closed.address())),
        "bazel-cache",
    );
    degraded(
        "garbage",
        bazel(&Server::start(Answer::GrpcGarbage).url("grpc")),
        "bazel-cache",
    );
    degraded(
        "without blobs",
        bazel(&Server::start(Answer::GrpcWithoutBlobs).url("grpc")),
        "bazel-cache",
    );
    degraded(
        "gRPC of another kind",
        bazel(&Server::start(Answer::GrpcStatus("12")).url("grpc")),
        "bazel-cache",
    );
    degraded(
        "silent",
        bazel(&Server::start(Answer::Silent).url("grpc")),
        "bazel-cache",
    );
    degraded(
        "a web page",
        bazel(&Server::start(Answer::Http(200, "<html>")).url("http")),
        "bazel-cache",
    );
    degraded("malformed", bazel("grpc:/cache"), "bazel-cache");
    let cacheless = Server::start(Answer::Grpc { execution: false }).url("grpc");
    degraded(
        "executes nothing",
        bazel(&cacheless).env("BAZEL_REMOTE_EXECUTOR", &cacheless),
        "bazel-executor",
    );
    for (answer, scheme) in [
        (Answer::Grpc { execution: true }, "grpc"),
        (Answer::Http(404, ""), "http"),
    ] {
        let canary = bazel(&Server::start(answer).url(scheme)).run();
        assert_eq!(
            (
                canary.layer(),
                canary.check("bazel-cache")["verdict"].as_str()
            ),
            ("", Some("passed")),
            "{}",
            canary.log
        );
    }
}
