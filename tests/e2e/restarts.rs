//! The node agent may stop, be killed, and come back: connections follow the last policy all the while.

use std::collections::BTreeSet;

use linux::pidfd::PidFd;
use nix::sys::signal::Signal;

use crate::harness::{
    EDIT_PATIENCE, Mesh, PATIENCE,
    objects::{allow, client, namespace, policy, server, service},
    until,
};

const FILE: &str = "policy.yaml";
const REFUSED: &str = "ECONNREFUSED";
const ROUNDS: u32 = 5;

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

    let attached = programs(&mesh);
    let allowed = mesh.request_loop("alice", &web, 80);
    let denied = mesh.request_loop("bob", &web, 80);
    for round in 0..ROUNDS {
        kill_the_agent(&mesh);
        held.exchange(&format!("round {round}"));
        mesh.connect("alice", &web, 80).greeting();
        mesh.connect("bob", &web, 80).failed(REFUSED);
        until("names resolve again", PATIENCE, || {
            let resolved = mesh.resolve("alice", "web");
            if resolved.addresses.contains(&web) {
                Ok(())
            } else {
                Err(format!("{resolved:?}"))
            }
        });
        assert_eq!(programs(&mesh), attached, "round {round}");
    }
    allowed.finish().all_succeeded();
    denied.finish().all_failed(REFUSED);
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

/// Kills it as a crash would, and waits for the next one to have taken over.
fn kill_the_agent(mesh: &Mesh) {
    let old = mesh.node("node-1").pid;
    PidFd::open(old).unwrap().signal(Signal::SIGKILL).unwrap();
    mesh.until_status("another agent has taken over", |status| {
        status.nodes[0]
            .status
            .as_ref()
            .is_some_and(|agent| agent.pid != old && agent.synced && agent.enrolled.len() == 4)
    });
}

/// What is attached where; nothing is attached twice.
fn programs(mesh: &Mesh) -> BTreeSet<(String, String)> {
    let programs = mesh.node("node-1").programs;
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
    let before = refusals();
    // By a replica's own address, which tells it from all that was tried before.
    let address = mesh.addresses("shop/web-0")[0].to_string();
    mesh.connect("bob", &address, 8000).failed(REFUSED);
    assert_eq!(refusals(), before + 1);
    let filter = ["--from", "shop/bob", "--verdict", "denied"];
    let count = until("the refusal is recorded", EDIT_PATIENCE, || {
        let flows = mesh.flows(&filter);
        match flows.iter().filter(|flow| flow.service.is_none()).count() {
            0 => Err("no record".into()),
            count => Ok(count),
        }
    });
    assert_eq!(count, 1);
    // What happened while no agent was there to look has its names, too.
    for flow in mesh.flows(&filter) {
        assert_eq!(flow.policy.as_deref(), Some("shop/web"), "{flow:#?}");
        assert_eq!(flow.destination.workload, "web", "{flow:#?}");
    }
}
