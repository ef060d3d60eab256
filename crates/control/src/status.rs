//! What operators see: every object, whether it is in effect, and on how many nodes.

use std::{path::PathBuf, sync::Arc};

use api::{objects::ObjectRef, problem::Problem};
use serde::{Deserialize, Serialize};
use xds::{
    proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE},
    server::ClientState,
};

use crate::compile::{peer_authentication, workload};

/// How the control plane stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlStatus {
    /// Every object, sorted.
    pub objects: Vec<ObjectStatus>,
    /// Everything that is wrong or doubtful, by file and line; that of objects is also with them.
    pub problems: Vec<Problem>,
    /// Every node of the mesh.
    pub nodes: Vec<NodeSync>,
    /// Number of states that the nodes have been sent.
    pub generation: u64,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectStatus {
    /// Kind, namespace, name.
    pub object: ObjectRef,
    /// The file that it is, or was, read from.
    pub file: PathBuf,
    /// Line where it begins.
    pub line: usize,
    /// Whether it is in effect.
    pub state: ObjectState,
    /// What is wrong or doubtful with it.
    pub problems: Vec<Problem>,
    /// Nodes that have accepted the version in effect.
    pub live_on: usize,
    /// Nodes of the mesh.
    pub nodes: usize,
}

/// Whether an object is in effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ObjectState {
    /// As written.
    Accepted,
    /// What is written is wrong: an earlier version stays in effect.
    LastGood,
    /// What is written is wrong, and there is no earlier version.
    Rejected,
}

/// One node's agent, as seen over xDS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSync {
    /// Node name.
    pub node: String,
    /// Its agent has a stream open.
    pub connected: bool,
    /// It has answered everything up to this state.
    pub generation: u64,
    /// Resources that it was sent and rejected.
    pub rejected: Vec<String>,
    /// What it said when it last rejected something, until it accepts again.
    pub last_error: Option<String>,
}

/// What the engine knows of the objects; joined with the nodes' answers on demand.
#[derive(Debug, Default)]
pub(crate) struct View {
    pub(crate) objects: Vec<ObjectView>,
    pub(crate) problems: Arc<Vec<Problem>>,
}

#[derive(Debug)]
pub(crate) struct ObjectView {
    pub(crate) object: ObjectRef,
    pub(crate) file: PathBuf,
    pub(crate) line: usize,
    pub(crate) state: ObjectState,
    pub(crate) problems: Vec<Problem>,
    /// The state of the cache that has the version in effect, if one is.
    pub(crate) generation: Option<u64>,
}

/// Joins what should be with what the nodes have answered.
pub(crate) fn status(
    view: &View,
    nodes: &[String],
    clients: &[ClientState],
    generation: u64,
) -> ControlStatus {
    let objects = view.objects.iter().map(|object| ObjectStatus {
        object: object.object.clone(),
        file: object.file.clone(),
        line: object.line,
        state: object.state,
        problems: object.problems.clone(),
        live_on: nodes
            .iter()
            .filter(|node| on_node(clients, node).any(|client| is_live(object, client)))
            .count(),
        nodes: nodes.len(),
    });
    ControlStatus {
        objects: objects.collect(),
        problems: view.problems.as_ref().clone(),
        nodes: nodes
            .iter()
            .map(|node| node_sync(node, on_node(clients, node).next_back()))
            .collect(),
        generation,
    }
}

fn on_node<'a>(
    clients: &'a [ClientState],
    node: &'a str,
) -> impl DoubleEndedIterator<Item = &'a ClientState> {
    clients.iter().filter(move |client| client.node == node)
}

fn node_sync(node: &str, client: Option<&ClientState>) -> NodeSync {
    let types = client
        .map(|client| client.types.as_slice())
        .unwrap_or_default();
    let of = |wanted: &str| {
        let state = types.iter().find(|state| state.type_url == wanted);
        state.map_or(0, |state| state.generation)
    };
    NodeSync {
        node: node.to_owned(),
        connected: client.is_some(),
        generation: of(ADDRESS_TYPE).min(of(AUTHORIZATION_TYPE)),
        rejected: types
            .iter()
            .flat_map(|state| state.rejected.clone())
            .collect(),
        last_error: types.iter().find_map(|state| state.last_error.clone()),
    }
}

fn is_live(object: &ObjectView, client: &ClientState) -> bool {
    let Some(generation) = object.generation else {
        return false;
    };
    client.has(ADDRESS_TYPE, generation)
        && client.has(AUTHORIZATION_TYPE, generation)
        && !client
            .types
            .iter()
            .flat_map(|state| &state.rejected)
            .any(|resource| is_made_of(resource, &object.object))
}

/// Whether a resource is what an object was compiled to.
fn is_made_of(resource: &str, object: &ObjectRef) -> bool {
    let (namespace, name) = (object.namespace.as_str(), object.name.as_str());
    match object.kind.as_str() {
        "Workload" => resource
            .strip_prefix(&workload::resource_name(namespace, &format!("{name}-")))
            .is_some_and(|index| {
                !index.is_empty() && index.bytes().all(|byte| byte.is_ascii_digit())
            }),
        "Service" => resource
            .strip_prefix(&format!("{namespace}/{name}.{namespace}.svc."))
            .is_some(),
        "AuthorizationPolicy" => resource == format!("{namespace}/{name}"),
        "PeerAuthentication" => resource == peer_authentication::converted_key(namespace, name),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_traced_to_their_object() {
        let object = |kind| ObjectRef::new(kind, "d", "a");
        for (resource, kind, made) in [
            ("Kubernetes//Pod/d/a-0", "Workload", true),
            ("Kubernetes//Pod/d/a-12", "Workload", true),
            ("Kubernetes//Pod/d/a-b-0", "Workload", false),
            ("Kubernetes//Pod/e/a-0", "Workload", false),
            ("d/a.d.svc.cluster.local", "Service", true),
            ("d/ab.d.svc.cluster.local", "Service", false),
            ("d/a", "AuthorizationPolicy", true),
            (
                "d/converted_peer_authentication_a",
                "PeerAuthentication",
                true,
            ),
            ("d/a", "PeerAuthentication", false),
        ] {
            assert_eq!(
                is_made_of(resource, &object(kind)),
                made,
                "{resource} {kind}"
            );
        }
    }
}
