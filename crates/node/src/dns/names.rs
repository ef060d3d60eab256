//! What a query name means to the workload that asks.
//!
//! The scheme is Kubernetes' DNS specification
//! (<https://github.com/kubernetes/dns/blob/master/docs/specification.md>), plus the shortened forms
//! `svc`, `svc.ns` and `svc.ns.svc`, so that they work whatever a program does about search domains.
//! Records are built in [`super::answer`].

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use api::pod::Protocol;
use hickory_proto::rr::Name;
use ipnet::IpNet;

use super::zone::{DnsEndpoint, DnsPort, DnsService, Zone};

/// What a name stands for.
#[derive(Debug)]
pub(super) enum Meaning {
    /// Not a name of the mesh: the machine's resolver knows, or nobody.
    Elsewhere,
    /// Would be a name of the mesh, but does not exist.
    Unknown,
    /// Exists only because names below it do.
    Empty,
    /// The cluster domain itself.
    Apex,
    /// A service.
    Service(Arc<DnsService>),
    /// One host name of a service, as a rule one pod.
    Pod(Vec<Arc<DnsEndpoint>>),
    /// Ports of a service, asked for by name and transport.
    Ports(Arc<DnsService>, Vec<DnsPort>),
    /// A pod's address in words.
    Address(IpAddr),
    /// An address in reverse, and the names it has.
    Pointer(Vec<Name>),
}

/// What `name` means to a workload of `namespace`.
pub(super) fn meaning(zone: &Zone, namespace: &str, name: &Name) -> Meaning {
    let Some(text) = plain_text(name) else {
        return if zone.domain().zone_of(name) {
            Meaning::Unknown
        } else {
            Meaning::Elsewhere
        };
    };
    if text == zone.domain_text() {
        return Meaning::Apex;
    }
    let below = text.strip_suffix(zone.domain_text());
    if let Some(inside) = below.and_then(|inside| inside.strip_suffix('.')) {
        let usual = cluster_name(zone, &labels(inside));
        return match (&usual, zone.host(&text, namespace)) {
            (Meaning::Unknown, Some(service)) => Meaning::Service(Arc::clone(service)),
            _ => usual,
        };
    }
    if text.ends_with(".arpa") {
        return pointer(zone, name);
    }
    if let Some(service) = zone.host(&text, namespace) {
        return Meaning::Service(Arc::clone(service));
    }
    match short_name(zone, namespace, &labels(&text)) {
        // The name may exist outside: `.shop` is a namespace here and a top-level domain there.
        Meaning::Unknown | Meaning::Empty => Meaning::Elsewhere,
        known => known,
    }
}

/// The full name of a service's host: `pod.svc.ns.svc.domain`; `None` if a part is no DNS label.
pub(super) fn pod_name(zone: &Zone, hostname: &str, service: &DnsService) -> Option<Name> {
    let service = service_text(zone, service);
    Name::from_ascii(format!("{hostname}.{service}")).ok()
}

/// The full name of a service: `svc.ns.svc.domain`; `None` if a part is no DNS label.
pub(super) fn service_name(zone: &Zone, service: &DnsService) -> Option<Name> {
    Name::from_ascii(service_text(zone, service)).ok()
}

fn service_text(zone: &Zone, service: &DnsService) -> String {
    let (name, namespace) = (&service.name, &service.namespace);
    format!("{name}.{namespace}.svc.{}.", zone.domain_text())
}

/// A name relative to the cluster domain.
fn cluster_name(zone: &Zone, labels: &[&str]) -> Meaning {
    match labels {
        ["svc" | "pod"] => Meaning::Empty,
        [namespace, "svc" | "pod"] if zone.has_namespace(namespace) => Meaning::Empty,
        [address, namespace, "pod"] => pod_address(zone, address, namespace),
        [rest @ .., namespace, "svc"] => name_in_namespace(zone, rest, namespace),
        _ => Meaning::Unknown,
    }
}

/// A name relative to `NAMESPACE.svc.CLUSTER_DOMAIN`.
fn name_in_namespace(zone: &Zone, labels: &[&str], namespace: &str) -> Meaning {
    let Some((name, rest)) = labels.split_last() else {
        return Meaning::Unknown;
    };
    let Some(service) = zone.service(name, namespace) else {
        return Meaning::Unknown;
    };
    match rest {
        [] => Meaning::Service(Arc::clone(service)),
        ["_tcp" | "_udp"] => Meaning::Empty,
        [port, protocol] => ports(service, port, protocol),
        [hostname] => {
            let pods: Vec<_> = zone.published_pods(service, hostname).cloned().collect();
            if pods.is_empty() {
                Meaning::Unknown
            } else {
                Meaning::Pod(pods)
            }
        }
        _ => Meaning::Unknown,
    }
}

