//! DNS messages: what is done about each kind of packet, and how answers are made to fit.
//!
//! All packets come from a workload and may be anything. Nothing here waits or touches a socket;
//! that is [`super::server`] and, for names outside the mesh, [`super::upstream`].

use hickory_proto::{
    ProtoError,
    op::{Edns, Message, MessageType, Metadata, OpCode, ResponseCode},
    rr::DNSClass,
};

use super::{answer::answer, zone::Zone};

/// Length of the fixed header (RFC 1035, section 4.1.1).
const HEADER: usize = 12;
/// Largest UDP answer to a client without EDNS (RFC 1035, section 4.2.1).
const PLAIN_UDP: u16 = 512;
/// Largest UDP answer at all: never fragmented, wherever it goes (DNS flag day 2020).
const LARGEST_UDP: u16 = 1232;
/// The smallest record: a compressed owner name, type, class, TTL, length and an IPv4 address.
const SMALLEST_ANSWER: usize = 16;

/// How a packet travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    /// One datagram.
    Udp,
    /// A length and a message (RFC 7766).
    Tcp,
}

/// What is to be done about a packet.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Not a query: no answer.
    Drop,
    /// The answer, and how it turned out.
    Reply(Vec<u8>, ResponseCode),
    /// A well-formed query about something outside the mesh.
    Forward,
}

/// Decides about one packet of a workload of `namespace`.
pub(super) fn handle(packet: &[u8], transport: Transport, zone: &Zone, namespace: &str) -> Verdict {
    // An answer to an answer would start a loop.
    if packet.len() < HEADER || packet[2] & 0x80 != 0 {
        return Verdict::Drop;
    }
    let opcode = OpCode::from_u8((packet[2] >> 3) & 0x0f);
    if opcode != OpCode::Query {
        return error(packet, ResponseCode::NotImp);
    }
    // Exactly one question, and no pointer in it: also what the way upstream relies on.
    if u16::from_be_bytes([packet[4], packet[5]]) != 1 || question(packet).is_none() {
        return error(packet, ResponseCode::FormErr);
    }
    let Ok(request) = Message::from_vec(packet) else {
        return error(packet, ResponseCode::FormErr);
    };
    let Some(query) = request.queries.first() else {
        return error(packet, ResponseCode::FormErr);
    };
    let mut response = response_to(&request);
    if request.version() > 0 {
        response.metadata.response_code = ResponseCode::BADVERS;
    } else if query.query_class != DNSClass::IN {
        response.metadata.response_code = ResponseCode::Refused;
    } else if !answer(zone, namespace, query, &mut response) {
        return Verdict::Forward;
    }
    let limit = match transport {
        Transport::Tcp => u16::MAX,
        Transport::Udp if request.edns.is_some() => request.max_payload().min(LARGEST_UDP),
        Transport::Udp => PLAIN_UDP,
    };
    let code = response.metadata.response_code;
    match encode_within(response, limit.into()) {
        Ok(bytes) => Verdict::Reply(bytes, code),
        Err(_) => error(packet, ResponseCode::ServFail),
    }
}

/// The answer to a query that nobody upstream answered.
pub(super) fn server_failure(packet: &[u8]) -> Option<Vec<u8>> {
    match error(packet, ResponseCode::ServFail) {
        Verdict::Reply(bytes, _) => Some(bytes),
        Verdict::Drop | Verdict::Forward => None,
    }
}

/// The first question with its type and class, as bytes; `None` if it is cut off or compressed.
pub(super) fn question(packet: &[u8]) -> Option<&[u8]> {
    let mut end = HEADER;
    loop {
        let length = usize::from(*packet.get(end)?);
        end += 1;
        match length {
            0 => break,
            1..=63 => end += length,
            _ => return None,
        }
    }
    packet.get(HEADER..end + 4)
}

fn response_to(request: &Message) -> Message {
    let mut response = Message::response(request.metadata.id, OpCode::Query);
    response.metadata = Metadata::response_from_request(&request.metadata);
    response.metadata.recursion_available = true;
    response.add_queries(request.queries.iter().cloned());
    if let Some(edns) = &request.edns {
        let mut own = Edns::new();
        own.set_max_payload(LARGEST_UDP);
        own.set_dnssec_ok(edns.flags().dnssec_ok);
        response.set_edns(own);
    }
    response
}

/// An error about a packet of which only the header, and at best the question, can be trusted.
fn error(packet: &[u8], code: ResponseCode) -> Verdict {
    let Some(&[id_high, id_low, flags, ..]) = packet.first_chunk::<HEADER>() else {
        return Verdict::Drop;
    };
    let opcode = OpCode::from_u8((flags >> 3) & 0x0f);
    let mut metadata = Metadata::new(
        u16::from_be_bytes([id_high, id_low]),
        MessageType::Response,
        opcode,
    );
    metadata.recursion_desired = flags & 1 != 0;
    metadata.recursion_available = true;
    metadata.response_code = code;
    let mut response = Message::response(metadata.id, opcode);
    response.metadata = metadata;
    let Ok(mut bytes) = response.to_vec() else {
        return Verdict::Drop;
    };
    if let Some(question) = question(packet) {
        bytes.extend_from_slice(question);
        bytes[5] = 1;
    }
    Verdict::Reply(bytes, code)
}

/// Encodes the message in at most `limit` bytes: without its additional records if they do not fit, and with
/// as many answers as do, marked as truncated, if not all fit.
fn encode_within(mut message: Message, limit: usize) -> Result<Vec<u8>, ProtoError> {
    let most = limit / SMALLEST_ANSWER;
    if message.answers.len() > most {
        message.answers.truncate(most);
        message.additionals.clear();
        message.metadata.truncation = true;
    }
    if let Some(bytes) = encode_if_fits(&message, limit)? {
        return Ok(bytes);
    }
    message.additionals.clear();
    if let Some(bytes) = encode_if_fits(&message, limit)? {
        return Ok(bytes);
    }
    message.metadata.truncation = true;
    let answers = std::mem::take(&mut message.answers);
    let mut best = message.to_vec()?;
    let (mut fit, mut do_not_fit) = (0, answers.len());
    while fit + 1 < do_not_fit {
        let middle = fit.midpoint(do_not_fit);
        message.answers = answers[..middle].to_vec();
        match encode_if_fits(&message, limit)? {
            Some(bytes) => (fit, best) = (middle, bytes),
            None => do_not_fit = middle,
        }
    }
    Ok(best)
}

fn encode_if_fits(message: &Message, limit: usize) -> Result<Option<Vec<u8>>, ProtoError> {
    let bytes = message.to_vec()?;
    // The encoder drops what goes beyond 64 KiB and marks the message as truncated.
    let cut = bytes[2] & 0x02 != 0 && !message.metadata.truncation;
    Ok((bytes.len() <= limit && !cut).then_some(bytes))
}
