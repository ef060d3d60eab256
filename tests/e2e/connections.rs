//! Connections that are open: their figures while they live, and their end when policy no longer allows them.

use std::{
    io::{BufRead, BufReader, Read},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use api::report::{FlowEventKind, FlowRecord, Verdict};
use linux::pidfd::PidFd;
use nix::sys::signal::Signal;

use crate::harness::{
    EDIT_PATIENCE, Mesh, PATIENCE,
    objects::{allow, client, namespace, policy, principal, server, service},
    probe::Watched,
    until,
};

const FILE: &str = "policy.yaml";
const FAMILIES: [&str; 3] = ["4", "6", "mapped"];
/// From the edit of a file to the end of what it forbids.
const BITES_WITHIN: Duration = Duration::from_secs(1);
/// One side is told that it was ended, the other by the reset that this sends.
const ENDINGS: [Option<&str>; 2] = [Some("ECONNABORTED"), Some("ECONNRESET")];

fn shop() -> String {
    [
        namespace("shop"),
        client("shop/alice", ""),
        client("shop/bob", ""),
        server("shop/web", &[8000], ""),
        service("shop/web", &[(80, 8000)]),
        server("shop/other", &[8000], ""),
        service("shop/other", &[(80, 8000)]),
    ]
    .concat()
}

fn only(accounts: &[&str]) -> String {
    policy("shop/web", "web", &allow(accounts))
}

fn deny(account: &str) -> String {
    let rest = format!(
        "  action: DENY\n  rules:\n  - from:\n    - source: {{principals: [{}]}}\n",
        principal(account)
    );
    policy("shop/not", "web", &rest)
}

fn watch_all(mesh: &Mesh, client: &str, host: &str) -> Vec<Watched> {
    let watch = |family| mesh.watch(client, family, host, 80);
    let mut watched: Vec<_> = FAMILIES.into_iter().map(watch).collect();
    for one in &mut watched {
        one.exchange("open");
    }
    watched
}

/// All of them have been ended, and soon enough after the edit.
#[track_caller]
fn all_end(watched: Vec<Watched>, edit: Instant) {
    for one in watched {
        let ending = one.ended();
        assert!(ENDINGS.contains(&ending.as_deref()), "{ending:?}");
    }
    let took = edit.elapsed();
    println!("ended {took:?} after the edit");
    assert!(took < BITES_WITHIN, "{took:?}");
}

fn all_go_on(watched: &mut [Watched], line: &str) {
    for one in watched {
        one.exchange(line);
    }
}

#[test]
fn open_connections_show_their_figures() {
    let mesh = Mesh::start("open", &[("objects.yaml", &shop()), (FILE, "")]);
    let open = |filter: &[&str]| {
        let flows = mesh.flows(&[&["--open"], filter].concat());
        assert!(
            flows.iter().all(|flow| flow.event == FlowEventKind::Open),
            "{flows:#?}"
        );
        flows
    };
    let from_alice = ["--from", "shop/alice", "--to", "shop/web"];
    assert!(open(&from_alice).is_empty());

    let mut held = watch_all(&mesh, "alice", "web");
    let flows = open(&from_alice);
    assert_eq!(flows.len(), FAMILIES.len(), "each once: {flows:#?}");
    for flow in &flows {
        assert_eq!(flow.bytes_sent, "open\n".len() as u64, "{flow:#?}");
        assert!(
            flow.bytes_received > 40 && flow.rtt_us > 0 && flow.duration_us > 0,
            "{flow:#?}"
        );
        assert_eq!(flow.state, "established", "{flow:#?}");
        assert_eq!(flow.verdict, Verdict::Allowed, "{flow:#?}");
        assert_eq!(flow.reason, "no-policy", "{flow:#?}");
        assert_eq!(flow.service.as_deref(), Some("shop/web"), "{flow:#?}");
        assert_eq!(flow.destination.port, 8000, "{flow:#?}");
        // Joined with the record of its opening.
        mesh.until_flow("the opening is recorded", &from_alice, |opened| {
            opened.event == FlowEventKind::Opened
                && opened.connection == flow.connection
                && opened.source == flow.source
        });
    }

    all_go_on(&mut held, "more");
    let grown = open(&from_alice);
    for before in &flows {
        let now = same(&grown, before);
        assert_eq!(now.bytes_sent, before.bytes_sent + 5, "{now:#?}");
        assert_eq!(now.bytes_received, before.bytes_received + 5, "{now:#?}");
        assert!(now.duration_us > before.duration_us, "{now:#?}");
    }
    filters(&mesh, &open);
    summary(&mesh, &grown);

    drop(held);
    until("no connection is open", PATIENCE, || {
        match open(&from_alice).as_slice() {
            [] => Ok(()),
            left => Err(format!("{left:#?}")),
        }
    });
    for before in &grown {
        let closed = mesh.until_flow("the close is recorded", &from_alice, |flow| {
            flow.event == FlowEventKind::Closed && flow.connection == before.connection
        });
        assert_eq!(closed.bytes_sent, before.bytes_sent, "{closed:#?}");
        assert_eq!(closed.bytes_received, before.bytes_received, "{closed:#?}");
        assert_eq!(closed.state, "closed", "{closed:#?}");
    }
    strangers_are_told_by_the_server(&mesh);
}

fn same<'a>(flows: &'a [FlowRecord], wanted: &FlowRecord) -> &'a FlowRecord {
    let found = flows
        .iter()
        .find(|flow| flow.connection == wanted.connection);
    found.unwrap_or_else(|| panic!("{wanted:#?} is not in {flows:#?}"))
}

