//! The identity socket as workloads use it: real processes in real cgroups, the PyPI client `spiffe`, and an SDS client.
//!
//! This program is also the SDS client: it runs itself again inside a workload's cgroup.
#![allow(clippy::unwrap_used)] // A failed test is what a panic is for.

mod sds;
mod source;
mod world;

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    time::Instant,
};

use identity::{
    socket::{Limits, Refusal},
    workload_api::proto::{
        JwtsvidRequest, X509svidRequest, spiffe_workload_api_client::SpiffeWorkloadApiClient,
    },
};
use libtest_mimic::{Arguments, Trial};
use tonic::Code;
use world::{Inside, PATIENCE, World, id};

fn main() {
    match std::env::args().nth(1).as_deref() {
        Some("sds") => return sds::connect(),
        Some("leave") => return sds::connect_and_leave(),
        Some("inherited") => return sds::go_on(),
        _ => {}
    }
    let test = |name: &str, body: fn()| {
        Trial::test(name, move || {
            body();
            Ok(())
        })
    };
    libtest_mimic::run(
        &Arguments::from_args(),
        vec![
            test(
                "a_standard_client_gets_its_identity",
                a_standard_client_gets_its_identity,
            ),
            test(
                "rotations_and_new_roots_are_pushed",
                rotations_and_new_roots_are_pushed,
            ),
            test("anothers_identity_is_refused", anothers_identity_is_refused),
            test("strangers_are_refused", strangers_are_refused),
            test(
                "who_connected_counts_not_who_holds_the_socket",
                who_connected_counts_not_who_holds_the_socket,
            ),
            test("calls_are_checked", calls_are_checked),
            test("connections_are_bounded", connections_are_bounded),
            test(
                "streams_go_on_with_the_next_server",
                streams_go_on_with_the_next_server,
            ),
            test("noise_disturbs_nobody", noise_disturbs_nobody),
        ],
    )
    .exit();
}

fn a_standard_client_gets_its_identity() {
    let world = World::new();
    world.source.rotate(&id("b"));
    let serial = world.source.rotate(&id("a"));
    let mut client = world.python("a", &["everything"]);
    let all = client.json();
    let a = id("a").to_string();
    for field in ["id", "token", "locally", "remotely"] {
        assert_eq!(all[field], a, "{all}");
    }
    assert_eq!(all["serial"], serial, "{all}");
    assert_eq!(
        (&all["svids"], &all["roots"]),
        (&1.into(), &1.into()),
        "{all}"
    );
    for reason in ["not for the audience", "signature does not hold"] {
        let refused = client.json();
        let error = refused["error"].as_str().unwrap();
        assert!(error.contains(reason), "{error}");
    }
    assert!(client.end().status.success());
}

fn rotations_and_new_roots_are_pushed() {
    let world = World::new();
    let mut workload_api = world.python("a", &["stream"]);
    let mut sds = world.sds("a", &["default", "ROOTCA"]);
    // They ask before there is anything: the roots come first, the certificate when it is signed.
    assert_eq!(sds.line(), "ROOTCA roots 1");
    let first = world.source.rotate(&id("a"));
    assert_eq!(workload_api.json()["serial"], first);
    let mut secrets = [sds.line(), sds.line()];
    secrets.sort();
    assert_eq!(
        secrets,
        [
            "ROOTCA roots 1".into(),
            format!("default certificate {first}")
        ]
    );

    let second = world.source.rotate(&id("a"));
    assert_eq!(workload_api.json()["serial"], second);
    assert_eq!(sds.line(), "ROOTCA roots 1");
    assert_eq!(sds.line(), format!("default certificate {second}"));
    // Another's rotation is no news.
    world.source.rotate(&id("b"));
    world.source.add_root();
    assert_eq!(workload_api.json()["roots"], 2);
    assert_eq!(sds.line(), "ROOTCA roots 2");
    assert_eq!(sds.line(), format!("default certificate {second}"));
}

fn anothers_identity_is_refused() {
    let world = World::new();
    for name in ["a", "b"] {
        world.source.rotate(&id(name));
    }
    let (a, b) = (id("a").to_string(), id("b").to_string());
    let mut own = world.python("a", &["token", &a]);
    assert_eq!(own.json()["result"], a);
    let mut others = world.python("a", &["token", &b]);
    let refused = others.json();
    let error = refused["error"].as_str().unwrap();
    assert!(
        error.contains("PERMISSION_DENIED") && error.contains(&a),
        "{error}"
    );
    assert_eq!(world.refusals(Refusal::NotTheCallers), 1);

    let mut own = world.sds("a", &[&a]);
    assert!(own.line().starts_with(&format!("{a} certificate ")));
    for names in [
        vec![b.as_str()],
        vec!["default", &b],
        vec!["spiffe://elsewhere"],
    ] {
        let mut others = world.sds("a", &names);
        let line = others.line();
        assert!(line.starts_with("PermissionDenied"), "{names:?}: {line}");
    }
    assert_eq!(world.refusals(Refusal::NotTheCallers), 4);
}

fn strangers_are_refused() {
    let world = World::new();
    world.source.rotate(&id("a"));
    let mut stranger = world.python("c", &["certificate"]);
    let refused = stranger.json();
    let error = refused["error"].as_str().unwrap();
    assert!(error.contains("PERMISSION_DENIED"), "{error}");
    let line = world.sds("c", &["default"]).line();
    assert!(line.starts_with("PermissionDenied"), "{line}");
    assert_eq!(world.refusals(Refusal::UnknownCaller), 2);
    // One that the node does not have any more is a stranger as well.
    world.workloads.replace([]);
    let line = world.sds("a", &["default"]).line();
    assert!(line.starts_with("PermissionDenied"), "{line}");
}

