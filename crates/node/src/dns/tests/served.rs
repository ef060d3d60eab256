//! The server over real sockets on loopback, with a real client's queries.

use std::{net::SocketAddr, os::fd::OwnedFd, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::RecordType::{A, AAAA},
};
use telemetry::Registry;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::{sleep, timeout},
};

use super::{
    NAMESPACE, data, query,
    resolver::{ADDRESS, Behaviour, Resolver},
    service, zone,
};
use crate::dns::{
    DnsError, DnsHandle, DnsMetrics, DnsServer, DnsSockets, Nameserver, Upstream, UpstreamConfig,
    WorkloadDns, Zone,
};

/// How long anything may take before a test has failed.
const PATIENCE: Duration = Duration::from_secs(10);

struct Served {
    address: SocketAddr,
    zone: Arc<ArcSwap<Zone>>,
    registry: Registry,
    resolver: Resolver,
    handle: DnsHandle,
}

impl Served {
    async fn start(ip: &str, behaviour: Behaviour) -> Self {
        let resolver = Resolver::start(behaviour).await;
        let config = UpstreamConfig {
            deadline: Duration::from_millis(300),
            ..UpstreamConfig::new(vec![Nameserver::from(resolver.address)])
        };
        let upstream = Upstream::start(config, || Ok(())).unwrap();
        let registry = Registry::new();
        let metrics = DnsMetrics::register(&registry).unwrap();
        let zone = Arc::new(ArcSwap::from_pointee(zone()));
        let server = DnsServer::new(Arc::clone(&zone), upstream, metrics);
        let sockets = open(ip);
        let address = sockets.udp[0].local_addr().unwrap();
        let handle = server.serve(&workload(), sockets).unwrap();
        Self {
            address,
            zone,
            registry,
            resolver,
            handle,
        }
    }

    async fn udp(&self, request: &Message) -> Message {
        let client = UdpSocket::bind((self.address.ip(), 0)).await.unwrap();
        client.connect(self.address).await.unwrap();
        client.send(&request.to_vec().unwrap()).await.unwrap();
        let mut buffer = [0; 4096];
        let received = timeout(PATIENCE, client.recv(&mut buffer)).await;
        let length = received.expect("an answer in time").unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    }

    async fn tcp(&self, requests: &[Message]) -> Vec<Message> {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        for request in requests {
            let bytes = request.to_vec().unwrap();
            stream
                .write_u16(bytes.len().try_into().unwrap())
                .await
                .unwrap();
            stream.write_all(&bytes).await.unwrap();
        }
        let mut answers = Vec::new();
        for _ in requests {
            answers.push(timeout(PATIENCE, read_answer(&mut stream)).await.unwrap());
        }
        answers
    }

