//! Agents come and go while they carry connections between nodes: the sockets stay, and so does the direct path.

use api::report::NodeStatus;
use linux::pidfd::PidFd;
use nix::sys::signal::Signal;

use crate::harness::{
    Mesh,
    objects::{client, namespace, server, service},
    probe::{LoopReport, RequestLoop},
};

/// How often each node's agent is told to make way, and how often it is killed.
const TIMES: u64 = 5;
const NODES: [&str; 2] = ["node-1", "node-2"];

#[test]
fn agents_hand_their_sockets_over() {
    let objects = [
        namespace("shop"),
        client("shop/alice", "  node: node-1\n"),
        server("shop/far", &[8000], "  node: node-2\n"),
        service("shop/far", &[(80, 8000)]),
        server("shop/near", &[8000], "  node: node-1\n"),
        service("shop/near", &[(80, 8000)]),
    ]
    .concat();
    let mesh = Mesh::start_with("handover", &[("objects.yaml", &objects)], &["--nodes", "2"]);
    let mut direct = mesh.hold("alice", "near", 80);

    // An agent that is told to end makes way: its successor accepts, and it finishes what it carries.
    let mut tunnelled = mesh.hold("alice", "far", 80);
    let [near, far] = loops(&mesh, || {
        for round in 0..TIMES {
            for node in NODES {
                end_agent(&mesh, node, Signal::SIGTERM);
                direct.exchange(&format!("direct {round}"));
                tunnelled.exchange(&format!("tunnelled {round}"));
            }
        }
    });
    near.all_succeeded();
    far.all_succeeded();

    // One that is killed takes with it what it carried at that moment, and nothing else.
    let [near, far] = loops(&mesh, || {
        for round in 0..TIMES {
            for node in NODES {
                end_agent(&mesh, node, Signal::SIGKILL);
                direct.exchange(&format!("direct {round}"));
            }
        }
    });
    near.all_succeeded();
    let cut: u64 = far.errors.values().sum();
    eprintln!(
        "{cut} of {} tunnelled requests were cut by {} kills",
        far.total,
        2 * TIMES
    );
    assert!(far.total > cut && cut <= 2 * TIMES, "{far:?}");
    mesh.connect("alice", "far", 80).greeting();
}

#[test]
fn replicas_leave_without_a_failed_request() {
    let far = |replicas: u32| {
        let spec = format!("  node: node-2\n  replicas: {replicas}\n");
        server("shop/far", &[8000], &spec)
    };
    let objects = [
        namespace("shop"),
        client("shop/alice", "  node: node-1\n"),
        service("shop/far", &[(80, 8000)]),
    ]
    .concat();
    let files = [("objects.yaml", objects.as_str()), ("far.yaml", &far(3))];
    let mesh = Mesh::start_with("leaving", &files, &["--nodes", "2"]);
    let requests = mesh.request_loop("alice", "far", 80);
    for replicas in [1, 3, 2] {
        mesh.write("far.yaml", &far(replicas));
        mesh.until_status("the replicas are as wanted", |status| {
            let far = status.workloads.iter();
            let ready = far.filter(|replica| replica.workload == "far");
            let ready: Vec<bool> = ready.map(|replica| replica.status.ready).collect();
            ready.len() == replicas as usize && ready.iter().all(|ready| *ready)
        });
    }
    requests.finish().all_succeeded();
}

/// What requests on the direct path and through the tunnel met meanwhile.
fn loops(mesh: &Mesh, meanwhile: impl FnOnce()) -> [LoopReport; 2] {
    let loops = ["near", "far"].map(|host| mesh.request_loop("alice", host, 80));
    meanwhile();
    loops.map(RequestLoop::finish)
}

/// Ends a node's agent in one way or the other, and waits for the next one to have taken over.
fn end_agent(mesh: &Mesh, node: &str, signal: Signal) -> NodeStatus {
    let old = mesh.node(node);
    PidFd::open(old.pid).unwrap().signal(signal).unwrap();
    let taken_over = |status: &NodeStatus| {
        status.pid != old.pid && status.synced && status.enrolled.len() == old.enrolled.len()
    };
    let status = mesh.until_status("another agent has taken over", |status| {
        let entry = status.nodes.iter().find(|entry| entry.node == node);
        entry
            .and_then(|entry| entry.status.as_ref())
            .is_some_and(taken_over)
    });
    let entry = status.nodes.into_iter().find(|entry| entry.node == node);
    entry.unwrap().status.unwrap()
}
