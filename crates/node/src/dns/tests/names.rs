//! Which names are answered how.

use hickory_proto::{
    op::ResponseCode,
    rr::RecordType::{self, A, AAAA, ANY, AXFR, MX, PTR, SOA, SRV},
};

use super::{NAMESPACE, ask_zone, data, endpoint, ip, service, zone};
use crate::dns::{DnsEndpoint, Zone};

/// The answers to a question that has some, without additional records.
fn answers(zone: &Zone, name: &str, kind: RecordType) -> Vec<String> {
    let answer = ask_zone(zone, name, kind).unwrap_or_else(|| panic!("{name} is forwarded"));
    let header = answer.metadata;
    assert_eq!(header.response_code, ResponseCode::NoError, "{name}");
    assert!(header.authoritative && header.recursion_available, "{name}");
    assert!(header.recursion_desired && !header.truncation, "{name}");
    assert!(
        answer.answers.iter().all(|record| record.ttl == 5),
        "{name}"
    );
    data(&answer.answers)
}

/// Asserts a negative answer that may be cached for 5 seconds.
fn assert_negative(zone: &Zone, name: &str, kind: RecordType, code: ResponseCode) {
    let answer = ask_zone(zone, name, kind).unwrap_or_else(|| panic!("{name} is forwarded"));
    assert_eq!(answer.metadata.response_code, code, "{name} {kind}");
    assert!(
        answer.metadata.authoritative && answer.answers.is_empty(),
        "{name} {kind}"
    );
    let [authority] = answer.authorities.as_slice() else {
        panic!("{name} {kind} has no SOA: {answer}");
    };
    assert_eq!((authority.record_type(), authority.ttl), (SOA, 5));
    assert!(authority.name.zone_of(&answer.queries[0].name), "{answer}");
}

fn assert_empty(zone: &Zone, name: &str, kind: RecordType) {
    assert_negative(zone, name, kind, ResponseCode::NoError);
}

fn assert_unknown(zone: &Zone, name: &str) {
    for kind in [A, AAAA, SRV] {
        assert_negative(zone, name, kind, ResponseCode::NXDomain);
    }
}

fn assert_forwarded(zone: &Zone, name: &str) {
    assert!(ask_zone(zone, name, A).is_none(), "{name} is answered");
}

#[test]
fn a_service_has_its_virtual_addresses_under_every_form_of_its_name() {
    let zone = zone();
    for name in [
        "api",
        "api.shop",
        "api.shop.svc",
        "api.shop.svc.cluster.local",
        "API.Shop.SVC.cluster.LOCAL",
    ] {
        assert_eq!(answers(&zone, name, A), ["10.96.0.20"], "{name}");
        assert_eq!(answers(&zone, name, AAAA), ["fd10:96::20"], "{name}");
    }
    assert_eq!(answers(&zone, "api.other", A), ["10.96.0.30"]);
    assert_eq!(
        answers(&zone, "api.other.svc.cluster.local", A),
        ["10.96.0.30"]
    );
}

#[test]
fn the_question_is_repeated_in_the_case_in_which_it_was_asked() {
    let answer = ask_zone(&zone(), "aPi.SHOP.svc.Cluster.local", A).unwrap();
    assert_eq!(
        answer.queries[0].name.to_ascii(),
        "aPi.SHOP.svc.Cluster.local."
    );
    assert_eq!(
        answer.answers[0].name.to_ascii(),
        "aPi.SHOP.svc.Cluster.local."
    );
}

#[test]
fn a_name_without_the_type_asked_for_exists_nevertheless() {
    let zone = zone();
    for name in ["redis", "redis.shop", "redis.shop.svc.cluster.local"] {
        assert_empty(&zone, name, AAAA);
        assert_empty(&zone, name, MX);
    }
    for name in [
        "cluster.local",
        "svc.cluster.local",
        "shop.svc.cluster.local",
        "_tcp.api.shop.svc.cluster.local",
    ] {
        assert_empty(&zone, name, A);
    }
    assert_eq!(answers(&zone, "cluster.local", SOA).len(), 1);
}

#[test]
fn names_below_the_cluster_domain_are_never_forwarded() {
    let zone = zone();
    for name in [
        "nothing.shop.svc.cluster.local",
        "api.nowhere.svc.cluster.local",
        "nowhere.svc.cluster.local",
        "example.org.cluster.local",
        "example.org.svc.cluster.local",
        "api.shop.svc.cluster.local.default.svc.cluster.local",
        "a\\.b.shop.svc.cluster.local",
        "x.y.z.api.shop.svc.cluster.local",
    ] {
        assert_unknown(&zone, name);
    }
}