    async fn wait_for_metric(&self, line: &str) {
        let found = async {
            while !self.registry.encode().lines().any(|found| found == line) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let found = timeout(PATIENCE, found).await;
        assert!(found.is_ok(), "no {line} in {}", self.registry.encode());
    }
}

async fn read_answer(stream: &mut TcpStream) -> Message {
    let length = stream.read_u16().await.unwrap();
    let mut answer = vec![0; length.into()];
    stream.read_exact(&mut answer).await.unwrap();
    Message::from_vec(&answer).unwrap()
}

fn workload() -> WorkloadDns {
    WorkloadDns {
        namespace: NAMESPACE.into(),
        workload: "frontend".into(),
    }
}

/// Sockets on a port that is free for UDP and TCP.
fn open(ip: &str) -> DnsSockets {
    let address = SocketAddr::new(ip.parse().unwrap(), 0);
    for _ in 0..100 {
        match DnsSockets::open_at([address]) {
            Ok(sockets) => return sockets,
            Err(DnsError::Bind { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    panic!("100 ports that are free for UDP are taken for TCP");
}

#[tokio::test]
async fn names_of_the_mesh_are_answered_over_udp_and_tcp() {
    for ip in ["127.0.0.1", "::1"] {
        let served = Served::start(ip, Behaviour::Silent).await;
        let answer = served.udp(&query("api", A)).await;
        assert_eq!(data(&answer.answers), ["10.96.0.20"]);
        let answers = served.tcp(&[query("api", A), query("api", AAAA)]).await;
        assert_eq!(data(&answers[0].answers), ["10.96.0.20"]);
        assert_eq!(data(&answers[1].answers), ["fd10:96::20"]);
        assert_eq!(served.resolver.queries(), 0);
        served
            .wait_for_metric(r#"heddle_dns_queries_total{outcome="answered"} 3"#)
            .await;
    }
}

#[tokio::test]
async fn other_names_are_forwarded_over_udp_and_tcp() {
    let served = Served::start("127.0.0.1", Behaviour::Truncates).await;
    let answer = served.udp(&query("example.org", A)).await;
    assert!(answer.metadata.truncation);
    let answers = served
        .tcp(&[query("example.org", A), query("api", A)])
        .await;
    assert_eq!(data(&answers[0].answers), [ADDRESS.to_string()]);
    assert_eq!(data(&answers[1].answers), ["10.96.0.20"]);
    served
        .wait_for_metric(r#"heddle_dns_queries_total{outcome="forwarded"} 2"#)
        .await;
}

#[tokio::test]
async fn a_resolver_that_is_silent_means_server_failure() {
    let served = Served::start("127.0.0.1", Behaviour::Silent).await;
    let answer = served.udp(&query("example.org", A)).await;
    assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(answer.metadata.id, 4711);
    let answers = served.tcp(&[query("example.org", A)]).await;
    assert_eq!(answers[0].metadata.response_code, ResponseCode::ServFail);
    served
        .wait_for_metric(r#"heddle_dns_queries_total{outcome="forward_failed"} 2"#)
        .await;
}

#[tokio::test]
async fn a_new_snapshot_is_used_at_once() {
    let served = Served::start("127.0.0.1", Behaviour::Silent).await;
    let mut zone = Zone::clone(&served.zone.load());
    zone.upsert_service(service("api", &["10.96.0.99"]));
    served.zone.store(Arc::new(zone));
    let answer = served.udp(&query("api", A)).await;
    assert_eq!(data(&answer.answers), ["10.96.0.99"]);
}

#[tokio::test]
async fn a_flood_is_dropped_and_names_of_the_mesh_still_answered() {
    let served = Served::start("127.0.0.1", Behaviour::Silent).await;
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let packet = query("example.org", A).to_vec().unwrap();
    for _ in 0..80 {
        client.send_to(&packet, served.address).await.unwrap();
    }
    let answer = served.udp(&query("api", A)).await;
    assert_eq!(data(&answer.answers), ["10.96.0.20"]);
    let dropped = concat!(
        r#"heddle_dns_dropped_total{what="query",source_workload="frontend","#,
        r#"source_workload_namespace="shop"} 16"#
    );
    served.wait_for_metric(dropped).await;
    let failed = r#"heddle_dns_queries_total{outcome="forward_failed"} 64"#;
    served.wait_for_metric(failed).await;
}

#[tokio::test]
async fn connections_are_bounded() {
    let served = Served::start("127.0.0.1", Behaviour::Silent).await;
    let mut connections = Vec::new();
    for _ in 0..40 {
        connections.push(TcpStream::connect(served.address).await.unwrap());
    }
    let dropped = concat!(
        r#"heddle_dns_dropped_total{what="connection",source_workload="frontend","#,
        r#"source_workload_namespace="shop"} 8"#
    );
    served.wait_for_metric(dropped).await;
    drop(connections);
    let answers = timeout(PATIENCE, async {
        loop {
            // The server learns of the closed connections in its own time.
            let mut stream = TcpStream::connect(served.address).await.unwrap();
            let bytes = query("api", A).to_vec().unwrap();
            let length: u16 = bytes.len().try_into().unwrap();
            let framed = [&length.to_be_bytes()[..], &bytes].concat();
            if stream.write_all(&framed).await.is_ok() && stream.read_u16().await.is_ok() {
                break;
            }
        }
    });
    answers.await.expect("connections are taken again");
}

#[tokio::test]
async fn nonsense_over_tcp_ends_the_connection_only() {
    let served = Served::start("127.0.0.1", Behaviour::Silent).await;
    for nonsense in [&[0xff, 0xff, 1, 2][..], &[0, 3, 1, 2, 3], &[0, 0]] {
        let mut stream = TcpStream::connect(served.address).await.unwrap();
        stream.write_all(nonsense).await.unwrap();
        let mut rest = Vec::new();
        let read = timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        // Closed, whether in order or by a reset because not all was read.
        drop(read.expect("the connection is closed"));
        assert!(rest.is_empty());
    }
    let answer = served.udp(&query("api", A)).await;
    assert_eq!(data(&answer.answers), ["10.96.0.20"]);
}

#[tokio::test]
async fn dropping_the_handle_frees_the_port() {
    let served = Served::start("127.0.0.1", Behaviour::Silent).await;
    // A query under way must not keep the socket.
    let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let packet = query("example.org", A).to_vec().unwrap();
    client.send_to(&packet, served.address).await.unwrap();
    timeout(PATIENCE, async {
        while served.resolver.queries() == 0 {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the query is forwarded");
    drop(served.handle);
    let reopened = timeout(PATIENCE, async {
        while DnsSockets::open_at([served.address]).is_err() {
            sleep(Duration::from_millis(5)).await;
        }
    });
    reopened.await.expect("the port is free again");
}

#[tokio::test]
async fn sockets_are_taken_over_from_their_descriptors() {
    let served = Served::start("127.0.0.1", Behaviour::Silent).await;
    let sockets = open("::1");
    let address = sockets.tcp[0].local_addr().unwrap();
    let (names, stored): (Vec<_>, Vec<OwnedFd>) = sockets
        .descriptors()
        .map(|(name, descriptor)| (name, descriptor.try_clone_to_owned().unwrap()))
        .unzip();
    assert_eq!(names, ["dns-udp6", "dns-tcp6"]);
    drop(sockets);
    // A client connects while nobody serves: it waits and is not refused.
    let mut waiting = TcpStream::connect(address).await.unwrap();

    let sockets = DnsSockets::from_descriptors(stored).unwrap();
    let metrics = DnsMetrics::register(&Registry::new()).unwrap();
    let upstream = Upstream::start(UpstreamConfig::new(Vec::new()), || Ok(())).unwrap();
    let server = DnsServer::new(Arc::clone(&served.zone), upstream, metrics);
    let _handle = server.serve(&workload(), sockets).unwrap();
    let bytes = query("api", AAAA).to_vec().unwrap();
    waiting
        .write_u16(bytes.len().try_into().unwrap())
        .await
        .unwrap();
    waiting.write_all(&bytes).await.unwrap();
    let answer = timeout(PATIENCE, read_answer(&mut waiting)).await.unwrap();
    assert_eq!(data(&answer.answers), ["fd10:96::20"]);
}

#[tokio::test]
async fn other_descriptors_are_refused() {
    let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let file = std::fs::File::open("/dev/null").unwrap();
    for descriptor in [OwnedFd::from(one), OwnedFd::from(file)] {
        let error = DnsSockets::from_descriptors([descriptor]).unwrap_err();
        assert!(matches!(error, DnsError::NotDns { .. }), "{error}");
    }
}
