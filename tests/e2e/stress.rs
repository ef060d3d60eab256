//! Every byte of very many connections is the right one, whatever programs do with their sockets: short and duplex
//! connections, half-closes, resets, slow readers, reused ports. What is done is `heddle-bench stress`'s business.

use std::{path::PathBuf, process::Stdio};

use api::report::FlowEventKind;
use serde::Deserialize;

use crate::harness::{
    Mesh, Outcome, heddle,
    objects::{allow, client, namespace, policy, service, workload},
};

/// Connections per mode, if `SOAK_CONNECTIONS` says nothing else.
const CONNECTIONS: u64 = 100_000;
const FIRST_PORT: u16 = 7100;
/// Four for data, one to ask how it went.
const PORTS: u16 = 5;

/// What `heddle-bench stress` prints.
#[derive(Debug, Deserialize)]
struct Account {
    connections: u64,
    scenarios: std::collections::BTreeMap<String, u64>,
    sent: u64,
    received: u64,
    early_wakeups: u64,
    mismatches: u64,
}

#[test]
fn a_hundred_thousand_connections_are_byte_exact() {
    let mesh = mesh("stress", "");
    let account = stress(&mesh, 1);
    // The bytes are TCP's from end to end: a blocking call that returns early would be ours.
    assert_eq!(account.early_wakeups, 0, "{account:?}");
    for node in mesh.status().nodes {
        assert_eq!(node.status.unwrap().problems, Vec::<String>::new());
    }
}

#[test]
fn so_are_a_hundred_thousand_spliced_ones() {
    let mesh = mesh("stress-splice", r#"heddle.dev/splice: "true""#);
    stress(&mesh, 2);
    // They were spliced, and all found room.
    mesh.until_flow("a spliced connection", &["--from", "shop/client"], |flow| {
        flow.spliced && flow.event == FlowEventKind::Closed
    });
    assert_eq!(mesh.count("node-1", "not-spliced"), 0);
    for node in mesh.status().nodes {
        assert_eq!(node.status.unwrap().problems, Vec::<String>::new());
    }
}

/// A server and a client whose objects bear `annotations`, under a policy that lets the client in.
fn mesh(topic: &str, annotations: &str) -> Mesh {
    let control = FIRST_PORT + PORTS - 1;
    let ports: Vec<(u16, u16)> = (FIRST_PORT..FIRST_PORT + PORTS)
        .map(|port| (port, port))
        .collect();
    let server = workload(
        "shop/server",
        &format!(
            "[{}, stress-server, --port={FIRST_PORT}]",
            program().display()
        ),
        // The control port alone takes a connection that asks nothing.
        &format!("  readinessProbe: {{tcpSocket: {{port: {control}}}, periodSeconds: 0.2}}\n"),
    );
    let objects = [
        namespace("shop"),
        annotated(&server, annotations),
        annotated(&client("shop/client", ""), annotations),
        service("shop/server", &ports),
        policy("shop/server", "server", &allow(&["shop/client"])),
    ]
    .concat();
    Mesh::start(topic, &[("objects.yaml", &objects)])
}

/// The same workload with annotations, in flow style: `heddle.dev/NAME: "VALUE"`.
fn annotated(workload: &str, annotations: &str) -> String {
    if annotations.is_empty() {
        return workload.to_owned();
    }
    let bare = "labels: {app:";
    assert!(workload.contains(bare), "{workload}");
    workload.replace(bare, &format!("annotations: {{{annotations}}}, {bare}"))
}

fn stress(mesh: &Mesh, seed: u64) -> Account {
    let wanted = std::env::var("SOAK_CONNECTIONS").map_or(CONNECTIONS, |text| {
        text.parse().expect("SOAK_CONNECTIONS is a number")
    });
    let [seed, connections] = [seed, wanted].map(|number| number.to_string());
    let target = format!("server:{FIRST_PORT}");
    let program = program();
    let command = [
        program.to_str().unwrap(),
        "stress",
        "--connect",
        &target,
        "--connections",
        &connections,
        "--seed",
        &seed,
    ];
    // Its progress, and what is wrong, are for who watches.
    let output = mesh
        .command("exec")
        .args(["client", "--"])
        .args(command)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let outcome = Outcome::from(output);
    println!("{}", outcome.stdout);
    let account: Account = serde_json::from_str(&outcome.success().stdout).unwrap();
    assert_eq!(account.connections, wanted, "{account:?}");
    assert_eq!(account.mismatches, 0, "{account:?}");
    assert_eq!(account.scenarios.len(), 20, "{account:?}");
    let gigabyte = 1 << 30;
    assert!(
        account.sent > gigabyte && account.received > gigabyte,
        "{account:?}"
    );
    account
}

/// Built beside the command under test. Workloads see it by the same path, as it is not in a folder of their own.
fn program() -> PathBuf {
    let path = heddle().with_file_name("heddle-bench");
    assert!(
        path.is_file(),
        "{} is not built: run `cargo build --release --bin heddle-bench` first, or `make test`",
        path.display()
    );
    path
}
