//! Whole meshes on a real kernel, with a stand-in for the node agent that allows every workload it hears
//! of. This program is also the containers' init, the agent, the guardian and the relay: it runs itself again.
#![allow(clippy::unwrap_used)] // A failed test is what a panic is for.

mod mesh;
mod roles;

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use api::pod::{PodPhase, ProbeAction, RestartPolicy};
use libtest_mimic::{Arguments, Trial};
use linux::pidfd::PidFd;
use mesh::{Mesh, pod, probe, shell};
use nix::sys::signal::Signal;
use runtime::publish::PublishedPort;

fn main() {
    roles::play();
    let test = |name: &str, body: fn()| {
        Trial::test(name, move || {
            body();
            Ok(())
        })
    };
    libtest_mimic::run(
        &Arguments::from_args(),
        vec![
            test("pods_start_change_and_stop", pods_start_change_and_stop),
            test("ends_are_told_apart", ends_are_told_apart),
            test("probes_decide", probes_decide),
            test("agents_may_die", agents_may_die),
            test("ports_are_published", ports_are_published),
            test(
                "a_killed_supervisor_leaves_nothing",
                a_killed_supervisor_leaves_nothing,
            ),
            test("fifty_pods_start_quickly", fifty_pods_start_quickly),
            test("limits_hold", limits_hold),
        ],
    )
    .exit();
}

fn pods_start_change_and_stop() {
    let mesh = Mesh::start(2);
    let serve = "echo I am $NAME; exec python3 -m http.server 80";
    let mut first = shell("shop", "web-0", "node-1", serve);
    first.env.insert("NAME".into(), "one".into());
    first.readiness = Some(probe(ProbeAction::Http {
        port: 80,
        path: "/etc/hosts".into(),
        headers: Vec::new(),
    }));
    let second = shell("shop", "web-1", "node-2", "sleep 1000");
    mesh.sync(vec![first.clone(), second.clone()]);
    let status = mesh.until("shop/web-0", |status| status.ready);
    assert_eq!(status.phase, PodPhase::Running);
    assert_eq!(status.addresses[0].to_string(), "10.244.0.2");
    mesh.until("shop/web-1", |status| status.ready);
    assert!(mesh.log("shop/web-0").starts_with("I am one\n"));
    let pid = mesh.pid("shop/web-0");

    // From another node's pod, over the fabric.
    let fetch = "python3 -c 'import urllib.request as u; print(u.urlopen(\"http://10.244.0.2/etc/hostname\").read().decode(), end=\"\")'";
    assert_eq!(mesh.exec("shop/web-1", fetch), ("web-0\n".into(), 0));

    // Labels are no reason to restart; the environment is, and the place stays.
    first.labels.insert("version".into(), "2".into());
    mesh.sync(vec![first.clone(), second]);
    assert_eq!(mesh.pid("shop/web-0"), pid);
    first.env.insert("NAME".into(), "two".into());
    first.template_hash = "two".into();
    mesh.sync(vec![first]);
    mesh.until_gone("shop/web-1");
    let status = mesh.until("shop/web-0", |status| {
        status.ready && mesh.try_pid("shop/web-0") != Some(pid)
    });
    assert_eq!(status.addresses[0].to_string(), "10.244.0.2");
    assert_eq!(status.restarts, 0);
    assert!(mesh.log("shop/web-0").contains("I am two\n"));
    mesh.end();
}

