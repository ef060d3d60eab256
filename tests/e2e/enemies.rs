//! Enemies of the tunnel: peers on another node that break every rule, at a workload's port 15008. Each is refused with
//! the right answer, counted, and told with its address; the neighbours' requests go on all the while.

mod floods;
mod forger;
mod strangers;

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
};

use serde::{Deserialize, de::DeserializeOwned};

use self::forger::{Forger, argument};
use crate::harness::{
    EDIT_PATIENCE, Mesh, Outcome,
    objects::{allow, client, namespace, policy, server, service, spiffe_id},
    until,
};

const ENEMY: &str = include_str!("programs/enemy.py");
/// Where the attacked workload runs, and where the enemy is.
const VICTIM: &str = "node-1";
const LAIR: &str = "node-2";
const PORT: u16 = 8000;
const REFUSED: &str = "heddle_tunnel_refused_total";
const FAILURES: &str = "heddle_tunnel_failures_total";

#[test]
fn bad_peers_and_bad_requests_are_refused_and_told() {
    let mesh = two_nodes("enemies");
    let good = mesh.request_loop("alice", "web", 80);
    let near = mesh.request_loop("near", "web", 80);
    let (ours, theirs) = (Forger::of(&mesh), Forger::stranger());
    let web = mesh.addresses("shop/web-0");
    let alice = ours.sign(&spiffe_id("shop/alice"));

    // TLS: what is shown must be the mesh's, in its time, and what is spoken TLS 1.3 and h2.
    let expired = ours.sign_expired(&spiffe_id("shop/alice"));
    let foreign = theirs.sign(&spiffe_id("shop/alice"));
    let elsewhere = ours.sign("spiffe://elsewhere.example/ns/shop/sa/alice");
    let nobody = ours.sign("spiffe://cluster.local/ns");
    let attempts = [
        ("-", "h2", "1.3", 116, "tls-no-certificate"),
        (argument(&alice), "h2", "1.2", 70, "tls-protocol"),
        (argument(&alice), "http/1.1", "1.3", 120, "tls-protocol"),
        (argument(&foreign), "h2", "1.3", 48, "tls-certificate"),
        (argument(&expired), "h2", "1.3", 45, "tls-certificate"),
        (argument(&elsewhere), "h2", "1.3", 46, "tls-certificate"),
    ];
    for (index, (certificate, alpn, version, alert, kind)) in attempts.into_iter().enumerate() {
        let address = web[index % 2].to_string();
        let labels = ["side=\"inbound\"", &format!("kind=\"{kind}\"")];
        let before = mesh.metric(VICTIM, FAILURES, &labels);
        let arguments = ["handshake", &address, certificate, alpn, version];
        let shaken: Shaken = one(&mesh.enemy(&arguments));
        assert_eq!(shaken.alert, Some(alert), "{arguments:?}");
        mesh.until_counted(VICTIM, FAILURES, &labels, before);
        mesh.until_told(&shaken.own, "a tunnel ended badly");
    }
    // In order otherwise, but no workload's.
    let node = ours.sign("spiffe://cluster.local/heddle/node/node-2");
    let target = format!("{}:{PORT}", web[0]);
    for certificate in [&node, &nobody] {
        mesh.is_refused(certificate, "CONNECT", &target, 401, "no workload's");
    }

    // Requests.
    let [neighbour, _] = mesh.addresses("shop/near-0");
    let mallory = ours.sign(&spiffe_id("shop/mallory"));
    let own = |port: u16| format!("{}:{port}", web[0]);
    mesh.is_refused(&alice, "GET", &target, 400, "not CONNECT");
    for authority in ["web", "1.2.3:80", "web:0", "web:99999", "web..shop:80"] {
        mesh.is_refused(&alice, "CONNECT", authority, 400, "authority");
    }
    mesh.is_refused(&alice, "CONNECT", "web.shop:80", 400, "host name");
    let others = format!("{neighbour}:{PORT}");
    mesh.is_refused(&alice, "CONNECT", &others, 400, "not this workload's");
    mesh.is_refused(
        &alice,
        "CONNECT",
        "127.0.0.1:8000",
        400,
        "not this workload's",
    );
    for port in [15001, 15006, 15008] {
        mesh.is_refused(&alice, "CONNECT", &own(port), 400, "the mesh's own");
    }
    mesh.is_refused(&alice, "CONNECT", &own(8009), 503, "refused");
    mesh.is_refused(&mallory, "CONNECT", &target, 401, "shop/only");
    let flow = mesh.until_flow("the refusal is told", &["--to", "shop/web"], |flow| {
        flow.source.identity == spiffe_id("shop/mallory")
    });
    assert_eq!(flow.policy.as_deref(), Some("shop/only"), "{flow:#?}");

    swollen_headers(&mesh, argument(&alice), &target);
    tales_of_the_client_are_not_believed(&mesh, argument(&alice), web);
    nobody_takes_the_agents_port(&mesh);
    good.finish().all_succeeded();
    near.finish().all_succeeded();
}

