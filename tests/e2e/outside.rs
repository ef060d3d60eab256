//! Strangers: connections that come to a workload past the mesh, from the nodes' own namespaces.

use std::{
    io::{self, BufRead, BufReader},
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::Duration,
};

use crate::harness::{
    EDIT_PATIENCE, Mesh,
    objects::{allow, client, namespace, policy, server, service},
    until,
};

const FILE: &str = "peers.yaml";
const PORT: u16 = 8000;
/// For datagrams: the server's program does not listen there.
const DATAGRAM_PORT: u16 = 8001;
/// A packet that is dropped is never answered: this long is waited for an answer.
const SILENCE: Duration = Duration::from_millis(700);

fn peers(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: peers, namespace: shop}}
spec: {{mtls: {{mode: {mode}}}}}
"
    )
}

#[test]
fn strangers_get_in_only_where_they_may() {
    let objects = [
        namespace("shop"),
        client("shop/client", "  node: node-1\n"),
        server("shop/web", &[PORT], "  node: node-1\n"),
        service("shop/web", &[(80, PORT)]),
    ]
    .concat();
    let mesh = Mesh::start_with(
        "outside",
        &[("objects.yaml", &objects), (FILE, &peers("STRICT"))],
        &["--nodes", "2"],
    );
    // STRICT: not from the node's own namespace, not from another node's.
    let addresses = mesh.addresses("shop/web-0");
    let everywhere = || {
        ["node-1", "node-2"]
            .into_iter()
            .flat_map(|node| addresses.map(|address| (node, address)))
    };
    for (node, address) in everywhere() {
        let before = mesh.count("node-1", "peer-not-attested");
        assert_silence(&mesh, node, address);
        assert!(
            mesh.count("node-1", "peer-not-attested") > before,
            "{node} {address}"
        );
    }
    let flow = mesh.until_flow("the stranger is recorded", &["--to", "shop/web"], |flow| {
        flow.reason == "peer-not-attested" && flow.source.identity.is_empty()
    });
    assert_eq!(flow.destination.workload, "web", "{flow:#?}");
    a_datagram_is_counted_and_dropped(&mesh, addresses[0]);
    mesh.connect("client", "web", 80).greeting();

    // PERMISSIVE: from everywhere.
    mesh.write(FILE, &peers("PERMISSIVE"));
    for (node, address) in everywhere() {
        until_answered(&mesh, node, address);
    }
    // But what names its callers knows no strangers.
    mesh.write(
        "policy.yaml",
        &policy("shop/only", "web", &allow(&["shop/client"])),
    );
    for (node, address) in everywhere() {
        until_silent(&mesh, node, address);
    }
    mesh.connect("client", "web", 80).greeting();
    mesh.write("policy.yaml", "");
    until_answered(&mesh, "node-1", addresses[0]);

    // And back.
    mesh.write(FILE, &peers("STRICT"));
    for (node, address) in everywhere() {
        until_silent(&mesh, node, address);
    }
    mesh.connect("client", "web", 80).greeting();
}

/// What a connection from a node's namespace meets: the server's greeting, or an error.
fn try_from(mesh: &Mesh, node: &str, address: IpAddr) -> io::Result<String> {
    let connect = || {
        let stream = TcpStream::connect_timeout(&SocketAddr::new(address, PORT), SILENCE)?;
        stream.set_read_timeout(Some(SILENCE))?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    };
    mesh.namespace_of_node(node).run(connect).unwrap()
}

#[track_caller]
fn assert_silence(mesh: &Mesh, node: &str, address: IpAddr) {
    let error = try_from(mesh, node, address).expect_err("a stranger got in");
    assert_eq!(
        error.kind(),
        io::ErrorKind::TimedOut,
        "{node} {address}: {error}"
    );
}

fn until_answered(mesh: &Mesh, node: &str, address: IpAddr) {
    until("a stranger gets in", EDIT_PATIENCE, || {
        try_from(mesh, node, address).map_err(|error| format!("{node} {address}: {error}"))
    });
}

fn until_silent(mesh: &Mesh, node: &str, address: IpAddr) {
    until(
        "a stranger gets nothing",
        EDIT_PATIENCE,
        || match try_from(mesh, node, address) {
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(()),
            other => Err(format!("{node} {address}: {other:?}")),
        },
    );
}

fn a_datagram_is_counted_and_dropped(mesh: &Mesh, address: IpAddr) {
    // Somebody listens, so that the packet meets a socket.
    let mut listener = mesh.talk("web", "datagrams", &[&DATAGRAM_PORT.to_string()]);
    assert_eq!(listener.hear::<String>(), "listening");
    let before = mesh.count("node-1", "peer-not-attested");
    let send = || {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.send_to(b"hello", (address, DATAGRAM_PORT))
    };
    mesh.namespace_of_node("node-1").run(send).unwrap().unwrap();
    until("the datagram is counted", EDIT_PATIENCE, || {
        match mesh.count("node-1", "peer-not-attested") {
            now if now > before => Ok(()),
            now => Err(now.to_string()),
        }
    });
    assert_eq!(listener.finish::<u32>(), 0, "a datagram got in");
}
