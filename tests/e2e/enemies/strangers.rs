//! Strangers without TLS at a PERMISSIVE workload whose policy goes by addresses: what the kernel cannot judge is steered to
//! the agent, which lets in whom the policy names, under the address that is its own.

use std::{
    io::{self, BufRead, BufReader, Read as _},
    net::{IpAddr, SocketAddr, TcpStream},
    time::Duration,
};

use api::report::{FlowEventKind, FlowRecord};

use super::{Greeting, PORT};
use crate::harness::{
    EDIT_PATIENCE, Mesh,
    objects::{client, namespace, policy, server, service},
    until,
};

const FILE: &str = "blocks.yaml";
const PERMISSIVE: &str = "---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: peers, namespace: shop}
spec: {mtls: {mode: PERMISSIVE}}
";
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
const NODES: [&str; 2] = ["node-1", "node-2"];

#[test]
fn strangers_are_judged_by_their_address() {
    let objects = [
        namespace("shop"),
        server("shop/web", &[PORT], "  node: node-1\n"),
        service("shop/web", &[(80, PORT)]),
        client("shop/alice", "  node: node-2\n"),
        PERMISSIVE.to_owned(),
    ]
    .concat();
    let mesh = Mesh::start_with("blocks", &[("objects.yaml", &objects)], &["--nodes", "2"]);
    let web = mesh.addresses("shop/web-0");
    // Whom the kernel can judge by itself: nobody is asked for an address yet.
    let own = NODES.map(|node| web.map(|address| greeted(&mesh, node, address).unwrap().1.ip()));

    for (friend, other) in [(1, 0), (0, 1)] {
        mesh.write(FILE, &only(&own[friend]));
        for (index, address) in web.into_iter().enumerate() {
            let (friend_node, other_node) = (NODES[friend], NODES[other]);
            until(
                "the named address gets in, by the agent",
                EDIT_PATIENCE,
                || {
                    let (greeting, from) = greeted(&mesh, friend_node, address)
                        .map_err(|error| format!("{friend_node} {address}: {error}"))?;
                    assert_eq!(greeting.peer, own[friend][index]);
                    let told = mesh.flows(&["--to", "shop/web"]);
                    let told = told
                        .iter()
                        .any(|flow| is_of(flow, from) && flow.path == "agent");
                    told.then_some(())
                        .ok_or_else(|| "the kernel let it in".to_owned())
                },
            );
            until(
                "another address is refused",
                EDIT_PATIENCE,
                || match greeted(&mesh, other_node, address) {
                    Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
                    other => Err(format!("{other_node} {address}: {other:?}")),
                },
            );
            let flow = mesh.until_flow("the refusal is told", &["--to", "shop/web"], |flow| {
                flow.event == FlowEventKind::Refused
                    && flow.source.address == Some(own[other][index])
            });
            assert_eq!(flow.policy.as_deref(), Some("shop/blocks"), "{flow:#?}");
        }
    }
    // The tunnel's clients have addresses, too, and they are none of these.
    mesh.connect("alice", "web", 80).failed("ECONNREFUSED");
    a_stranger_is_sent_away_by_an_edit(&mesh, web[0], &own);
}

/// Also when it is in already.
fn a_stranger_is_sent_away_by_an_edit(mesh: &Mesh, web: IpAddr, own: &[[IpAddr; 2]; 2]) {
    let mut stream = mesh
        .namespace_of_node(NODES[0])
        .run(|| TcpStream::connect((web, PORT)))
        .unwrap()
        .unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line).unwrap();
    assert!(line.contains("web-0"), "{line:?}");
    mesh.write(FILE, &only(&own[1]));
    let error = stream.read(&mut [0]).expect_err("it was let stay");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let flow = mesh.until_flow("its end is told", &["--to", "shop/web"], |flow| {
        flow.event == FlowEventKind::Ended
    });
    assert_eq!(flow.policy.as_deref(), Some("shop/blocks"), "{flow:#?}");
}

/// Lets in these addresses and nobody else.
fn only(addresses: &[IpAddr]) -> String {
    let blocks: Vec<String> = addresses.iter().map(|one| format!("\"{one}\"")).collect();
    let blocks = blocks.join(", ");
    policy(
        "shop/blocks",
        "web",
        &format!("  rules:\n  - from:\n    - source: {{ipBlocks: [{blocks}]}}\n"),
    )
}

/// What the server says to somebody in a node's own namespace, and where that one comes from.
fn greeted(mesh: &Mesh, node: &str, address: IpAddr) -> io::Result<(Greeting, SocketAddr)> {
    let connect = || {
        let stream = TcpStream::connect_timeout(&SocketAddr::new(address, PORT), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let own = stream.local_addr()?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok((serde_json::from_str(&line)?, own))
    };
    mesh.namespace_of_node(node).run(connect).unwrap()
}

fn is_of(flow: &FlowRecord, from: SocketAddr) -> bool {
    flow.source.address == Some(from.ip()) && flow.source.port == from.port()
}
