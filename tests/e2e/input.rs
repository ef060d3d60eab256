//! Mistakes: in files, before and while a mesh runs, and on the command line.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
};

use api::report::MeshStatus;
use serde_json::Value;

use crate::harness::{
    EDIT_PATIENCE, Mesh, Outcome, heddle,
    objects::{allow, client, namespace, policy, server, service},
    until,
};

const NOBODY: &str = "65534";

#[test]
fn check_shows_every_mistake_at_its_place() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(
        folder.path().join("bad.yaml"),
        "apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  ports:
  - port: 99999
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: good}
---
apiVersion: heddle.dev/v1alpha1
kind: Workload
metadata: {name: api}
spec:
  comand: [api]
",
    )
    .unwrap();
    fs::write(folder.path().join("broken.yaml"), "kind: [\n").unwrap();
    let check = |output: &str| {
        let mut command = Command::new(heddle());
        Outcome::of(command.args(["check", "-o", output]).arg(folder.path()))
    };
    let text = check("table");
    assert_eq!(text.code, 1, "{text:#?}");
    for expected in [
        "bad.yaml:6:11: error: Service default/web: spec.ports[0].port: ",
        "bad.yaml:16:3: error: Workload default/api: spec.comand: ",
        "did you mean `command`?",
        "broken.yaml:",
    ] {
        assert!(text.stdout.contains(expected), "{expected}: {text:#?}");
    }
    let json = check("json");
    assert_eq!(json.code, 1, "{json:#?}");
    let report: Value = serde_json::from_str(&json.stdout).unwrap();
    let problem = |field: &str| {
        let problems = report["problems"].as_array().unwrap();
        let found = problems.iter().find(|problem| problem["field"] == field);
        found.unwrap_or_else(|| panic!("{field}: {report:#}"))
    };
    let port = problem("spec.ports[0].port");
    assert_eq!(port["line"], 6);
    assert_eq!(port["column"], 11);
    assert_eq!(port["severity"], "error");
    assert_eq!(problem("spec.comand")["line"], 16);

    for file in ["bad.yaml", "broken.yaml"] {
        fs::remove_file(folder.path().join(file)).unwrap();
    }
    fs::write(folder.path().join("good.yaml"), namespace("shop")).unwrap();
    assert_eq!(check("table").code, 0);
}

#[test]
fn command_lines_that_cannot_work_say_why() {
    let run = |arguments: &[&str]| Outcome::of(Command::new(heddle()).args(arguments));
    for command in ["up", "check"] {
        let outcome = run(&[command, "/nonexistent"]);
        assert_eq!(outcome.code, 1, "{outcome:#?}");
        assert!(
            outcome.stderr.contains("/nonexistent is no folder"),
            "{outcome:#?}"
        );
    }
    for arguments in [
        &["status", "--mesh", "e2e-none"][..],
        &["exec", "--mesh", "e2e-none", "web", "--", "true"],
        &["logs", "--mesh", "e2e-none", "web"],
        &["flows", "--mesh", "e2e-none"],
        &["explain", "--mesh", "e2e-none", "web", "api:80"],
    ] {
        let outcome = run(arguments);
        assert_eq!(outcome.code, 1, "{outcome:#?}");
        assert!(
            outcome.stderr.contains("`e2e-none` is not running"),
            "{outcome:#?}"
        );
    }
    let outcome = run(&["up", "/tmp", "--mesh", "No Name"]);
    assert_eq!(outcome.code, 1, "{outcome:#?}");
    assert!(
        outcome.stderr.contains("is not a DNS label"),
        "{outcome:#?}"
    );
    assert_eq!(run(&["up"]).code, 2);
}

