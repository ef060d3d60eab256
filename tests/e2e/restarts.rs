//! The node agent may stop, be killed, and come back: connections follow the last policy all the while.

use std::{
    collections::BTreeSet,
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use api::report::NodeStatus;
use linux::pidfd::PidFd;
use nix::sys::signal::Signal;

use crate::harness::{
    Mesh, PATIENCE,
    objects::{allow, client, namespace, policy, server, service},
    probe::{Held, RequestLoop},
    until,
};

const FILE: &str = "policy.yaml";
const REFUSED: &str = "ECONNREFUSED";
const KILLS: u32 = 100;
/// Workloads of the mesh under load.
const ENROLLED: usize = 4;
/// How long the stranger waits for an answer that must not come.
const SILENCE: Duration = Duration::from_millis(20);

#[test]
fn connections_do_not_need_the_agent() {
    let objects = [
        namespace("shop"),
        client("shop/alice", ""),
        client("shop/bob", ""),
        server("shop/web", &[8000], "  replicas: 2\n"),
        service("shop/web", &[(80, 8000)]),
    ]
    .concat();
    let only_alice = policy("shop/web", "web", &allow(&["shop/alice"]));
    let both = policy("shop/web", "web", &allow(&["shop/alice", "shop/bob"]));
    let mesh = Mesh::start(
        "restarts",
        &[("objects.yaml", &objects), (FILE, &only_alice)],
    );
    let web = mesh.virtual_address("alice", "web");
    let mut held = mesh.hold("alice", &web, 80);
    held.exchange("before");

    // Away, and for as long as we like.
    let agent = PidFd::open(mesh.node("node-1").pid).unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    held.exchange("stopped");
    mesh.connect("alice", &web, 80).greeting();
    mesh.connect("bob", &web, 80).failed(REFUSED);
    agent.signal(Signal::SIGCONT).unwrap();

    killed_again_and_again(&mesh, &web, &mut held);
    one_try_is_one_refusal(&mesh);

    // The agent that came back follows edits: of policies, and of what runs.
    mesh.write(FILE, &both);
    mesh.until_explained("bob", "web:80", "policy-allow");
    mesh.connect("bob", &web, 80).greeting();
    mesh.write(FILE, &only_alice);
    mesh.until_explained("bob", "web:80", "no-allow-matched");
    mesh.connect("bob", &web, 80).failed(REFUSED);
    mesh.write("more.yaml", &client("shop/carol", ""));
    mesh.until_replica("shop/carol-0", "is ready", |replica| replica.status.ready);
    mesh.connect("carol", "web", 80).failed(REFUSED);
    held.exchange("after");
}

/// Under load all the while: who may is never refused, who may not never gets in, and names resolve.
fn killed_again_and_again(mesh: &Mesh, web: &str, held: &mut Held) {
    let attached = programs(&mesh.node("node-1"));
    let by_name = [
        mesh.request_loop("alice", "web", 80),
        mesh.request_loop("bob", "web", 80),
    ];
    let by_address = [
        mesh.request_loop("alice", web, 80),
        mesh.request_loop("bob", web, 80),
    ];
    let stranger = Stranger::start(mesh);
    let mut waits = Vec::new();
    for round in 0..KILLS {
        let killed = Instant::now();
        let node = kill_the_agent(mesh);
        waits.push(killed.elapsed());
        assert_eq!(programs(&node), attached, "round {round}");
        held.exchange(&format!("round {round}"));
    }
    waits.sort();
    eprintln!(
        "from kill to taken over: median {:?}, longest {:?}",
        waits[waits.len() / 2],
        waits[waits.len() - 1]
    );
    for [allowed, denied] in [by_name, by_address].map(|loops| loops.map(RequestLoop::finish)) {
        allowed.all_succeeded();
        denied.all_failed(REFUSED);
    }
    stranger.never_got_in();
}

/// Kills it as a crash would, and waits for the next one to have taken over.
fn kill_the_agent(mesh: &Mesh) -> NodeStatus {
    let old = mesh.node("node-1").pid;
    PidFd::open(old).unwrap().signal(Signal::SIGKILL).unwrap();
    let status = mesh.until_status("another agent has taken over", |status| {
        status.nodes[0].status.as_ref().is_some_and(|agent| {
            agent.pid != old && agent.synced && agent.enrolled.len() == ENROLLED
        })
    });
    status.nodes[0].status.clone().unwrap()
}

/// Somebody on the node's bridge who is no workload and knocks at every replica all the time.
struct Stranger {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, u64)>,
}

impl Stranger {
    fn start(mesh: &Mesh) -> Self {
        let namespace = mesh.namespace_of_node("node-1");
        let targets: Vec<SocketAddr> = ["shop/web-0", "shop/web-1"]
            .iter()
            .flat_map(|uid| mesh.addresses(uid))
            .map(|address| (address, 8000).into())
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let stop = Arc::clone(&stop);
            move || {
                let knock = || {
                    let (mut tried, mut got_in) = (0, 0);
                    while !stop.load(Ordering::Relaxed) {
                        for target in &targets {
                            tried += 1;
                            got_in +=
                                u64::from(TcpStream::connect_timeout(target, SILENCE).is_ok());
                        }
                    }
                    (tried, got_in)
                };
                namespace.run(knock).unwrap()
            }
        });
        Self { stop, thread }
    }

    fn never_got_in(self) {
        self.stop.store(true, Ordering::Relaxed);
        let (tried, got_in) = self.thread.join().unwrap();
        assert!(tried > 100 && got_in == 0, "{got_in} of {tried}");
    }
}

/// What is attached where; nothing is attached twice.
fn programs(node: &NodeStatus) -> BTreeSet<(String, String)> {
    let programs = &node.programs;
    let distinct: BTreeSet<_> = programs
        .iter()
        .map(|program| (program.program.clone(), program.target.clone()))
        .collect();
    assert_eq!(distinct.len(), programs.len(), "{programs:#?}");
    distinct
}

/// Two copies of a program would count, and record, twice.
fn one_try_is_one_refusal(mesh: &Mesh) {
    let refusals = || mesh.count("node-1", "no-allow-matched");
    let filter = ["--from", "shop/bob", "--verdict", "denied"];
    // By a replica's own address, which tells it from all that was tried before.
    let try_once = |replica: &str| {
        let address = mesh.addresses(&format!("shop/{replica}"))[0].to_string();
        mesh.connect("bob", &address, 8000).failed(REFUSED);
    };
    let records = |replica: &str| {
        let flows = mesh.flows(&filter);
        let of_try = flows
            .iter()
            .filter(|flow| flow.service.is_none() && flow.destination.pod == replica);
        match of_try.count() {
            0 => Err("no record".to_owned()),
            count => Ok(count),
        }
    };
    // The crowd before may have filled the ring buffer. Records come in order: when one of now is there, it is empty.
    until("the records have caught up", PATIENCE, || {
        try_once("web-1");
        records("web-1")
    });
    let before = refusals();
    try_once("web-0");
    assert_eq!(refusals(), before + 1);
    let count = until("the refusal is recorded", PATIENCE, || records("web-0"));
    assert_eq!(count, 1);
    // What happened while no agent was there to look has its names, too.
    for flow in mesh.flows(&filter) {
        assert_eq!(flow.policy.as_deref(), Some("shop/web"), "{flow:#?}");
        assert_eq!(flow.destination.workload, "web", "{flow:#?}");
    }
}
