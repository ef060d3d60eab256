//! The bytes of `NETLINK_SOCK_DIAG`: `linux/netlink.h`, `linux/inet_diag.h`, `linux/sock_diag.h`, `linux/tcp.h`.
//!
//! Numbers are in the machine's order unless said otherwise. Nothing here trusts a length: what does not fit
//! into what encloses it is an error, never a panic.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
};

use super::{Family, Figures, Protocol, Request, Socket, State};

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;
/// Messages and attributes begin at multiples of this.
const ALIGNMENT: usize = 4;
/// `struct inet_diag_req_v2` without the socket's id.
const REQUEST: usize = 8;
/// `struct inet_diag_sockid`.
const SOCKET_ID: usize = 48;
/// `struct inet_diag_msg`.
const ANSWER: usize = 72;
/// Length of `struct tcp_info` up to and with `tcpi_bytes_received` (Linux 4.1).
const FIGURES: usize = 136;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;
/// The upper bits of an attribute's type are flags.
const NLA_TYPE_MASK: u16 = 0x3fff;
const NLA_F_NESTED: u16 = 0x8000;

const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_MARK: u16 = 15;
const INET_DIAG_SK_BPF_STORAGES: u16 = 20;
const INET_DIAG_CGROUP_ID: u16 = 21;
const INET_DIAG_REQ_SK_BPF_STORAGES: u16 = 2;
const SK_DIAG_BPF_STORAGE_REQ_MAP_FD: u16 = 1;
const SK_DIAG_BPF_STORAGE: u16 = 1;
const SK_DIAG_BPF_STORAGE_MAP_ID: u16 = 2;
const SK_DIAG_BPF_STORAGE_MAP_VALUE: u16 = 3;

/// `struct inet_diag_sockid`, kept as it came: the kernel wants it back the same.
pub(super) type SocketId = [u8; SOCKET_ID];

/// One message of the kernel's.
#[derive(Debug)]
pub(super) struct Received {
    pub(super) sequence: u32,
    pub(super) interrupted: bool,
    pub(super) content: Message,
}

/// What it says.
#[derive(Debug)]
pub(super) enum Message {
    Socket(Box<Socket>),
    /// An acknowledgement (0) or an errno.
    Error(i32),
    /// The end of a dump, with 0 or an errno.
    Done(i32),
    /// A socket that this version cannot name, or a message that it does not know.
    Other,
}

/// An answer that is not of the form that the kernel's headers tell.
pub(super) fn unreadable(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("sock_diag answered with {what}"),
    )
}

pub(super) fn dump_request(request: &Request<'_>, sequence: u32) -> Vec<u8> {
    let extensions = if request.figures {
        1 << (INET_DIAG_INFO - 1)
    } else {
        0
    };
    let mut bytes = begin(
        SOCK_DIAG_BY_FAMILY,
        NLM_F_REQUEST | NLM_F_DUMP,
        sequence,
        [
            family_number(request.family),
            protocol_number(request.protocol),
            extensions,
            0,
        ],
        request.states.0,
        &[0; SOCKET_ID],
    );
    if !request.storages.is_empty() {
        let mut descriptors = Vec::new();
        for map in &request.storages {
            put_attribute(
                &mut descriptors,
                SK_DIAG_BPF_STORAGE_REQ_MAP_FD,
                &map.as_raw_fd().to_ne_bytes(),
            );
        }
        put_attribute(
            &mut bytes,
            INET_DIAG_REQ_SK_BPF_STORAGES | NLA_F_NESTED,
            &descriptors,
        );
    }
    finish(bytes)
}

pub(super) fn destroy_request(
    family: Family,
    protocol: Protocol,
    id: &SocketId,
    sequence: u32,
) -> Vec<u8> {
    finish(begin(
        SOCK_DESTROY,
        NLM_F_REQUEST | NLM_F_ACK,
        sequence,
        [family_number(family), protocol_number(protocol), 0, 0],
        u32::MAX,
        id,
    ))
}

fn begin(
    kind: u16,
    flags: u16,
    sequence: u32,
    what: [u8; 4],
    states: u32,
    id: &SocketId,
) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + REQUEST + SOCKET_ID + 64);
    // The length is filled in by `finish`; the sender's port 0 lets the kernel choose.
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(sequence.to_ne_bytes());
    bytes.extend(0_u32.to_ne_bytes());
    bytes.extend(what);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

fn finish(mut bytes: Vec<u8>) -> Vec<u8> {
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

fn put_attribute(bytes: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = (ATTRIBUTE_HEADER + value.len()) as u16;
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(align(bytes.len()), 0);
}

/// The messages of one datagram. After an error there is nothing more.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = io::Result<Received>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let message = split_message(rest);
        match message {
            Ok((header, payload, tail)) => {
                rest = tail;
                Some(read_message(&header, payload))
            }
            Err(error) => {
                rest = &[];
                Some(Err(error))
            }
        }
    })
}

struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

fn split_message(bytes: &[u8]) -> io::Result<(Header, &[u8], &[u8])> {
    let length = number_u32(bytes, 0).ok_or_else(|| unreadable("half a header"))? as usize;
    if length < HEADER || length > bytes.len() {
        return Err(unreadable("a message of a wrong length"));
    }
    let header = Header {
        kind: number_u16(bytes, 4).unwrap_or_default(),
        flags: number_u16(bytes, 6).unwrap_or_default(),
        sequence: number_u32(bytes, 8).unwrap_or_default(),
    };
    let next = align(length).min(bytes.len());
    Ok((header, &bytes[HEADER..length], &bytes[next..]))
}

