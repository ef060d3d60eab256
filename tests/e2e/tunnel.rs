//! Three nodes: what crosses them goes through tunnels, under the workloads' own identities, and nothing else does.

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
};

use api::report::{FlowEventKind, FlowRecord, FlowReporter};
use linux::pidfd::PidFd;
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::harness::{
    Mesh,
    objects::{allow, client, namespace, policy, server, service, spiffe_id, workload},
    probe::Talk,
};

const FILE: &str = "policy.yaml";
const CAPTURE: &str = include_str!("programs/capture.py");
/// What must never be seen between nodes.
const SECRET: &str = "the-secret-of-the-test";
const HBONE: u16 = 15008;

#[test]
fn connections_cross_nodes_under_their_identities() {
    let mesh = three_nodes("tunnel");
    let capture = Capture::start(&mesh, "node-2");

    // By name and by address, IPv4 and IPv6; the server sees the client's address, the client the service's.
    let alice = mesh.addresses("shop/alice-0");
    let [v4, v6] = mesh
        .addresses("shop/web-0")
        .map(|address| address.to_string());
    let attempt = mesh.connect("alice", "web", 80);
    let peer = &attempt.greeting().peer;
    assert!(
        alice.iter().any(|own| own.to_string() == *peer),
        "{attempt:?}"
    );
    let vip = mesh.virtual_address("alice", "web");
    let attempt = mesh.connect("alice", &vip, 80);
    assert_eq!(attempt.greeting().peer, alice[0].to_string());
    let peer = attempt.peer.as_deref().unwrap();
    assert!(peer.starts_with(&vip), "{attempt:?}");
    for (host, own) in [(&v4, alice[0]), (&v6, alice[1])] {
        let attempt = mesh.connect("alice", host, 8000);
        assert_eq!(attempt.greeting().peer, own.to_string(), "{host}");
        assert_eq!(attempt.greeting().address, *host);
    }
    let page = mesh.addresses("shop/page-0")[1];
    for host in ["page".to_owned(), format!("[{page}]:8080")] {
        let url = format!("http://{host}/?{SECRET}");
        let outcome = mesh.exec(
            "alice",
            &["curl", "--silent", "--show-error", "--max-time", "10", &url],
        );
        assert_eq!(outcome.success().stdout, "hello\n", "{url}");
    }
    let mut held = mesh.hold("alice", "web", 80);
    held.exchange(SECRET);

    let open = mesh.flows(&["--open", "--from", "shop/alice"]);
    let open = open.iter().find(|flow| flow.event == FlowEventKind::Open);
    let open = open.expect("the one that is held");
    assert_eq!(
        (open.path.as_str(), open.service.as_deref()),
        ("tunnel", Some("shop/web"))
    );
    assert_eq!(
        open.destination.identity,
        spiffe_id("shop/web"),
        "{open:#?}"
    );
    assert_eq!(open.bytes_sent, SECRET.len() as u64 + 1, "{open:#?}");

    // Both nodes tell of it, under the same identities.
    let told = |reporter: FlowReporter| {
        mesh.until_flow(
            "a connection is told",
            &["--from", "shop/alice", "--to", "shop/web"],
            |flow| flow.reporter == reporter && flow.event == FlowEventKind::Closed,
        )
    };
    let (source, destination) = (told(FlowReporter::Source), told(FlowReporter::Destination));
    for flow in [&source, &destination] {
        assert_eq!(flow.path, "tunnel", "{flow:#?}");
        assert_eq!(flow.source.identity, spiffe_id("shop/alice"), "{flow:#?}");
        assert_eq!(
            flow.destination.identity,
            spiffe_id("shop/web"),
            "{flow:#?}"
        );
        assert!(flow.bytes_received > 0, "{flow:#?}");
    }
    assert_eq!(
        (source.node.as_str(), destination.node.as_str()),
        ("node-1", "node-2")
    );
    assert_eq!(
        destination.policy.as_deref(),
        Some("shop/only"),
        "{destination:#?}"
    );
    let answer = mesh.explain("alice", "web:80");
    assert_eq!(
        (answer.path.as_str(), answer.reason.as_str()),
        ("tunnel", "policy-allow")
    );

    // Who may not is refused where it begins, and told by which policy.
    mesh.connect("bob", "web", 80).failed("ECONNREFUSED");
    mesh.connect("bob", &v6, 8000).failed("ECONNREFUSED");
    let refused = |flow: &FlowRecord| {
        flow.event == FlowEventKind::Refused && flow.policy.as_deref() == Some("shop/only")
    };
    let flow = mesh.until_flow("the refusal is told", &["--from", "shop/bob"], refused);
    assert_eq!(flow.reason, "no-allow-matched", "{flow:#?}");

    policy_bites_on_open_connections(&mesh, &mut held);
    the_agent_is_away(&mesh);

    let seen = capture.finish();
    assert_eq!(seen.leaks, 0, "{seen:?}");
    assert!(seen.connections > 0 && seen.strange == 0, "{seen:?}");
    let ports: Vec<&String> = seen.ports.keys().collect();
    assert!(
        ports
            .iter()
            .all(|port| **port == HBONE.to_string() || **port == CA_PORT),
        "{seen:?}"
    );
}

