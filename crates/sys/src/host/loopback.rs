//! Which user a connection over the loopback comes from. A port on 127.0.0.1 is open to every user of the host, whatever
//! the folder of its address may be.

use std::fs;
use std::net::{SocketAddr, SocketAddrV4};

use rustix::process::geteuid;

/// Whether the client of a connection is another user than this one and root, as far as the kernel tells. `client` and
/// `server` are the addresses of the connection's two ends.
pub fn is_of_another_user(client: SocketAddr, server: SocketAddr) -> bool {
    let (SocketAddr::V4(client), SocketAddr::V4(server)) = (client, server) else {
        return false;
    };
    // The table is the kernel's, and as long as there are connections.
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    user_in(&table, client, server).is_some_and(|user| user != 0 && user != geteuid().as_raw())
}

/// The user id of the socket at `client` that is connected to `server` (`proc_net_tcp` in the kernel's documentation).
fn user_in(table: &str, client: SocketAddrV4, server: SocketAddrV4) -> Option<u32> {
    let (client, server) = (written(client), written(server));
    let mut lines = table.lines().map(str::split_whitespace);
    lines.find_map(|mut fields| {
        let is_its = fields.nth(1)? == client && fields.next()? == server;
        // Behind the two addresses: state, queues, timer, retransmissions.
        is_its.then(|| fields.nth(4)?.parse().ok())?
    })
}

/// An address as the table has it: the bytes of the number as this machine stores them.
fn written(address: SocketAddrV4) -> String {
    let ip = u32::from_ne_bytes(address.ip().octets());
    format!("{ip:08X}:{:04X}", address.port())
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn the_user_of_a_connection_is_known() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let server = listener.local_addr().expect("bound");
        let stream = TcpStream::connect(server).expect("connected");
        let client = stream.local_addr().expect("bound");
        let (SocketAddr::V4(ours), SocketAddr::V4(theirs)) = (client, server) else {
            panic!("{client} {server}");
        };
        let table = fs::read_to_string("/proc/net/tcp").expect("the kernel's table");
        assert_eq!(user_in(&table, ours, theirs), Some(geteuid().as_raw()));
        assert!(!is_of_another_user(client, server));
    }

    #[test]
    fn another_user_is_told_by_the_number_in_the_table() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
             0: 0100007F:0050 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  1001        0 7 1 0 20 4 30 10 -1\n";
        let at = |port| SocketAddrV4::new([127, 0, 0, 1].into(), port);
        assert_eq!(user_in(table, at(80), at(8080)), Some(1001));
        assert_eq!(user_in(table, at(8080), at(80)), None);
    }
}
