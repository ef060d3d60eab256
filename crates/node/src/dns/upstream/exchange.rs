//! One query, asked of the servers until one answers.
//!
//! Every try has a socket, and so a source port, and an id of its own: an answer that somebody makes up has to
//! guess both (RFC 5452). The bytes of query and answer are passed on as they are, but for the id.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use futures::{StreamExt, stream::FuturesUnordered};
use hickory_proto::op::Message;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{TcpStream, UdpSocket},
    time::timeout,
};
use tracing::debug;

use super::config::{Nameserver, UpstreamConfig};
use crate::dns::message::{Transport, question};

/// Largest UDP payload.
const LARGEST_DATAGRAM: usize = 65_535;

/// The first useful answer, else the last that says that a server could not help; `None` if there was none
/// at all. Does not end by itself while a server neither answers nor refuses.
pub(super) async fn ask(
    config: &UpstreamConfig,
    query: &[u8],
    transport: Transport,
) -> Option<Vec<u8>> {
    let mut servers = (0..config.attempts).flat_map(|_| &config.servers);
    let mut tries = FuturesUnordered::new();
    let mut unhelpful = None;
    loop {
        match servers.next() {
            // Earlier tries go on: a slow answer is as good as a fast one.
            Some(server) => tries.push(ask_server(server, query, transport)),
            None if tries.is_empty() => return unhelpful,
            None => {}
        }
        match timeout(config.patience(), tries.next()).await {
            Ok(Some((_, Ok(answer)))) if is_helpful(&answer) => return Some(answer),
            Ok(Some((_, Ok(answer)))) => unhelpful = Some(answer),
            Ok(Some((server, Err(error)))) => debug!(?server, %error, "no answer from name server"),
            Ok(None) | Err(_) => {}
        }
    }
}

async fn ask_server<'a>(
    server: &'a Nameserver,
    query: &[u8],
    transport: Transport,
) -> (&'a Nameserver, io::Result<Vec<u8>>) {
    (server, try_server(server, query, transport).await)
}

async fn try_server(
    server: &Nameserver,
    query: &[u8],
    transport: Transport,
) -> io::Result<Vec<u8>> {
    let address = server.socket_address()?;
    // Message::query() draws its id from a cryptographic generator.
    let id = Message::query().metadata.id.to_be_bytes();
    let mut own_query = query.to_vec();
    own_query[..2].copy_from_slice(&id);
    let mut answer = over_udp(address, &own_query).await?;
    if transport == Transport::Tcp && answer[2] & 0x02 != 0 {
        answer = over_tcp(address, &own_query).await?;
    }
    answer[..2].copy_from_slice(&query[..2]);
    Ok(answer)
}

async fn over_udp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let any = match server {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Connected: packets from elsewhere are not received, and a closed port is an error at once.
    socket.connect(server).await?;
    socket.send(query).await?;
    loop {
        // A closed port shows as an error only: waiting for something to read would miss it.
        let ready = socket.ready(Interest::READABLE | Interest::ERROR).await?;
        if ready.is_error() {
            let error = socket.take_error()?;
            return Err(error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()));
        }
        // Made when there is something to put in, so that a waiting query costs no buffer.
        let mut answer = vec![0; LARGEST_DATAGRAM];
        match socket.try_recv(&mut answer) {
            Ok(length) if answers(&answer[..length], query) => return Ok(answer[..length].to_vec()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn over_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let length = u16::try_from(query.len())
        .map_err(|_| io::Error::other("the query is longer than a DNS message can be"))?;
    let mut stream = TcpStream::connect(server).await?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(query);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await?;
    if answers(&answer, query) {
        Ok(answer)
    } else {
        Err(io::Error::other("the server answered another question"))
    }
}

/// Whether `packet` is an answer to `query`: id and question match, the question in any case.
fn answers(packet: &[u8], query: &[u8]) -> bool {
    let Some(header) = packet.first_chunk::<12>() else {
        return false;
    };
    let is_answer = header[2] & 0xf8 == 0x80;
    if !is_answer || header[..2] != query[..2] {
        return false;
    }
    match u16::from_be_bytes([header[4], header[5]]) {
        // A server that understood nothing repeats no question.
        0 => code(packet) != 0,
        1 => match (question(packet), question(query)) {
            (Some(answered), Some(asked)) => same_question(answered, asked),
            _ => false,
        },
        _ => false,
    }
}

fn same_question(one: &[u8], other: &[u8]) -> bool {
    let split = |question: &[u8]| question.len().saturating_sub(4);
    let ((name, rest), (other_name, other_rest)) =
        (one.split_at(split(one)), other.split_at(split(other)));
    rest == other_rest && name.eq_ignore_ascii_case(other_name)
}

/// Whether another server need not be asked: not SERVFAIL, NOTIMP or REFUSED (RFC 1035, section 4.1.1).
fn is_helpful(answer: &[u8]) -> bool {
    !matches!(code(answer), 2 | 4 | 5)
}

fn code(answer: &[u8]) -> u8 {
    answer.get(3).map_or(0, |flags| flags & 0x0f)
}
