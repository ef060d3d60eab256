//! Who may call whom: the L4 fields of AuthorizationPolicy, edited while everything runs.
//!
//! `explain`, the program's own errno and the flow record must always agree.

use std::net::IpAddr;

use api::report::{FlowEventKind, Verdict};

use crate::harness::{
    Mesh,
    objects::{allow, client, namespace, policy, principal, server, service, spiffe_id},
};

const FILE: &str = "policy.yaml";
/// Port 80 of the service is 8000 of the workload, 90 is 9000; policies speak of the workload's.
const PORTS: [(u16, u16); 2] = [(80, 8000), (90, 9000)];

/// Whether a client gets through to port 80 and to port 90, and why.
type Row<'a> = (&'a str, [(bool, &'a str); 2]);

const FREE: (bool, &str) = (true, "no-policy");
const ALLOWED: (bool, &str) = (true, "policy-allow");
const UNMATCHED: (bool, &str) = (false, "no-allow-matched");
const DENIED: (bool, &str) = (false, "policy-deny");

#[test]
fn policies_decide_and_edits_bite() {
    let objects = [
        namespace("shop"),
        namespace("other"),
        client("shop/alice", ""),
        client("shop/bob", ""),
        client("other/carol", ""),
        server("shop/web", &PORTS.map(|(_, target)| target), ""),
        service("shop/web", &PORTS),
        server("shop/steady", &[8000], ""),
        service("shop/steady", &[(80, 8000)]),
        policy("shop/steady", "steady", &allow(&["other/carol"])),
    ]
    .concat();
    let mesh = Mesh::start("policy", &[("objects.yaml", &objects), (FILE, "")]);
    // Who is allowed all the time notices nothing of what goes on.
    let steady = mesh.virtual_address("other/carol", "steady.shop");
    let steady = mesh.request_loop("other/carol", &steady, 80);
    principals_and_namespaces(&mesh);
    ports(&mesh);
    denials_win(&mesh);
    addresses(&mesh);
    nobody_at_all(&mesh);
    every_refusal_is_recorded(&mesh);
    edits_do_not_hurt_who_stays_allowed(&mesh);
    replicas_addresses_are_under_the_same_policy(&mesh);
    steady.finish().all_succeeded();
}

fn principals_and_namespaces(mesh: &Mesh) {
    check(
        mesh,
        "",
        &[("alice", [FREE, FREE]), ("other/carol", [FREE, FREE])],
    );
    check(
        mesh,
        &policy("shop/only", "web", &allow(&["shop/alice"])),
        &[
            ("alice", [ALLOWED, ALLOWED]),
            ("bob", [UNMATCHED, UNMATCHED]),
            ("other/carol", [UNMATCHED, UNMATCHED]),
        ],
    );
    check(
        mesh,
        &policy(
            "shop/only",
            "web",
            "  rules:\n  - from:\n    - source: {namespaces: [\"oth*\"]}\n",
        ),
        &[
            ("alice", [UNMATCHED, UNMATCHED]),
            ("other/carol", [ALLOWED, ALLOWED]),
        ],
    );
    // Two policies allow what either allows.
    let two = [
        policy("shop/only", "web", &allow(&["shop/alice"])),
        policy("shop/more", "web", &allow(&["shop/bob"])),
    ];
    check(
        mesh,
        &two.concat(),
        &[
            ("alice", [ALLOWED, ALLOWED]),
            ("bob", [ALLOWED, ALLOWED]),
            ("other/carol", [UNMATCHED, UNMATCHED]),
        ],
    );
}

fn ports(mesh: &Mesh) {
    check(
        mesh,
        &policy(
            "shop/only",
            "web",
            "  rules:\n  - to:\n    - operation: {ports: [\"8000\"]}\n",
        ),
        &[
            ("alice", [ALLOWED, UNMATCHED]),
            ("other/carol", [ALLOWED, UNMATCHED]),
        ],
    );
    check(
        mesh,
        &policy(
            "shop/only",
            "web",
            &format!(
                "  rules:\n  - from:\n    - source: {{principals: [{}]}}\n    to:\n    - operation: {{notPorts: [\"8000\"]}}\n",
                principal("shop/bob")
            ),
        ),
        &[
            ("alice", [UNMATCHED, UNMATCHED]),
            ("bob", [UNMATCHED, ALLOWED]),
        ],
    );
}

fn denials_win(mesh: &Mesh) {
    let both = [
        policy("shop/everybody", "web", "  rules:\n  - {}\n"),
        policy(
            "shop/not-bob",
            "web",
            &format!(
                "  action: DENY\n  rules:\n  - from:\n    - source: {{principals: [{}]}}\n    to:\n    - operation: {{ports: [\"9000\"]}}\n",
                principal("shop/bob")
            ),
        ),
    ];
    check(
        mesh,
        &both.concat(),
        &[("alice", [ALLOWED, ALLOWED]), ("bob", [ALLOWED, DENIED])],
    );
    // Without a policy that allows, what is not denied is free.
    check(
        mesh,
        &both[1],
        &[("alice", [FREE, FREE]), ("bob", [FREE, DENIED])],
    );
}

fn addresses(mesh: &Mesh) {
    let own: Vec<String> = mesh.addresses("shop/alice-0").map(whole).into();
    let own = own.join(", ");
    check(
        mesh,
        &policy(
            "shop/only",
            "web",
            &format!("  rules:\n  - from:\n    - source: {{ipBlocks: [{own}]}}\n"),
        ),
        &[
            ("alice", [ALLOWED, ALLOWED]),
            ("bob", [UNMATCHED, UNMATCHED]),
        ],
    );
    check(
        mesh,
        &policy(
            "shop/only",
            "web",
            &format!("  action: DENY\n  rules:\n  - from:\n    - source: {{ipBlocks: [{own}]}}\n"),
        ),
        &[("alice", [DENIED, DENIED]), ("bob", [FREE, FREE])],
    );
}

/// An address as the smallest of networks.
fn whole(address: IpAddr) -> String {
    let bits = if address.is_ipv4() { 32 } else { 128 };
    format!("\"{address}/{bits}\"")
}

fn nobody_at_all(mesh: &Mesh) {
    check(
        mesh,
        &policy("shop/nobody", "web", "  action: ALLOW\n"),
        &[
            ("alice", [UNMATCHED, UNMATCHED]),
            ("other/carol", [UNMATCHED, UNMATCHED]),
        ],
    );
    check(
        mesh,
        "",
        &[("alice", [FREE, FREE]), ("other/carol", [FREE, FREE])],
    );
}

/// One record per try, with both identities, the policy and the reason.
fn every_refusal_is_recorded(mesh: &Mesh) {
    let text = policy("shop/recorded", "web", &allow(&["shop/alice"]));
    mesh.write(FILE, &text);
    mesh.until_explained("bob", "web:80", UNMATCHED.1);
    let filter = [
        "--from",
        "shop/bob",
        "--to",
        "shop/web",
        "--verdict",
        "denied",
    ];
    let is_ours = |policy: &Option<String>| policy.as_deref() == Some("shop/recorded");
    let before = mesh
        .flows(&filter)
        .iter()
        .filter(|flow| is_ours(&flow.policy))
        .count();
    assert_eq!(before, 0);
    for family in ["4", "6"] {
        mesh.attempts("bob", family, "web", 80, 1)
            .remove(0)
            .failed("ECONNREFUSED");
    }
    let own = mesh.addresses("shop/web-0");
    for address in own {
        let flow = mesh.until_flow("the refusal is recorded", &filter, |flow| {
            is_ours(&flow.policy) && flow.destination.address == Some(address)
        });
        assert_eq!(flow.event, FlowEventKind::Refused, "{flow:#?}");
        assert_eq!(flow.verdict, Verdict::Denied, "{flow:#?}");
        assert_eq!(flow.reason, UNMATCHED.1, "{flow:#?}");
        assert_eq!(flow.source.identity, spiffe_id("shop/bob"), "{flow:#?}");
        assert_eq!(
            flow.destination.identity,
            spiffe_id("shop/web"),
            "{flow:#?}"
        );
        assert_eq!(flow.destination.port, 8000, "{flow:#?}");
        assert_eq!(flow.service.as_deref(), Some("shop/web"), "{flow:#?}");
    }
    let after = mesh.flows(&filter);
    let ours = after.iter().filter(|flow| is_ours(&flow.policy));
    assert_eq!(ours.count(), 2, "one record per try: {after:#?}");

    // And of what was allowed: opened, then closed with its figures.
    mesh.connect("alice", "web", 80).greeting();
    let filter = [
        "--from",
        "shop/alice",
        "--to",
        "shop/web",
        "--verdict",
        "allowed",
    ];
    let closed = mesh.until_flow("the connection is recorded", &filter, |flow| {
        is_ours(&flow.policy) && flow.event == FlowEventKind::Closed
    });
    assert_eq!(closed.reason, ALLOWED.1, "{closed:#?}");
    assert_eq!(closed.path, "direct", "{closed:#?}");
    // "ping\n", without the SYN and the FIN that TCP counts as a byte each (RFC 9293, 3.4).
    assert_eq!(closed.bytes_sent, 5, "{closed:#?}");
    assert!(
        closed.bytes_received > 40 && closed.rtt_us > 0,
        "{closed:#?}"
    );
}

/// Whoever is allowed before and after an edit is allowed in between, too.
fn edits_do_not_hurt_who_stays_allowed(mesh: &Mesh) {
    let [narrow, wide] = [&["shop/alice"][..], &["shop/alice", "shop/bob"]]
        .map(|accounts| policy("shop/edited", "web", &allow(accounts)));
    mesh.write(FILE, &narrow);
    mesh.until_explained("bob", "web:80", UNMATCHED.1);
    let address = mesh.virtual_address("alice", "web");
    let alice = mesh.request_loop("alice", &address, 80);
    for _ in 0..5 {
        mesh.write(FILE, &wide);
        mesh.until_explained("bob", "web:80", ALLOWED.1);
        mesh.connect("bob", &address, 80).greeting();
        mesh.write(FILE, &narrow);
        mesh.until_explained("bob", "web:80", UNMATCHED.1);
        mesh.connect("bob", &address, 80).failed("ECONNREFUSED");
    }
    alice.finish().all_succeeded();
}

/// There is no way around a service's policy past its virtual address.
fn replicas_addresses_are_under_the_same_policy(mesh: &Mesh) {
    for address in mesh.addresses("shop/web-0") {
        let address = address.to_string();
        mesh.connect("alice", &address, 8000).greeting();
        mesh.connect("bob", &address, 8000).failed("ECONNREFUSED");
        let answer = mesh.explain("bob", &format!("[{address}]:8000"));
        assert_eq!(answer.reason, UNMATCHED.1, "{answer:#?}");
    }
}

/// Puts policies in force, and compares for every client what is explained with what happens.
fn check(mesh: &Mesh, policies: &str, rows: &[Row<'_>]) {
    mesh.write(FILE, policies);
    for (client, ports) in rows {
        for ((port, _), (allowed, reason)) in PORTS.into_iter().zip(ports) {
            let answer = mesh.until_explained(client, &format!("web.shop:{port}"), reason);
            let names_policy = answer.endpoints[0].policy.is_some();
            assert_eq!(names_policy, *reason != FREE.1, "{answer:#?}");
            for attempt in [
                mesh.attempts(client, "4", "web.shop", port, 1).remove(0),
                mesh.attempts(client, "6", "web.shop", port, 1).remove(0),
            ] {
                if *allowed {
                    attempt.greeting();
                    assert_eq!(answer.outcome, "connected");
                } else {
                    attempt.failed("ECONNREFUSED");
                    assert_eq!(answer.outcome, "ECONNREFUSED");
                }
            }
        }
    }
}
