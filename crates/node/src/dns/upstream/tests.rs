//! Forwarding over real sockets on loopback.

use std::{io, net::SocketAddr, time::Duration};

use hickory_proto::{
    op::{Message, MessageType, OpCode, Query, ResponseCode},
    rr::{Name, RecordType},
};
use tokio::{net::UdpSocket, time::Instant};

use super::{Nameserver, Upstream, UpstreamConfig};
use crate::dns::{
    DnsError,
    message::Transport,
    tests::resolver::{ADDRESS, Behaviour, Resolver},
};

fn upstream(servers: &[SocketAddr], timeout: Duration, deadline: Duration) -> Upstream {
    let servers = servers.iter().copied().map(Nameserver::from).collect();
    let config = UpstreamConfig {
        timeout,
        deadline,
        ..UpstreamConfig::new(servers)
    };
    Upstream::start(config, || Ok(())).unwrap()
}

/// Where timing does not matter.
fn patient(servers: &[SocketAddr]) -> Upstream {
    upstream(servers, Duration::from_secs(5), Duration::from_secs(10))
}

fn query() -> Vec<u8> {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    let name = Name::from_ascii("ExAmple.org.").unwrap();
    message.add_query(Query::query(name, RecordType::A));
    message.to_vec().unwrap()
}

async fn ask(upstream: &Upstream, transport: Transport) -> Option<Message> {
    let answer = upstream.ask(query(), transport).await?;
    let answer = Message::from_vec(&answer).unwrap();
    assert_eq!(answer.metadata.id, 4711);
    assert_eq!(answer.queries[0].name.to_ascii(), "ExAmple.org.");
    Some(answer)
}

fn assert_good(answer: Option<Message>) {
    let answer = answer.expect("an answer");
    assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
    assert_eq!(answer.answers[0].data.to_string(), ADDRESS.to_string());
}

#[tokio::test]
async fn answers_come_back_with_the_askers_id() {
    let resolver = Resolver::start(Behaviour::Answers).await;
    let upstream = patient(&[resolver.address]);
    assert_good(ask(&upstream, Transport::Udp).await);
    assert_good(ask(&upstream, Transport::Tcp).await);
    assert_eq!(resolver.queries(), 2);
}

#[tokio::test]
async fn many_queries_at_once_are_all_answered() {
    let resolver = Resolver::start(Behaviour::Answers).await;
    let upstream = patient(&[resolver.address]);
    let queries = (0..500).map(|_| ask(&upstream, Transport::Udp));
    for answer in futures::future::join_all(queries).await {
        assert_good(answer);
    }
}

#[tokio::test]
async fn unknown_names_are_passed_on() {
    let resolver = Resolver::start(Behaviour::Fails(ResponseCode::NXDomain)).await;
    let other = Resolver::start(Behaviour::Answers).await;
    let upstream = patient(&[resolver.address, other.address]);
    let answer = ask(&upstream, Transport::Udp).await.unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(other.queries(), 0);
}

#[tokio::test]
async fn the_next_server_is_asked_if_one_fails_refuses_or_is_not_there() {
    let good = Resolver::start(Behaviour::Answers).await;
    for code in [
        ResponseCode::ServFail,
        ResponseCode::Refused,
        ResponseCode::NotImp,
    ] {
        let bad = Resolver::start(Behaviour::Fails(code)).await;
        assert_good(ask(&patient(&[bad.address, good.address]), Transport::Udp).await);
    }
    let closed = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = closed.local_addr().unwrap();
    drop(closed);
    let started = Instant::now();
    assert_good(ask(&patient(&[address, good.address]), Transport::Udp).await);
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "{:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn the_next_server_is_asked_if_one_is_silent() {
    let silent = Resolver::start(Behaviour::Silent).await;
    let good = Resolver::start(Behaviour::Answers).await;
    let servers = [silent.address, good.address];
    let upstream = upstream(&servers, Duration::from_millis(50), Duration::from_secs(10));
    assert_good(ask(&upstream, Transport::Udp).await);
    assert_eq!(silent.queries(), 1);
}

#[tokio::test]
async fn a_failure_of_all_servers_is_passed_on() {
    let bad = Resolver::start(Behaviour::Fails(ResponseCode::ServFail)).await;
    let answer = ask(&patient(&[bad.address]), Transport::Udp).await.unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(bad.queries(), 2, "asked in each of two rounds");
}

#[tokio::test]
async fn silence_ends_with_the_deadline() {
    let silent = Resolver::start(Behaviour::Silent).await;
    let deadline = Duration::from_millis(200);
    let upstream = upstream(&[silent.address], Duration::from_secs(5), deadline);
    let started = Instant::now();
    assert!(ask(&upstream, Transport::Udp).await.is_none());
    assert!(started.elapsed() >= deadline);
    assert!(
        ask(&patient(&[]), Transport::Udp).await.is_none(),
        "no servers"
    );
}

#[tokio::test]
async fn made_up_answers_are_not_believed() {
    let liar = Resolver::start(Behaviour::LiesFirst).await;
    assert_good(ask(&patient(&[liar.address]), Transport::Udp).await);
}

#[tokio::test]
async fn a_cut_answer_is_passed_on_over_udp_and_asked_for_again_over_tcp() {
    let resolver = Resolver::start(Behaviour::Truncates).await;
    let upstream = patient(&[resolver.address]);
    let answer = ask(&upstream, Transport::Udp).await.unwrap();
    assert!(answer.metadata.truncation && answer.answers.is_empty());
    assert_good(ask(&upstream, Transport::Tcp).await);
}

#[tokio::test]
async fn every_query_has_a_port_and_an_id_of_its_own() {
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let upstream = patient(&[server.local_addr().unwrap()]);
    let mut seen = std::collections::HashSet::new();
    for _ in 0..8 {
        let asked = tokio::spawn({
            let upstream = upstream.clone();
            async move { upstream.ask(query(), Transport::Udp).await }
        });
        let mut buffer = [0; 512];
        let (length, client) = server.recv_from(&mut buffer).await.unwrap();
        seen.insert((client.port(), buffer[0], buffer[1]));
        let mut answer = buffer[..length].to_vec();
        answer[2] |= 0x80;
        server.send_to(&answer, client).await.unwrap();
        assert!(asked.await.unwrap().is_some());
    }
    // Two equal pairs among eight are a matter of one in 10^8.
    assert_eq!(seen.len(), 8);
}

#[test]
fn a_namespace_that_cannot_be_entered_is_an_error() {
    let enter = || Err(io::Error::from(nix::errno::Errno::EPERM));
    let error = Upstream::start(UpstreamConfig::new(Vec::new()), enter).unwrap_err();
    assert!(matches!(error, DnsError::Upstream { .. }));
    assert!(error.to_string().contains("not permitted"), "{error}");
}
