//! Datagrams within a node: services, policy, and answers under the address that was asked.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use api::report::{FlowEventKind, FlowRecord, Verdict};
use serde::Deserialize;

use crate::harness::{
    AT_ONCE, Mesh, PATIENCE,
    objects::{allow, client, namespace, policy, server, spiffe_id},
    until,
};

const FILE: &str = "policy.yaml";
const PORT: u16 = 8000;
const REFUSED: &str = "ECONNREFUSED";
/// Longer than the agent waits for one more datagram before it says that an exchange is over.
const OVER: Duration = Duration::from_secs(30);

/// One datagram and what came of it.
#[derive(Debug, Deserialize)]
struct Exchange {
    error: Option<String>,
    milliseconds: f64,
    /// Who the answer said that it came from: address and port.
    sender: Option<(String, u16)>,
    /// What getpeername() said.
    peer: Option<String>,
    pod: Option<String>,
}

/// The answer to a line of `hold_datagrams`.
#[derive(Debug, Deserialize)]
struct Held {
    error: Option<String>,
    sender: Option<(String, u16)>,
}

fn objects() -> String {
    let deny_all = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nothing, namespace: shop}
spec: {}
";
    [
        namespace("shop"),
        client("shop/alice", ""),
        client("shop/bob", ""),
        server("shop/web", &[PORT], "  replicas: 3\n"),
        server("shop/log", &[PORT], ""),
        datagram_service("shop/web", 80, PORT),
        datagram_service("shop/log", 514, PORT),
        policy("shop/log", "log", &allow(&["shop/alice"])),
        deny_all.to_owned(),
    ]
    .concat()
}

fn datagram_service(name: &str, port: u16, target: u16) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {{app: {name}}}
  ports:
  - {{name: datagrams, port: {port}, targetPort: {target}, protocol: UDP}}
"
    )
}

fn ask(mesh: &Mesh, from: &str, how: &str, family: &str, count: u32, to: &[&str]) -> Vec<Exchange> {
    let count = count.to_string();
    let mut arguments = vec![how, family, &count];
    arguments.extend(to);
    let mut talk = mesh.talk(from, "ask_datagrams", &arguments);
    let expected = count.parse::<usize>().unwrap() * to.len() / 2;
    (0..expected).map(|_| talk.hear()).collect()
}

#[test]
fn datagrams_follow_services_and_policy() {
    let only_alice = policy("shop/web", "web", &allow(&["shop/alice"]));
    let mesh = Mesh::start(
        "datagrams",
        &[("objects.yaml", &objects()), (FILE, &only_alice)],
    );
    answers_come_from_the_service(&mesh);
    one_socket_stays_with_its_endpoint(&mesh);
    two_services_are_told_apart(&mesh);
    who_may_not_is_refused_at_once(&mesh);
    clients_take_answers_and_nothing_else(&mesh);
    a_server_may_connect_back(&mesh);
    looking_for_an_address_is_let_be(&mesh);
    too_many_peers_are_refused(&mesh);
    records_tell_of_both_directions(&mesh);
    an_edit_bites(&mesh, &only_alice);
}

/// All calls below are alice's, whom the policy allows, although nobody may call alice.
fn answers_come_from_the_service(mesh: &Mesh) {
    let found = mesh.resolve("alice", "web").addresses;
    for (family, v6) in [("4", false), ("6", true), ("mapped", false)] {
        let address = found.iter().find(|a| a.contains(':') == v6).unwrap();
        let address = match family {
            "mapped" => format!("::ffff:{address}"),
            _ => address.clone(),
        };
        for how in ["connected", "unconnected"] {
            for exchange in ask(mesh, "alice", how, family, 3, &["web", "80"]) {
                assert_eq!(exchange.error, None, "{family} {how}: {exchange:?}");
                let sender = exchange.sender.as_ref().unwrap();
                assert_eq!(sender, &(address.clone(), 80), "{family} {how}");
                let peer = (how == "connected").then(|| address.clone());
                assert_eq!(exchange.peer, peer, "{family} {how}");
            }
        }
    }
    // An endpoint's own address is as good.
    for address in mesh.addresses("shop/web-1") {
        let family = if address.is_ipv6() { "6" } else { "4" };
        let to = [&address.to_string(), "8000"];
        let exchange = ask(mesh, "alice", "unconnected", family, 1, &to).remove(0);
        assert_eq!(exchange.pod.as_deref(), Some("web-1"), "{exchange:?}");
        assert_eq!(exchange.sender, Some((address.to_string(), PORT)));
    }
}

fn one_socket_stays_with_its_endpoint(mesh: &Mesh) {
    let pods = |how, count| -> BTreeMap<String, u32> {
        let mut pods = BTreeMap::new();
        for exchange in ask(mesh, "alice", how, "4", count, &["web", "80"]) {
            *pods.entry(exchange.pod.expect("answered")).or_default() += 1;
        }
        pods
    };
    assert_eq!(pods("unconnected", 30).len(), 1);
    // Each socket draws anew: that 60 leave one of three out has a probability of 3 * (2/3)^60 < 1e-10.
    assert_eq!(pods("fresh", 60).len(), 3);
    assert_eq!(pods("connected", 60).len(), 3);
}

