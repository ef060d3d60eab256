//! Two nodes: each has an agent of its own, which knows its own workloads and how to reach the others.

use std::collections::BTreeSet;

use api::report::FlowEventKind;

use crate::harness::{
    Mesh,
    objects::{client, namespace, server, service, service_for},
};

#[test]
fn nodes_are_apart_and_know_it() {
    let objects = [
        namespace("shop"),
        client("shop/here", "  node: node-1\n"),
        client("shop/there", "  node: node-2\n"),
        server("shop/web", &[8000], "  node: node-1\n"),
        service("shop/web", &[(80, 8000)]),
        service_for("shop/each", "web", &[(80, 8000)], "  clusterIP: None\n"),
        server("shop/spread", &[8000], "  replicas: 4\n"),
        service_for(
            "shop/local",
            "spread",
            &[(80, 8000)],
            "  internalTrafficPolicy: Local\n",
        ),
    ]
    .concat();
    let mesh = Mesh::start_with("nodes", &[("objects.yaml", &objects)], &["--nodes", "2"]);

    // Workloads are where they should be, replicas on both; each agent has its own.
    let node_of = |uid: &str| mesh.replica(uid).status.node;
    assert_eq!(node_of("shop/web-0"), "node-1");
    assert_eq!(node_of("shop/there-0"), "node-2");
    let spread: Vec<String> = (0..4)
        .map(|index| node_of(&format!("shop/spread-{index}")))
        .collect();
    assert_eq!(
        spread.iter().filter(|node| *node == "node-1").count(),
        2,
        "{spread:?}"
    );
    let [one, two] = ["node-1", "node-2"].map(|node| mesh.node(node));
    assert_ne!(one.pid, two.pid);
    assert!(one.synced && two.synced);
    let [of_one, of_two] = [&one, &two].map(|node| BTreeSet::from_iter(&node.enrolled));
    assert!(of_one.is_disjoint(&of_two), "{of_one:?} {of_two:?}");
    assert_eq!(of_one.len() + of_two.len(), 7);

    // On one node all is well, whatever the other does.
    mesh.connect("here", "web", 80).greeting();

    // The other node is one tunnel away, and everything says so.
    let addresses = mesh.addresses("shop/web-0");
    for host in [
        "web".to_owned(),
        addresses[0].to_string(),
        addresses[1].to_string(),
    ] {
        let port = if host == "web" { 80 } else { 8000 };
        mesh.connect("there", &host, port).greeting();
        let answer = mesh.explain("there", &format!("[{host}]:{port}"));
        assert_eq!(answer.path, "tunnel", "{answer:#?}");
        assert_eq!(answer.endpoints[0].node, "node-1", "{answer:#?}");
    }
    let flow = mesh.until_flow(
        "the connection is recorded",
        &["--from", "shop/there"],
        |flow| {
            flow.event == FlowEventKind::Opened
                && flow.path == "tunnel"
                && flow.service.as_deref() == Some("shop/web")
        },
    );
    assert_eq!(
        (flow.event, flow.node.as_str()),
        (FlowEventKind::Opened, "node-2")
    );
    assert_eq!(flow.destination.workload, "web", "{flow:#?}");

    // A service of this node's replicas only needs no tunnel.
    for (client, node) in [("here", "node-1"), ("there", "node-2")] {
        for attempt in mesh.attempts(client, "any", "local", 80, 20) {
            let pod = &attempt.greeting().pod;
            assert_eq!(node_of(&format!("shop/{pod}")), node);
        }
    }

    // Names are the same everywhere.
    for name in ["web", "each", "web-0.each"] {
        let [here, there] = ["here", "there"].map(|client| mesh.resolve(client, name).addresses);
        assert!(!here.is_empty(), "{name}");
        assert_eq!(here, there, "{name}");
    }
    a_place_that_is_not_there_is_said(&mesh);
}

fn a_place_that_is_not_there_is_said(mesh: &Mesh) {
    mesh.write("lost.yaml", &client("shop/lost", "  node: node-9\n"));
    let status = mesh.until_status("the problem is shown", |status| !status.problems.is_empty());
    let said = &status.problems[0];
    assert!(
        said.contains("node-9") && said.contains("one of node-1, node-2"),
        "{said}"
    );
    assert!(
        status
            .workloads
            .iter()
            .all(|replica| replica.workload != "lost")
    );
}
