//! Checks of services against workloads and against the mesh's address range.

use std::{collections::HashMap, net::IpAddr};

use super::Index;
use crate::{
    Located,
    mesh::MeshConfig,
    objects::{ClusterIp, Object, ObjectRef, Service, TargetPort},
    problem::{Problem, Severity},
};

/// Whether `service` has workloads, and its named ports a target.
pub(super) fn check(located: &Located, service: &Service, index: &Index<'_>) -> Vec<Problem> {
    if service.selector.is_empty() {
        let message = "has no selector, so it has no endpoints".to_owned();
        return vec![located.problem(Severity::Warning, "spec", message)];
    }
    let namespace = service.metadata.namespace.as_str();
    let selected = index.selected(&service.selector, Some(namespace));
    if selected.is_empty() {
        let message = format!("selects no workload in namespace `{namespace}`");
        return vec![located.problem(Severity::Warning, "spec.selector", message)];
    }
    let mut problems = Vec::new();
    for (number, port) in service.ports.iter().enumerate() {
        let TargetPort::Name(name) = &port.target_port else {
            continue;
        };
        let known = selected
            .iter()
            .flat_map(|workload| &workload.spec.ports)
            .any(|known| known.name.as_ref() == Some(name) && known.protocol == port.protocol);
        if !known {
            let message = format!("none of the selected workloads has a port named `{name}`");
            let path = format!("spec.ports[{number}].targetPort");
            problems.push(located.problem(Severity::Error, &path, message));
        }
    }
    problems
}

/// Whether the addresses that services ask for are in range, free, and asked for once.
pub(super) fn virtual_addresses(objects: &[Located], config: &MeshConfig) -> Vec<Problem> {
    let mut holders: HashMap<IpAddr, ObjectRef> = HashMap::new();
    let mut problems = Vec::new();
    for located in objects {
        let Object::Service(service) = &located.object else {
            continue;
        };
        let ClusterIp::Fixed(addresses) = &service.cluster_ip else {
            continue;
        };
        let reference = located.object.reference();
        for (number, address) in addresses.iter().enumerate() {
            let listed = format!("spec.clusterIPs[{number}]");
            let path = match located.position(&listed) {
                Some(_) => listed.as_str(),
                None => "spec.clusterIP",
            };
            let mut report = |message, expected: Option<String>| {
                let problem = located.problem(Severity::Error, path, message);
                problems.push(Problem {
                    expected,
                    ..problem
                });
            };
            if let Err(expected) = usable(*address, config) {
                report(
                    format!("{address} cannot be the address of a service"),
                    Some(expected),
                );
            }
            let holder = holders.entry(*address).or_insert_with(|| reference.clone());
            if *holder != reference {
                report(
                    format!("{address} is already the address of {holder}"),
                    None,
                );
            }
        }
    }
    problems
}

/// Whether a service may have `address`; `Err` says which it may.
fn usable(address: IpAddr, config: &MeshConfig) -> Result<(), String> {
    let (range, reserved) = match address {
        IpAddr::V4(_) => {
            let range = config.service_cidr_v4;
            let reserved = [range.network(), range.broadcast(), config.dns_v4()];
            (range.to_string(), reserved.map(IpAddr::from))
        }
        IpAddr::V6(_) => {
            let range = config.service_cidr_v6;
            let reserved = [range.network(), range.network(), config.dns_v6()];
            (range.to_string(), reserved.map(IpAddr::from))
        }
    };
    if config.is_service_address(address) && !reserved.contains(&address) {
        return Ok(());
    }
    let dns = reserved[2];
    Err(format!(
        "an address in {range}, other than its first and last and the mesh's DNS at {dns}"
    ))
}
