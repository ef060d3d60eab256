//! Workloads as their users have them: `exec`, `logs`, probes, ends, files, users.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

use api::pod::PodPhase;

use crate::harness::{
    Mesh, Outcome, heddle,
    objects::{client, namespace, server, workload},
};

/// Writes into its log what a test puts into /tmp/say.
const TOLD: &str = "[sh, -c, \"echo started as $(id -un) in $PWD; while sleep 0.05; do mv /tmp/say /tmp/said 2> /dev/null && cat /tmp/said; done\"]";

#[test]
fn workloads_are_what_they_were_asked_to_be() {
    let objects = [
        namespace("shop"),
        workload(
            "shop/plain",
            TOLD,
            "  env: [{name: GREETING, value: good day}]\n  user: nobody\n  workingDir: /opt\n",
        ),
        client("shop/files", "").replace(
            "  files:\n",
            "  files:\n  - {path: /etc/app/app.conf, content: \"answer = 42\\n\", mode: 0600}\n  - {path: /srv/run.sh, content: \"#!/bin/sh\\necho run\\n\", mode: 0755}\n",
        ),
        client("shop/twice", "  replicas: 2\n"),
        namespace("other"),
        client(
            "other/files",
            "  env: [{name: SPIFFE_ENDPOINT_SOCKET, value: \"unix:///mine\"}]\n",
        ),
    ]
    .concat();
    let mesh = Mesh::start("workloads", &[("objects.yaml", &objects)]);
    commands_run_as_the_workload(&mesh);
    names_must_be_clear(&mesh);
    files_are_placed(&mesh);
    logs_tell_and_follow(&mesh);
    ends_are_told_apart(&mesh);
    probes_restart_and_hold_back(&mesh);
}

fn commands_run_as_the_workload(mesh: &Mesh) {
    for code in [0, 7, 255] {
        assert_eq!(mesh.shell("plain", &format!("exit {code}")).code, code);
    }
    assert_eq!(mesh.shell("plain", "kill -KILL $$").code, 128 + 9);
    let missing = mesh.exec("plain", &["no-such-program"]);
    assert_eq!(missing.code, 127, "{missing:#?}");
    assert!(
        missing
            .stderr
            .contains("command not found: no-such-program"),
        "{missing:#?}"
    );

    let line = "id -un; pwd; hostname; echo $GREETING; echo error >&2; cat /proc/1/comm > /dev/null && ls /proc | grep -c '^1$'";
    let outcome = mesh.shell("plain", line).success();
    assert_eq!(outcome.stdout, "nobody\n/opt\nplain-0\ngood day\n1\n");
    assert_eq!(outcome.stderr, "error\n");

    // Where identities are handed out: SPIFFE clients find it, and it is not the workload's to change.
    let line = "echo $SPIFFE_ENDPOINT_SOCKET; test -d /run/spiffe/workload && ! touch /run/spiffe/workload/x 2> /dev/null && echo there";
    let outcome = mesh.shell("plain", line).success();
    assert_eq!(
        outcome.stdout,
        "unix:///run/spiffe/workload/agent.sock\nthere\n"
    );
    let outcome = mesh.shell("other/files", "echo $SPIFFE_ENDPOINT_SOCKET");
    assert_eq!(outcome.success().stdout, "unix:///mine\n");

    // What goes in comes out, whatever it is.
    let bytes: Vec<u8> = (0..200_000_u32)
        .map(|number| (number % 251) as u8)
        .collect();
    let mut child = mesh.spawn_exec("plain", &["cat"]);
    let mut input = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            input.write_all(&bytes).unwrap();
            drop(input);
        });
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success());
    assert!(
        output.stdout == bytes,
        "{} bytes came out",
        output.stdout.len()
    );
}