fn read_message(header: &Header, payload: &[u8]) -> io::Result<Received> {
    let content = match header.kind {
        SOCK_DIAG_BY_FAMILY => {
            read_socket(payload)?.map_or(Message::Other, |socket| Message::Socket(socket.into()))
        }
        NLMSG_ERROR => Message::Error(read_errno(payload)?),
        // Some kernels end a dump without a number.
        NLMSG_DONE if payload.is_empty() => Message::Done(0),
        NLMSG_DONE => Message::Done(read_errno(payload)?),
        _ => Message::Other,
    };
    Ok(Received {
        sequence: header.sequence,
        interrupted: header.flags & NLM_F_DUMP_INTR != 0,
        content,
    })
}

/// The kernel writes errors as negative numbers.
fn read_errno(payload: &[u8]) -> io::Result<i32> {
    let number = number_u32(payload, 0).ok_or_else(|| unreadable("an error without a number"))?;
    Ok((number as i32).saturating_neg().max(0))
}

/// `None` for a state or family that this version does not know.
fn read_socket(payload: &[u8]) -> io::Result<Option<Socket>> {
    let fixed = payload
        .get(..ANSWER)
        .ok_or_else(|| unreadable("half a socket"))?;
    let family = match i32::from(fixed[0]) {
        libc::AF_INET => Family::V4,
        libc::AF_INET6 => Family::V6,
        _ => return Ok(None),
    };
    let Some(state) = State::from_number(fixed[1]) else {
        return Ok(None);
    };
    let mut id: SocketId = [0; SOCKET_ID];
    id.copy_from_slice(&fixed[4..4 + SOCKET_ID]);
    let mut socket = Socket {
        family,
        state,
        local: endpoint(family, &id, 0, 4),
        remote: endpoint(family, &id, 2, 20),
        cookie: number_u64(&id, 40).unwrap_or_default(),
        cgroup: None,
        mark: 0,
        figures: None,
        storages: Vec::new(),
        id,
    };
    for attribute in attributes(&payload[ANSWER..]) {
        let (kind, value) = attribute?;
        match kind {
            INET_DIAG_INFO => socket.figures = read_figures(value),
            INET_DIAG_MARK => socket.mark = number_u32(value, 0).unwrap_or_default(),
            INET_DIAG_CGROUP_ID => socket.cgroup = number_u64(value, 0),
            INET_DIAG_SK_BPF_STORAGES => read_storages(value, &mut socket.storages)?,
            _ => {}
        }
    }
    Ok(Some(socket))
}

/// Ports are in network order, addresses in 16 bytes of which IPv4 uses the first four.
fn endpoint(family: Family, id: &SocketId, port_at: usize, address_at: usize) -> SocketAddr {
    let port = u16::from_be_bytes([id[port_at], id[port_at + 1]]);
    let mut octets = [0; 16];
    octets.copy_from_slice(&id[address_at..address_at + 16]);
    let address = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])),
        Family::V6 => IpAddr::V6(Ipv6Addr::from(octets)),
    };
    SocketAddr::new(address, port)
}

/// `None` if the kernel is older than the figures.
fn read_figures(info: &[u8]) -> Option<Figures> {
    let info = info.get(..FIGURES)?;
    Some(Figures {
        rtt_us: number_u32(info, 68)?,
        retransmits: number_u32(info, 100)?,
        bytes_acked: number_u64(info, 120)?,
        bytes_received: number_u64(info, 128)?,
    })
}

fn read_storages(nest: &[u8], storages: &mut Vec<(u32, Vec<u8>)>) -> io::Result<()> {
    for storage in attributes(nest) {
        let (kind, parts) = storage?;
        if kind != SK_DIAG_BPF_STORAGE {
            continue;
        }
        let (mut map, mut value) = (None, None);
        for part in attributes(parts) {
            match part? {
                (SK_DIAG_BPF_STORAGE_MAP_ID, id) => map = number_u32(id, 0),
                (SK_DIAG_BPF_STORAGE_MAP_VALUE, bytes) => value = Some(bytes.to_vec()),
                _ => {}
            }
        }
        if let (Some(map), Some(value)) = (map, value) {
            storages.push((map, value));
        }
    }
    Ok(())
}

/// Type and value of each attribute. After an error there is nothing more.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = io::Result<(u16, &[u8])>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let length = usize::from(number_u16(rest, 0).unwrap_or_default());
        let Some(kind) =
            number_u16(rest, 2).filter(|_| (ATTRIBUTE_HEADER..=rest.len()).contains(&length))
        else {
            rest = &[];
            return Some(Err(unreadable("an attribute of a wrong length")));
        };
        let value = &rest[ATTRIBUTE_HEADER..length];
        rest = &rest[align(length).min(rest.len())..];
        Some(Ok((kind & NLA_TYPE_MASK, value)))
    })
}

fn align(length: usize) -> usize {
    length.next_multiple_of(ALIGNMENT)
}

fn number_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn number_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn number_u64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    }
}

fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => libc::IPPROTO_TCP as u8,
        Protocol::Udp => libc::IPPROTO_UDP as u8,
    }
}

#[cfg(test)]
mod tests;
