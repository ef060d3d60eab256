//! A name server outside of the mesh, on the machine's loopback: it knows one name, and keeps silent on another.

use std::{
    net::{Ipv4Addr, UdpSocket},
    thread,
};

/// The one name that it knows.
pub(super) const KNOWN: &str = "known.example";
/// The address of [`KNOWN`]; from RFC 5737's range for examples.
pub(super) const KNOWN_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
/// A name about which it never says anything.
pub(super) const SILENT: &str = "silent.example";

const A: u16 = 1;
const NXDOMAIN: u16 = 3;
/// This is an answer, recursion was wanted and is there (RFC 1035, 4.1.1).
const ANSWER: u16 = 0x8180;

/// Runs until the test's process ends.
pub(super) struct Upstream {
    port: u16,
}

impl Upstream {
    pub(super) fn start() -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = socket.local_addr().unwrap().port();
        thread::spawn(move || {
            let mut packet = [0; 512];
            while let Ok((length, client)) = socket.recv_from(&mut packet) {
                if let Some(reply) = reply(&packet[..length]) {
                    // A client that is gone needs no answer.
                    let _ = socket.send_to(&reply, client);
                }
            }
        });
        Self { port }
    }

    pub(super) fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

/// The answer to a query with one question, `None` for silence.
fn reply(query: &[u8]) -> Option<Vec<u8>> {
    let mut name = Vec::new();
    let mut at = 12;
    while query[at] != 0 {
        let end = at + 1 + usize::from(query[at]);
        name.push(String::from_utf8_lossy(&query[at + 1..end]).to_lowercase());
        at = end;
    }
    let name = name.join(".");
    let kind = u16::from_be_bytes([query[at + 1], query[at + 2]]);
    let question = &query[12..at + 5];
    if name == SILENT {
        return None;
    }
    let has_address = name == KNOWN && kind == A;
    let flags = ANSWER | if name == KNOWN { 0 } else { NXDOMAIN };
    let counts = [1, u16::from(has_address), 0, 0];
    let mut reply = query[..2].to_vec();
    reply.extend(flags.to_be_bytes());
    reply.extend(counts.iter().flat_map(|count| count.to_be_bytes()));
    reply.extend(question);
    if has_address {
        // The name is where the question has it; class IN, a minute, four bytes.
        reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        reply.extend(KNOWN_ADDRESS.octets());
    }
    Some(reply)
}
