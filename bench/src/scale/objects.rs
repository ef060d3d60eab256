//! What the mesh consists of, as the control plane sends it: services, workloads and policies, all by number.
//!
//! Service N has one endpoint, on another node, and one policy of its own; that is what most of a mesh is to a
//! node. The workloads that run here, and services with many endpoints, are made by name.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use bytes::Bytes;
use prost::Message;
use xds::{
    cache::Change,
    proto::{
        ADDRESS_TYPE, AUTHORIZATION_TYPE, address_to_bytes,
        security::{
            self, Authorization, Clause, Match, Rule, Scope, StringMatch, string_match::MatchType,
        },
        workload::{Address, NetworkAddress, Port, PortList, Service, Workload, address::Type},
    },
};

/// The namespace of everything.
pub(super) const NAMESPACE: &str = "scale";
/// The node under test.
pub(super) const NODE: &str = "node";
/// Where all other endpoints are.
const ELSEWHERE: &str = "elsewhere";
/// The port of services by number.
pub(super) const HTTP: u16 = 80;
const TARGET: u16 = 8080;

/// Addresses of both families, told apart by range and number.
#[derive(Debug, Clone, Copy)]
pub(super) enum Range {
    /// Services by number.
    Services = 0x0a60_1000,
    /// Endpoints of services by number.
    Endpoints = 0x0af5_0000,
    /// Services by name.
    Named = 0x0a60_0100,
    /// Endpoints of services by name.
    Many = 0x0af6_0000,
}

/// The addresses of a number in a range.
pub(super) fn addresses(range: Range, number: u32) -> [IpAddr; 2] {
    let v4 = range as u32 + number;
    let v6 = (0xfd10_0096_u128 << 96) + u128::from(v4);
    [Ipv4Addr::from(v4).into(), Ipv6Addr::from(v6).into()]
}

/// The changes that add (or take away) service `number`, its endpoint and its policy.
pub(super) fn numbered(number: u32, present: bool) -> [Change; 3] {
    let (pod, policy) = (format!("pod-{number}"), format!("policy-{number}"));
    let service = format!("svc-{number}");
    if !present {
        return [
            removed(ADDRESS_TYPE, service_name(&service)),
            removed(ADDRESS_TYPE, workload_name(&pod)),
            removed(AUTHORIZATION_TYPE, policy_name(&policy)),
        ];
    }
    let endpoint = remote(
        &pod,
        addresses(Range::Endpoints, number),
        &[(&service, &[(HTTP, TARGET)])],
        &[&policy],
    );
    [
        service_of(&service, addresses(Range::Services, number), &[HTTP]),
        change(endpoint),
        change_policy(&selected(&policy, &format!("caller-{number}"), &[TARGET])),
    ]
}

/// The endpoint `number` of a service by name; taken away without `weight`.
pub(super) fn endpoint(service: &str, number: u32, weight: Option<u32>) -> Change {
    let pod = format!("{service}-{number}");
    let Some(weight) = weight else {
        return removed(ADDRESS_TYPE, workload_name(&pod));
    };
    let mut workload = remote(
        &pod,
        addresses(Range::Many, number),
        &[(service, &[(HTTP, TARGET)])],
        &[],
    );
    workload.capacity = Some(weight);
    change(workload)
}

/// A service with these ports.
pub(super) fn service_of(name: &str, vips: [IpAddr; 2], ports: &[u16]) -> Change {
    let service = Service {
        name: name.into(),
        namespace: NAMESPACE.into(),
        hostname: hostname(name),
        addresses: vips.map(network_address).to_vec(),
        ports: ports.iter().map(|port| same_port(*port, 0)).collect(),
        ..Service::default()
    };
    Change {
        type_url: ADDRESS_TYPE.into(),
        name: service_name(name),
        body: Some(encoded(&Address {
            r#type: Some(Type::Service(service)),
        })),
    }
}

/// A workload of the node under test, under its own service account.
pub(super) fn local(
    pod: &str,
    own: &[IpAddr],
    services: &[(&str, &[(u16, u16)])],
    policies: &[&str],
) -> Change {
    let mut workload = workload_of(pod, own, services, policies);
    workload.node = NODE.into();
    change(workload)
}

