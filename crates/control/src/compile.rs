//! Objects and reports in, xDS resources out. No I/O and no memory: the same input gives the same bytes.
//!
//! - `compile/service.rs`: services, and which workloads are behind them.
//! - `compile/workload.rs`: one resource per replica.
//! - `compile/authorization.rs`: AuthorizationPolicy.
//! - `compile/peer_authentication.rs`: PeerAuthentication, said in the terms of authorization.
//!
//! [`Compiled`] holds what follows from the objects alone; replicas, which come and go and turn ready far
//! more often than objects change, are compiled against it.

pub(crate) mod authorization;
pub(crate) mod peer_authentication;
pub(crate) mod service;
pub(crate) mod workload;

use std::{collections::BTreeMap, net::IpAddr};

use api::{mesh::MeshConfig, objects::Object};
use bytes::Bytes;
use prost::Message;
use xds::proto::workload::{Address, address::Type};

use self::{
    peer_authentication::PeerAuthentications,
    service::ServiceShape,
    workload::{ReplicaState, WorkloadShape},
};
use crate::{expand::Replica, publish::PublishService, selector::SelectorIndex, store::Store};

/// Virtual addresses of services by `NAMESPACE/NAME`; empty for headless ones.
pub(crate) type Addresses = BTreeMap<String, Vec<IpAddr>>;

/// A resource's name and its encoded message.
pub(crate) type Resource = (String, Bytes);

/// What follows from the objects, without the replicas' state.
#[derive(Debug, Default)]
pub(crate) struct Compiled {
    /// Resources of type Authorization.
    pub(crate) authorizations: Vec<Resource>,
    /// Resources of type Address that are services.
    pub(crate) services: Vec<Resource>,
    /// By replica uid: what its resource says beside its own state.
    shapes: BTreeMap<String, WorkloadShape>,
}

/// Compiles all objects for the given replicas. `addresses` are the services' virtual addresses by `NAMESPACE/NAME`; a
/// service without an entry is left out.
pub(crate) fn compile(
    mesh: &MeshConfig,
    store: &Store,
    addresses: &Addresses,
    publish: &[PublishService],
    replicas: &BTreeMap<String, Replica>,
) -> Compiled {
    let policies: Vec<_> = store
        .iter(|object| match object {
            Object::AuthorizationPolicy(policy) => Some(policy),
            _ => None,
        })
        .map(|(_, policy)| policy)
        .collect();
    let peers = PeerAuthentications::new(
        mesh,
        store
            .iter(|object| match object {
                Object::PeerAuthentication(policy) => Some(policy),
                _ => None,
            })
            .map(|(_, policy)| policy),
    );
    let services = service::shapes(mesh, store, addresses, publish);
    let service_index = service::index(&services);
    let policy_index = SelectorIndex::new(
        policies
            .iter()
            .filter(|policy| !policy.selector.is_empty())
            .map(|policy| {
                let namespace = policy.metadata.namespace.as_str();
                let anywhere = namespace == mesh.root_namespace;
                ((!anywhere).then_some(namespace), &policy.selector, *policy)
            }),
    );
    let peer_index = peers.index();
    let shapes = replicas
        .iter()
        .map(|(uid, replica)| {
            let spec = &replica.spec;
            let mut members: Vec<&ServiceShape> = service_index
                .matching(&spec.namespace, &spec.labels)
                .collect();
            members.extend(service::published(&services, spec));
            let mut listed: Vec<String> = policy_index
                .matching(&spec.namespace, &spec.labels)
                .map(authorization::key)
                .collect();
            listed.extend(peers.policies_of(&peer_index, spec));
            listed.sort_unstable();
            (uid.clone(), WorkloadShape::new(&members, replica, listed))
        })
        .collect();
    let mut authorizations: Vec<Resource> = policies
        .iter()
        .map(|policy| {
            let message = authorization::compile(mesh, policy);
            (authorization::key(policy), message.encode_to_vec().into())
        })
        .collect();
    authorizations.extend(peers.resources());
    Compiled {
        authorizations,
        services: services.values().map(ServiceShape::resource).collect(),
        shapes,
    }
}

impl Compiled {
    /// The resource of a replica, or `None` before it has an address.
    pub(crate) fn replica(
        &self,
        mesh: &MeshConfig,
        replica: &Replica,
        state: &ReplicaState,
    ) -> Option<Resource> {
        let shape = self.shapes.get(&replica.spec.uid)?;
        workload::resource(mesh, replica, shape, state)
    }
}

fn encode_address(address: Type) -> Bytes {
    let address = Address {
        r#type: Some(address),
    };
    address.encode_to_vec().into()
}
