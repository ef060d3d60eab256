//! Puts together what control, runtime and agents say of the mesh.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
    time::Duration,
};

use api::{
    pod::{PodPhase, PodStatus},
    report::{MeshStatus, NodeEntry, NodeStatus, ObjectEntry, PublishedEntry, Replica},
};
use control::ObjectState;
use futures::future::join_all;

use super::Mesh;
use crate::client;

/// An agent that has not answered by then is away.
const AGENT_PATIENCE: Duration = Duration::from_secs(2);

/// How far from the end of its log an agent's last words are looked for: what the verifier says can be long.
const LAST_WORDS_WITHIN: u64 = 256 << 10;

/// The whole picture.
pub(super) async fn of(mesh: &Mesh) -> MeshStatus {
    let control = mesh.control.status();
    let nodes = join_all(mesh.nodes.iter().map(|node| node_entry(mesh, node))).await;
    MeshStatus {
        mesh: mesh.layout.mesh().to_owned(),
        pid: std::process::id(),
        source: mesh.source.display().to_string(),
        workloads: replicas(mesh),
        nodes,
        objects: control
            .objects
            .iter()
            .map(|object| ObjectEntry {
                object: object.object.to_string(),
                source: format!("{}:{}", object.file.display(), object.line),
                state: match object.state {
                    ObjectState::Accepted => "accepted",
                    ObjectState::LastGood => "last good version in effect",
                    ObjectState::Rejected => "rejected",
                }
                .into(),
                live_on: object.live_on,
                nodes: object.nodes,
            })
            .collect(),
        published: published(mesh),
        problems: control.problems.iter().map(ToString::to_string).collect(),
    }
}

/// Every replica that is wanted or still there.
pub(super) fn replicas(mesh: &Mesh) -> Vec<Replica> {
    let statuses = mesh.runtime.statuses().borrow().clone();
    let wanted = mesh.control.pods().borrow().clone();
    let mut all: BTreeMap<String, Replica> = wanted
        .iter()
        .map(|spec| {
            let replica = Replica {
                namespace: spec.namespace.clone(),
                workload: spec.workload.clone(),
                name: spec.name.clone(),
                service_account: spec.service_account.clone(),
                status: statuses
                    .get(&spec.uid)
                    .cloned()
                    .unwrap_or_else(|| not_yet(spec.uid.clone(), spec.node.clone())),
            };
            (spec.uid.clone(), replica)
        })
        .collect();
    for (uid, status) in statuses {
        all.entry(uid)
            .or_insert_with_key(|uid| leaving(uid, status));
    }
    all.into_values().collect()
}

fn not_yet(uid: String, node: String) -> PodStatus {
    PodStatus {
        uid,
        node,
        addresses: Vec::new(),
        phase: PodPhase::Pending,
        ready: false,
        restarts: 0,
        message: None,
    }
}

/// One that control no longer asks for, or Heddle's own relay: all that is known of it is in its name.
fn leaving(uid: &str, status: PodStatus) -> Replica {
    let (namespace, name) = uid.split_once('/').unwrap_or(("", uid));
    let is_own = namespace == runtime::publish::NAMESPACE;
    let workload = if is_own {
        name
    } else {
        name.rsplit_once('-').map_or(name, |(workload, _)| workload)
    };
    Replica {
        namespace: namespace.to_owned(),
        workload: workload.to_owned(),
        name: name.to_owned(),
        service_account: if is_own {
            name.to_owned()
        } else {
            String::new()
        },
        status,
    }
}

async fn node_entry(mesh: &Mesh, node: &str) -> NodeEntry {
    let socket = mesh.layout.agent_socket(node);
    let answer = tokio::time::timeout(
        AGENT_PATIENCE,
        client::get::<NodeStatus>(&socket, "/v1/status"),
    );
    let (status, error) = match answer.await {
        Ok(Ok(status)) => (Some(status), None),
        Ok(Err(error)) => (None, Some(away(mesh, node, &format!("{error:#}")))),
        Err(_) => (None, Some(away(mesh, node, "no answer within 2 s"))),
    };
    NodeEntry {
        node: node.to_owned(),
        status,
        error,
    }
}

/// Why an agent does not answer: its own last words, if it has ended.
fn away(mesh: &Mesh, node: &str, error: &str) -> String {
    let state = mesh
        .runtime
        .agent(node)
        .ok()
        .map(|state| state.borrow().clone());
    let ended = state.and_then(|state| state.message);
    match (ended, last_words(&mesh.layout.agent_log(node))) {
        (Some(message), Some(words)) => {
            format!("{message}: {words}; see `heddle logs node/{node}`")
        }
        (Some(message), None) => format!("{message} ({error}); see `heddle logs node/{node}`"),
        (None, _) => format!("{error}; see `heddle logs node/{node}`"),
    }
}

/// What an agent that could not go on said at its end.
fn last_words(log: &Path) -> Option<String> {
    let mut file = File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LAST_WORDS_WITHIN)))
        .ok()?;
    let mut end = Vec::new();
    file.take(LAST_WORDS_WITHIN).read_to_end(&mut end).ok()?;
    let end = String::from_utf8_lossy(&end);
    // As `main` prints an error.
    let line = end.lines().rfind(|line| line.starts_with("heddle: "))?;
    Some(line.trim_start_matches("heddle: ").to_owned())
}

fn published(mesh: &Mesh) -> Vec<PublishedEntry> {
    let errors = mesh.unpublished.borrow().clone();
    let ports = mesh.control.published().borrow().clone();
    ports
        .iter()
        .map(|port| {
            let error = errors
                .iter()
                .find(|error| error.host_port() == port.host_port);
            PublishedEntry {
                host_port: port.host_port,
                workload: port.workload.clone(),
                error: error.map(ToString::to_string),
            }
        })
        .collect()
}
