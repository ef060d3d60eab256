//! Replicas: one resource each, from what it was asked to be and what the runtime says of it.

use std::{collections::BTreeMap, net::IpAddr};

use api::{
    mesh::MeshConfig,
    pod::{PodPhase, PodStatus},
};
use xds::proto::{
    WORKLOAD_OPTIONS, address_to_bytes,
    heddle::WorkloadOptions,
    workload::{
        Extension, PortList, TunnelProtocol, Workload, WorkloadStatus, WorkloadType, address::Type,
    },
};

use super::{Resource, encode_address, service::ServiceShape};
use crate::{expand::Replica, selector::Labels};

/// Istio's name for a cluster that has not been given one.
const CLUSTER_ID: &str = "Kubernetes";
/// Trust domain that the protocol leaves out.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// Labels that name the application, the first that is there wins.
/// <https://istio.io/latest/docs/ops/deployment/application-requirements/#canonical-service>
const NAME_LABELS: [&str; 3] = [
    "service.istio.io/canonical-name",
    "app.kubernetes.io/name",
    "app",
];
/// Labels that name the revision, the first that is there wins.
const REVISION_LABELS: [&str; 3] = [
    "service.istio.io/canonical-revision",
    "app.kubernetes.io/version",
    "version",
];

/// What a replica's resource says beside its own state.
#[derive(Debug)]
pub(crate) struct WorkloadShape {
    services: BTreeMap<String, PortList>,
    policies: Vec<String>,
}

/// What the runtime says of a replica, as far as others must know.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ReplicaState {
    addresses: Vec<IpAddr>,
    node: String,
    ready: bool,
    draining: bool,
}

impl WorkloadShape {
    pub(crate) fn new(
        services: &[&ServiceShape<'_>],
        replica: &Replica,
        policies: Vec<String>,
    ) -> Self {
        Self {
            services: services
                .iter()
                .map(|service| {
                    let ports = service.ports_of(&replica.spec.ports);
                    (service.key.clone(), PortList { ports })
                })
                .collect(),
            policies,
        }
    }
}

impl ReplicaState {
    /// `wanted` is false for a replica that is to go: it drains from that moment, whatever the runtime says.
    pub(crate) fn new(status: &PodStatus, wanted: bool) -> Self {
        let draining = !wanted || status.phase == PodPhase::Terminating;
        Self {
            addresses: status.addresses.clone(),
            node: status.node.clone(),
            ready: status.ready && status.phase == PodPhase::Running && !draining,
            draining,
        }
    }
}

/// Resource name of a replica, in ztunnel's form `CLUSTER/GROUP/KIND/NAMESPACE/NAME`.
pub(crate) fn resource_name(namespace: &str, name: &str) -> String {
    format!("{CLUSTER_ID}//Pod/{namespace}/{name}")
}

/// The resource of a replica, or `None` before it has an address.
pub(crate) fn resource(
    mesh: &MeshConfig,
    replica: &Replica,
    shape: &WorkloadShape,
    state: &ReplicaState,
) -> Option<Resource> {
    if state.addresses.is_empty() {
        return None;
    }
    let spec = &replica.spec;
    let uid = resource_name(&spec.namespace, &spec.name);
    let trust_domain = match mesh.trust_domain.as_str() {
        DEFAULT_TRUST_DOMAIN => "",
        other => other,
    };
    let status = if state.ready {
        WorkloadStatus::Healthy
    } else {
        WorkloadStatus::Unhealthy
    };
    let options = WorkloadOptions {
        draining: state.draining,
        replica_of: spec.workload.clone(),
        splice: replica.splice,
    };
    let message = Workload {
        name: spec.name.clone(),
        namespace: spec.namespace.clone(),
        addresses: state
            .addresses
            .iter()
            .copied()
            .map(address_to_bytes)
            .collect(),
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        trust_domain: trust_domain.to_owned(),
        service_account: spec.service_account.clone(),
        node: state.node.clone(),
        canonical_name: label(&spec.labels, &NAME_LABELS)
            .unwrap_or(&spec.workload)
            .to_owned(),
        canonical_revision: label(&spec.labels, &REVISION_LABELS)
            .unwrap_or("latest")
            .to_owned(),
        workload_type: WorkloadType::Pod.into(),
        workload_name: spec.workload.clone(),
        authorization_policies: shape.policies.clone(),
        status: status.into(),
        cluster_id: CLUSTER_ID.to_owned(),
        uid: uid.clone(),
        hostname: spec.name.clone(),
        services: shape.services.clone(),
        extensions: vec![Extension::pack(WORKLOAD_OPTIONS, &options)],
        capacity: Some(replica.weight),
        ..Workload::default()
    };
    Some((uid, encode_address(Type::Workload(message))))
}

fn label<'a>(labels: &'a Labels, keys: &[&str]) -> Option<&'a str> {
    keys.iter()
        .find_map(|key| labels.get(*key))
        .map(String::as_str)
}
