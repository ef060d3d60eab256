//! Spliced connections: what a program sees of them, byte by byte, beside the same over TCP.
//!
//! Both ends are `programs/splice.py`. `client` and `web` ask for spliced connections; `tcp` does not, so its
//! connections to `web` are TCP's, and what is expected of them shows that the scenarios mean something.

use std::{path::Path, process::Command};

use api::report::FlowEventKind;
use linux::pidfd::PidFd;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::harness::{
    EDIT_PATIENCE, Mesh, leftovers,
    objects::{allow, client, namespace, policy, workload},
    probe::Talk,
    until,
};

const PROGRAM: &str = include_str!("programs/splice.py");
const DOCUMENT: &str = include_str!("../../docs/splice.md");
const PORT: u16 = 7000;
/// Beside it, a listener whose queue is full.
const NARROW: u16 = PORT + 1;
const SPLICED: &str = "client";
const PLAIN: &str = "tcp";
/// `SPLICE_WINDOW` of `kernel/bpf/splice.h`.
const WINDOW: u64 = 128 * 1024;
/// More than this cannot wait in a connection: the splice's window and what TCP buffers on both sides at the start.
const MOST_BUFFERED: u64 = 8 << 20;

#[test]
fn every_byte_arrives_in_order() {
    let mesh = mesh("splice-bytes");
    for workload in [SPLICED, PLAIN] {
        for family in ["4", "6", "mapped"] {
            for blocking in ["yes", "no"] {
                echo(&mesh, workload, family, blocking);
            }
        }
        let all = |scenario: &str, arguments: &[&str]| {
            let seen = run(&mesh, workload, scenario, "4", arguments);
            assert!(
                all_true(&seen),
                "{workload}: {scenario} {arguments:?}: {seen}"
            );
        };
        all("half_close", &[]);
        all("fast_open", &[]);
        all("reconnect", &[]);
        let seen = run(&mesh, workload, "switch", "6", &[]);
        assert!(seen["bad"].is_null() && seen["same"] == true, "{seen}");
        let seen = run(&mesh, workload, "early_send", "4", &[]);
        assert!(seen["early"] == true && seen["same"] == true, "{seen}");
        let seen = run(&mesh, workload, "port_reuse", "4", &[]);
        assert_eq!(seen["bad"].as_array().map(Vec::len), Some(0), "{seen}");
        assert_eq!(seen["kept"], 150, "{seen}");
    }
}

#[test]
fn a_reader_that_never_reads_blocks_its_writer() {
    let mesh = mesh("splice-block");
    for workload in [SPLICED, PLAIN] {
        for scenario in ["never_reads", "talks_and_never_reads"] {
            let seen = run(&mesh, workload, scenario, "4", &[]);
            let after = seen["blocked_after"].as_u64().unwrap();
            assert!(
                (WINDOW..MOST_BUFFERED).contains(&after),
                "{workload} {scenario}: {seen}"
            );
            assert_eq!(seen["size"], after, "{workload} {scenario}: {seen}");
            assert_eq!(seen["same"], true, "{workload} {scenario}: {seen}");
        }
    }
}

#[test]
fn whoever_leaves_is_missed() {
    let mesh = mesh("splice-leave");
    let gone = |error: &Value| error == "EPIPE" || error == "ECONNRESET";
    for workload in [SPLICED, PLAIN] {
        for how in ["close", "reset"] {
            let seen = run(&mesh, workload, "leaves", "4", &[how]);
            assert!(gone(&seen["send"]), "{workload} {how}: {seen}");
        }
        // A reset is a reset on either path.
        let seen = run(&mesh, workload, "leaves", "6", &["reset"]);
        assert_eq!(seen["heard"], "ECONNRESET", "{workload}: {seen}");
        let seen = run(&mesh, workload, "leaves_a_writer", "4", &[]);
        assert!(gone(&seen["send"]), "{workload}: {seen}");
        let seen = run(&mesh, workload, "after_shutdown", "4", &[]);
        assert_eq!(seen["send"], "EPIPE", "{workload}: {seen}");
        assert_eq!(seen["server"]["size"], 6, "{workload}: {seen}");
    }
}

#[test]
fn what_stays_different_is_documented() {
    let mesh = mesh("splice-differ");
    let plain = run(&mesh, PLAIN, "differences", "4", &[]);
    assert!(all_true(&plain), "{plain}");
    let spliced = run(&mesh, SPLICED, "differences", "4", &[]);
    for (name, as_in_tcp) in spliced.as_object().unwrap() {
        // One that is gone should go from the document.
        assert_eq!(as_in_tcp, false, "{name} is as in TCP: {spliced}");
        assert!(
            DOCUMENT.contains(&format!("| {name} |")),
            "{name} is not documented"
        );
    }
}

