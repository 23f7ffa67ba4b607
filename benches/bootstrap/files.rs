//! A server of plain files on the loopback that keeps its connections, as a binary cache does.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

/// Serves a folder for as long as the process lives; its address.
pub fn serve(folder: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let folder = folder.clone();
            // A client that has gone ends its own thread.
            std::thread::spawn(move || answer(stream, &folder));
        }
    });
    url
}

fn answer(mut stream: TcpStream, folder: &Path) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while let Some(first) = lines.next().transpose()? {
        while lines
            .next()
            .transpose()?
            .is_some_and(|line| !line.is_empty())
        {}
        let name = first.split(' ').nth(1).unwrap_or_default();
        let found = fs::read(folder.join(name.trim_start_matches('/')));
        let (status, body) = match &found {
            Ok(body) => ("200 OK", body.as_slice()),
            Err(_) => ("404 Not Found", &[][..]),
        };
        let length = body.len();
        stream.write_all(
            format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n").as_bytes(),
        )?;
        stream.write_all(body)?;
    }
    Ok(())
}
