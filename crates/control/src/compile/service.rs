//! Services: their resources, and what a workload behind one must know to serve it.
//!
//! Besides those that users write there is one for every workload with published ports (see [`crate::publish`]).

use std::{collections::BTreeMap, net::IpAddr};

use api::{
    mesh::MeshConfig,
    objects::{
        ClusterIp, IpFamily, IpFamilyPolicy, Object, Service, TargetPort, TrafficDistribution,
    },
    pod::{PodPort, PodSpec, Protocol},
};
use xds::proto::{
    SERVICE_OPTIONS, address_to_bytes,
    heddle::{self, PortName, PortProtocol, ServiceOptions},
    workload::{
        self, AppProtocol, Extension, IpFamilies, LoadBalancing, NetworkAddress, Port,
        address::Type, load_balancing,
    },
};

use super::{Addresses, Resource, encode_address};
use crate::{
    publish::{PUBLISH_NAMESPACE, PublishService},
    selector::{Labels, SelectorIndex},
    store::Store,
    vip::Wish,
};

/// A service as compiled.
#[derive(Debug)]
pub(crate) struct ServiceShape<'a> {
    /// `NAMESPACE/HOSTNAME`: its resource's name.
    pub(crate) key: String,
    message: workload::Service,
    ports: Vec<PortShape>,
    /// Namespace and labels of its workloads, or, for a published workload, none.
    selects: Option<(&'a str, &'a Labels)>,
}

#[derive(Debug)]
struct PortShape {
    port: u16,
    protocol: Protocol,
    target: TargetPort,
    app_protocol: AppProtocol,
}

/// Services by `NAMESPACE/NAME`.
pub(crate) type Services<'a> = BTreeMap<String, ServiceShape<'a>>;

/// Compiles all services that have an entry in `addresses` (empty for headless ones).
pub(crate) fn shapes<'a>(
    mesh: &MeshConfig,
    store: &'a Store,
    addresses: &Addresses,
    publish: &'a [PublishService],
) -> Services<'a> {
    let written = store.iter(as_service).filter_map(|(_, service)| {
        let key = service_key(service);
        let addresses = addresses.get(&key)?;
        Some((key, shape(mesh, service, addresses)))
    });
    let published = publish.iter().filter_map(|service| {
        let addresses = addresses.get(&service.key())?;
        Some((service.key(), publish_shape(mesh, service, addresses)))
    });
    written.chain(published).collect()
}

/// Finds the services of a workload by its labels.
pub(crate) fn index<'s>(services: &'s Services<'_>) -> SelectorIndex<'s, &'s ServiceShape<'s>> {
    SelectorIndex::new(services.values().filter_map(|service| {
        let (namespace, selector) = service.selects?;
        Some((Some(namespace), selector, service as &ServiceShape<'_>))
    }))
}

/// The service through which a replica's workload is published.
pub(crate) fn published<'s>(
    services: &'s Services<'_>,
    spec: &PodSpec,
) -> Option<&'s ServiceShape<'s>> {
    let name = crate::publish::service_name(&spec.namespace, &spec.workload);
    let service = services.get(&format!("{PUBLISH_NAMESPACE}/{name}"))?;
    service
        .selects
        .is_none()
        .then_some(service as &ServiceShape<'_>)
}

/// `NAMESPACE/NAME` of a service.
pub(crate) fn service_key(service: &Service) -> String {
    format!("{}/{}", service.metadata.namespace, service.metadata.name)
}

/// `NAMESPACE/HOSTNAME`: the resource's name.
pub(crate) fn resource_name(mesh: &MeshConfig, namespace: &str, name: &str) -> String {
    format!("{namespace}/{}", hostname(mesh, namespace, name))
}

/// What a service asks for, or `None` if it has no addresses (headless).
pub(crate) fn address_wish(service: &Service) -> Option<Wish> {
    let families: Vec<bool> = service
        .ip_families
        .iter()
        .map(|family| *family == IpFamily::IPv6)
        .collect();
    match &service.cluster_ip {
        ClusterIp::Headless => None,
        ClusterIp::Fixed(addresses) => Some(Wish::These(addresses.clone())),
        ClusterIp::Auto => {
            let single = service.ip_family_policy == Some(IpFamilyPolicy::SingleStack);
            let first = families.first().copied().unwrap_or(false);
            let named_one = families.len() == 1
                && !matches!(
                    service.ip_family_policy,
                    Some(IpFamilyPolicy::PreferDualStack | IpFamilyPolicy::RequireDualStack)
                );
            Some(Wish::Any {
                ipv6: if single || named_one {
                    vec![first]
                } else {
                    vec![first, !first]
                },
            })
        }
    }
}

/// Picks services.
pub(crate) fn as_service(object: &Object) -> Option<&Service> {
    match object {
        Object::Service(service) => Some(service),
        _ => None,
    }
}

impl ServiceShape<'_> {
    /// Its resource.
    pub(crate) fn resource(&self) -> Resource {
        (
            self.key.clone(),
            encode_address(Type::Service(self.message.clone())),
        )
    }

    /// The ports on which a replica serves it. One whose named target the replica lacks is not among them.
    pub(crate) fn ports_of(&self, replica_ports: &[PodPort]) -> Vec<Port> {
        self.ports
            .iter()
            .filter_map(|port| {
                let target = match &port.target {
                    TargetPort::Number(number) => *number,
                    TargetPort::Name(name) => {
                        replica_ports
                            .iter()
                            .find(|other| {
                                other.name.as_ref() == Some(name) && other.protocol == port.protocol
                            })?
                            .port
                    }
                };
                Some(Port {
                    service_port: port.port.into(),
                    target_port: target.into(),
                    app_protocol: port.app_protocol.into(),
                })
            })
            .collect()
    }
}

fn shape<'a>(mesh: &MeshConfig, service: &'a Service, addresses: &[IpAddr]) -> ServiceShape<'a> {
    let (namespace, name) = (&service.metadata.namespace, &service.metadata.name);
    let ports: Vec<PortShape> = service
        .ports
        .iter()
        .map(|port| PortShape {
            port: port.port,
            protocol: port.protocol,
            target: port.target_port.clone(),
            app_protocol: app_protocol(port.app_protocol.as_deref()),
        })
        .collect();
    let affinity = service
        .session_affinity
        .map_or(0, |duration| duration.as_secs());
    let options = ServiceOptions {
        session_affinity_seconds: u32::try_from(affinity).unwrap_or(u32::MAX),
        publish_not_ready_addresses: service.publish_not_ready_addresses,
        headless: service.cluster_ip == ClusterIp::Headless,
        port_protocols: port_protocols(&ports),
        port_names: service
            .ports
            .iter()
            .filter_map(|port| {
                Some(PortName {
                    service_port: port.port.into(),
                    name: port.name.clone()?,
                })
            })
            .collect(),
    };
    let mut message = message(mesh, namespace, name, addresses, &ports, &options);
    message.load_balancing = load_balancing(service);
    ServiceShape {
        key: resource_name(mesh, namespace, name),
        message,
        ports,
        selects: Some((namespace, &service.selector)),
    }
}

