//! What a publication costs when the cache has everything already, beside the two requests of Attic's own client,
//! replayed: that one reads the closure, asks which paths are missing, and has one more answer to wait for. Without and
//! with 50 ms more per request. Never changes the cache: that the paths are there is done before.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::table::{Figures, Table};
use crate::{Bench, Place, RTT, Server, delayed, measure as run, ratio};

/// As many as the goal is set for.
pub const PATHS: usize = 300;
/// Each is short, so it is done several times in a run.
const TIMES: usize = 5;
const ROWS: [(&str, &str, Duration); 2] = [
    (
        "nothing: flywheel publish",
        "nothing: two requests",
        Duration::ZERO,
    ),
    (
        "nothing: flywheel publish, 50 ms",
        "nothing: two requests, 50 ms",
        RTT,
    ),
];

/// Adds the rows of one run.
pub fn measure(bench: &Bench, table: &mut Table, paths: &[String]) {
    let server = bench.serve(Place::Disk);
    publish(bench, &server, &server.url, paths);
    for (own, stock, rtt) in ROWS {
        for _ in 0..TIMES {
            let url = || match rtt {
                Duration::ZERO => server.url.clone(),
                rtt => delayed(&server.url, rtt),
            };
            table.add(own, publish(bench, &server, &url(), paths));
            table.add(stock, replay(bench, &server, &url(), paths));
        }
    }
}

/// Prints what became of it, beside the goal.
pub fn ratios(table: &Table) {
    for (own, stock, _) in ROWS {
        let ratio = ratio(table, own, stock, "wall s");
        println!("{own}: {ratio:.2} times `{stock}` (at most 1.2)");
    }
}

fn publish(bench: &Bench, server: &Server, url: &str, paths: &[String]) -> Figures {
    let mut command = bench.within(&bench.nix(), bench.flywheel.to_str().unwrap());
    command
        .env("ATTIC_TOKEN", &server.token)
        .args(["publish", "--attic-server", url])
        .args(paths);
    let (figures, printed) = run(command, Some(server), |_| ());
    assert!(printed.contains(", 0 lost"), "{printed}");
    figures
}

/// Has Nix read the closure, and sends the two requests on one connection.
fn replay(bench: &Bench, server: &Server, url: &str, paths: &[String]) -> Figures {
    let began = Instant::now();
    let mut command = bench.within(&bench.nix(), "nix");
    command
        .args(["path-info", "--recursive", "--json"])
        .args(paths);
    let (mut figures, _) = run(command, Some(server), |_| ());
    let stream = TcpStream::connect(url.trim_start_matches("http://")).unwrap();
    stream.set_nodelay(true).unwrap();
    let hashes: Vec<&str> = paths.iter().map(|path| &path[11..43]).collect();
    let question = serde_json::json!({ "cache": "main", "store_path_hashes": hashes }).to_string();
    let token = &server.token;
    let ask = |line: &str, more: &str, body: &str| {
        let head =
            format!("{line} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n{more}\r\n");
        (&stream)
            .write_all(format!("{head}{body}").as_bytes())
            .unwrap();
        answer(&stream)
    };
    let length = question.len();
    let missing = ask(
        "POST /_api/v1/get-missing-paths",
        &format!("Content-Type: application/json\r\nContent-Length: {length}\r\n"),
        &question,
    );
    assert!(missing.contains("\"missing_paths\":[]"), "{missing}");
    let info = ask(&format!("GET /main/{}.narinfo", hashes[0]), "", "");
    assert!(info.starts_with("StorePath: "), "{info}");
    figures.insert("wall s", began.elapsed().as_secs_f64());
    figures
}

/// The body of an answer that announces its length.
fn answer(stream: &TcpStream) -> String {
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let line = line.trim_end().to_ascii_lowercase();
        if let Some(value) = line.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).unwrap();
    String::from_utf8(body).unwrap()
}