/// The message names what is missing, and how to get it.
#[test]
fn without_rights_up_says_what_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // The build's folder is root's own as a rule.
    let program = folder.path().join("heddle");
    fs::copy(heddle(), &program).unwrap();
    let outcome = Outcome::of(
        Command::new("setpriv")
            .args(["--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--"])
            .arg(&program)
            .args(["up", "--mesh", "e2e-nobody"])
            .arg(folder.path())
            .stdin(Stdio::null()),
    );
    assert_eq!(outcome.code, 1, "{outcome:#?}");
    for expected in [
        "this machine cannot run a mesh",
        "CAP_SYS_ADMIN",
        "CAP_NET_ADMIN",
        "root",
    ] {
        assert!(
            outcome.stderr.contains(expected),
            "{expected}: {outcome:#?}"
        );
    }
}

#[test]
fn a_mistake_while_running_keeps_to_itself() {
    let rest = [
        namespace("shop"),
        client("shop/alice", ""),
        client("shop/bob", ""),
        server("shop/web", &[8000], ""),
    ]
    .concat();
    let good = policy("shop/web", "web", &allow(&["shop/alice"]));
    let bad = good.replace("rules:", "ruels:");
    let file =
        |policy: &str, port: u16| format!("{policy}{}", service("shop/web", &[(port, 8000)]));
    let mesh = Mesh::start(
        "mistakes",
        &[("rest.yaml", &rest), ("web.yaml", &file(&good, 80))],
    );
    mesh.connect("alice", "web", 80).greeting();
    mesh.connect("bob", "web", 80).failed("ECONNREFUSED");

    // One document of the file is wrong: its last good version stays, the other is taken.
    mesh.write("web.yaml", &file(&bad, 81));
    let status = until_problem(&mesh, "web.yaml:", "spec.ruels");
    let place = status
        .problems
        .iter()
        .find(|problem| problem.contains("spec.ruels"))
        .unwrap();
    assert!(
        place.contains("web.yaml:7:3: error: AuthorizationPolicy shop/web: "),
        "{place}"
    );
    assert_eq!(
        state_of(&status, "AuthorizationPolicy shop/web"),
        "last good version in effect"
    );
    assert_eq!(state_of(&status, "Service shop/web"), "accepted");
    mesh.until_explained("alice", "web:81", "policy-allow");
    mesh.connect("alice", "web", 81).greeting();
    mesh.connect("bob", "web", 81).failed("ECONNREFUSED");
    mesh.connect("alice", "web", 80).failed("ECONNREFUSED");

    // The whole file is no YAML: all that it held stays.
    mesh.write("web.yaml", "kind: [\n");
    until_problem(&mesh, "web.yaml:", "");
    mesh.connect("alice", "web", 81).greeting();
    mesh.connect("bob", "web", 81).failed("ECONNREFUSED");

    // A new object with a mistake is not there; everything else is.
    mesh.write(
        "new.yaml",
        &service("shop/new", &[(80, 8000)]).replace("port: 80", "port: eighty"),
    );
    let status = until_problem(&mesh, "new.yaml:", "eighty");
    assert_eq!(state_of(&status, "Service shop/new"), "rejected");
    assert!(mesh.resolve("alice", "new").error.is_some());

    // Mended, nothing is said any more.
    mesh.write("web.yaml", &file(&good, 80));
    mesh.write("new.yaml", "");
    mesh.until_status("there is no problem", |status| status.problems.is_empty());
    mesh.until_explained("alice", "web:80", "policy-allow");
    mesh.connect("alice", "web", 80).greeting();
}

fn until_problem(mesh: &Mesh, file: &str, text: &str) -> MeshStatus {
    until("the problem is shown", EDIT_PATIENCE, || {
        let status = mesh.status();
        let is_shown = |problem: &String| problem.contains(file) && problem.contains(text);
        if status.problems.iter().any(is_shown) {
            Ok(status)
        } else {
            Err(format!("{:#?}", status.problems))
        }
    })
}

fn state_of<'a>(status: &'a MeshStatus, object: &str) -> &'a str {
    let found = status.objects.iter().find(|entry| entry.object == object);
    &found
        .unwrap_or_else(|| panic!("{object}: {:#?}", status.objects))
        .state
}