/// The kernel is asked late, on purpose: meanwhile the process moves or ends.
fn who_connected_counts_not_who_holds_the_socket() {
    let world = World::new();
    let serial = world.source.rotate(&id("b"));
    world.source.rotate(&id("a"));
    world.attesting.send_replace(false);
    let mut moved = world.sds("a", &["default"]);
    world
        .cgroup("b")
        .child("app")
        .unwrap()
        .add_pid(moved.child.id())
        .unwrap();
    world.attesting.send_replace(true);
    assert_eq!(moved.line(), format!("default certificate {serial}"));

    // It connects, hands the socket to a child and ends. Its number is free again, the child is not who connected.
    world.attesting.send_replace(false);
    let mut heir = world.heir("a", &["default"]);
    assert_eq!(heir.line(), "inherited");
    heir.child.wait().unwrap();
    world.attesting.send_replace(true);
    let line = heir.line();
    assert!(line.starts_with("PermissionDenied"), "{line}");
    assert_eq!(world.refusals(Refusal::UnknownCaller), 1);
}

fn calls_are_checked() {
    let world = World::new();
    let _inside = Inside::of(&world, "b");
    world.source.rotate(&id("b"));
    let socket = format!("unix:{}", world.socket().display());
    world.runtime.block_on(async {
        let channel = tonic::transport::Endpoint::try_from(socket)
            .unwrap()
            .connect()
            .await
            .unwrap();
        let mut client = SpiffeWorkloadApiClient::new(channel);
        let error = client.fetch_x509svid(X509svidRequest {}).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument);
        assert!(error.message().contains("workload.spiffe.io"), "{error}");
        let ask = |audience: Vec<String>| {
            let mut request = tonic::Request::new(JwtsvidRequest {
                audience,
                spiffe_id: String::new(),
            });
            request
                .metadata_mut()
                .insert("workload.spiffe.io", "true".parse().unwrap());
            request
        };
        for audience in [
            vec![],
            vec![String::new()],
            vec!["db".into(), " ".into()],
            vec!["a".repeat(1025)],
            vec!["db".into(); 17],
        ] {
            let error = client.fetch_jwtsvid(ask(audience)).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        }
        let error = client
            .fetch_jwtsvid(ask(vec!["a".repeat(70_000)]))
            .await
            .unwrap_err();
        assert_eq!(error.code(), Code::OutOfRange, "{error}");
        let token = client.fetch_jwtsvid(ask(vec!["db".into()])).await.unwrap();
        assert_eq!(token.into_inner().svids[0].spiffe_id, id("b").as_str());
    });
    assert_eq!(world.refusals(Refusal::NoSecurityHeader), 1);
}

/// What a client says whose connection was closed: how far it had come decides which of these it is.
fn is_cut_off(line: &str) -> bool {
    let said = ["Unavailable", "Unknown", "Internal", "Cancelled"];
    said.iter().any(|code| line.starts_with(code))
}

fn connections_are_bounded() {
    let world = World::with(Limits {
        connections: 3,
        connections_per_workload: 2,
        streams_per_connection: 32,
    });
    for name in ["a", "b"] {
        world.source.rotate(&id(name));
    }
    let mut streams = [(); 2].map(|()| world.sds("a", &["default"]));
    for stream in &mut streams {
        assert_eq!(stream.line().split(' ').next(), Some("default"));
    }
    // Its third is closed; another workload is not affected, until there are too many in all.
    assert!(is_cut_off(&world.sds("a", &["default"]).line()));
    let mut other = world.sds("b", &["default"]);
    assert!(other.line().starts_with("default certificate"));
    assert!(is_cut_off(&world.sds("b", &["default"]).line()));
    assert!(world.refusals(Refusal::TooManyConnections) >= 2);
    // A place is free again when its connection ends.
    let [gone, _stays] = &mut streams;
    gone.child.kill().unwrap();
    gone.child.wait().unwrap();
    let start = Instant::now();
    while !world
        .sds("a", &["default"])
        .line()
        .starts_with("default certificate")
    {
        assert!(start.elapsed() < PATIENCE);
    }
}

fn streams_go_on_with_the_next_server() {
    let mut world = World::new();
    let first = world.source.rotate(&id("a"));
    let mut stream = world.python("a", &["stream"]);
    assert_eq!(stream.json()["serial"], first);
    let mut sds = world.sds("a", &["default"]);
    assert_eq!(sds.line(), format!("default certificate {first}"));
    let start = Instant::now();
    world.stop();
    assert!(start.elapsed().as_secs() < 4, "streams end at once");
    assert!(sds.line().starts_with("Unavailable"));
    // Nobody serves: who connects waits in the socket.
    let mut waiting = world.sds("a", &["default"]);
    let second = world.source.rotate(&id("a"));
    world.start();
    assert_eq!(stream.json()["serial"], second);
    assert_eq!(waiting.line(), format!("default certificate {second}"));
}

fn noise_disturbs_nobody() {
    let world = World::new();
    let _inside = Inside::of(&world, "b");
    let serial = world.source.rotate(&id("a"));
    let mut connections: Vec<UnixStream> = Vec::new();
    for bytes in [
        b"".as_slice(),
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\x00\x00\x00\x00\x00\x00",
        &[0; 4096],
    ] {
        let mut connection = UnixStream::connect(world.socket()).unwrap();
        // Closed already is as good.
        let _ = connection.write_all(bytes);
        connections.push(connection);
    }
    assert_eq!(
        world.sds("a", &["default"]).line(),
        format!("default certificate {serial}")
    );
    for connection in &mut connections[1..] {
        connection.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = Vec::new();
        match connection.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}