#[test]
fn a_destroyed_connection_stays_dead() {
    let mesh = mesh("splice-kill");
    for workload in [SPLICED, PLAIN] {
        let mut talk = talk(&mesh, workload, "destroyed");
        let port: u16 = talk.hear();
        destroy(&mesh, workload, port);
        talk.say("destroyed");
        let seen: Value = talk.hear();
        assert_eq!(seen["server"]["error"], "ECONNRESET", "{workload}: {seen}");
        assert_eq!(seen["late"]["received"], 0, "{workload}: {seen}");
        for error in [&seen["sends"], &seen["late"]["sends"]]
            .into_iter()
            .flat_map(|errors| errors.as_array().unwrap())
        {
            assert!(error.is_string() && error != "hangs", "{workload}: {seen}");
        }
    }
}

#[test]
fn policy_ends_a_spliced_connection() {
    let mesh = mesh("splice-policy");
    mesh.write(
        "policy.yaml",
        &policy("shop/web", "web", &allow(&["shop/client"])),
    );
    mesh.until_explained("client", &target(&mesh), "policy-allow");
    let mut held = talk(&mesh, SPLICED, "hold");
    assert_eq!(held.hear::<String>(), "connected");
    held.say("go");
    assert!(held.hear::<bool>());
    // What is open shows every byte that was spliced.
    let flows = mesh.flows(&["--open", "--from", "shop/client"]);
    let [open] = flows.as_slice() else {
        panic!("{flows:#?}");
    };
    assert!(open.spliced, "{open:#?}");
    assert_eq!(open.bytes_received, 2000, "{open:#?}");
    assert!(open.bytes_sent > 2000, "{open:#?}");

    mesh.write(
        "policy.yaml",
        &policy("shop/web", "web", &allow(&["shop/tcp"])),
    );
    let ended = mesh.until_flow("it is ended", &["--from", "shop/client"], |flow| {
        flow.event == FlowEventKind::Ended && flow.connection == open.connection
    });
    assert!(ended.spliced, "{ended:#?}");
    assert_eq!(ended.bytes_received, 2000, "{ended:#?}");
    assert_eq!(ended.bytes_sent, open.bytes_sent, "{ended:#?}");
    // Nothing is carried any more.
    held.say("go");
    let seen: Value = held.hear();
    assert!(seen == "ECONNABORTED" || seen == "ECONNRESET", "{seen}");
}

