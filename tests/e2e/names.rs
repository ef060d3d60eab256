//! Names: services in every form, replicas, SRV; what is elsewhere, what does not exist, who does not answer.

mod upstream;

use std::collections::BTreeSet;

use crate::harness::{
    AT_ONCE, Mesh,
    objects::{client, namespace, server, service, service_for},
};
use upstream::Upstream;

const NXDOMAIN: u8 = 3;
const SERVFAIL: u8 = 2;
/// Programs give up after 5 seconds as a rule: the answer must be there before.
const SILENCE: f64 = 5000.0;

#[test]
fn names_lead_to_what_they_name() {
    let upstream = Upstream::start();
    let objects = [
        namespace("shop"),
        namespace("other"),
        client("shop/client", ""),
        server("shop/web", &[8000], "  replicas: 2\n"),
        service("shop/web", &[(80, 8000)]),
        service_for("shop/each", "web", &[(80, 8000)], "  clusterIP: None\n"),
        server("other/api", &[8000], ""),
        service("other/api", &[(80, 8000)]),
    ]
    .concat();
    let mesh = Mesh::start_with(
        "names",
        &[("objects.yaml", &objects)],
        &["--dns-upstream", &upstream.address()],
    );
    services_have_all_their_forms(&mesh);
    replicas_have_names(&mesh);
    ports_have_names(&mesh);
    every_name_server_is_the_meshs(&mesh);
    what_does_not_exist_is_said_at_once(&mesh);
    names_elsewhere_go_upstream(&mesh);
}

fn services_have_all_their_forms(mesh: &Mesh) {
    let full = mesh
        .resolve("client", "web.shop.svc.cluster.local")
        .addresses;
    assert_eq!(full.len(), 2, "one IPv4 and one IPv6 address: {full:?}");
    for name in ["web", "web.shop", "web.shop.svc", "WEB.Shop"] {
        assert_eq!(mesh.resolve("client", name).addresses, full, "{name}");
    }
    for name in ["web", "web.shop", "web.shop.svc.cluster.local"] {
        mesh.connect("client", name, 80).greeting();
    }
    // Another namespace's services have their namespace in their name.
    mesh.connect("client", "api.other", 80).greeting();
    assert!(mesh.resolve("client", "api").error.is_some());
    mesh.connect("other/api", "web.shop", 80).greeting();
}

fn replicas_have_names(mesh: &Mesh) {
    let addresses = ["shop/web-0", "shop/web-1"].map(|uid| mesh.addresses(uid));
    for (family, kind) in ["A", "AAAA"].into_iter().enumerate() {
        let expected: BTreeSet<String> = addresses
            .iter()
            .map(|pair| pair[family].to_string())
            .collect();
        let answer = mesh.dns("client", "udp", "each.shop.svc.cluster.local", kind);
        assert_eq!(BTreeSet::from_iter(answer.records), expected);
        let name = "web-1.each.shop.svc.cluster.local";
        let answer = mesh.dns("client", "udp", name, kind);
        assert_eq!(answer.records, [addresses[1][family].to_string()]);
    }
    let greeting = mesh.connect("client", "web-1.each", 8000);
    assert_eq!(greeting.greeting().pod, "web-1");
}

fn ports_have_names(mesh: &Mesh) {
    for transport in ["udp", "tcp"] {
        let name = "_port-80._tcp.web.shop.svc.cluster.local";
        let answer = mesh.dns("client", transport, name, "SRV");
        assert_eq!(answer.records, ["80 web.shop.svc.cluster.local"]);
        // Behind a headless service are the replicas with their own ports.
        let name = "_port-80._tcp.each.shop.svc.cluster.local";
        let answer = mesh.dns("client", transport, name, "SRV");
        let expected =
            ["web-0", "web-1"].map(|pod| format!("8000 {pod}.each.shop.svc.cluster.local"));
        assert_eq!(answer.records, expected);
    }
    let name = "_port-81._tcp.web.shop.svc.cluster.local";
    assert_eq!(mesh.dns("client", "udp", name, "SRV").rcode, NXDOMAIN);
}

/// Some programs have a name server of their own; the mesh's names are right for them too.
fn every_name_server_is_the_meshs(mesh: &Mesh) {
    let name = "web.shop.svc.cluster.local";
    let expected = mesh.dns("client", "udp", name, "A").records;
    assert_eq!(expected.len(), 1);
    let answer = mesh.dns_at("client", "192.0.2.53", name, "A");
    assert_eq!(answer.records, expected);
}

fn what_does_not_exist_is_said_at_once(mesh: &Mesh) {
    for name in [
        "nobody.shop.svc.cluster.local",
        "web.nowhere.svc.cluster.local",
    ] {
        for transport in ["udp", "tcp"] {
            let answer = mesh.dns("client", transport, name, "A");
            assert_eq!(answer.rcode, NXDOMAIN, "{name}");
            assert!(answer.milliseconds < AT_ONCE, "{name}: {answer:?}");
        }
    }
    let resolved = mesh.resolve("client", "nobody");
    assert!(resolved.error.is_some(), "{resolved:?}");
    assert!(resolved.milliseconds < AT_ONCE, "{resolved:?}");
    // A name without the kind of record that was asked for exists all the same.
    let answer = mesh.dns("client", "udp", "web.shop.svc.cluster.local", "PTR");
    assert_eq!((answer.rcode, answer.records.len()), (0, 0));
}

fn names_elsewhere_go_upstream(mesh: &Mesh) {
    let answer = mesh.dns("client", "udp", upstream::KNOWN, "A");
    assert_eq!(answer.records, [upstream::KNOWN_ADDRESS.to_string()]);
    let resolved = mesh.resolve("client", upstream::KNOWN);
    assert_eq!(resolved.addresses, [upstream::KNOWN_ADDRESS.to_string()]);
    let answer = mesh.dns("client", "udp", "unknown.example", "A");
    assert_eq!(answer.rcode, NXDOMAIN);
    let answer = mesh.dns("client", "udp", upstream::SILENT, "A");
    assert_eq!(answer.rcode, SERVFAIL);
    assert!(answer.milliseconds < SILENCE, "{answer:?}");
}
