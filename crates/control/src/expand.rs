//! Workload objects to replicas: names, nodes, and the hash that says when a restart is due.

use std::collections::{BTreeMap, HashSet};

use api::{
    Located,
    objects::{Object, Workload},
    pod::PodSpec,
    problem::{Problem, Severity},
};
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{placement::Placement, store::Store};

/// A replica that should run, or that is being stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Replica {
    pub(crate) spec: PodSpec,
    /// Its share of traffic.
    pub(crate) weight: u32,
    /// Its connections with others that have this may skip the TCP stack.
    pub(crate) splice: bool,
}

/// Expands all workloads. `keep` are uids of replicas that may still run: their node stays taken for them.
pub(crate) fn expand(
    store: &Store,
    placement: &mut Placement,
    keep: &HashSet<&str>,
) -> (BTreeMap<String, Replica>, Vec<Problem>) {
    let mut replicas = BTreeMap::new();
    let mut problems = Vec::new();
    let workloads: Vec<(&Located, &Workload)> = store
        .iter(as_workload)
        .map(|(located, workload)| (located.as_ref(), workload))
        .collect();
    let names: Vec<String> = workloads
        .iter()
        .flat_map(|(_, workload)| uids(workload))
        .collect();
    let mut wanted: HashSet<&str> = names.iter().map(String::as_str).collect();
    wanted.extend(keep);
    placement.retain(&wanted);
    for (located, workload) in workloads {
        for index in 0..workload.spec.replicas {
            match replica(workload, index, placement) {
                Some(replica) => {
                    replicas.insert(replica.spec.uid.clone(), replica);
                }
                None => {
                    problems.push(unknown_node(located, workload, placement));
                    break;
                }
            }
        }
    }
    (replicas, problems)
}

/// Picks workloads.
pub(crate) fn as_workload(object: &Object) -> Option<&Workload> {
    match object {
        Object::Workload(workload) => Some(workload),
        _ => None,
    }
}

fn uids(workload: &Workload) -> impl Iterator<Item = String> {
    let (namespace, name) = (&workload.metadata.namespace, &workload.metadata.name);
    (0..workload.spec.replicas).map(move |index| format!("{namespace}/{name}-{index}"))
}

fn replica(workload: &Workload, index: u32, placement: &mut Placement) -> Option<Replica> {
    let (metadata, spec) = (&workload.metadata, &workload.spec);
    let name = format!("{}-{index}", metadata.name);
    let uid = format!("{}/{name}", metadata.namespace);
    let owner = format!("{}/{}", metadata.namespace, metadata.name);
    let node = placement
        .place(&uid, &owner, spec.node.as_deref())
        .ok()?
        .to_owned();
    let mut pod = PodSpec {
        uid,
        name,
        namespace: metadata.namespace.clone(),
        workload: metadata.name.clone(),
        service_account: spec.service_account.clone(),
        node,
        labels: spec.labels.clone(),
        command: spec.command.clone(),
        env: spec.env.clone(),
        user: spec.user.clone(),
        working_dir: spec.working_dir.clone(),
        files: spec.files.clone(),
        ports: spec.ports.clone(),
        readiness: spec.readiness.clone(),
        liveness: spec.liveness.clone(),
        resources: spec.resources.clone(),
        restart_policy: spec.restart_policy,
        termination_grace: spec.termination_grace,
        template_hash: String::new(),
    };
    pod.template_hash = template_hash(&pod);
    Some(Replica {
        spec: pod,
        weight: spec.weight,
        splice: workload.splice,
    })
}

/// Labels and ports only matter to services and policies: they change without a restart.
fn template_hash(pod: &PodSpec) -> String {
    let (labels, ports) = (BTreeMap::new(), Vec::new());
    let template = PodSpec {
        labels,
        ports,
        template_hash: String::new(),
        ..pod.clone()
    };
    hash_json(&template)
}

/// The first 128 bits of the SHA-256 of a value's JSON, in hexadecimal.
pub(crate) fn hash_json(value: &impl Serialize) -> String {
    // Only maps with keys that are not texts cannot be JSON, and the objects have none.
    let json = serde_json::to_vec(value).unwrap_or_default();
    Sha256::digest(&json)[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn unknown_node(located: &Located, workload: &Workload, placement: &Placement) -> Problem {
    let node = workload.spec.node.as_deref().unwrap_or_default();
    let message = format!("the mesh has no node `{node}`");
    let mut problem = located.problem(Severity::Error, "spec.node", message);
    problem.expected = Some(format!("one of {}", placement.nodes().join(", ")));
    problem
}
