//! Enemies with certificates in order who ask for too much: streams, resets, handshakes, bytes that they never read. What they
//! can take is bounded, and nobody else notices.

use std::{collections::BTreeMap, fs, thread, time::Duration};

use serde::Deserialize;

use super::{FAILURES, Forger, PORT, VICTIM, argument, one, two_nodes};
use crate::harness::{
    Mesh, PATIENCE,
    objects::{spiffe_id, workload},
    probe::Talk,
    until,
};

/// What a connection may have at once, and more than that.
const STREAMS: u64 = 200;
const MORE_STREAMS: u64 = 250;
/// RFC 9113, section 7.
const REFUSED_STREAM: &str = "reset 7";
const ENHANCE_YOUR_CALM: u32 = 11;
/// More than may be in a handshake on all workers of a small machine.
const STALLED: usize = 700;
/// Within this handshakes must end (5 s), with room for a busy machine.
const HANDSHAKE: f64 = 9.0;
/// Deaf streams, and what the agent may hold for each: 512 KiB to be sent, and some for itself.
const DEAF: u64 = 32;
const HELD: u64 = 640 << 10;
/// What all floods together may make the agent grow by.
const ALL_HELD: u64 = 160 << 20;
/// What the deaf peer uploads: as much as it may without an answer.
const UPLOAD: u64 = 4 << 20;
/// Until a peer counts as gone that does not answer PINGs: 10 s and 20 s, with room for a busy machine.
const DEAF_PATIENCE: Duration = Duration::from_secs(45);

/// Sends to everyone without end and reads nothing; in a file is how much it was.
const POUR: &str = "
import os, socket, threading
total, lock = 0, threading.Lock()
def tell():
  with open('/tmp/draft', 'w') as draft:
    draft.write(str(total))
  os.rename('/tmp/draft', '/tmp/total')
def pour(sock):
  global total
  try:
    while True:
      count = sock.send(bytes(65536))
      with lock:
        total += count
        tell()
  except OSError:
    pass
server = socket.create_server(('::', 9000), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128)
tell()
while True:
  threading.Thread(target=pour, args=(server.accept()[0],), daemon=True).start()
";

#[test]
fn floods_are_bounded_and_disturb_nobody() {
    let mesh = two_nodes("floods");
    let pour = serde_json::to_string(POUR).unwrap();
    let ready = "  node: node-1\n  readinessProbe: {exec: {command: [test, -e, /tmp/total]}, periodSeconds: 0.2}\n";
    mesh.write(
        "pour.yaml",
        &workload("shop/pour", &format!("[python3, -c, {pour}]"), ready),
    );
    mesh.until_replica("shop/pour-0", "is ready", |replica| replica.status.ready);
    let forger = Forger::of(&mesh);
    let alice = forger.sign(&spiffe_id("shop/alice"));
    let alice = argument(&alice);
    let good = mesh.request_loop("alice", "web", 80);
    let near = mesh.request_loop("near", "web", 80);
    let web = mesh.addresses("shop/web-0")[0].to_string();
    let target = format!("{web}:{PORT}");

    let deaf = Deaf::start(&mesh, alice);

    let count = MORE_STREAMS.to_string();
    let flood: Flood = one(&mesh.enemy(&["many_streams", &web, alice, &target, &count]));
    let answered = |answer: &str| flood.answers.get(answer).copied().unwrap_or_default();
    assert_eq!(answered("status 200"), STREAMS, "{flood:?}");
    assert_eq!(
        answered(REFUSED_STREAM),
        MORE_STREAMS - STREAMS,
        "{flood:?}"
    );
    deaf.stays_bounded("streams");

    let labels = ["side=\"inbound\"", "kind=\"protocol\""];
    let before = mesh.metric(VICTIM, FAILURES, &labels);
    let resets: Resets = one(&mesh.enemy(&["many_resets", &web, alice, &target]));
    assert!(resets.ended, "{resets:?}");
    // What was said last may be lost with the connection.
    assert!(
        resets.goaway.is_none_or(|code| code == ENHANCE_YOUR_CALM),
        "{resets:?}"
    );
    mesh.until_counted(VICTIM, FAILURES, &labels, before);
    mesh.until_told(&resets.own, "a tunnel ended badly");
    deaf.stays_bounded("resets");

    handshakes_that_stall_make_room(&mesh, &web);
    deaf.stays_bounded("handshakes");
    deaf.end_given_up(&mesh);
    good.finish().all_succeeded();
    near.finish().all_succeeded();
}