fn two_services_are_told_apart(mesh: &Mesh) {
    let web = mesh.virtual_address("alice", "web");
    let log = mesh.virtual_address("alice", "log");
    let to = ["web", "80", "log", "514"];
    let exchanges = ask(mesh, "alice", "unconnected", "4", 5, &to);
    for (index, exchange) in exchanges.iter().enumerate() {
        let expected = if index % 2 == 0 {
            (web.clone(), 80)
        } else {
            (log.clone(), 514)
        };
        assert_eq!(exchange.sender, Some(expected), "{exchange:?}");
    }
}

fn who_may_not_is_refused_at_once(mesh: &Mesh) {
    for how in ["connected", "unconnected"] {
        for family in ["4", "6", "mapped"] {
            let before = mesh.count("node-1", "no-allow-matched");
            let exchange = ask(mesh, "bob", how, family, 1, &["web", "80"]).remove(0);
            assert_eq!(exchange.error.as_deref(), Some(REFUSED), "{exchange:?}");
            assert!(exchange.milliseconds < AT_ONCE, "{exchange:?}");
            assert_eq!(mesh.count("node-1", "no-allow-matched"), before + 1);
        }
    }
    let filter = ["--from", "shop/bob", "--verdict", "denied"];
    let flow = mesh.until_flow("the refusal is recorded", &filter, |flow| {
        flow.protocol == "UDP" && flow.service.as_deref() == Some("shop/web")
    });
    // None of the ALLOW policies matched; the first one of them is named.
    assert_eq!(flow.policy.as_deref(), Some("shop/nothing"), "{flow:#?}");
    assert_eq!(flow.source.identity, spiffe_id("shop/bob"), "{flow:#?}");

    let no = mesh.explain("bob", "web:80/udp");
    assert_eq!(
        (no.reason.as_str(), no.outcome.as_str()),
        ("no-allow-matched", REFUSED)
    );
    assert_eq!(
        mesh.explain("alice", "web:80/udp").verdict,
        Verdict::Allowed
    );
    // The service has no such TCP port.
    assert_eq!(mesh.explain("alice", "web:80").reason, "no-such-port");
}

fn clients_take_answers_and_nothing_else(mesh: &Mesh) {
    let alice = mesh.addresses("shop/alice-0")[0].to_string();
    let mut listener = mesh.talk("alice", "datagrams", &["7777"]);
    assert_eq!(listener.hear::<String>(), "listening");
    let before = mesh.count("node-1", "no-allow-matched");
    // From a port on which alice may ask web, so it might be an answer; but alice has not asked.
    let arguments = ["9999", &alice, "7777"];
    let error = mesh.error_of("web", "datagram_from", &arguments);
    assert_eq!(error, None, "an answer may be sent");
    until("it is refused where it arrives", PATIENCE, || {
        match mesh.count("node-1", "no-allow-matched") {
            now if now > before => Ok(()),
            now => Err(now.to_string()),
        }
    });
    // Bob, whom alice may not ask, cannot even send.
    let error = mesh.error_of("bob", "datagram_from", &arguments);
    assert_eq!(error.as_deref(), Some(REFUSED));
    assert_eq!(listener.finish::<u32>(), 0, "an uninvited datagram got in");
}

fn a_server_may_connect_back(mesh: &Mesh) {
    let log = mesh.addresses("shop/log-0")[0].to_string();
    let mut serving = mesh.talk("log", "serve_connected", &["8200"]);
    assert_eq!(serving.hear::<String>(), "listening");
    let to = [log.as_str(), "8200"];
    for exchange in ask(mesh, "alice", "unconnected", "4", 3, &to) {
        assert_eq!(exchange.pod.as_deref(), Some("log-0"), "{exchange:?}");
    }
}

/// getaddrinfo() connects datagram sockets to what it found, and some programs do to an outside address, only to learn
/// their own address.
fn looking_for_an_address_is_let_be(mesh: &Mesh) {
    let web = mesh.virtual_address("alice", "web");
    let outside = "192.0.2.1".to_owned();
    for (address, port) in [(&web, "0"), (&web, "443"), (&outside, "9")] {
        let mut held = mesh.talk("alice", "hold_datagrams", &["connected", address, port]);
        assert_eq!(held.hear::<String>(), "ready", "{address}:{port}");
        held.say("hello");
        let seen = held.hear::<Held>();
        assert_eq!(seen.error.as_deref(), Some(REFUSED), "{address}:{port}");
    }
    let exchange = ask(mesh, "alice", "unconnected", "4", 1, &[&outside, "9"]).remove(0);
    assert_eq!(
        exchange.error.as_deref(),
        Some("ENETUNREACH"),
        "{exchange:?}"
    );
}

