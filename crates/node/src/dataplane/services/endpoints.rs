//! Which replicas a service's new connections are spread over, as this node sees it. Nothing of the kernel is here.

use std::net::IpAddr;

use api::pod::Protocol;
use xds::proto::workload::load_balancing;

use crate::state::{MeshState, Service, Workload};

/// An endpoint that a service port may lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SharedEndpoint {
    /// `NAMESPACE/POD`.
    pub(crate) pod: String,
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) weight: u32,
}

/// How a service chooses among its replicas.
#[derive(Debug, Clone, Copy)]
pub(super) struct Balancing {
    allow_all: bool,
    prefers_node: bool,
    strict: bool,
}

impl Balancing {
    pub(super) fn of(service: &Service) -> Self {
        let Some(balancing) = &service.message.load_balancing else {
            return Self {
                allow_all: false,
                prefers_node: false,
                strict: false,
            };
        };
        Self {
            allow_all: balancing.health_policy() == load_balancing::HealthPolicy::AllowAll,
            prefers_node: balancing
                .routing_preference()
                .any(|scope| scope == load_balancing::Scope::Node),
            strict: balancing.mode() == load_balancing::Mode::Strict,
        }
    }

    /// Whether the replica may get new connections at all.
    pub(super) fn uses(self, workload: &Workload) -> bool {
        let willing = workload.ready || self.allow_all && !workload.options.draining;
        willing && workload.weight() > 0
    }

    /// Whether replicas of other nodes are left out, where so many usable ones are of this node.
    pub(super) fn only_here(self, here: usize) -> bool {
        self.prefers_node && (self.strict || here > 0)
    }
}

/// The endpoints that new connections to a service's port are spread over, as this node sees it.
pub(crate) fn endpoints(
    state: &MeshState,
    node: &str,
    name: &str,
    (port, protocol): (u16, Protocol),
    ipv6: bool,
) -> Vec<SharedEndpoint> {
    let Some(service) = state.services.get(name) else {
        return Vec::new();
    };
    let Some(nth) = place_of(service, port, protocol) else {
        return Vec::new();
    };
    let balancing = Balancing::of(service);
    let usable: Vec<&Workload> = state
        .members(name)
        .map(AsRef::as_ref)
        .filter(|workload| balancing.uses(workload))
        .collect();
    let here = |workload: &&Workload| workload.message.node == node;
    let only_here = balancing.only_here(usable.iter().copied().filter(here).count());
    usable
        .into_iter()
        .filter(|workload| !only_here || here(workload))
        .filter_map(|workload| {
            let (address, port) = target_of(workload, name, (port, nth), ipv6)?;
            Some(SharedEndpoint {
                pod: workload.pod(),
                address,
                port,
                weight: workload.weight(),
            })
        })
        .collect()
}

/// Where TCP and UDP share a number, the n-th entry of that number is the n-th port's: this is n.
pub(super) fn place_of(service: &Service, port: u16, protocol: Protocol) -> Option<usize> {
    service
        .ports()
        .filter(|(number, _)| *number == port)
        .position(|(_, other)| other == protocol)
}

/// Where a replica serves a service's port: its number, and which entry of that number it is.
pub(super) fn target_of(
    workload: &Workload,
    service: &str,
    (port, nth): (u16, usize),
    ipv6: bool,
) -> Option<(IpAddr, u16)> {
    let mut addresses = workload.addresses.iter();
    let address = addresses.find(|address| address.is_ipv6() == ipv6)?;
    let ports = &workload.message.services.get(service)?.ports;
    let found = ports
        .iter()
        .filter(|other| other.service_port == u32::from(port))
        .nth(nth)?;
    Some((*address, u16::try_from(found.target_port).ok()?))
}