#[test]
fn other_names_are_forwarded() {
    let zone = zone();
    for name in [
        ".",
        "nothing",
        "nothing.shop",
        "api.nowhere",
        "example.org",
        "www.example.org",
        "svc",
        "nothing.shop.svc",
        "xcluster.local",
        "local",
        "1.1.1.1.in-addr.arpa",
        "10.in-addr.arpa",
        "api\\.shop",
    ] {
        assert_forwarded(&zone, name);
    }
}

#[test]
fn a_headless_service_has_the_addresses_of_its_ready_endpoints() {
    let zone = zone();
    assert_eq!(answers(&zone, "db", A), ["10.244.0.5"]);
    assert_eq!(
        answers(&zone, "db.shop.svc.cluster.local", AAAA),
        ["fd10:244::5"]
    );
    assert_eq!(answers(&zone, "gossip", A), ["10.244.0.5", "10.244.0.6"]);
}

#[test]
fn endpoints_of_a_headless_service_come_in_any_order() {
    let zone = zone();
    let mut first = std::collections::HashSet::new();
    for _ in 0..200 {
        let answer = ask_zone(&zone, "gossip", A).unwrap();
        first.insert(answer.answers[0].data.to_string());
    }
    assert_eq!(first.len(), 2);
}

#[test]
fn a_pod_has_a_name_in_each_service() {
    let zone = zone();
    for name in [
        "db-0.db.shop.svc.cluster.local",
        "db-0.db.shop.svc",
        "db-0.gossip.shop.svc.cluster.local",
    ] {
        assert_eq!(answers(&zone, name, A), ["10.244.0.5"], "{name}");
        assert_eq!(answers(&zone, name, AAAA), ["fd10:244::5"], "{name}");
    }
    assert_eq!(
        answers(&zone, "db-1.gossip.shop.svc.cluster.local", A),
        ["10.244.0.6"]
    );
    assert_empty(&zone, "db-1.gossip.shop.svc.cluster.local", AAAA);
    assert_unknown(&zone, "db-1.db.shop.svc.cluster.local");
    assert_unknown(&zone, "db-0.api.shop.svc.cluster.local");
    assert_eq!(
        answers(&zone, "10-244-0-9.shop.pod.cluster.local", A),
        ["10.244.0.9"]
    );
    assert_eq!(
        answers(&zone, "fd10-244--9.shop.pod.cluster.local", AAAA),
        ["fd10:244::9"]
    );
    assert_unknown(&zone, "10-244-0-9.other.pod.cluster.local");
    assert_unknown(&zone, "10-244-0-99.shop.pod.cluster.local");
}

#[test]
fn ports_have_service_records() {
    let zone = zone();
    for name in [
        "_http._tcp.api",
        "_http._tcp.api.shop",
        "_http._tcp.api.shop.svc",
        "_HTTP._TCP.api.shop.svc.cluster.local",
    ] {
        assert_eq!(
            answers(&zone, name, SRV),
            ["api.shop.svc.cluster.local. 80"],
            "{name}"
        );
    }
    let name = "_dns._udp.api.shop.svc.cluster.local";
    let answer = ask_zone(&zone, name, SRV).unwrap();
    assert_eq!(data(&answer.answers), ["api.shop.svc.cluster.local. 53"]);
    assert_eq!(data(&answer.additionals), ["10.96.0.20", "fd10:96::20"]);
    assert_empty(&zone, name, A);
    assert_unknown(&zone, "_http._udp.api.shop.svc.cluster.local");
    assert_unknown(&zone, "_none._tcp.api.shop.svc.cluster.local");
    assert_eq!(answers(&zone, "api.shop.svc.cluster.local", SRV).len(), 2);
}

#[test]
fn service_records_of_a_headless_service_lead_to_the_endpoints_own_ports() {
    let zone = zone();
    let answer = ask_zone(&zone, "_http._tcp.gossip.shop.svc.cluster.local", SRV).unwrap();
    assert_eq!(
        data(&answer.answers),
        [
            "db-0.gossip.shop.svc.cluster.local. 8080",
            "db-1.gossip.shop.svc.cluster.local. 8080"
        ]
    );
    assert_eq!(
        data(&answer.additionals),
        ["10.244.0.5", "10.244.0.6", "fd10:244::5"]
    );
    // No target port is known for this one: the service's own.
    assert_eq!(
        answers(&zone, "_dns._udp.db.shop.svc.cluster.local", SRV),
        ["db-0.db.shop.svc.cluster.local. 53"]
    );
}

