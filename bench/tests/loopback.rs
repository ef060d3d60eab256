//! Both ends of every measurement, as real processes over loopback.

#![allow(
    clippy::unwrap_used,
    reason = "clippy allows it in tests, but not in the helpers of integration tests"
)]

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use serde_json::Value;

/// A running server, ended with the test.
struct Server {
    process: Child,
    port: u16,
}

impl Server {
    /// Takes the first pair of ports that is free.
    fn start() -> Self {
        let first = 20_000 + (std::process::id() % 10_000) as u16;
        (first..first + 200)
            .step_by(2)
            .find_map(Self::start_on)
            .expect("one of a hundred pairs of ports is free")
    }

    fn start_on(port: u16) -> Option<Self> {
        let mut process = bench()
            .args(["server", "--port", &port.to_string()])
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

    fn measure(&self, host: &str, mode: &str, size: u32) -> Value {
        let output = client(&format!("{host}:{}", self.port), mode, size);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
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

fn client(target: &str, mode: &str, size: u32) -> std::process::Output {
    bench()
        .args(["client", "--mode", mode, "--connect", target])
        .args(["--size", &size.to_string(), "--seconds", "0.3"])
        .output()
        .unwrap()
}

#[test]
fn ping_pong_gives_latencies() {
    let server = Server::start();
    for (host, size) in [("127.0.0.1", 64), ("[::1]", 4096)] {
        let measurement = server.measure(host, "pingpong", size);
        let p50 = measurement["p50_ns"].as_u64().unwrap();
        let p99 = measurement["p99_ns"].as_u64().unwrap();
        assert!(p50 > 0 && p50 <= p99, "{measurement}");
        assert!(measurement["messages_per_second"].as_f64().unwrap() > 0.0);
        assert_eq!(measurement["size"], size);
    }
}

#[test]
fn bulk_counts_every_byte() {
    let server = Server::start();
    let measurement = server.measure("127.0.0.1", "bulk", 128 * 1024);
    assert!(measurement["bytes_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn connections_are_counted_without_errors() {
    let server = Server::start();
    let measurement = server.measure("[::1]", "connect", 64);
    assert!(measurement["connections_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(measurement["errors"], 0);
}

#[test]
fn a_server_that_is_not_there_is_an_error() {
    // Port 1 is reserved and never served.
    for mode in ["pingpong", "bulk", "connect"] {
        let output = client("127.0.0.1:1", mode, 64);
        assert!(!output.status.success(), "{mode}");
        assert!(output.stdout.is_empty(), "{mode}");
    }
}

/// The whole of `direct` but for the mesh: real namespaces, alternating rounds, the report.
#[test]
fn plain_tcp_compared_with_itself_gives_every_figure() {
    let output = bench()
        .args(["direct", "--control", "--rounds", "1", "--seconds", "0.2"])
        .args(["-o", "json"])
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let figures: Value = serde_json::from_slice(&output.stdout).unwrap();
    let comparisons = figures["comparisons"].as_array().unwrap();
    let names: Vec<_> = comparisons
        .iter()
        .map(|line| format!("{} {}", line["scenario"], line["metric"]).replace('"', ""))
        .collect();
    assert_eq!(
        names,
        [
            "ping-pong 64 B p50",
            "ping-pong 64 B p99",
            "ping-pong 4096 B p50",
            "ping-pong 4096 B p99",
            "bulk throughput",
            "new connections rate",
        ]
    );
    for line in comparisons {
        for side in 0..2 {
            assert!(line["medians"][side].as_f64().unwrap() > 0.0, "{line}");
        }
    }
}

#[test]
fn several_connections_add_up() {
    let server = Server::start();
    let target = format!("127.0.0.1:{}", server.port);
    for (mode, figure) in [
        ("bulk", "bytes_per_second"),
        ("connect", "connections_per_second"),
    ] {
        let output = bench()
            .args(["client", "--mode", mode, "--connect", &target])
            .args(["--connections", "4", "--size", "4096", "--seconds", "0.2"])
            .output()
            .unwrap();
        let measurement: Value = serde_json::from_slice(&output.stdout).unwrap();
        let seconds = measurement["seconds"].as_f64().unwrap();
        let counted = measurement[figure].as_f64().unwrap() * seconds;
        // The warm-up is in one of them only.
        assert!(measurement["operations"].as_f64().unwrap() > counted);
        assert_eq!(measurement["errors"], 0);
    }
}

#[test]
fn idle_connections_are_held_until_standard_input_ends() {
    let server = Server::start();
    let mut client = bench()
        .args(["client", "--mode", "idle", "--connections", "20"])
        .args(["--connect", &format!("127.0.0.1:{}", server.port)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(client.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let measurement: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(measurement["operations"], 20);
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", client.id())).unwrap();
    assert!(descriptors.count() >= 20, "they are closed already");
    drop(client.stdin.take());
    assert!(client.wait().unwrap().success());
}