/// What is a little too long is answered, what is far too long ends the connection.
fn swollen_headers(mesh: &Mesh, certificate: &str, target: &str) {
    let swollen = |size: u32, pieces: u32| {
        let (size, pieces) = (size.to_string(), pieces.to_string());
        let address = target.rsplit_once(':').unwrap().0;
        let arguments = ["swollen", address, certificate, target, &size, &pieces];
        one::<Answer>(&mesh.enemy(&arguments))
    };
    assert_eq!(swollen(8 << 10, 1).status, Some(200));
    let labels = ["status=\"431\""];
    let before = mesh.metric(VICTIM, REFUSED, &labels);
    let answer = swollen(20 << 10, 2);
    assert_eq!(answer.status, Some(431), "{answer:?}");
    mesh.until_counted(VICTIM, REFUSED, &labels, before);
    mesh.until_told(&answer.own, "headers");
    let labels = ["side=\"inbound\"", "kind=\"protocol\""];
    let before = mesh.metric(VICTIM, FAILURES, &labels);
    let answer = swollen(1 << 20, 100);
    assert_eq!(answer.status, None, "{answer:?}");
    mesh.until_counted(VICTIM, FAILURES, &labels, before);
    mesh.until_told(&answer.own, "a tunnel ended badly");
}

/// The program sees whom the connection comes from, whatever `forwarded` says.
fn tales_of_the_client_are_not_believed(mesh: &Mesh, certificate: &str, web: [IpAddr; 2]) {
    for (address, tale) in [(web[0], "9.9.9.9:99"), (web[1], "[2001:db8::9]:99")] {
        let (host, tale) = (address.to_string(), format!("for=\"{tale}\""));
        let target = SocketAddr::new(address, PORT).to_string();
        let arguments = [
            "ask",
            &host,
            certificate,
            "CONNECT",
            &target,
            "forwarded",
            &tale,
        ];
        let answer: Answer = one(&mesh.enemy(&arguments));
        assert_eq!(answer.status, Some(200), "{answer:?}");
        let greeting: Greeting = serde_json::from_str(&answer.line).unwrap();
        let own: SocketAddr = answer.own.parse().unwrap();
        assert_eq!(greeting.peer, own.ip(), "{answer:?}");
    }
}

/// A program in a workload that would speak for the agent.
fn nobody_takes_the_agents_port(mesh: &Mesh) {
    for address in ["0.0.0.0", "::", "127.0.0.1"] {
        for port in ["15001", "15006", "15008"] {
            let error = mesh.error_of("near", "bind", &[address, port]);
            assert_eq!(error.as_deref(), Some("EACCES"), "{address} {port}");
        }
    }
    assert!(mesh.count(VICTIM, "reserved-port") > 0);
}

/// How a handshake ended.
#[derive(Debug, Deserialize)]
struct Shaken {
    /// Its number, if it is a known one.
    alert: Option<u8>,
    /// The enemy's own address.
    own: String,
}

/// How a request was answered.
#[derive(Debug, Deserialize)]
struct Answer {
    status: Option<u16>,
    own: String,
    /// What came first, if it was let in.
    line: String,
}

/// What the server said to its caller.
#[derive(Debug, Deserialize)]
struct Greeting {
    peer: IpAddr,
}

impl Mesh {
    /// Runs the enemy's program on the other node, past all workloads.
    fn enemy(&self, arguments: &[&str]) -> Outcome {
        let output = self.spawn_enemy(LAIR, arguments).wait_with_output();
        Outcome::from(output.unwrap()).success()
    }

    /// Starts the enemy's program in a node's namespace.
    fn spawn_enemy(&self, node: &str, arguments: &[&str]) -> Child {
        let spawn = || {
            Command::new("python3")
                .args(["-c", ENEMY])
                .args(arguments)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
        };
        self.namespace_of_node(node).run(spawn).unwrap().unwrap()
    }

    /// A request to the server is answered with this status, counted, and told with the peer's address and a reason.
    #[track_caller]
    fn is_refused(
        &self,
        certificate: &Path,
        method: &str,
        authority: &str,
        status: u16,
        reason: &str,
    ) {
        let labels = [format!("status=\"{status}\"")];
        let labels = labels.each_ref().map(String::as_str);
        let before = self.metric(VICTIM, REFUSED, &labels);
        let address = self.addresses("shop/web-0")[0].to_string();
        let arguments = ["ask", &address, argument(certificate), method, authority];
        let answer: Answer = one(&self.enemy(&arguments));
        assert_eq!(answer.status, Some(status), "{method} {authority}");
        self.until_counted(VICTIM, REFUSED, &labels, before);
        self.until_told(&answer.own, reason);
    }

    /// Waits for a line in the victim's agent's log that names the peer's address, and says this.
    #[track_caller]
    fn until_told(&self, own: &str, text: &str) {
        let what = format!("the log tells of {own}: {text}");
        let log = format!("node/{VICTIM}");
        until(&what, EDIT_PATIENCE, || {
            let log = self.run("logs", &[&log]).success().stdout;
            let mut lines = log.lines().rev();
            let told = lines.any(|line| line.contains(own) && line.contains(text));
            told.then_some(()).ok_or(log)
        });
    }
}

/// A server with a near and a far client, all of whom may; and one whom the policy does not name.
fn two_nodes(topic: &str) -> Mesh {
    let objects = [
        namespace("shop"),
        server("shop/web", &[PORT], "  node: node-1\n"),
        service("shop/web", &[(80, PORT)]),
        client("shop/near", "  node: node-1\n"),
        client("shop/alice", "  node: node-2\n"),
        client("shop/mallory", "  node: node-2\n"),
        policy("shop/only", "web", &allow(&["shop/alice", "shop/near"])),
    ]
    .concat();
    Mesh::start_with(topic, &[("objects.yaml", &objects)], &["--nodes", "2"])
}

#[track_caller]
fn one<T: DeserializeOwned>(outcome: &Outcome) -> T {
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome:#?}"))
}
