//! Size limits, and packets that are not what they should be.

use hickory_proto::{
    op::{Edns, Message, MessageType, OpCode, Query, ResponseCode},
    rr::{
        DNSClass,
        RecordType::{A, SRV},
    },
};
use proptest::prelude::*;

use super::{NAMESPACE, endpoint, query, service, zone};
use crate::dns::{
    Zone,
    message::{Transport, Verdict, handle, question, server_failure},
};

fn reply(zone: &Zone, packet: &[u8], transport: Transport) -> Vec<u8> {
    match handle(packet, transport, zone, NAMESPACE) {
        Verdict::Reply(bytes, _) => bytes,
        other => panic!("not a reply: {other:?}"),
    }
}

fn ask(request: &Message, transport: Transport) -> (Message, usize) {
    let bytes = reply(&large_zone(), &request.to_vec().unwrap(), transport);
    (Message::from_vec(&bytes).unwrap(), bytes.len())
}

fn code(packet: &[u8]) -> ResponseCode {
    let answer = Message::from_vec(&reply(&zone(), packet, Transport::Udp)).unwrap();
    assert_eq!(answer.metadata.id, 4711);
    assert_eq!(answer.metadata.message_type, MessageType::Response);
    answer.metadata.response_code
}

/// The usual names, and a headless service `big` with 1000 endpoints.
fn large_zone() -> Zone {
    let mut zone = zone();
    zone.upsert_service(service("big", &[]));
    for index in 0..1000_u32 {
        let [_, _, high, low] = index.to_be_bytes();
        let address = format!("10.244.{}.{low}", high + 8);
        zone.upsert_endpoint(endpoint(&format!("big-{index}"), &[&address], &["big"]));
    }
    zone
}

fn with_payload(mut request: Message, size: u16) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(size);
    edns.set_dnssec_ok(true);
    request.set_edns(edns);
    request
}

#[test]
fn udp_answers_fit_the_client_and_say_that_they_are_cut() {
    let name = "big.shop.svc.cluster.local";
    let header_and_question = 12 + 28 + 4;
    for (request, limit) in [
        (query(name, A), 512),
        (with_payload(query(name, A), 100), 512),
        (with_payload(query(name, A), 800), 800),
        (with_payload(query(name, A), 4096), 1232),
    ] {
        let (answer, size) = ask(&request, Transport::Udp);
        assert!(
            answer.metadata.truncation && size <= limit,
            "{size} of {limit}"
        );
        let opt = if request.edns.is_some() { 11 } else { 0 };
        // As many answers as there is room for.
        assert_eq!(
            answer.answers.len(),
            (limit - header_and_question - opt) / 16
        );
        assert_eq!(answer.edns.is_some(), request.edns.is_some());
    }
}

#[test]
fn tcp_answers_are_complete() {
    let (answer, _) = ask(&query("big.shop.svc.cluster.local", A), Transport::Tcp);
    assert!(!answer.metadata.truncation);
    assert_eq!(answer.answers.len(), 1000);
}

#[test]
fn tcp_answers_beyond_what_a_message_can_hold_are_cut() {
    let name = "_http._tcp.big.shop.svc.cluster.local";
    let (answer, size) = ask(&query(name, SRV), Transport::Tcp);
    assert!(answer.metadata.truncation);
    assert!((65_000..=65_535).contains(&size), "{size}");
    assert!(answer.answers.len() > 500 && answer.additionals.is_empty());
}

#[test]
fn additional_records_are_left_out_before_anything_is_cut() {
    let mut zone = zone();
    zone.upsert_service(service("some", &[]));
    for index in 0..10 {
        let addresses = [format!("10.244.1.{index}"), format!("fd10:244::1:{index}")];
        let addresses = [addresses[0].as_str(), addresses[1].as_str()];
        zone.upsert_endpoint(endpoint(&format!("some-{index}"), &addresses, &["some"]));
    }
    let request = with_payload(query("_http._tcp.some.shop.svc.cluster.local", SRV), 900);
    let bytes = reply(&zone, &request.to_vec().unwrap(), Transport::Udp);
    let answer = Message::from_vec(&bytes).unwrap();
    assert!(bytes.len() <= 900 && !answer.metadata.truncation);
    assert_eq!((answer.answers.len(), answer.additionals.len()), (10, 0));
}

#[test]
fn edns_is_answered_with_edns() {
    let (answer, _) = ask(&with_payload(query("api", A), 4096), Transport::Udp);
    let edns = answer.edns.unwrap();
    assert_eq!(edns.max_payload(), 1232);
    assert!(edns.flags().dnssec_ok);
    let mut newer = with_payload(query("api", A), 4096);
    newer.edns.as_mut().unwrap().set_version(1);
    let (answer, _) = ask(&newer, Transport::Udp);
    assert_eq!(answer.metadata.response_code.high(), 1);
    assert_eq!(answer.metadata.response_code.low(), 0);
    assert!(answer.answers.is_empty());
}