fn filters(mesh: &Mesh, open: &dyn Fn(&[&str]) -> Vec<FlowRecord>) {
    let count = |filter: &[&str]| {
        let all = [&["--from", "alice"][..], filter].concat();
        open(&all).len()
    };
    assert_eq!(count(&["--verdict", "allowed", "--reason", "no-policy"]), 3);
    assert_eq!(count(&["--since", "30s"]), 3);
    assert_eq!(count(&["--verdict", "denied"]), 0);
    assert_eq!(count(&["--reason", "policy-allow"]), 0);
    assert_eq!(count(&["--to", "shop/other"]), 0);
    assert!(open(&["--from", "bob"]).is_empty());
    // Without --open they come after the history; a follower is not told of them.
    let all = mesh.flows(&["--from", "alice"]);
    let last = all.len() - 3;
    for (index, flow) in all.iter().enumerate() {
        assert_eq!(
            flow.event == FlowEventKind::Open,
            index >= last,
            "{flow:#?}"
        );
    }
}

fn summary(mesh: &Mesh, open: &[FlowRecord]) {
    let outcome = mesh.run("flows", &["--summary", "--from", "alice", "-o", "json"]);
    let rows: serde_json::Value = serde_json::from_str(&outcome.success().stdout).unwrap();
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 1, "{rows:#?}");
    let sum = |of: fn(&FlowRecord) -> u64| open.iter().map(of).sum::<u64>();
    assert_eq!(rows[0]["open"], 3, "{rows:#?}");
    assert_eq!(rows[0]["connections"], 3, "{rows:#?}");
    assert_eq!(
        rows[0]["bytes_sent"],
        sum(|flow| flow.bytes_sent),
        "{rows:#?}"
    );
    assert_eq!(
        rows[0]["bytes_received"],
        sum(|flow| flow.bytes_received),
        "{rows:#?}"
    );
}