fn too_many_peers_are_refused(mesh: &Mesh) {
    let web = mesh.addresses("shop/web-0")[0].to_string();
    let before = mesh.count("node-1", "peers-full");
    let mut talk = mesh.talk("alice", "ask_many_ports", &[&web, "20000", "22000"]);
    let errors: BTreeMap<String, u64> = talk.hear();
    let refused = errors.get("ENOBUFS").copied().unwrap_or_default();
    // There is room for 256; refusals that the ports sent back may be among the errors.
    assert!((2000 - 256..2000).contains(&refused), "{errors:?}");
    let kinds: BTreeSet<&str> = errors.keys().map(String::as_str).collect();
    assert!(
        kinds.is_subset(&BTreeSet::from(["ENOBUFS", REFUSED])),
        "{errors:?}"
    );
    assert_eq!(mesh.count("node-1", "peers-full"), before + refused);
    let filter = ["--from", "shop/alice", "--reason", "peers-full"];
    mesh.until_flow("the refusal is recorded", &filter, |flow| {
        flow.protocol == "UDP"
    });
    // Other sockets have room of their own.
    let exchange = ask(mesh, "alice", "unconnected", "4", 1, &["web", "80"]).remove(0);
    assert_eq!(exchange.error, None, "{exchange:?}");
}

fn records_tell_of_both_directions(mesh: &Mesh) {
    let filter = ["--from", "shop/alice", "--to", "shop/log"];
    for how in ["connected", "unconnected"] {
        let known = mesh.flows(&filter);
        let before = known.iter().map(|flow| flow.sequence).max().unwrap_or(0);
        ask(mesh, "alice", how, "4", 4, &["log", "514"]);
        let find = |patience, wanted: &dyn Fn(&FlowRecord) -> bool| {
            until("a record of datagrams", patience, || {
                let flows = mesh.flows(&filter);
                let found = flows.iter().find(|flow| wanted(flow));
                found.cloned().ok_or_else(|| format!("{flows:#?}"))
            })
        };
        let opened = find(PATIENCE, &|flow| {
            flow.sequence > before && flow.event == FlowEventKind::Opened
        });
        assert_eq!(opened.protocol, "UDP", "{opened:#?}");
        assert_eq!(
            opened.source.identity,
            spiffe_id("shop/alice"),
            "{opened:#?}"
        );
        assert_eq!(
            opened.destination.identity,
            spiffe_id("shop/log"),
            "{opened:#?}"
        );
        assert_eq!(opened.policy.as_deref(), Some("shop/log"), "{opened:#?}");
        let active = find(PATIENCE, &|flow| {
            flow.connection == opened.connection && flow.event == FlowEventKind::Open
        });
        assert_eq!(active.state, "active", "{active:#?}");
        assert_eq!(active.bytes_sent, 4 * "question 0".len() as u64);
        let closed = find(OVER, &|flow| {
            flow.connection == opened.connection && flow.event == FlowEventKind::Closed
        });
        assert_eq!(closed.service.as_deref(), Some("shop/log"), "{closed:#?}");
        assert_eq!(
            closed.bytes_sent,
            4 * "question 0".len() as u64,
            "{closed:#?}"
        );
        assert!(closed.bytes_received > closed.bytes_sent, "{closed:#?}");
    }
}

fn an_edit_bites(mesh: &Mesh, only_alice: &str) {
    let mut held = mesh.talk("alice", "hold_datagrams", &["unconnected", "web", "80"]);
    assert_eq!(held.hear::<String>(), "ready");
    held.say("before");
    assert_eq!(held.hear::<Held>().error, None);
    mesh.write(FILE, &policy("shop/web", "web", &allow(&["shop/bob"])));
    mesh.until_explained("alice", "web:80/udp", "no-allow-matched");
    held.say("after");
    assert_eq!(held.hear::<Held>().error.as_deref(), Some(REFUSED));
    let exchange = ask(mesh, "bob", "unconnected", "4", 1, &["web", "80"]).remove(0);
    assert_eq!(exchange.error, None, "{exchange:?}");
    mesh.write(FILE, only_alice);
    mesh.until_explained("alice", "web:80/udp", "policy-allow");
    held.say("again");
    let again = held.hear::<Held>();
    assert_eq!(
        again.sender,
        Some((mesh.virtual_address("alice", "web"), 80)),
        "{again:?}"
    );
}

#[test]
fn datagrams_stay_on_their_node() {
    let objects = [
        namespace("shop"),
        client("shop/alice", "  node: node-1\n"),
        server("shop/web", &[PORT], "  node: node-2\n"),
        datagram_service("shop/web", 80, PORT),
    ]
    .concat();
    let mesh = Mesh::start_with(
        "datagrams-nodes",
        &[("objects.yaml", &objects)],
        &["--nodes", "2"],
    );
    for how in ["connected", "unconnected"] {
        let before = mesh.count("node-1", "udp-not-carried");
        let exchange = ask(&mesh, "alice", how, "4", 1, &["web", "80"]).remove(0);
        assert_eq!(exchange.error.as_deref(), Some(REFUSED), "{exchange:?}");
        assert_eq!(mesh.count("node-1", "udp-not-carried"), before + 1);
    }
    assert_eq!(
        mesh.explain("alice", "web:80/udp").reason,
        "udp-not-carried"
    );
}
