//! The stress run, both ends as real processes over loopback: it goes through, and it finds what is wrong.

#![allow(
    clippy::unwrap_used,
    reason = "clippy allows it in tests, but not in the helpers of integration tests"
)]

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::{Child, Command, Output, Stdio},
    thread,
};

use serde_json::Value;

/// Data ports and the control port.
const PORTS: u16 = 5;

struct Server {
    process: Child,
    port: u16,
}

impl Server {
    /// Takes the first ports that are free.
    fn start() -> Self {
        let first = 20_000 + (std::process::id() % 1_000) as u16 * 10;
        (first..first + 1_000)
            .step_by(10)
            .find_map(Self::start_on)
            .expect("one of a hundred ranges of ports is free")
    }

    fn start_on(port: u16) -> Option<Self> {
        let mut process = bench()
            .args(["stress-server", "--port", &port.to_string()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        if line.starts_with("listening") {
            return Some(Self { process, port });
        }
        process.wait().unwrap();
        None
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn bench() -> Command {
    Command::new(env!("CARGO_BIN_EXE_heddle-bench"))
}

fn stress(target: &str, arguments: &[&str]) -> Output {
    // Tests run beside each other; their source ports should not meet too often.
    let source_ports = 4_000 + (std::process::id() % 60) * 200;
    bench()
        .args(["stress", "--connect", target])
        .args(["--source-ports", &source_ports.to_string()])
        .args(arguments)
        .output()
        .unwrap()
}

fn outcome(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", stderr(output)))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn two_thousand_connections_are_byte_exact() {
    let server = Server::start();
    let target = format!("localhost:{}", server.port);
    let output = stress(&target, &["--connections", "2000", "--seed", "3"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let outcome = outcome(&output);
    assert_eq!(outcome["connections"], 2000, "{outcome}");
    assert_eq!(outcome["mismatches"], 0, "{outcome}");
    // TCP never sends a blocking call back before its time.
    assert_eq!(outcome["early_wakeups"], 0, "{outcome}");
    let scenarios = outcome["scenarios"].as_object().unwrap();
    assert_eq!(scenarios.len(), 20, "{outcome}");
    for direction in ["sent", "received"] {
        assert!(
            outcome[direction].as_u64().unwrap() > 10_000_000,
            "{outcome}"
        );
    }
}

#[test]
fn one_connection_alone_is_the_same_again() {
    let server = Server::start();
    let target = format!("127.0.0.1:{}", server.port);
    let [first, second] = [(), ()].map(|()| {
        let output = stress(&target, &["--seed", "3", "--only", "4711"]);
        assert!(output.status.success(), "{}", stderr(&output));
        outcome(&output)
    });
    for field in ["scenarios", "sent", "received", "connections"] {
        assert_eq!(first[field], second[field], "{first} {second}");
    }
}

/// What a faulty path does to a chunk of bytes from the server.
type Fault = fn(&mut Vec<u8>) -> bool;

#[test]
fn a_path_that_spoils_bytes_is_found_out() {
    let faults: [(&str, Fault); 4] = [
        ("wrong byte at offset", |chunk| {
            chunk[0] ^= 0x40;
            true
        }),
        // A hole.
        ("wrong byte at offset", |chunk| {
            chunk.remove(0);
            true
        }),
        ("wrong byte at offset", |chunk| {
            chunk.reverse();
            true
        }),
        // The connection ends where more should come.
        ("too early", |chunk| {
            chunk.truncate(chunk.len() / 2);
            false
        }),
    ];
    for (what, fault) in faults {
        let server = Server::start();
        let path = faulty_path(server.port, fault);
        let target = format!("127.0.0.1:{path}");
        let arguments = ["--connections", "1000", "--scenario", "download"];
        let output = stress(&target, &[&arguments[..], &["--concurrency", "1"]].concat());
        assert!(!output.status.success());
        assert!(outcome(&output)["mismatches"].as_u64().unwrap() > 0);
        let said = stderr(&output);
        assert!(
            said.contains(what) && said.contains("(download, client, seed 1)"),
            "{said}"
        );
    }
}

/// Relays all ports; on the first of them, every connection's third chunk suffers `fault`. Returns the first port.
fn faulty_path(server: u16, fault: Fault) -> u16 {
    let (first, listeners) = (0..100)
        .find_map(|_| {
            let first = TcpListener::bind(("127.0.0.1", 0)).unwrap();
            let port = first.local_addr().unwrap().port();
            let others = (1..PORTS).map(|offset| TcpListener::bind(("127.0.0.1", port + offset)));
            let listeners: Result<Vec<_>, _> = [Ok(first)].into_iter().chain(others).collect();
            Some((port, listeners.ok()?))
        })
        .expect("five ports in a row are free");
    for (listener, offset) in listeners.into_iter().zip(0..) {
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let spoil = (offset == 0).then_some(fault);
                thread::spawn(move || relay(&stream, server + offset, spoil));
            }
        });
    }
    first
}

fn relay(client: &TcpStream, port: u16, fault: Option<Fault>) {
    let server = TcpStream::connect(("127.0.0.1", port)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| copy(client, &server, None));
        copy(&server, client, fault);
    });
}

/// Errors are those of a connection that ended early, as the fault makes it.
fn copy(mut from: &TcpStream, mut to: &TcpStream, fault: Option<Fault>) {
    let mut buffer = vec![0; 16 << 10];
    for index in 0.. {
        let count = from.read(&mut buffer).unwrap_or(0);
        let mut chunk = buffer[..count].to_vec();
        let goes_on = match fault {
            Some(fault) if index == 2 && count > 0 => fault(&mut chunk),
            _ => true,
        };
        if to.write_all(&chunk).is_err() || count == 0 || !goes_on {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    if fault.is_some() {
        let _ = from.shutdown(Shutdown::Both);
    }
}

#[test]
fn a_server_that_is_not_there_is_an_error() {
    // Port 1 is reserved and never served.
    let output = stress("127.0.0.1:1", &["--connections", "1"]);
    assert!(!output.status.success());
    assert!(output.stdout.is_empty());
}
