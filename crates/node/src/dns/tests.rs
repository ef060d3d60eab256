//! Tests of the DNS server as a whole, and what they share: a mesh with a few names, and a resolver to forward to.
//!
//! [`names`] asks without sockets, [`packets`] about size limits and nonsense, [`served`] over real sockets.

mod names;
mod packets;
pub(super) mod resolver;
mod served;

use std::net::IpAddr;

use api::{mesh::MeshConfig, pod::Protocol};
use hickory_proto::{
    op::{Message, MessageType, OpCode, Query},
    rr::{Name, RData, Record, RecordType},
};

use super::{
    DnsEndpoint, DnsMembership, DnsPort, DnsService, Zone,
    message::{Transport, Verdict, handle},
};

/// The namespace of who asks.
const NAMESPACE: &str = "shop";

fn service(name: &str, vips: &[&str]) -> DnsService {
    DnsService {
        namespace: NAMESPACE.into(),
        name: name.into(),
        hostname: format!("{name}.{NAMESPACE}.svc.cluster.local"),
        vips: vips.iter().map(|vip| ip(vip)).collect(),
        headless: vips.is_empty(),
        ports: vec![
            port("http", 80, Protocol::Tcp),
            port("dns", 53, Protocol::Udp),
        ],
        publish_not_ready: false,
    }
}

fn port(name: &str, port: u16, protocol: Protocol) -> DnsPort {
    DnsPort {
        name: Some(name.into()),
        port,
        protocol,
    }
}

fn endpoint(hostname: &str, addresses: &[&str], services: &[&str]) -> DnsEndpoint {
    let membership = |service: &&str| DnsMembership {
        namespace: NAMESPACE.into(),
        service: (*service).into(),
        target_ports: vec![(80, 8080)],
    };
    DnsEndpoint {
        uid: format!("{NAMESPACE}/{hostname}"),
        namespace: NAMESPACE.into(),
        hostname: hostname.into(),
        addresses: addresses.iter().map(|address| ip(address)).collect(),
        ready: true,
        services: services.iter().map(membership).collect(),
    }
}

/// Services `api` (two families), `redis` (IPv4), `db` (headless: `db-0` ready, `db-1` not), `gossip` (headless,
/// both published), `partner` (another host name), and `api` of namespace `other`.
fn zone() -> Zone {
    let mut zone = Zone::new(&MeshConfig::default()).unwrap();
    zone.upsert_endpoint(endpoint(
        "db-0",
        &["10.244.0.5", "fd10:244::5"],
        &["db", "gossip"],
    ));
    zone.upsert_endpoint(DnsEndpoint {
        ready: false,
        ..endpoint("db-1", &["10.244.0.6"], &["db", "gossip"])
    });
    zone.upsert_endpoint(endpoint("client-0", &["10.244.0.9", "fd10:244::9"], &[]));
    zone.upsert_endpoint(endpoint("api-0", &["10.244.0.7"], &["api"]));
    zone.upsert_service(service("api", &["10.96.0.20", "fd10:96::20"]));
    zone.upsert_service(service("redis", &["10.96.0.21"]));
    zone.upsert_service(service("db", &[]));
    zone.upsert_service(DnsService {
        publish_not_ready: true,
        ..service("gossip", &[])
    });
    zone.upsert_service(DnsService {
        hostname: "Api.Partner.example".into(),
        ..service("partner", &["10.96.0.22"])
    });
    zone.upsert_service(DnsService {
        namespace: "other".into(),
        hostname: "api.other.svc.cluster.local".into(),
        ..service("api", &["10.96.0.30"])
    });
    zone
}

fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::new(4711, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    let name = Name::from_ascii(name).unwrap();
    let name = name.append_domain(&Name::root()).unwrap();
    message.add_query(Query::query(name, kind));
    message
}

/// The answer, `None` if the query would be forwarded.
fn ask_zone(zone: &Zone, name: &str, kind: RecordType) -> Option<Message> {
    let packet = query(name, kind).to_vec().unwrap();
    match handle(&packet, Transport::Udp, zone, NAMESPACE) {
        Verdict::Forward => None,
        Verdict::Reply(bytes, _) => Some(Message::from_vec(&bytes).unwrap()),
        Verdict::Drop => panic!("{name} {kind} was dropped"),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// What records say, without owner and TTL, in order.
fn data(records: &[Record]) -> Vec<String> {
    let mut data: Vec<_> = records.iter().map(|record| text(&record.data)).collect();
    data.sort();
    data
}

fn text(data: &RData) -> String {
    match data {
        RData::SRV(srv) => format!("{} {}", srv.target, srv.port),
        RData::PTR(name) => name.0.to_string(),
        other => other.to_string(),
    }
}
