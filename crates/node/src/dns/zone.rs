//! The mesh's services and endpoints as DNS needs them: a snapshot that is cheap to copy and change.
//!
//! Who changes it clones the current one, applies the changes and publishes the result behind an
//! `ArcSwap`. What a query name means is in [`super::names`], what is answered in [`super::answer`].

use std::{net::IpAddr, sync::Arc};

use api::{mesh::MeshConfig, pod::Protocol};
use hickory_proto::rr::Name;
use ipnet::IpNet;

use super::{DnsError, sharded::Sharded};

/// A service, as far as its names go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsService {
    /// Namespace.
    pub namespace: String,
    /// Name within the namespace.
    pub name: String,
    /// Full host name; answered too if it is not the usual `NAME.NAMESPACE.svc.CLUSTER_DOMAIN`.
    pub hostname: String,
    /// Virtual addresses; none if headless.
    pub vips: Vec<IpAddr>,
    /// The name stands for the endpoints' own addresses.
    pub headless: bool,
    /// Ports, for SRV records.
    pub ports: Vec<DnsPort>,
    /// Endpoints that are not ready have records too.
    pub publish_not_ready: bool,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsPort {
    /// Name; a port without one has no SRV record of its own.
    pub name: Option<String>,
    /// Number, as clients of the service use it.
    pub port: u16,
    /// Transport.
    pub protocol: Protocol,
}

/// A replica and the services that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsEndpoint {
    /// Identifies the endpoint for [`Zone::upsert_endpoint`] and [`Zone::remove_endpoint`].
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// The pod's host name: the first label of its own names.
    pub hostname: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// May get traffic.
    pub ready: bool,
    /// Services that select it.
    pub services: Vec<DnsMembership>,
}

/// That an endpoint belongs to a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsMembership {
    /// Namespace of the service.
    pub namespace: String,
    /// Name of the service.
    pub service: String,
    /// Pairs of a port of the service and the endpoint's own port that serves it.
    pub target_ports: Vec<(u16, u16)>,
}

/// A snapshot of all names of the mesh.
///
/// Services and endpoints may come in any order; a later one of the same name or uid replaces the earlier.
#[derive(Debug, Clone)]
pub struct Zone {
    domain: Arc<Domain>,
    /// Changes with every change, as the serial of a zone should (RFC 1035, section 3.3.13).
    serial: u32,
    /// By `NAME.NAMESPACE`.
    services: Sharded<String, Arc<DnsService>>,
    /// By host names outside the usual scheme.
    hosts: Sharded<String, Vec<Arc<DnsService>>>,
    vips: Sharded<IpAddr, Vec<Arc<DnsService>>>,
    /// Services per namespace: a namespace exists as long as it has one.
    namespaces: Sharded<String, usize>,
    /// By uid.
    endpoints: Sharded<String, Arc<DnsEndpoint>>,
    /// By the `NAME.NAMESPACE` of a service.
    members: Sharded<String, Vec<Arc<DnsEndpoint>>>,
    /// By `HOSTNAME.NAMESPACE`.
    pods: Sharded<String, Vec<Arc<DnsEndpoint>>>,
    addresses: Sharded<IpAddr, Vec<Arc<DnsEndpoint>>>,
}

#[derive(Debug)]
struct Domain {
    name: Name,
    text: String,
    ranges: [IpNet; 4],
}

impl Zone {
    /// A zone without names, for this mesh's cluster domain and address ranges.
    ///
    /// # Errors
    /// [`DnsError::ClusterDomain`] if the cluster domain is not a domain name.
    pub fn new(mesh: &MeshConfig) -> Result<Self, DnsError> {
        let text = mesh.cluster_domain.trim_end_matches('.').to_lowercase();
        let name = Name::from_ascii(format!("{text}."));
        let name = name.map_err(|source| DnsError::ClusterDomain {
            domain: mesh.cluster_domain.clone(),
            source,
        })?;
        let ranges = [
            mesh.pod_cidr_v4.into(),
            mesh.pod_cidr_v6.into(),
            mesh.service_cidr_v4.into(),
            mesh.service_cidr_v6.into(),
        ];
        Ok(Self {
            domain: Arc::new(Domain { name, text, ranges }),
            serial: 1,
            services: Sharded::default(),
            hosts: Sharded::default(),
            vips: Sharded::default(),
            namespaces: Sharded::default(),
            endpoints: Sharded::default(),
            members: Sharded::default(),
            pods: Sharded::default(),
            addresses: Sharded::default(),
        })
    }

    /// Adds a service, or replaces the one of the same name.
    pub fn upsert_service(&mut self, service: DnsService) {
        self.remove_service(&service.namespace, &service.name);
        let service = Arc::new(service);
        let key = key(&service.name, &service.namespace);
        if let Some(host) = self.unusual_host(&service) {
            self.hosts.add(host.as_str(), Arc::clone(&service));
        }
        for vip in &service.vips {
            self.vips.add(vip, Arc::clone(&service));
        }
        let namespace = service.namespace.to_lowercase();
        let others = self.namespaces.get(namespace.as_str()).copied();
        self.namespaces.insert(namespace, others.unwrap_or(0) + 1);
        self.services.insert(key, service);
        self.serial = self.serial.wrapping_add(1);
    }

