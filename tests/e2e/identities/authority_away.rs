//! The authority is out of reach: what is in force goes on, also over an agent's end.

use std::{fs, net::SocketAddr, process::Command};

use linux::pidfd::PidFd;
use nix::sys::signal::Signal;
use serde::Deserialize;

use super::two_nodes;
use crate::harness::{Mesh, leftovers};

const NODES: [&str; 2] = ["node-1", "node-2"];

/// Of an agent's settings, where it finds the authority.
#[derive(Deserialize)]
struct Settings {
    authority: Authority,
}

#[derive(Deserialize)]
struct Authority {
    address: SocketAddr,
}

#[test]
fn agents_come_back_with_their_certificates_while_the_authority_is_away() {
    let mesh = two_nodes("authority-away", &[]);
    mesh.connect("alice", "web", 80).greeting();
    let before = ["shop/alice", "shop/web"].map(|account| mesh.serial(account));
    assert!(before.iter().all(Option::is_some), "{before:?}");
    for node in NODES {
        take_the_authority_away(&mesh, node);
        let old = mesh.node(node).pid;
        PidFd::open(old).unwrap().signal(Signal::SIGKILL).unwrap();
        mesh.until_status("another agent has taken over", |status| {
            let of_node = status.nodes.iter().find(|entry| entry.node == node);
            let status = of_node.and_then(|entry| entry.status.as_ref());
            status.is_some_and(|agent| agent.pid != old && agent.synced)
        });
        // Both as a client and as a server, with a tunnel that is new.
        for _ in 0..5 {
            mesh.connect("alice", "web", 80).greeting();
        }
    }
    let after = ["shop/alice", "shop/web"].map(|account| mesh.serial(account));
    assert_eq!(after, before);
}

/// From a node's own namespace no way leads to it any more.
fn take_the_authority_away(mesh: &Mesh, node: &str) {
    let path = leftovers::run_dir(mesh.name()).join(format!("nodes/{node}/agent.json"));
    let settings: Settings = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let address = settings.authority.address.ip();
    let route = || {
        Command::new("ip")
            .args(["route", "add", "unreachable", &address.to_string()])
            .status()
    };
    let status = mesh.namespace_of_node(node).run(route).unwrap().unwrap();
    assert!(status.success(), "{status}");
}