/// Where agents ask for certificates, over TLS as well.
const CA_PORT: &str = "15012";

/// Within a second of an edit, and no later.
fn policy_bites_on_open_connections(mesh: &Mesh, held: &mut crate::harness::probe::Held) {
    held.exchange("still");
    let mut watched = mesh.watch("alice", "4", "web", 80);
    watched.exchange("open");
    mesh.write(FILE, &policy("shop/only", "web", &allow(&["shop/carol"])));
    let error = watched.ended();
    assert_eq!(error.as_deref(), Some("ECONNRESET"));
    let flow = mesh.until_flow("the end is told", &["--from", "shop/alice"], |flow| {
        flow.event == FlowEventKind::Ended
    });
    assert_eq!(flow.policy.as_deref(), Some("shop/only"), "{flow:#?}");
    mesh.connect("alice", "web", 80).failed("ECONNREFUSED");
    mesh.connect("carol", "web", 80).greeting();
    mesh.write(FILE, &only_alice());
    mesh.until_explained("alice", "web:80", "policy-allow");
    mesh.connect("alice", "web", 80).greeting();
}

/// Connections to other nodes wait for it: they are never sent past it.
fn the_agent_is_away(mesh: &Mesh) {
    let agent = PidFd::open(mesh.node("node-1").pid).unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    let waiting = mesh.spawn_exec(
        "alice",
        &[
            "curl",
            "--silent",
            "--show-error",
            "--max-time",
            "20",
            &format!("http://page/?{SECRET}"),
        ],
    );
    // The other node's workloads do not notice.
    mesh.connect("carol", "web", 80).failed("ECONNREFUSED");
    agent.signal(Signal::SIGCONT).unwrap();
    let output = waiting.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello\n");
}

/// An HTTP server, for curl.
const PAGE: &str = "
import http.server, socket
class Page(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  def do_GET(self):
    self.send_response(200)
    self.send_header('content-length', '6')
    self.end_headers()
    self.wfile.write(b'hello\\n')
  def log_message(self, *_):
    pass
class Server(http.server.ThreadingHTTPServer):
  address_family = socket.AF_INET6
Server(('::', 8080), Page).serve_forever()
";

/// Alice and bob on the first node, web and page on the second, carol on the third.
fn three_nodes(topic: &str) -> Mesh {
    let page = serde_json::to_string(PAGE).unwrap();
    let page = workload(
        "shop/page",
        &format!("[python3, -c, {page}]"),
        "  node: node-2
  ports: [{name: http, port: 8080}]
  readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 0.2}
",
    );
    let objects = [
        namespace("shop"),
        client("shop/alice", "  node: node-1\n"),
        client("shop/bob", "  node: node-1\n"),
        server("shop/web", &[8000], "  node: node-2\n"),
        service("shop/web", &[(80, 8000)]),
        page,
        service("shop/page", &[(80, 8080)]),
        client("shop/carol", "  node: node-3\n"),
    ]
    .concat();
    Mesh::start_with(
        topic,
        &[("objects.yaml", &objects), (FILE, &only_alice())],
        &["--nodes", "3"],
    )
}

fn only_alice() -> String {
    policy("shop/only", "web", &allow(&["shop/alice"]))
}

/// Everything that a node sends to others, or gets from them.
struct Capture(Talk);

#[derive(Debug, Deserialize)]
struct Seen {
    /// Segments with payload, by the lower port.
    ports: BTreeMap<String, u64>,
    /// Segments with the secret in them.
    leaks: u64,
    connections: u64,
    /// Connections that begin with something else than TLS.
    strange: u64,
}

impl Capture {
    fn start(mesh: &Mesh, node: &str) -> Self {
        let namespace = mesh.namespace_of_node(node);
        let spawned = namespace.run(|| {
            Command::new("python3")
                .args(["-c", CAPTURE, "uplink", SECRET])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
        });
        let mut talk = Talk::with(spawned.unwrap().unwrap());
        assert_eq!(talk.hear::<String>(), "listening");
        Self(talk)
    }

    fn finish(self) -> Seen {
        self.0.finish()
    }
}
