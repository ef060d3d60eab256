//! Identities as workloads and operators meet them: a program gets its own and no other; certificates and roots are replaced
//! under load; an operator's CA; an agent that comes back while the authority is away.

mod authority_away;
mod operator;
mod rotation;

use std::{env, path::PathBuf};

use serde::Deserialize;

use crate::harness::{
    Mesh,
    objects::{client, namespace, server, service, spiffe_id},
    probe::Talk,
};

const IDENTITY: &str = include_str!("programs/identity.py");
const PORT: u16 = 8000;

#[test]
fn a_program_gets_its_own_identity_and_no_other() {
    let mesh = two_nodes("identities", &[]);
    for (workload, node) in [("alice", "node-1"), ("web", "node-2")] {
        let id = spiffe_id(&format!("shop/{workload}"));
        let own: Own = mesh.identity(workload, &["own"]).hear();
        assert_eq!(own.id, id);
        assert_eq!((own.chain.len(), own.roots.len()), (1, 1), "{own:?}");
        // The same one that the operator is shown, on the node where it is and on no other.
        let certificates = mesh.certificates();
        let shown: Vec<&Shown> = certificates
            .iter()
            .filter(|one| one.identity == id)
            .collect();
        let [shown] = shown[..] else {
            panic!("{certificates:#?}");
        };
        assert_eq!((shown.node.as_str(), shown.state.as_str()), (node, "valid"));
        assert_eq!(shown.serial, own.serial);
        assert!(shown.not_after > shown.not_before, "{shown:?}");
        assert_eq!(shown.users, [format!("shop/{workload}-0")]);
        let token: Token = mesh.identity(workload, &["token"]).hear();
        assert_eq!(token.id, Some(id));
    }
    let labels = ["reason=\"not_the_callers\""];
    let refused = || mesh.metric("node-1", "heddle_identity_refused_total", &labels);
    let before = refused();
    for other in ["shop/web", "shop/bob", "other/alice"] {
        let token: Token = mesh.identity("alice", &["token", &spiffe_id(other)]).hear();
        assert_eq!(token.id, None, "{token:?}");
        assert!(token.error.is_some(), "{token:?}");
    }
    assert_eq!(refused(), before + 3);
    // Two of one account have one identity; the operator sees both.
    mesh.write(
        "more.yaml",
        &client("shop/carol", "  node: node-1\n  replicas: 2\n"),
    );
    for replica in ["shop/carol-0", "shop/carol-1"] {
        mesh.until_replica(replica, "is ready", |replica| replica.status.ready);
    }
    let carol = spiffe_id("shop/carol");
    let certificates = mesh.certificates();
    let shown = certificates
        .iter()
        .find(|one| one.identity == carol)
        .unwrap();
    assert_eq!(shown.users, ["shop/carol-0", "shop/carol-1"]);
}

/// What a workload is told of itself.
#[derive(Debug, Deserialize)]
struct Own {
    id: String,
    serial: String,
    /// PEM texts: its own certificate first.
    chain: Vec<String>,
    roots: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Token {
    id: Option<String>,
    error: Option<String>,
}

/// One entry of `heddle certs -o json`.
#[derive(Debug, Deserialize)]
struct Shown {
    node: String,
    identity: String,
    state: String,
    serial: String,
    not_before: Option<u64>,
    not_after: Option<u64>,
    users: Vec<String>,
}

impl Mesh {
    /// Runs the identity program in a workload, with the Python that has the `spiffe` package.
    fn identity(&self, workload: &str, arguments: &[&str]) -> Talk {
        let venv = env::var_os("HEDDLE_VENV").map_or_else(
            || PathBuf::from(env::var_os("HOME").unwrap()).join(".cache/heddle/venv"),
            PathBuf::from,
        );
        let python = venv.join("bin/python");
        let python = python.to_str().unwrap();
        let mut command = vec![python, "-c", IDENTITY];
        command.extend(arguments);
        Talk::with(self.spawn_exec(workload, &command))
    }

    /// `heddle certs`.
    fn certificates(&self) -> Vec<Shown> {
        let outcome = self.run("certs", &["-o", "json"]).success();
        serde_json::from_str(&outcome.stdout).unwrap()
    }

    /// The serial number of an identity's certificate, as the operator is shown it; `None` while there is none.
    fn serial(&self, account: &str) -> Option<String> {
        let id = spiffe_id(account);
        let mut all = self.certificates().into_iter();
        let shown = all.find(|one| one.identity == id)?;
        Some(shown.serial).filter(|serial| !serial.is_empty())
    }
}

/// A client on one node, a server on the other.
fn two_nodes(topic: &str, arguments: &[&str]) -> Mesh {
    let mut all = vec!["--nodes", "2"];
    all.extend(arguments);
    Mesh::start_with(topic, &[("objects.yaml", &objects())], &all)
}

fn objects() -> String {
    [
        namespace("shop"),
        client("shop/alice", "  node: node-1\n"),
        server("shop/web", &[PORT], "  node: node-2\n"),
        service("shop/web", &[(80, PORT)]),
    ]
    .concat()
}