fn names_must_be_clear(mesh: &Mesh) {
    assert_eq!(
        mesh.exec("twice-1", &["hostname"]).success().stdout,
        "twice-1\n"
    );
    assert_eq!(
        mesh.exec("shop/twice", &["hostname"]).success().stdout,
        "twice-0\n"
    );
    let unclear = mesh.exec("files", &["true"]);
    assert_eq!(unclear.code, 1);
    assert!(unclear.stderr.contains("other, shop"), "{unclear:#?}");
    let unknown = mesh.exec("nobody", &["true"]);
    assert_eq!(unknown.code, 1);
    assert!(
        unknown.stderr.contains("there is no workload `nobody`"),
        "{unknown:#?}"
    );
}

fn files_are_placed(mesh: &Mesh) {
    let line = "cat /etc/app/app.conf; stat -c %a /etc/app/app.conf; /srv/run.sh";
    let outcome = mesh.shell("shop/files", line).success();
    assert_eq!(outcome.stdout, "answer = 42\n600\nrun\n");
    // Another workload has none of it, and neither has the machine.
    mesh.exec("other/files", &["test", "!", "-e", "/etc/app"])
        .success();
    assert!(!std::path::Path::new("/srv/run.sh").exists());
}

fn logs_tell_and_follow(mesh: &Mesh) {
    let logs = mesh.run("logs", &["plain"]).success();
    assert_eq!(logs.stdout, "started as nobody in /opt\n");
    let mut follow = mesh
        .command("logs")
        .args(["plain", "-f"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(follow.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "started as nobody in /opt");
    for word in ["one", "two"] {
        mesh.shell(
            "plain",
            &format!("echo {word} > /tmp/draft; mv /tmp/draft /tmp/say"),
        )
        .success();
        assert_eq!(lines.next().unwrap().unwrap(), word);
    }
    follow.kill().unwrap();
    follow.wait().unwrap();
    let agent = mesh.run("logs", &["node/node-1"]).success();
    assert!(
        agent.stdout.contains("policy is in the kernel"),
        "{agent:#?}"
    );
}

fn ends_are_told_apart(mesh: &Mesh) {
    let ending = |name: &str, script: &str, policy: &str| {
        workload(
            &format!("shop/{name}"),
            &format!("[sh, -c, \"{script}\"]"),
            &format!("  restartPolicy: {policy}\n"),
        )
    };
    let objects = [
        ending("done", "exit 0", "OnFailure"),
        ending("failed", "exit 3", "Never"),
        ending("crashing", "exit 4", "Always"),
        ending("trying", "exit 5", "OnFailure"),
        workload(
            "shop/missing",
            "[no-such-program]",
            "  restartPolicy: Never\n",
        ),
    ];
    mesh.write("ends.yaml", &objects.concat());
    let phase = |name: &str, phase: PodPhase| {
        let uid = format!("shop/{name}-0");
        let wanted = format!("is {phase:?}");
        let replica = mesh.until_replica(&uid, &wanted, |replica| replica.status.phase == phase);
        replica.status
    };
    assert_eq!(phase("done", PodPhase::Succeeded).restarts, 0);
    let failed = phase("failed", PodPhase::Failed);
    assert_eq!(
        (failed.message.as_deref(), failed.restarts),
        (Some("exit code 3"), 0)
    );
    let missing = phase("missing", PodPhase::Failed);
    assert!(
        missing
            .message
            .unwrap()
            .contains("command not found: no-such-program")
    );
    for (name, message) in [("crashing", "exit code 4"), ("trying", "exit code 5")] {
        let uid = format!("shop/{name}-0");
        let replica = mesh.until_replica(&uid, "was started again", |replica| {
            replica.status.restarts > 0 && replica.status.phase == PodPhase::BackOff
        });
        assert_eq!(replica.status.message.as_deref(), Some(message));
    }
    // One that does not run cannot be entered, and that is said.
    let outcome = mesh.exec("failed", &["true"]);
    assert_eq!(outcome.code, 1);
    assert!(outcome.stderr.contains("is not running"), "{outcome:#?}");
    mesh.write("ends.yaml", "");
}

fn probes_restart_and_hold_back(mesh: &Mesh) {
    let liveness = |probe: &str| {
        format!("  livenessProbe: {{{probe}, periodSeconds: 0.2, failureThreshold: 2}}\n")
    };
    let readiness = |probe: &str| format!("  readinessProbe: {{{probe}, periodSeconds: 0.2}}\n");
    let objects = [
        workload(
            "shop/hung",
            TOLD,
            &liveness("exec: {command: [test, \"!\", -e, /tmp/hung]}"),
        ),
        workload(
            "shop/http",
            "[python3, -m, http.server, --directory, /tmp, \"8080\"]",
            &readiness("httpGet: {path: /ready, port: 8080}"),
        ),
        server("shop/tcp", &[9000], &readiness("tcpSocket: {port: 9001}")),
        workload(
            "shop/exec",
            TOLD,
            &readiness("exec: {command: [test, -e, /tmp/ready]}"),
        ),
    ];
    mesh.write("probes.yaml", &objects.concat());

    // A program that hangs is started again, in the same place.
    let before = mesh.until_replica("shop/hung-0", "is ready", |replica| replica.status.ready);
    mesh.exec("hung", &["touch", "/tmp/hung"]).success();
    let after = mesh.until_replica("shop/hung-0", "was started again", |replica| {
        replica.status.restarts == 1 && replica.status.phase == PodPhase::Running
    });
    assert_eq!(after.status.addresses, before.status.addresses);
    let logs = mesh.run("logs", &["hung"]).success();
    assert_eq!(logs.stdout.matches("started as").count(), 2, "{logs:#?}");

    // Not ready as long as the probe says so, and no reason to restart.
    for (name, make_ready) in [
        ("http", "echo > /tmp/ready"),
        (
            "tcp",
            "setsid python3 /opt/e2e/server.py 9001 > /dev/null 2>&1 &",
        ),
        ("exec", "touch /tmp/ready"),
    ] {
        let uid = format!("shop/{name}-0");
        mesh.until_replica(&uid, "is not ready", |replica| {
            let said = replica.status.message.as_deref().unwrap_or_default();
            replica.status.phase == PodPhase::Running
                && !replica.status.ready
                && said.contains("not ready")
        });
        mesh.shell(name, make_ready).success();
        let replica = mesh.until_replica(&uid, "is ready", |replica| replica.status.ready);
        assert_eq!(replica.status.restarts, 0, "{name}");
    }
    mesh.write("probes.yaml", "");
    mesh.until_status("they are gone", |status| {
        status
            .workloads
            .iter()
            .all(|replica| replica.workload != "tcp")
    });
}

/// `--mesh` has a default; a second mesh does not disturb the first.
#[test]
fn meshes_do_not_see_each_other() {
    let objects = [namespace("shop"), server("shop/web", &[8000], "")].concat();
    let one = Mesh::start("one", &[("objects.yaml", &objects)]);
    let address = one.addresses("shop/web-0");
    {
        let two = Mesh::start(
            "two",
            &[(
                "objects.yaml",
                &[objects, client("shop/client", "")].concat(),
            )],
        );
        // The same addresses, in other namespaces.
        assert_eq!(two.node("node-1").enrolled.len(), 2);
        let greeting = two.connect("client", &two.addresses("shop/web-0")[0].to_string(), 8000);
        greeting.greeting();
        assert!(
            one.flows(&[])
                .iter()
                .all(|flow| flow.source.workload != "client")
        );
    }
    assert_eq!(one.addresses("shop/web-0"), address);
    one.exec("web", &["true"]).success();
    let mut by_environment = Command::new(heddle());
    by_environment.arg("status").env("HEDDLE_MESH", one.name());
    Outcome::of(&mut by_environment).success();
}
