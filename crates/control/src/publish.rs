//! Ports published on the host: an internal service per workload, and the list for who relays to it.
//!
//! A relay on the host connects to the service's virtual address, so that published traffic is balanced, checked and
//! recorded like all other. The relay itself is the runtime's.

use std::{collections::BTreeMap, net::IpAddr};

use api::pod::{PodPort, Protocol};
use serde::{Deserialize, Serialize};

use crate::{expand::hash_json, store::Store};

/// Namespace of internal services.
pub(crate) const PUBLISH_NAMESPACE: &str = "heddle-system";
/// Longest name of a service (RFC 1123 label).
const MAX_NAME: usize = 63;

/// A port on the host's loopback and where it leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// Port on the host's loopback.
    pub host_port: u16,
    /// Virtual IPv4 address of the internal service.
    pub service_vip: IpAddr,
    /// Port at the virtual address, which is the workload's own.
    pub port: u16,
    /// Transport.
    pub protocol: Protocol,
    /// `NAMESPACE/NAME` of the workload.
    pub workload: String,
}

/// The internal service of a workload with published ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PublishService {
    pub(crate) name: String,
    pub(crate) ports: Vec<(u16, Protocol)>,
    workload: String,
    host_ports: Vec<(u16, u16, Protocol)>,
}

/// The internal services. Where two workloads publish on one host port, the first by name has it.
pub(crate) fn services(store: &Store) -> Vec<PublishService> {
    let mut taken = BTreeMap::new();
    store
        .iter(crate::expand::as_workload)
        .filter_map(|(_, workload)| {
            let (namespace, name) = (&workload.metadata.namespace, &workload.metadata.name);
            let owner = format!("{namespace}/{name}");
            let mut is_free = |port: &PodPort, host_port| {
                *taken
                    .entry((host_port, port.protocol))
                    .or_insert_with(|| owner.clone())
                    == owner
            };
            let host_ports: Vec<_> = workload
                .spec
                .ports
                .iter()
                .filter_map(|port| Some((port, port.publish?)))
                .filter(|(port, host_port)| is_free(port, *host_port))
                .map(|(port, host_port)| (host_port, port.port, port.protocol))
                .collect();
            (!host_ports.is_empty()).then(|| PublishService {
                name: service_name(namespace, name),
                ports: host_ports
                    .iter()
                    .map(|(_, port, protocol)| (*port, *protocol))
                    .collect(),
                workload: owner,
                host_ports,
            })
        })
        .collect()
}

/// Name of a workload's internal service. Distinct for distinct workloads: a namespace with a dash, which would make it ambiguous where the
/// workload's name begins, and names that are too long get a hash.
pub(crate) fn service_name(namespace: &str, workload: &str) -> String {
    let name = format!("publish-{namespace}-{workload}");
    if name.len() <= MAX_NAME && !namespace.contains('-') {
        return name;
    }
    let hash = hash_json(&(namespace, workload));
    let kept: String = name.chars().take(MAX_NAME - 9).collect();
    format!("{}-{}", kept.trim_end_matches('-'), &hash[..8])
}

impl PublishService {
    /// `NAMESPACE/NAME`.
    pub(crate) fn key(&self) -> String {
        format!("{PUBLISH_NAMESPACE}/{}", self.name)
    }

    /// What a relay has to do for it.
    pub(crate) fn published(&self, service_vip: IpAddr) -> impl Iterator<Item = PublishedPort> {
        self.host_ports
            .iter()
            .map(move |(host_port, port, protocol)| PublishedPort {
                host_port: *host_port,
                service_vip,
                port: *port,
                protocol: *protocol,
                workload: self.workload.clone(),
            })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_distinct_labels() {
        assert_eq!(service_name("shop", "web-ui"), "publish-shop-web-ui");
        let long = "x".repeat(60);
        let names = [
            service_name("a", "b-c"),
            service_name("a-b", "c"),
            service_name("a", &long),
            service_name("b", &long),
            service_name(&long, "a"),
        ];
        let distinct: BTreeSet<&String> = names.iter().collect();
        assert_eq!(distinct.len(), names.len());
        assert!(names.iter().all(|name| name.len() <= MAX_NAME));
    }
}