/// A policy that lets one service account reach ports of the workloads that list it.
pub(super) fn selected(name: &str, caller: &str, ports: &[u16]) -> Authorization {
    allow(name, Scope::WorkloadSelector, Some((caller, ports)))
}

/// A policy of the whole namespace: nobody may do anything that no other policy allows, but `caller`, on a
/// port that nobody uses.
pub(super) fn namespace_wide(caller: &str) -> Authorization {
    allow("everywhere", Scope::Namespace, Some((caller, &[9])))
}

/// The policy as a change.
pub(super) fn change_policy(policy: &Authorization) -> Change {
    Change {
        type_url: AUTHORIZATION_TYPE.into(),
        name: policy_name(&policy.name),
        body: Some(encoded(policy)),
    }
}

/// A change that takes a local workload away.
pub(super) fn without_local(pod: &str) -> Change {
    removed(ADDRESS_TYPE, workload_name(pod))
}

/// A change that takes a policy away.
pub(super) fn without_policy(name: &str) -> Change {
    removed(AUTHORIZATION_TYPE, policy_name(name))
}

fn allow(name: &str, scope: Scope, rule: Option<(&str, &[u16])>) -> Authorization {
    let rules = rule.map(|(caller, ports)| Rule {
        clauses: vec![
            Clause {
                matches: vec![Match {
                    principals: vec![StringMatch {
                        match_type: Some(MatchType::Exact(principal(caller))),
                    }],
                    ..Match::default()
                }],
            },
            Clause {
                matches: vec![Match {
                    destination_ports: ports.iter().copied().map(u32::from).collect(),
                    ..Match::default()
                }],
            },
        ],
    });
    Authorization {
        name: name.into(),
        namespace: NAMESPACE.into(),
        scope: scope.into(),
        action: security::Action::Allow.into(),
        rules: rules.into_iter().collect(),
        dry_run: false,
    }
}

fn principal(account: &str) -> String {
    format!("cluster.local/ns/{NAMESPACE}/sa/{account}")
}

fn remote(
    pod: &str,
    own: [IpAddr; 2],
    services: &[(&str, &[(u16, u16)])],
    policies: &[&str],
) -> Workload {
    let mut workload = workload_of(pod, &own, services, policies);
    workload.node = ELSEWHERE.into();
    workload
}

fn workload_of(
    pod: &str,
    own: &[IpAddr],
    services: &[(&str, &[(u16, u16)])],
    policies: &[&str],
) -> Workload {
    let services: HashMap<String, PortList> = services
        .iter()
        .map(|(service, ports)| {
            let ports = ports
                .iter()
                .map(|(port, target)| same_port(*port, *target))
                .collect();
            (service_name(service), PortList { ports })
        })
        .collect();
    Workload {
        name: pod.into(),
        namespace: NAMESPACE.into(),
        hostname: pod.into(),
        addresses: own.iter().copied().map(address_to_bytes).collect(),
        service_account: pod.into(),
        workload_name: pod.into(),
        authorization_policies: policies.iter().map(|name| policy_name(name)).collect(),
        uid: workload_name(pod),
        services: services.into_iter().collect(),
        ..Workload::default()
    }
}

fn change(workload: Workload) -> Change {
    Change {
        type_url: ADDRESS_TYPE.into(),
        name: workload.uid.clone(),
        body: Some(encoded(&Address {
            r#type: Some(Type::Workload(workload)),
        })),
    }
}

fn removed(type_url: &str, name: String) -> Change {
    Change {
        type_url: type_url.into(),
        name,
        body: None,
    }
}

fn encoded(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

fn same_port(port: u16, target: u16) -> Port {
    Port {
        service_port: port.into(),
        target_port: target.into(),
        ..Port::default()
    }
}

fn network_address(address: IpAddr) -> NetworkAddress {
    NetworkAddress {
        address: address_to_bytes(address),
        ..NetworkAddress::default()
    }
}

fn hostname(service: &str) -> String {
    format!("{service}.{NAMESPACE}.svc.cluster.local")
}

fn service_name(service: &str) -> String {
    format!("{NAMESPACE}/{}", hostname(service))
}

fn workload_name(pod: &str) -> String {
    format!("Kubernetes//Pod/{NAMESPACE}/{pod}")
}

fn policy_name(policy: &str) -> String {
    format!("{NAMESPACE}/{policy}")
}