    /// Removes a service; its endpoints stay. Nothing happens if there is none of this name.
    pub fn remove_service(&mut self, namespace: &str, name: &str) {
        let Some(service) = self.services.remove(key(name, namespace).as_str()) else {
            return;
        };
        if let Some(host) = self.unusual_host(&service) {
            self.hosts
                .subtract(host.as_str(), |other| Arc::ptr_eq(other, &service));
        }
        for vip in &service.vips {
            self.vips
                .subtract(vip, |other| Arc::ptr_eq(other, &service));
        }
        let namespace = service.namespace.to_lowercase();
        match self.namespaces.get(namespace.as_str()).copied() {
            Some(count) if count > 1 => {
                self.namespaces.insert(namespace, count - 1);
            }
            _ => {
                self.namespaces.remove(namespace.as_str());
            }
        }
        self.serial = self.serial.wrapping_add(1);
    }

    /// Adds an endpoint, or replaces the one of the same uid.
    pub fn upsert_endpoint(&mut self, endpoint: DnsEndpoint) {
        self.remove_endpoint(&endpoint.uid);
        let endpoint = Arc::new(endpoint);
        for membership in &endpoint.services {
            let service = key(&membership.service, &membership.namespace);
            self.members.add(service.as_str(), Arc::clone(&endpoint));
        }
        let pod = key(&endpoint.hostname, &endpoint.namespace);
        self.pods.add(pod.as_str(), Arc::clone(&endpoint));
        for address in &endpoint.addresses {
            self.addresses.add(address, Arc::clone(&endpoint));
        }
        self.endpoints.insert(endpoint.uid.clone(), endpoint);
        self.serial = self.serial.wrapping_add(1);
    }

    /// Removes an endpoint. Nothing happens if there is none of this uid.
    pub fn remove_endpoint(&mut self, uid: &str) {
        let Some(endpoint) = self.endpoints.remove(uid) else {
            return;
        };
        let same = |other: &Arc<DnsEndpoint>| Arc::ptr_eq(other, &endpoint);
        for membership in &endpoint.services {
            let service = key(&membership.service, &membership.namespace);
            self.members.subtract(service.as_str(), same);
        }
        let pod = key(&endpoint.hostname, &endpoint.namespace);
        self.pods.subtract(pod.as_str(), same);
        for address in &endpoint.addresses {
            self.addresses.subtract(address, same);
        }
        self.serial = self.serial.wrapping_add(1);
    }

    /// The cluster domain, absolute and in lower case.
    pub(super) fn domain(&self) -> &Name {
        &self.domain.name
    }

    /// The cluster domain in lower case, without a trailing dot.
    pub(super) fn domain_text(&self) -> &str {
        &self.domain.text
    }

    pub(super) fn serial(&self) -> u32 {
        self.serial
    }

    /// Whether the address is the mesh's to name.
    pub(super) fn owns_address(&self, address: IpAddr) -> bool {
        self.domain
            .ranges
            .iter()
            .any(|range| range.contains(&address))
    }

    pub(super) fn has_namespace(&self, namespace: &str) -> bool {
        self.namespaces.get(namespace).is_some()
    }

    pub(super) fn service(&self, name: &str, namespace: &str) -> Option<&Arc<DnsService>> {
        self.services.get(key(name, namespace).as_str())
    }

    /// The service of an unusual host name; the asker's own namespace comes first.
    pub(super) fn host(&self, host: &str, namespace: &str) -> Option<&Arc<DnsService>> {
        let services = self.hosts.all(host);
        let own = services
            .iter()
            .find(|service| service.namespace == namespace);
        own.or(services.first())
    }

    pub(super) fn services_of_vip(&self, vip: IpAddr) -> &[Arc<DnsService>] {
        self.vips.all(&vip)
    }

    /// Endpoints of the service that have records: the ready ones, unless the service says all.
    pub(super) fn published(
        &self,
        service: &DnsService,
    ) -> impl Iterator<Item = &Arc<DnsEndpoint>> {
        self.members
            .all(key(&service.name, &service.namespace).as_str())
            .iter()
            .filter(|endpoint| endpoint.ready || service.publish_not_ready)
    }

    /// Endpoints of the service that have records under this host name.
    pub(super) fn published_pods(
        &self,
        service: &DnsService,
        hostname: &str,
    ) -> impl Iterator<Item = &Arc<DnsEndpoint>> {
        // A service selects pods of its own namespace only.
        self.pods
            .all(key(hostname, &service.namespace).as_str())
            .iter()
            .filter(|endpoint| endpoint.ready || service.publish_not_ready)
            .filter(|endpoint| endpoint.membership(service).is_some())
    }

    pub(super) fn endpoints_of_address(&self, address: IpAddr) -> &[Arc<DnsEndpoint>] {
        self.addresses.all(&address)
    }

    fn unusual_host(&self, service: &DnsService) -> Option<String> {
        let host = service.hostname.trim_end_matches('.').to_lowercase();
        let usual = format!(
            "{}.svc.{}",
            key(&service.name, &service.namespace),
            self.domain.text
        );
        (!host.is_empty() && host != usual).then_some(host)
    }
}

impl DnsEndpoint {
    /// How it belongs to the service, if it does.
    pub(super) fn membership(&self, service: &DnsService) -> Option<&DnsMembership> {
        self.services.iter().find(|membership| {
            membership.service == service.name && membership.namespace == service.namespace
        })
    }
}

fn key(name: &str, namespace: &str) -> String {
    format!("{name}.{namespace}").to_lowercase()
}