fn ends_are_told_apart() {
    let mesh = Mesh::start(1);
    let ending = |name: &str, script: &str, policy| {
        let mut pod = shell("shop", name, "node-1", script);
        pod.restart_policy = policy;
        pod
    };
    let mut missing = pod("shop", "missing-0", "node-1", &["no-such-program"]);
    missing.restart_policy = RestartPolicy::Never;
    let mut refused = shell("shop", "refused-0", "node-1", "sleep 1000");
    refused.service_account = roles::REFUSED.into();
    mesh.sync(vec![
        ending("done-0", "exit 0", RestartPolicy::OnFailure),
        ending("failed-0", "exit 3", RestartPolicy::Never),
        ending("crash-0", "kill -SEGV $$", RestartPolicy::Always),
        missing,
        refused,
    ]);
    mesh.until("shop/done-0", |status| status.phase == PodPhase::Succeeded);
    let status = mesh.until("shop/failed-0", |status| status.phase == PodPhase::Failed);
    assert_eq!(status.message.as_deref(), Some("exit code 3"));
    let status = mesh.until("shop/crash-0", |status| {
        status.phase == PodPhase::BackOff && status.restarts == 1
    });
    assert_eq!(status.message.as_deref(), Some("exit code 139 (signal 11)"));
    let status = mesh.until("shop/missing-0", |status| status.phase == PodPhase::Failed);
    assert!(
        status
            .message
            .unwrap()
            .contains("command not found: no-such-program")
    );
    assert!(
        mesh.log("shop/missing-0")
            .contains("command not found: no-such-program")
    );
    let status = mesh.until("shop/refused-0", |status| {
        status
            .message
            .as_ref()
            .is_some_and(|message| message.contains("refused by the agent"))
    });
    assert_eq!(status.phase, PodPhase::Pending);
    assert!(mesh.runtime().exec_spec("shop/refused-0").is_err());
    mesh.end();
}

fn probes_decide() {
    let mesh = Mesh::start(1);
    let mut slow = shell(
        "shop",
        "slow-0",
        "node-1",
        "trap 'rm /tmp/ready; while true; do sleep 0.1; done' USR1; touch /tmp/ready; while true; do sleep 0.1; done",
    );
    slow.readiness = Some(probe(ProbeAction::Exec {
        command: ["test", "-e", "/tmp/ready"].map(String::from).into(),
    }));
    let mut dead = shell(
        "shop",
        "dead-0",
        "node-1",
        "trap 'exit 0' TERM; while true; do sleep 0.1; done",
    );
    dead.liveness = Some(probe(ProbeAction::Tcp { port: 9 }));
    let mut open = shell(
        "shop",
        "open-0",
        "node-1",
        "exec python3 -m http.server 8080",
    );
    open.liveness = Some(probe(ProbeAction::Tcp { port: 8080 }));
    open.liveness.as_mut().unwrap().initial_delay = Duration::from_secs(1);
    open.readiness = Some(probe(ProbeAction::Tcp { port: 8080 }));
    mesh.sync(vec![slow, dead, open]);
    mesh.until("shop/slow-0", |status| status.ready);
    assert_eq!(mesh.exec("shop/slow-0", "pkill -o -USR1 sh").1, 0);
    let status = mesh.until("shop/slow-0", |status| !status.ready);
    assert!(
        status
            .message
            .unwrap()
            .starts_with("not ready: command `test -e /tmp/ready`")
    );
    let status = mesh.until("shop/dead-0", |status| status.restarts > 0);
    assert!(
        status
            .message
            .unwrap()
            .contains("liveness probe failed: TCP connection to port 9")
    );
    mesh.until("shop/open-0", |status| status.ready && status.restarts == 0);
    mesh.end();
}

const KILLS: u32 = 9;

fn agents_may_die() {
    let mesh = Mesh::start(1);
    mesh.sync(vec![shell("shop", "old-0", "node-1", "sleep 1000")]);
    mesh.until("shop/old-0", |status| status.ready);
    let pid = mesh.pid("shop/old-0");
    let state = || mesh.runtime().agent("node-1").unwrap().borrow().clone();
    let mut pods = vec![shell("shop", "old-0", "node-1", "sleep 1000")];
    let start = Instant::now();
    for round in 0..KILLS {
        let agent = state().pid.unwrap();
        PidFd::open(agent).unwrap().signal(Signal::SIGKILL).unwrap();
        pods.push(shell(
            "shop",
            &format!("new-{round}"),
            "node-1",
            "sleep 1000",
        ));
        mesh.sync(pods.clone());
        // It is not ready before an agent that has heard of everything has heard of it, too.
        mesh.until(&format!("shop/new-{round}"), |status| status.ready);
        assert_eq!(mesh.pid("shop/old-0"), pid);
        assert_ne!(state().pid, Some(agent));
        assert_eq!(state().restarts, round + 1);
    }
    // Waits that double from 50 ms would come to this; who had taken over is started again at once.
    let doubling = Duration::from_millis(50) * (2u32.pow(KILLS) - 1);
    assert!(start.elapsed() < doubling / 2, "{:?}", start.elapsed());
    mesh.end();
}