#[test]
fn asking_applies_to_new_connections_and_outlives_the_agent() {
    let mesh = mesh("splice-ask");
    let spliced = |workload: &str| {
        let seen = run(&mesh, workload, "echo", "4", &["no"]);
        closed(&mesh, workload, &seen)
    };
    let explained = |workload: &str| mesh.explain(workload, &target(&mesh)).endpoints[0].spliced;
    assert!(spliced(SPLICED) && explained(SPLICED));
    assert!(!spliced(PLAIN) && !explained(PLAIN), "both ends must ask");
    let mut held = talk(&mesh, SPLICED, "hold");
    assert_eq!(held.hear::<String>(), "connected");
    let mut exchange = || {
        held.say("go");
        assert!(held.hear::<bool>());
    };
    exchange();

    // The agent is killed: open connections go on, new ones are spliced, also under its successor.
    let old = mesh.node("node-1").pid;
    PidFd::open(old).unwrap().signal(Signal::SIGKILL).unwrap();
    exchange();
    mesh.until_status("another agent has taken over", |status| {
        let agent = status.nodes[0].status.as_ref();
        agent.is_some_and(|agent| agent.pid != old && agent.synced && agent.enrolled.len() == 3)
    });
    exchange();
    assert!(spliced(SPLICED));
    let programs = mesh.node("node-1").programs;
    let attached = programs.iter().filter(|one| one.program == "heddle_splice");
    assert_eq!(attached.count(), 1, "{programs:#?}");

    // Edits restart nothing, and leave open connections as they are.
    mesh.write(FILE, &objects(&["web", PLAIN]));
    until("the edit is in force", EDIT_PATIENCE, || {
        match (explained(SPLICED), explained(PLAIN)) {
            (false, true) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    assert!(!spliced(SPLICED) && spliced(PLAIN));
    exchange();
    for uid in ["shop/web-0", "shop/client-0", "shop/tcp-0"] {
        assert_eq!(mesh.replica(uid).status.restarts, 0, "{uid}");
    }
    assert_eq!(mesh.count("node-1", "not-spliced"), 0);
}

const FILE: &str = "objects.yaml";

fn mesh(topic: &str) -> Mesh {
    Mesh::start(topic, &[(FILE, &objects(&["web", SPLICED]))])
}

/// The server, by its own address.
fn target(mesh: &Mesh) -> String {
    format!("{}:{PORT}", mesh.addresses("shop/web-0")[0])
}

/// A server and two clients, of which `asking` ask for spliced connections.
fn objects(asking: &[&str]) -> String {
    let program = serde_json::to_string(PROGRAM).unwrap();
    let server = workload(
        "shop/web",
        &format!("[python3, \"-c\", {program}, serve, \"{PORT}\"]"),
        &format!(
            "  ports: [{{port: {PORT}}}, {{port: {NARROW}}}]\n  readinessProbe: {{tcpSocket: {{port: {PORT}}}, periodSeconds: 0.2}}\n"
        ),
    );
    let mut all = [
        namespace("shop"),
        server,
        client("shop/client", ""),
        client("shop/tcp", ""),
    ]
    .concat();
    for name in asking {
        let labels = format!("labels: {{app: {name}}}");
        assert!(all.contains(&labels));
        all = all.replace(
            &labels,
            &format!("{labels}, annotations: {{heddle.dev/splice: \"true\"}}"),
        );
    }
    all
}

/// Runs a scenario to its end.
#[track_caller]
fn run(mesh: &Mesh, workload: &str, scenario: &str, family: &str, arguments: &[&str]) -> Value {
    let mut all = command(mesh, scenario, family);
    all.extend(arguments.iter().map(|&argument| argument.to_owned()));
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let outcome = mesh.exec(workload, &all).success();
    serde_json::from_str(&outcome.stdout).unwrap_or_else(|error| panic!("{error}: {outcome:#?}"))
}

/// Starts a scenario that is spoken to.
fn talk(mesh: &Mesh, workload: &str, scenario: &str) -> Talk {
    let all = command(mesh, scenario, "4");
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    Talk::with(mesh.spawn_exec(workload, &all))
}

fn command(mesh: &Mesh, scenario: &str, family: &str) -> Vec<String> {
    let [v4, v6] = mesh
        .addresses("shop/web-0")
        .map(|address| address.to_string());
    let host = if family == "6" { v6 } else { v4 };
    [
        "python3",
        "-c",
        PROGRAM,
        "run",
        scenario,
        &host,
        &PORT.to_string(),
        family,
    ]
    .map(str::to_owned)
    .to_vec()
}

#[track_caller]
fn echo(mesh: &Mesh, workload: &str, family: &str, blocking: &str) {
    let seen = run(mesh, workload, "echo", family, &[blocking]);
    assert!(
        seen["bad"].is_null(),
        "{workload} {family} {blocking}: {seen}"
    );
    let spliced = closed(mesh, workload, &seen);
    assert_eq!(
        spliced,
        workload == SPLICED,
        "{workload} {family} {blocking}"
    );
}

/// Whether the echo's connection was spliced. Its record must have every byte.
#[track_caller]
fn closed(mesh: &Mesh, workload: &str, seen: &Value) -> bool {
    let from = format!("shop/{workload}");
    let record = mesh.until_flow("the connection's record", &["--from", &from], |flow| {
        flow.event == FlowEventKind::Closed
            && flow.bytes_sent == seen["sent"]
            && flow.bytes_received == seen["back"]
            && flow.source.port == seen["port"]
    });
    record.spliced
}

fn all_true(seen: &Value) -> bool {
    let seen = seen.as_object().unwrap();
    !seen.is_empty() && seen.values().all(|value| *value == Value::Bool(true))
}

/// Ends a connection from outside, as an operator (and a policy that turns against it) does: SOCK_DESTROY.
fn destroy(mesh: &Mesh, workload: &str, port: u16) {
    let cgroup = leftovers::cgroup_of(mesh.name());
    let inside = find_below(&cgroup, &format!("{workload}-0"))
        .and_then(|cgroup| leftovers::processes_below(&cgroup).pop_first())
        .unwrap_or_else(|| panic!("{workload} has no process below {}", cgroup.display()));
    let filter = format!("sport = :{port}");
    let output = Command::new("nsenter")
        .args(["-t", &inside.to_string(), "-n", "ss", "-HK", "-t", &filter])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains(&port.to_string()),
        "{output:?}"
    );
}

/// The folder of this name (or with it after a namespace's).
fn find_below(folder: &Path, name: &str) -> Option<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    for entry in folders {
        let found = entry.file_name();
        if found.to_str().is_some_and(|found| found.ends_with(name)) {
            return Some(entry.path());
        }
        if let Some(found) = find_below(&entry.path(), name) {
            return Some(found);
        }
    }
    None
}