#[test]
fn addresses_have_names() {
    let zone = zone();
    let reverse = |address: &str| hickory_proto::rr::Name::from(ip(address)).to_ascii();
    for (address, expected) in [
        ("10.96.0.20", &["api.shop.svc.cluster.local."][..]),
        ("fd10:96::20", &["api.shop.svc.cluster.local."]),
        (
            "10.244.0.5",
            &[
                "db-0.db.shop.svc.cluster.local.",
                "db-0.gossip.shop.svc.cluster.local.",
            ],
        ),
        ("10.244.0.9", &["10-244-0-9.shop.pod.cluster.local."]),
        ("fd10:244::9", &["fd10-244--9.shop.pod.cluster.local."]),
    ] {
        assert_eq!(
            answers(&zone, &reverse(address), PTR),
            expected,
            "{address}"
        );
        assert_empty(&zone, &reverse(address), A);
    }
    for address in ["10.96.0.99", "10.244.9.9", "fd10:96::99"] {
        assert_negative(&zone, &reverse(address), PTR, ResponseCode::NXDomain);
    }
    assert_forwarded(&zone, &reverse("192.168.1.1"));
}

#[test]
fn a_service_may_have_a_host_name_of_its_own() {
    let zone = zone();
    assert_eq!(answers(&zone, "api.partner.example", A), ["10.96.0.22"]);
    assert_eq!(
        answers(&zone, "partner.shop.svc.cluster.local", A),
        ["10.96.0.22"]
    );
    assert_forwarded(&zone, "partner.example");
}

#[test]
fn any_is_answered_with_little_and_transfers_are_refused() {
    let zone = zone();
    assert_eq!(answers(&zone, "api", ANY).len(), 1);
    assert_negative(
        &zone,
        "no.shop.svc.cluster.local",
        ANY,
        ResponseCode::NXDomain,
    );
    let answer = ask_zone(&zone, "cluster.local", AXFR).unwrap();
    assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
}

#[test]
fn changes_show_in_the_new_snapshot_only() {
    let before = zone();
    let mut after = before.clone();
    after.remove_service(NAMESPACE, "redis");
    after.remove_service(NAMESPACE, "partner");
    after.remove_service("other", "api");
    after.upsert_service(service("api", &["10.96.0.77"]));
    after.upsert_endpoint(DnsEndpoint {
        ready: false,
        ..endpoint("db-0", &["10.244.0.5"], &["db"])
    });
    after.remove_endpoint("shop/db-1");
    after.remove_endpoint("shop/db-1");

    assert_unknown(&after, "redis.shop.svc.cluster.local");
    assert_forwarded(&after, "redis");
    assert_forwarded(&after, "api.partner.example");
    assert_unknown(&after, "other.svc.cluster.local");
    assert_eq!(answers(&after, "api", A), ["10.96.0.77"]);
    assert_negative(
        &after,
        "20.0.96.10.in-addr.arpa",
        PTR,
        ResponseCode::NXDomain,
    );
    assert_empty(&after, "db", A);
    assert_empty(&after, "gossip", A);
    assert_negative(
        &after,
        "6.0.244.10.in-addr.arpa",
        PTR,
        ResponseCode::NXDomain,
    );
    assert_ne!(before.serial(), after.serial());

    assert_eq!(answers(&before, "redis", A), ["10.96.0.21"]);
    assert_eq!(answers(&before, "api", A), ["10.96.0.20"]);
    assert_eq!(answers(&before, "gossip", A).len(), 2);
    assert_empty(&before, "other.svc.cluster.local", A);
}

#[test]
fn ten_thousand_services_change_one_at_a_time() {
    let mut zone = zone();
    for index in 0..10_000_u32 {
        let [_, _, high, low] = index.to_be_bytes();
        let vip = format!("10.97.{high}.{low}");
        zone.upsert_service(service(&format!("many-{index}"), &[&vip]));
    }
    let started = std::time::Instant::now();
    for index in 0..1000 {
        zone = zone.clone();
        zone.upsert_service(service(&format!("many-{index}"), &["10.98.0.1"]));
    }
    let each = started.elapsed() / 1000;
    assert!(each.as_millis() < 5, "a change took {each:?}");
    assert_eq!(answers(&zone, "many-999", A), ["10.98.0.1"]);
    assert_eq!(answers(&zone, "many-9999", A), ["10.97.39.15"]);
}

#[test]
fn a_cluster_domain_must_be_a_name() {
    let mesh = api::mesh::MeshConfig {
        cluster_domain: "not..a.domain".into(),
        ..api::mesh::MeshConfig::default()
    };
    let error = Zone::new(&mesh).unwrap_err();
    assert!(error.to_string().contains("not..a.domain"), "{error}");
}
