//! Ports on the machine's loopback: they lead to workloads, under an identity of their own, and policy applies.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use crate::harness::{
    EDIT_PATIENCE, Mesh,
    objects::{allow, client, namespace, policy, server, spiffe_id},
    until,
};

const PORT: u16 = 8000;
const RELAY: &str = "heddle-system/publish";
const PATIENCE: Duration = Duration::from_secs(3);

#[test]
fn published_ports_obey_policy() {
    let [web, api] = [free_port(), free_port()];
    let published =
        |name: &str, port: u16| server(name, &[PORT], &format!("  publish: [\"{port}:{PORT}\"]\n"));
    let objects = [
        namespace("shop"),
        client("shop/client", ""),
        published("shop/web", web),
    ]
    .concat();
    let mesh = Mesh::start(
        "publish",
        &[("objects.yaml", &objects), ("policy.yaml", "")],
    );
    for host in [
        SocketAddr::from((Ipv4Addr::LOCALHOST, web)),
        (Ipv6Addr::LOCALHOST, web).into(),
    ] {
        until_answered(host);
    }
    let host = SocketAddr::from((Ipv4Addr::LOCALHOST, web));
    let flow = mesh.until_flow(
        "the relay's connection is recorded",
        &["--to", "shop/web"],
        |flow| flow.source.identity == spiffe_id(RELAY),
    );
    assert_eq!(flow.verdict, api::report::Verdict::Allowed, "{flow:#?}");

    // A policy that does not name the relay keeps the machine out, and lets it in once it does.
    mesh.write(
        "policy.yaml",
        &policy("shop/web", "web", &allow(&["shop/client"])),
    );
    until(
        "who is on the machine is kept out",
        EDIT_PATIENCE,
        || match greeting(host) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            other => Err(format!("{other:?}")),
        },
    );
    mesh.until_flow(
        "the refusal is recorded",
        &["--to", "shop/web", "--verdict", "denied"],
        |flow| {
            flow.source.identity == spiffe_id(RELAY) && flow.policy.as_deref() == Some("shop/web")
        },
    );
    mesh.write(
        "policy.yaml",
        &policy("shop/web", "web", &allow(&["shop/client", RELAY])),
    );
    until_answered(host);

    a_taken_port_is_said_and_hurts_nobody(&mesh, published, host, api);

    // Gone from the file, the port is closed.
    let objects = [
        namespace("shop"),
        client("shop/client", ""),
        server("shop/web", &[PORT], ""),
    ]
    .concat();
    mesh.write("objects.yaml", &objects);
    until("the port is closed", EDIT_PATIENCE, || {
        match greeting(host) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
}

fn a_taken_port_is_said_and_hurts_nobody(
    mesh: &Mesh,
    published: impl Fn(&str, u16) -> String,
    host: SocketAddr,
    api: u16,
) {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let taken_port = taken.local_addr().unwrap().port();
    let objects = [
        published("shop/late", taken_port),
        published("shop/api", api),
    ];
    mesh.write("more.yaml", &objects.concat());
    let status = mesh.until_status("the taken port is said", |status| {
        status.published.iter().any(|entry| entry.error.is_some())
    });
    for entry in &status.published {
        assert_eq!(
            entry.error.is_some(),
            entry.host_port == taken_port,
            "{entry:?}"
        );
    }
    let entry = status
        .published
        .iter()
        .find(|entry| entry.error.is_some())
        .unwrap();
    let said = entry.error.as_ref().unwrap();
    assert!(said.contains(&taken_port.to_string()), "{said}");
    assert_eq!(entry.workload, "shop/late");
    until_answered(host);
    until_answered((Ipv4Addr::LOCALHOST, api).into());
    mesh.write("more.yaml", "");
    mesh.until_status("the problem is gone", |status| status.published.len() == 1);
}

/// The server's greeting through a published port.
fn greeting(host: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&host, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"ping\n")?;
    let mut line = String::new();
    match BufReader::new(stream).read_line(&mut line)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(line),
    }
}

fn until_answered(host: SocketAddr) {
    until("the published port answers", EDIT_PATIENCE, || {
        greeting(host).map_err(|error| format!("{host}: {error}"))
    });
}

/// A port that nobody has now; it is the test's luck that nobody takes it in the next second.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}