/// One whose client is not in the mesh has no other side; and STRICT ends it.
fn strangers_are_told_by_the_server(mesh: &Mesh) {
    let peers = |mode| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: peers, namespace: shop}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        )
    };
    mesh.write(FILE, &peers("PERMISSIVE"));
    let address = SocketAddr::new(mesh.addresses("shop/web-0")[0], 8000);
    let node = mesh.namespace_of_node("node-1");
    let mut stream = until("a stranger gets in", EDIT_PATIENCE, || {
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(300));
        node.run(connect)
            .unwrap()
            .map_err(|error| error.to_string())
    });
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = String::new();
    BufReader::new(&stream).read_line(&mut greeting).unwrap();
    let flows = mesh.flows(&["--open", "--to", "shop/web"]);
    assert_eq!(flows.len(), 1, "{flows:#?}");
    assert_eq!(flows[0].source.identity, "", "{flows:#?}");
    assert_eq!(
        flows[0].bytes_received,
        greeting.len() as u64,
        "as its client sees it: {flows:#?}"
    );

    let edit = Instant::now();
    mesh.write(FILE, &peers("STRICT"));
    stream.read_exact(&mut [0]).unwrap_err();
    assert!(edit.elapsed() < BITES_WITHIN, "{:?}", edit.elapsed());
    let ended = mesh.until_flow("its end is recorded", &["--to", "shop/web"], |flow| {
        flow.event == FlowEventKind::Ended
    });
    assert_eq!(ended.reason, "peer-not-attested", "{ended:#?}");
}

#[test]
fn what_policy_forbids_ends_at_once_and_nothing_else() {
    let both = only(&["shop/alice", "shop/bob"]);
    let mesh = Mesh::start("forbid", &[("objects.yaml", &shop()), (FILE, &both)]);
    let mut alice = watch_all(&mesh, "alice", "web");
    let bob = watch_all(&mesh, "bob", "web");
    let mut elsewhere = watch_all(&mesh, "bob", "other");

    // A removed ALLOW.
    let edit = Instant::now();
    mesh.write(FILE, &only(&["shop/alice"]));
    all_end(bob, edit);
    all_go_on(&mut alice, "still allowed");
    all_go_on(&mut elsewhere, "another server");
    told(&mesh, "shop/bob", "no-allow-matched", "shop/web", 3);
    assert_eq!(counted(&mesh, "no-allow-matched"), 3);

    // An added DENY.
    let edit = Instant::now();
    let text = [only(&["shop/alice"]), deny("shop/alice")].concat();
    mesh.write(FILE, &text);
    all_end(alice, edit);
    all_go_on(&mut elsewhere, "another server");
    told(&mesh, "shop/alice", "policy-deny", "shop/not", 3);
    assert_eq!(counted(&mesh, "policy-deny"), 3);
    assert_eq!(counted(&mesh, "no-allow-matched"), 3, "each once");
    assert!(mesh.status().all_problems().is_empty());

    // What is allowed again can be made again.
    mesh.write(FILE, &both);
    mesh.until_explained("bob", "web:80", "policy-allow");
    all_go_on(&mut watch_all(&mesh, "bob", "web"), "again");
}

/// The records of the connections that were ended: all, with their figures, and why.
fn told(mesh: &Mesh, source: &str, reason: &str, policy: &str, count: usize) {
    let filter = ["--from", source, "--verdict", "denied", "--reason", reason];
    let ended = until("the ends are recorded", EDIT_PATIENCE, || {
        let flows = mesh.flows(&filter);
        if flows.len() == count {
            Ok(flows)
        } else {
            Err(format!("{flows:#?}"))
        }
    });
    for flow in ended {
        assert_eq!(flow.event, FlowEventKind::Ended, "{flow:#?}");
        assert_eq!(flow.policy.as_deref(), Some(policy), "{flow:#?}");
        assert_eq!(flow.state, "closed", "{flow:#?}");
        assert!(
            flow.bytes_sent >= 5 && flow.bytes_received > 40,
            "{flow:#?}"
        );
    }
}

/// How many connections were ended for a reason.
fn counted(mesh: &Mesh, reason: &str) -> u64 {
    let ended = mesh.node("node-1").ended;
    let of_reason = ended.iter().filter(|count| count.reason == reason);
    of_reason.map(|count| count.count).sum()
}