fn ports_are_published() {
    let mesh = Mesh::start(1);
    mesh.sync(vec![shell(
        "shop",
        "web-0",
        "node-1",
        "cd /etc; exec python3 -m http.server 80",
    )]);
    let target = SocketAddr::new(
        mesh.until("shop/web-0", |status| status.ready).addresses[0],
        80,
    );
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let [taken_port, host_port] =
        [&taken, &free].map(|listener| listener.local_addr().unwrap().port());
    drop(free);
    let ports = [host_port, taken_port].map(|host_port| PublishedPort { host_port, target });
    let errors = mesh.runtime().publish(&ports);
    assert_eq!(errors.len(), 1);
    assert_eq!(errors[0].host_port(), taken_port);
    mesh.until("heddle-system/publish", |status| status.ready);
    let fetch = || {
        let mut stream = TcpStream::connect(("127.0.0.1", host_port))?;
        stream.write_all(b"GET /hostname HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text).map(|_| text)
    };
    let start = Instant::now();
    let answer = loop {
        match fetch() {
            Ok(text) => break text,
            // The server may not be listening yet.
            Err(error) => assert!(start.elapsed() < Duration::from_secs(10), "{error}"),
        }
    };
    assert!(answer.ends_with("web-0\n"), "{answer}");
    mesh.runtime().publish(&[]);
    mesh.until_gone("heddle-system/publish");
    TcpStream::connect(("127.0.0.1", host_port)).unwrap_err();
    mesh.end();
}

fn a_killed_supervisor_leaves_nothing() {
    roles::kill_a_supervisor();
}

fn fifty_pods_start_quickly() {
    let mesh = Mesh::start(1);
    let start = Instant::now();
    mesh.sync(
        (0..50)
            .map(|number| {
                shell(
                    "load",
                    &format!("pod-{number}"),
                    "node-1",
                    "exec sleep 1000",
                )
            })
            .collect(),
    );
    mesh.until_all(|all| all.len() == 50 && all.values().all(|status| status.ready));
    println!("50 pods in {:?}", start.elapsed());
    assert!(
        start.elapsed() < Duration::from_secs(10),
        "{:?}",
        start.elapsed()
    );
    let addresses: BTreeSet<_> = mesh
        .statuses()
        .into_values()
        .flat_map(|status| status.addresses)
        .collect();
    assert_eq!(addresses.len(), 100);
    let start = Instant::now();
    mesh.end();
    println!("gone in {:?}", start.elapsed());
}

fn limits_hold() {
    let mesh = Mesh::start(1);
    let mut greedy = pod(
        "shop",
        "greedy-0",
        "node-1",
        &["python3", "-c", "x = bytearray(200 << 20); print(len(x))"],
    );
    greedy.resources.memory_bytes = Some(32 << 20);
    greedy.resources.cpu_millis = Some(500);
    greedy.restart_policy = RestartPolicy::Never;
    mesh.sync(vec![greedy]);
    let status = mesh.until("shop/greedy-0", |status| {
        matches!(status.phase, PodPhase::Failed | PodPhase::Succeeded)
    });
    let message = status.message.unwrap();
    assert_eq!(status.phase, PodPhase::Failed, "{message}");
    assert!(
        message.contains("SIGKILL") || message.contains("signal 9"),
        "{message}"
    );
    mesh.end();
}