fn handshakes_that_stall_make_room(mesh: &Mesh, web: &str) {
    let kinds = ["handshake-timeout", "too-many-handshakes"];
    let ended = || {
        let of_kind = |kind: &str| mesh.metric(VICTIM, FAILURES, &[&format!("kind=\"{kind}\"")]);
        kinds.map(of_kind).iter().sum::<u64>()
    };
    let before = ended();
    let mut stalled =
        Talk::with(mesh.spawn_enemy(super::LAIR, &["stall", web, &STALLED.to_string()]));
    assert_eq!(stalled.hear::<String>(), "stalled");
    // They hold whatever they can, and who comes now is served.
    mesh.connect("alice", "web", 80).greeting();
    let stalled: Stalled = stalled.hear();
    assert_eq!(stalled.closed, STALLED, "{stalled:?}");
    assert!(stalled.seconds < HANDSHAKE, "{stalled:?}");
    until("all are counted", PATIENCE, || match ended() - before {
        count if count >= STALLED as u64 => Ok(()),
        count => Err(count.to_string()),
    });
}

/// A peer that never reads what the program sends, and sends all it may.
struct Deaf {
    _talk: Talk,
    own: String,
    pid: u32,
    before: u64,
}

impl Deaf {
    fn start(mesh: &Mesh, certificate: &str) -> Self {
        let pid = mesh.node(VICTIM).pid;
        let before = resident(pid);
        let address = mesh.addresses("shop/pour-0")[0].to_string();
        let target = format!("{address}:9000");
        let (streams, upload) = (DEAF.to_string(), UPLOAD.to_string());
        let arguments = ["deaf", &address, certificate, &target, &streams, &upload];
        let mut talk = Talk::with(mesh.spawn_enemy(super::LAIR, &arguments));
        let told: Own = talk.hear();
        // The program is stopped by what nobody takes from it.
        let mut last = None;
        until("the program's sends come to a stop", PATIENCE, || {
            thread::sleep(Duration::from_millis(300));
            let now = poured(mesh);
            let stopped = now.is_some_and(|bytes| bytes > DEAF * (64 << 10)) && now == last;
            last = now;
            stopped.then_some(()).ok_or_else(|| format!("{now:?}"))
        });
        let grown = resident(pid).saturating_sub(before);
        eprintln!(
            "{:?} bytes were sent to a deaf peer; the agent grew by {grown}",
            last.unwrap()
        );
        assert!(grown < DEAF * HELD + 2 * UPLOAD, "{grown}");
        Self {
            _talk: talk,
            own: told.own,
            pid,
            before,
        }
    }

    /// What the agent has grown by since the beginning, for all that came after as well.
    fn stays_bounded(&self, flood: &str) {
        let grown = resident(self.pid).saturating_sub(self.before);
        eprintln!("after {flood} the agent has grown by {grown} bytes");
        assert!(grown < ALL_HELD, "{flood}: {grown}");
    }

    fn end_given_up(self, mesh: &Mesh) {
        let labels = ["side=\"inbound\"", "kind=\"ping-timeout\""];
        until("the deaf peer is given up", DEAF_PATIENCE, || {
            match mesh.metric(VICTIM, FAILURES, &labels) {
                0 => Err("it is not".to_owned()),
                _ => Ok(()),
            }
        });
        mesh.until_told(&self.own, "PING");
    }
}

/// What the program in `shop/pour` has sent so far.
fn poured(mesh: &Mesh) -> Option<u64> {
    let outcome = mesh.exec("pour", &["cat", "/tmp/total"]);
    outcome.stdout.trim().parse().ok()
}

/// Bytes of memory that a process has.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.unwrap().trim().trim_end_matches(" kB");
    kilobytes.parse::<u64>().unwrap() << 10
}

#[derive(Debug, Deserialize)]
struct Own {
    own: String,
}

#[derive(Debug, Deserialize)]
struct Flood {
    answers: BTreeMap<String, u64>,
}

#[derive(Debug, Deserialize)]
struct Resets {
    own: String,
    goaway: Option<u32>,
    ended: bool,
}

#[derive(Debug, Deserialize)]
struct Stalled {
    closed: usize,
    seconds: f64,
}