fn publish_shape<'a>(
    mesh: &MeshConfig,
    service: &'a PublishService,
    addresses: &[IpAddr],
) -> ServiceShape<'a> {
    let ports: Vec<PortShape> = service
        .ports
        .iter()
        .map(|(port, protocol)| PortShape {
            port: *port,
            protocol: *protocol,
            target: TargetPort::Number(*port),
            app_protocol: AppProtocol::Unknown,
        })
        .collect();
    let options = ServiceOptions {
        port_protocols: port_protocols(&ports),
        ..ServiceOptions::default()
    };
    ServiceShape {
        key: resource_name(mesh, PUBLISH_NAMESPACE, &service.name),
        message: message(
            mesh,
            PUBLISH_NAMESPACE,
            &service.name,
            addresses,
            &ports,
            &options,
        ),
        ports,
        selects: None,
    }
}

fn message(
    mesh: &MeshConfig,
    namespace: &str,
    name: &str,
    addresses: &[IpAddr],
    ports: &[PortShape],
    options: &ServiceOptions,
) -> workload::Service {
    let target = |port: &PortShape| match port.target {
        TargetPort::Number(number) => number.into(),
        // 0: each workload says.
        TargetPort::Name(_) => 0,
    };
    workload::Service {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        hostname: hostname(mesh, namespace, name),
        addresses: addresses
            .iter()
            .map(|address| NetworkAddress {
                network: String::new(),
                address: address_to_bytes(*address),
            })
            .collect(),
        ports: ports
            .iter()
            .map(|port| Port {
                service_port: port.port.into(),
                target_port: target(port),
                app_protocol: port.app_protocol.into(),
            })
            .collect(),
        ip_families: ip_families(addresses).into(),
        extensions: vec![Extension::pack(SERVICE_OPTIONS, options)],
        canonical: true,
        ..workload::Service::default()
    }
}

/// In the order of the service's ports: where TCP and UDP share a number, the n-th entry of that number is the n-th port's.
fn port_protocols(ports: &[PortShape]) -> Vec<PortProtocol> {
    let protocol = |port: &PortShape| match port.protocol {
        Protocol::Tcp => heddle::Protocol::Tcp,
        Protocol::Udp => heddle::Protocol::Udp,
    };
    ports
        .iter()
        .map(|port| PortProtocol {
            service_port: port.port.into(),
            protocol: protocol(port).into(),
        })
        .collect()
}

/// Without zones and regions, "close" means the same node.
fn load_balancing(service: &Service) -> Option<LoadBalancing> {
    let mode = match (service.local_only, service.traffic_distribution) {
        (true, _) => load_balancing::Mode::Strict,
        (false, Some(TrafficDistribution::PreferClose | TrafficDistribution::PreferSameNode)) => {
            load_balancing::Mode::Failover
        }
        (false, None) => return None,
    };
    Some(LoadBalancing {
        routing_preference: vec![load_balancing::Scope::Node.into()],
        mode: mode.into(),
        health_policy: load_balancing::HealthPolicy::OnlyHealthy.into(),
    })
}

fn ip_families(addresses: &[IpAddr]) -> IpFamilies {
    let v4 = addresses.iter().any(IpAddr::is_ipv4);
    let v6 = addresses.iter().any(IpAddr::is_ipv6);
    match (v4, v6) {
        (true, true) => IpFamilies::Dual,
        (true, false) => IpFamilies::Ipv4Only,
        (false, true) => IpFamilies::Ipv6Only,
        (false, false) => IpFamilies::Automatic,
    }
}

/// <https://kubernetes.io/docs/concepts/services-networking/service/#application-protocol>
fn app_protocol(name: Option<&str>) -> AppProtocol {
    match name {
        Some("http" | "kubernetes.io/ws") => AppProtocol::Http11,
        Some("http2" | "kubernetes.io/h2c") => AppProtocol::Http2,
        Some("grpc") => AppProtocol::Grpc,
        _ => AppProtocol::Unknown,
    }
}

fn hostname(mesh: &MeshConfig, namespace: &str, name: &str) -> String {
    format!("{name}.{namespace}.svc.{}", mesh.cluster_domain)
}