#[test]
fn what_is_not_a_query_gets_no_answer() {
    let mut packet = query("api", A).to_vec().unwrap();
    for short in [&[][..], &packet[..11]] {
        let verdict = handle(short, Transport::Udp, &zone(), NAMESPACE);
        assert!(matches!(verdict, Verdict::Drop));
    }
    packet[2] |= 0x80;
    let verdict = handle(&packet, Transport::Udp, &zone(), NAMESPACE);
    assert!(matches!(verdict, Verdict::Drop));
}

#[test]
fn malformed_queries_are_called_so() {
    let packet = query("api.example", A).to_vec().unwrap();
    assert_eq!(code(&packet[..12]), ResponseCode::FormErr);
    assert_eq!(code(&packet[..packet.len() - 1]), ResponseCode::FormErr);
    let mut none = packet.clone();
    none[5] = 0;
    assert_eq!(code(&none), ResponseCode::FormErr);
    let mut two = query("api", A);
    two.add_query(Query::query("b.".parse().unwrap(), A));
    assert_eq!(code(&two.to_vec().unwrap()), ResponseCode::FormErr);
    let mut pointer = packet[..12].to_vec();
    pointer.extend([0xc0, 0x0c, 0, 1, 0, 1]);
    assert_eq!(code(&pointer), ResponseCode::FormErr);
    let mut record_missing = packet;
    record_missing[11] = 1;
    assert_eq!(code(&record_missing), ResponseCode::FormErr);
}

#[test]
fn other_operations_and_classes_are_refused() {
    let mut notify = query("api", A);
    notify.metadata.op_code = OpCode::Notify;
    assert_eq!(code(&notify.to_vec().unwrap()), ResponseCode::NotImp);
    let mut chaos = query("version.bind", A);
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(code(&chaos.to_vec().unwrap()), ResponseCode::Refused);
}

#[test]
fn a_server_failure_repeats_the_question() {
    let packet = query("ExAmple.org", A).to_vec().unwrap();
    let bytes = server_failure(&packet).unwrap();
    let failure = Message::from_vec(&bytes).unwrap();
    assert_eq!(failure.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(failure.metadata.id, 4711);
    assert!(failure.metadata.recursion_desired);
    assert_eq!(question(&bytes), question(&packet));
}

/// Whatever comes in: no panic, and what goes out is a message that fits.
fn check(packet: &[u8]) {
    let zone = zone();
    for (transport, limit) in [(Transport::Udp, 1232), (Transport::Tcp, 65_535)] {
        match handle(packet, transport, &zone, NAMESPACE) {
            Verdict::Drop => {}
            Verdict::Forward => assert!(question(packet).is_some()),
            Verdict::Reply(bytes, _) => {
                assert!(bytes.len() <= limit);
                assert_eq!(bytes[..2], packet[..2]);
                assert_eq!(bytes[2] & 0x80, 0x80);
                Message::from_vec(&bytes).unwrap();
            }
        }
    }
    server_failure(packet);
}

proptest! {
    #[test]
    fn random_bytes_do_no_harm(packet in prop::collection::vec(any::<u8>(), 0..600)) {
        check(&packet);
    }

    #[test]
    fn random_bytes_after_a_plausible_header_do_no_harm(
        counts in any::<[u8; 3]>(),
        rest in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        let [answers, authorities, additionals] = counts.map(|count| count % 4);
        let mut packet = vec![0x12, 0x67, 1, 0, 0, 1, 0, answers, 0, authorities, 0, additionals];
        packet.extend(rest);
        check(&packet);
    }

    #[test]
    fn broken_queries_do_no_harm(
        name in "([a-z_][a-z-]{0,20}\\.){0,6}((shop\\.)?svc\\.)?(cluster\\.local\\.|in-addr\\.arpa\\.)?",
        kind in any::<u16>(),
        position in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let request = with_payload(query(if name.is_empty() { "." } else { &name }, kind.into()), 1232);
        let mut packet = request.to_vec().unwrap();
        check(&packet);
        let position = position.index(packet.len());
        packet[position] = value;
        check(&packet);
    }
}

/// Written out by hand after RFC 1035, section 4.1, so that not all is checked with the library that made it.
#[test]
fn an_answer_is_byte_for_byte_what_the_rfc_says() {
    let question = b"\x03aPi\x04shop\x00\x00\x01\x00\x01";
    let mut packet = vec![0xab, 0xcd, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
    packet.extend(question);
    let mut expected = vec![0xab, 0xcd, 0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0];
    expected.extend(question);
    expected.extend([0xc0, 0x0c, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 96, 0, 20]);
    assert_eq!(reply(&zone(), &packet, Transport::Udp), expected);
}