/// A name without the cluster domain, or with less.
fn short_name(zone: &Zone, own_namespace: &str, labels: &[&str]) -> Meaning {
    match labels {
        [rest @ .., namespace, "svc"] if !rest.is_empty() => {
            name_in_namespace(zone, rest, namespace)
        }
        [port, protocol, service] if protocol.starts_with('_') => {
            name_in_namespace(zone, &[port, protocol, service], own_namespace)
        }
        [port, protocol, service, namespace] if protocol.starts_with('_') => {
            name_in_namespace(zone, &[port, protocol, service], namespace)
        }
        [service] => name_in_namespace(zone, &[service], own_namespace),
        [service, namespace] => name_in_namespace(zone, &[service], namespace),
        _ => Meaning::Unknown,
    }
}

fn ports(service: &Arc<DnsService>, port: &str, protocol: &str) -> Meaning {
    let protocol = match protocol {
        "_tcp" => Protocol::Tcp,
        "_udp" => Protocol::Udp,
        _ => return Meaning::Unknown,
    };
    let Some(name) = port.strip_prefix('_') else {
        return Meaning::Unknown;
    };
    let matches = |port: &&DnsPort| {
        let named = port.name.as_deref();
        port.protocol == protocol && named.is_some_and(|own| own.eq_ignore_ascii_case(name))
    };
    let ports: Vec<_> = service.ports.iter().filter(matches).cloned().collect();
    if ports.is_empty() {
        Meaning::Unknown
    } else {
        Meaning::Ports(Arc::clone(service), ports)
    }
}

/// `10-244-0-5.NAMESPACE.pod`, for pods that exist.
fn pod_address(zone: &Zone, dashed: &str, namespace: &str) -> Meaning {
    let v4 = dashed.replace('-', ".").parse::<Ipv4Addr>();
    let v6 = || dashed.replace('-', ":").parse::<Ipv6Addr>();
    let address = v4.map(IpAddr::from).or_else(|_| v6().map(IpAddr::from));
    let Ok(address) = address else {
        return Meaning::Unknown;
    };
    let endpoints = zone.endpoints_of_address(address);
    if endpoints
        .iter()
        .any(|endpoint| endpoint.namespace == namespace)
    {
        Meaning::Address(address)
    } else {
        Meaning::Unknown
    }
}

/// `5.0.244.10.in-addr.arpa` and its IPv6 like.
fn pointer(zone: &Zone, name: &Name) -> Meaning {
    let address = match name.parse_arpa_name() {
        Ok(IpNet::V4(net)) if net.prefix_len() == 32 => IpAddr::from(net.addr()),
        Ok(IpNet::V6(net)) if net.prefix_len() == 128 => IpAddr::from(net.addr()),
        _ => return Meaning::Elsewhere,
    };
    let services = zone.services_of_vip(address).iter();
    let mut names: Vec<_> = services
        .filter_map(|service| service_name(zone, service))
        .collect();
    for endpoint in zone.endpoints_of_address(address) {
        names.extend(endpoint_names(zone, endpoint, address));
    }
    match (names.is_empty(), zone.owns_address(address)) {
        (false, _) => Meaning::Pointer(names),
        (true, true) => Meaning::Unknown,
        (true, false) => Meaning::Elsewhere,
    }
}

/// The endpoint's name in each of its services, or its address in words if it belongs to none.
fn endpoint_names(zone: &Zone, endpoint: &DnsEndpoint, address: IpAddr) -> Vec<Name> {
    let services = endpoint.services.iter();
    let names: Vec<_> = services
        .filter_map(|membership| zone.service(&membership.service, &membership.namespace))
        .filter_map(|service| pod_name(zone, &endpoint.hostname, service))
        .collect();
    if !names.is_empty() {
        return names;
    }
    let dashed = address.to_string().replace(['.', ':'], "-");
    let (namespace, domain) = (&endpoint.namespace, zone.domain_text());
    Name::from_ascii(format!("{dashed}.{namespace}.pod.{domain}."))
        .into_iter()
        .collect()
}

/// The name in lower case without its last dot, if it is of letters, digits, `-` and `_` only.
/// A dot inside a label would otherwise pass for the border of two.
fn plain_text(name: &Name) -> Option<String> {
    let mut text = String::with_capacity(name.len());
    for label in name.iter() {
        if !text.is_empty() {
            text.push('.');
        }
        for byte in label {
            if !byte.is_ascii_alphanumeric() && !matches!(byte, b'-' | b'_') {
                return None;
            }
            text.push(byte.to_ascii_lowercase().into());
        }
    }
    Some(text)
}

fn labels(text: &str) -> Vec<&str> {
    text.split('.').collect()
}
