//! A workload's program starts only when its policy is in the kernel, whatever happened before: its very first act
//! is decided like every other.

use std::{thread, time::Duration};

use api::pod::PodPhase;
use linux::pidfd::PidFd;
use nix::sys::signal::Signal;
use serde::Deserialize;

use crate::harness::{
    Mesh, PATIENCE,
    objects::{PROBE_PATH, allow, namespace, policy, server, service, workload},
    until,
};

const FILE: &str = "eager.yaml";
/// How long a replica that must not start is watched.
const WATCH: Duration = Duration::from_secs(2);
const STARTS: u32 = 6;

/// What a replica met as the first thing it did.
#[derive(Debug, Deserialize)]
struct First {
    round: String,
    /// All that the forbidden calls came to.
    denied: Vec<String>,
    allowed: Option<String>,
    /// How often both were called until the allowed one answered.
    tries: u32,
}

/// Replicas that begin with a forbidden call and an allowed one.
fn eager(replicas: u32, round: u32) -> String {
    workload(
        "shop/eager",
        &format!("[python3, {PROBE_PATH}, first, closed, open, \"80\"]"),
        &format!("  replicas: {replicas}\n  env: [{{name: ROUND, value: \"{round}\"}}]\n"),
    )
}

#[test]
fn the_first_act_of_a_program_is_under_policy() {
    let objects = [
        namespace("shop"),
        server("shop/open", &[8000], ""),
        service("shop/open", &[(80, 8000)]),
        policy("shop/open", "open", &allow(&["shop/eager"])),
        server("shop/closed", &[8000], ""),
        service("shop/closed", &[(80, 8000)]),
        policy("shop/closed", "closed", &allow(&["shop/open"])),
    ]
    .concat();
    let mesh = Mesh::start("starts", &[("objects.yaml", &objects)]);
    mesh.write(FILE, &eager(4, 0));
    check(&mesh, 4, 0);

    // The same places again, and new ones.
    for round in 1..STARTS {
        mesh.write(FILE, &eager(4, round));
        check(&mesh, 4, round);
    }
    mesh.write(FILE, &eager(0, STARTS));
    mesh.until_status("they are gone", |status| {
        let mut replicas = status.workloads.iter();
        replicas.all(|replica| replica.workload != "eager")
    });
    mesh.write(FILE, &eager(4, STARTS));
    check(&mesh, 4, STARTS);

    without_the_agent_nothing_new_starts(&mesh);

    // As after a reboot: nothing is in the kernel any more, and all start at the same time.
    mesh.run("down", &[]).success();
    assert_eq!(mesh.leftovers(), Vec::<String>::new());
    mesh.up(&[]);
    acts(&mesh, 6, STARTS);
}

fn without_the_agent_nothing_new_starts(mesh: &Mesh) {
    let agent = PidFd::open(mesh.node("node-1").pid).unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    mesh.write(FILE, &eager(6, STARTS));
    let new = ["shop/eager-4", "shop/eager-5"];
    let waits = |replica: &api::report::Replica| {
        let said = replica.status.message.as_deref().unwrap_or_default();
        replica.status.phase == PodPhase::Pending
            && said.contains("waits for the agent of node node-1")
    };
    for uid in new {
        mesh.until_replica(uid, "waits and says why", waits);
    }
    thread::sleep(WATCH);
    for uid in new {
        let replica = mesh.replica(uid);
        assert!(waits(&replica), "{replica:#?}");
        assert_eq!(first_acts(mesh, uid), Vec::<String>::new());
    }
    agent.signal(Signal::SIGCONT).unwrap();
    check(mesh, 6, STARTS);
}

/// As [`acts`], with both servers ready: the first try is decided.
fn check(mesh: &Mesh, replicas: u32, round: u32) {
    for first in acts(mesh, replicas, round) {
        assert_eq!(first.tries, 1, "{first:?}");
    }
}

/// All replicas have started in this round, and none of their starts so far met anything but policy.
fn acts(mesh: &Mesh, replicas: u32, round: u32) -> Vec<First> {
    let mut all = Vec::new();
    for index in 0..replicas {
        let uid = format!("shop/eager-{index}");
        let what = format!("{uid} has started in round {round}");
        let lines = until(&what, PATIENCE, || {
            let lines = first_acts(mesh, &uid);
            let last = lines.last().map(|line| parse(line).round);
            if last == Some(round.to_string()) {
                Ok(lines)
            } else {
                Err(format!("{lines:?}"))
            }
        });
        for line in lines {
            let first = parse(&line);
            assert_eq!(first.denied, ["ECONNREFUSED"], "{uid}: {first:?}");
            assert_eq!(first.allowed, None, "{uid}: {first:?}");
            all.push(first);
        }
    }
    all
}

fn parse(line: &str) -> First {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}

/// What a replica has written.
fn first_acts(mesh: &Mesh, uid: &str) -> Vec<String> {
    let outcome = mesh.run("logs", &[uid]);
    outcome.stdout.lines().map(str::to_owned).collect()
}