#[test]
fn restarts_end_nothing_but_what_was_forbidden_meanwhile() {
    let both = only(&["shop/alice", "shop/bob"]);
    let mesh = Mesh::start("amnesty", &[("objects.yaml", &shop()), (FILE, &both)]);
    let mut alice = watch_all(&mesh, "alice", "web");
    let mut bob = watch_all(&mesh, "bob", "web");
    for round in 0..3 {
        replace_the_agent(&mesh);
        all_go_on(&mut alice, &format!("round {round}"));
        all_go_on(&mut bob, &format!("round {round}"));
        assert!(mesh.node("node-1").ended.is_empty());
    }

    // Edited while nobody looks: by the agent that wakes up…
    let agent = PidFd::open(mesh.node("node-1").pid).unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    mesh.write(FILE, &only(&["shop/alice"]));
    all_go_on(&mut bob, "nobody looks");
    let woken = Instant::now();
    agent.signal(Signal::SIGCONT).unwrap();
    all_end(bob, woken);
    all_go_on(&mut alice, "woken");

    // … and by the one that comes after it.
    let agent = PidFd::open(mesh.node("node-1").pid).unwrap();
    let old = mesh.node("node-1").pid;
    agent.signal(Signal::SIGSTOP).unwrap();
    mesh.write(FILE, &only(&["shop/bob"]));
    all_go_on(&mut alice, "nobody looks");
    agent.signal(Signal::SIGKILL).unwrap();
    for one in alice {
        let ending = one.ended();
        assert!(ENDINGS.contains(&ending.as_deref()), "{ending:?}");
    }
    until_replaced(&mesh, old);
    assert_eq!(counted(&mesh, "no-allow-matched"), 3);
}

fn replace_the_agent(mesh: &Mesh) {
    let old = mesh.node("node-1").pid;
    PidFd::open(old).unwrap().signal(Signal::SIGKILL).unwrap();
    until_replaced(mesh, old);
}

fn until_replaced(mesh: &Mesh, old: u32) {
    mesh.until_status("another agent has taken over", |status| {
        status.nodes[0]
            .status
            .as_ref()
            .is_some_and(|agent| agent.pid != old && agent.synced)
    });
}

/// A connected datagram socket cannot know that nobody is there any more; a TCP connection drains.
#[test]
fn datagram_sockets_do_not_outlive_their_endpoint() {
    let asks = |app: &str| {
        format!(
            "---
apiVersion: v1
kind: Service
metadata: {{name: asked, namespace: shop}}
spec:
  selector: {{app: {app}}}
  ports:
  - {{name: stream, port: 80, targetPort: 8000}}
  - {{name: datagrams, port: 70, targetPort: 7000, protocol: UDP}}
"
        )
    };
    let mesh = Mesh::start(
        "stale",
        &[
            ("objects.yaml", &shop()),
            ("asked.yaml", &asks("web")),
            (FILE, ""),
        ],
    );
    let watch = |client, family| mesh.watch_datagrams(client, family, "asked", 70);
    let mut streams = watch_all(&mesh, "alice", "asked");
    let gone = ["4", "6"].map(|family| watch("alice", family));
    let edit = Instant::now();
    mesh.write("asked.yaml", &asks("other"));
    for one in gone {
        assert_eq!(one.ended().as_deref(), Some("ECONNABORTED"));
    }
    assert!(edit.elapsed() < BITES_WITHIN, "{:?}", edit.elapsed());
    all_go_on(&mut streams, "draining");
    assert_eq!(counted(&mesh, "endpoint-gone"), 2);

    let forbidden = watch("alice", "4");
    let steady = watch("bob", "4");
    let edit = Instant::now();
    mesh.write(FILE, &policy("shop/other", "other", &allow(&["shop/bob"])));
    assert_eq!(forbidden.ended().as_deref(), Some("ECONNABORTED"));
    assert!(edit.elapsed() < BITES_WITHIN, "{:?}", edit.elapsed());
    let filter = ["--from", "alice", "--reason", "no-allow-matched"];
    let ended = mesh.until_flow("its end is recorded", &filter, |flow| {
        flow.event == FlowEventKind::Ended
    });
    assert_eq!(ended.protocol, "UDP", "{ended:#?}");

    // The workload itself goes.
    let objects = shop().replace(
        "kind: Workload\nmetadata: {name: other,",
        "kind: Workload\nmetadata: {name: another,",
    );
    assert_ne!(objects, shop());
    mesh.write("objects.yaml", &objects);
    assert_eq!(steady.ended().as_deref(), Some("ECONNABORTED"));
}
