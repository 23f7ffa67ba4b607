//! Ports of loopback that belong to one test.

use tokio::net::TcpSocket;

/// A port that is bound, so that no other program is given it, and that refuses connections until a server of this
/// test listens there: both sides set `SO_REUSEADDR`, which Linux accepts as long as only one of them listens.
pub struct Port(TcpSocket);

impl Port {
    /// Reserves one that is free.
    pub fn reserve() -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        Self(socket)
    }

    /// `127.0.0.1:<port>`.
    pub fn address(&self) -> String {
        self.0.local_addr().unwrap().to_string()
    }
}
