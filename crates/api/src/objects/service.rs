//! `v1` Service. <https://kubernetes.io/docs/reference/kubernetes-api/service-resources/service-v1/>

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::Metadata;
use crate::{
    decode::{Cursor, Fields, Name},
    pod::Protocol,
};

/// Kubernetes' default for `sessionAffinityConfig.clientIP.timeoutSeconds`: three hours.
const DEFAULT_AFFINITY_SECONDS: u32 = 10_800;
/// Kubernetes' bound for the same.
const MAX_AFFINITY_SECONDS: u32 = 86_400;

/// A name and a virtual address for the workloads that a selector picks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Name, namespace, labels.
    pub metadata: Metadata,
    /// Virtual addresses.
    pub cluster_ip: ClusterIp,
    /// Ports; empty only for a headless service.
    pub ports: Vec<ServicePort>,
    /// Labels of the workloads that serve it; empty selects nothing.
    pub selector: BTreeMap<String, String>,
    /// How long a client stays with an endpoint, if it does (`sessionAffinity: ClientIP`).
    pub session_affinity: Option<Duration>,
    /// Whether endpoints that are not ready are named too.
    pub publish_not_ready_addresses: bool,
    /// Whether only endpoints on the client's own node count (`internalTrafficPolicy: Local`).
    pub local_only: bool,
    /// Which endpoints are preferred, if any.
    pub traffic_distribution: Option<TrafficDistribution>,
    /// Families in the order of preference; empty: the mesh decides.
    pub ip_families: Vec<IpFamily>,
    /// How many families.
    pub ip_family_policy: Option<IpFamilyPolicy>,
}

/// The virtual addresses of a service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClusterIp {
    /// Allocated by control.
    #[default]
    Auto,
    /// None: its name leads to the endpoints (`clusterIP: None`).
    Headless,
    /// These, one per family at most.
    Fixed(Vec<IpAddr>),
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Name; all ports have one if there are several.
    pub name: Option<String>,
    /// Port on the virtual address.
    pub port: u16,
    /// Port on the endpoint.
    pub target_port: TargetPort,
    /// Transport.
    pub protocol: Protocol,
    /// What is spoken, such as `http`.
    pub app_protocol: Option<String>,
}

/// Where a service's port leads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetPort {
    /// To this port.
    Number(u16),
    /// To the workload's port of this name.
    Name(String),
}

/// Which endpoints are preferred while they can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrafficDistribution {
    /// Those in the client's zone (`PreferClose`, since Kubernetes 1.34 also called `PreferSameZone`).
    PreferClose,
    /// Those on the client's node.
    PreferSameNode,
}

/// Address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum IpFamily {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

/// How many address families a service has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IpFamilyPolicy {
    /// One.
    SingleStack,
    /// Two, where the mesh has two.
    PreferDualStack,
    /// Two.
    RequireDualStack,
}

impl IpFamily {
    fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::IPv4,
            IpAddr::V6(_) => Self::IPv6,
        }
    }
}

impl Service {
    pub(super) fn decode(metadata: Metadata, fields: &mut Fields<'_>) -> Self {
        let mut service = Self {
            metadata,
            cluster_ip: ClusterIp::Auto,
            ports: Vec::new(),
            selector: BTreeMap::new(),
            session_affinity: None,
            publish_not_ready_addresses: false,
            local_only: false,
            traffic_distribution: None,
            ip_families: Vec::new(),
            ip_family_policy: None,
        };
        if let Some(spec) = fields.require("spec", "a mapping with `ports` and `selector`") {
            service.decode_spec(&spec);
        }
        service
    }

    fn decode_spec(&mut self, cursor: &Cursor<'_>) {
        let mut spec = cursor.fields();
        check_type(&mut spec);
        self.cluster_ip = cluster_ip(&mut spec);
        if self.cluster_ip == ClusterIp::Headless {
            self.ports = spec
                .get("ports")
                .map(|list| ports(&list))
                .unwrap_or_default();
        } else if let Some(list) = spec.require("ports", "a list of at least one port") {
            self.ports = ports(&list);
            if self.ports.is_empty() {
                list.error("is empty", "a list of at least one port");
            }
        }
        if let Some(selector) = spec.get("selector") {
            self.selector = selector.labels();
        }
        self.session_affinity = session_affinity(&mut spec);
        self.publish_not_ready_addresses = spec
            .get("publishNotReadyAddresses")
            .is_some_and(|value| value.boolean());
        self.local_only = spec
            .get("internalTrafficPolicy")
            .and_then(|value| value.choice(&[("Cluster", false), ("Local", true)]))
            .unwrap_or(false);
        self.traffic_distribution = spec.get("trafficDistribution").and_then(|value| {
            value.choice(&[
                ("PreferClose", TrafficDistribution::PreferClose),
                ("PreferSameZone", TrafficDistribution::PreferClose),
                ("PreferSameNode", TrafficDistribution::PreferSameNode),
            ])
        });
        self.ip_families = spec
            .get("ipFamilies")
            .map(|list| ip_families(&list))
            .unwrap_or_default();
        self.ip_family_policy = spec.get("ipFamilyPolicy").and_then(|value| {
            value.choice(&[
                ("SingleStack", IpFamilyPolicy::SingleStack),
                ("PreferDualStack", IpFamilyPolicy::PreferDualStack),
                ("RequireDualStack", IpFamilyPolicy::RequireDualStack),
            ])
        });
        spec.inert(&[
            "allocateLoadBalancerNodePorts",
            "externalIPs",
            "externalTrafficPolicy",
            "healthCheckNodePort",
            "loadBalancerClass",
            "loadBalancerIP",
            "loadBalancerSourceRanges",
        ]);
        spec.finish();
    }
}

fn check_type(spec: &mut Fields<'_>) {
    const ELSEWHERE: [&str; 3] = ["NodePort", "LoadBalancer", "ExternalName"];
    let Some(kind) = spec.get("type") else {
        spec.unsupported(
            "externalName",
            "only for the type ExternalName, which is not supported",
            "no such field",
        );
        return;
    };
    spec.ignore(&["externalName"]);
    match kind.node().as_str() {
        Some(text) if ELSEWHERE.contains(&text) => kind.error(
            format!("services of type {text} are not supported"),
            "ClusterIP (to reach a workload from outside the mesh, use its `publish`)",
        ),
        _ => {
            kind.choice(&[("ClusterIP", ())]);
        }
    }
}

fn cluster_ip(spec: &mut Fields<'_>) -> ClusterIp {
    let single = spec.get("clusterIP");
    let list = spec.get("clusterIPs");
    let is_none = |cursor: &Cursor<'_>| cursor.node().as_str() == Some("None");
    let is_auto = |cursor: &Cursor<'_>| cursor.node().as_str() == Some("");
    let entries = list.as_ref().map(Cursor::items).unwrap_or_default();
    let headless = entries.iter().any(is_none) || single.as_ref().is_some_and(is_none);
    if headless {
        let agree = entries.len() <= 1 && entries.iter().chain(&single).all(is_none);
        if let (false, Some(at)) = (agree, single.as_ref().or(list.as_ref())) {
            at.error(
                "`None` and addresses contradict each other",
                "either `None` or addresses",
            );
        }
        return ClusterIp::Headless;
    }
    let first = single.filter(|cursor| !is_auto(cursor));
    let first_address = first.as_ref().and_then(Cursor::address);
    let mut addresses: Vec<IpAddr> = entries.iter().filter_map(Cursor::address).collect();
    if let (Some(at), Some(one)) = (&first, first_address) {
        if addresses.first().is_some_and(|listed| *listed != one) {
            at.error("differs from the first of `clusterIPs`", "the same address");
        } else if addresses.is_empty() {
            addresses.push(one);
        }
    }
    let families: BTreeSet<IpFamily> = addresses.iter().copied().map(IpFamily::of).collect();
    if let (true, Some(list)) = (families.len() < addresses.len(), &list) {
        list.error(
            "has two addresses of one family",
            "at most one IPv4 and one IPv6 address",
        );
    }
    if addresses.is_empty() {
        ClusterIp::Auto
    } else {
        ClusterIp::Fixed(addresses)
    }
}

fn ports(list: &Cursor<'_>) -> Vec<ServicePort> {
    let items = list.items();
    let mut names = BTreeSet::new();
    let mut numbers = BTreeSet::new();
    let mut ports = Vec::with_capacity(items.len());
    for item in &items {
        let port = ServicePort::decode(item);
        match &port.name {
            Some(name) if !names.insert(name.clone()) => {
                item.error(
                    format!("the name `{name}` is given to two ports"),
                    "a name of its own",
                );
            }
            None if items.len() > 1 => {
                item.error("has no name", "a `name`, as there are several ports");
            }
            _ => {}
        }
        // A port that could not be read is 0.
        if port.port != 0 && !numbers.insert((port.port, port.protocol)) {
            let message = format!("port {} is given twice", port.port);
            item.error(message, "every port once per protocol");
        }
        ports.push(port);
    }
    ports
}

impl ServicePort {
    fn decode(cursor: &Cursor<'_>) -> Self {
        let mut fields = cursor.fields();
        let name = fields.get("name").map(|name| name.name(Name::Label));
        let port = fields.require("port", "the port on the service's address");
        let port = port.map_or(0, |port| port.port());
        let target = fields.get("targetPort");
        let target_port = target.map_or(TargetPort::Number(port), |target| target_port(&target));
        let protocol = fields.get("protocol").map(|value| protocol(&value));
        let app_protocol = fields.get("appProtocol").map(|value| value.string());
        fields.inert(&["nodePort"]);
        fields.finish();
        Self {
            name,
            port,
            target_port,
            protocol: protocol.unwrap_or_default(),
            app_protocol,
        }
    }
}

fn target_port(cursor: &Cursor<'_>) -> TargetPort {
    match cursor.node().as_str() {
        Some(_) => TargetPort::Name(cursor.name(Name::Port)),
        None => TargetPort::Number(cursor.port()),
    }
}

/// `TCP` or `UDP`.
pub(super) fn protocol(cursor: &Cursor<'_>) -> Protocol {
    cursor
        .choice(&[("TCP", Protocol::Tcp), ("UDP", Protocol::Udp)])
        .unwrap_or_default()
}

fn session_affinity(spec: &mut Fields<'_>) -> Option<Duration> {
    let affinity = spec.get("sessionAffinity");
    let config = spec.get("sessionAffinityConfig");
    let by_client = affinity
        .and_then(|value| value.choice(&[("None", false), ("ClientIP", true)]))
        .unwrap_or(false);
    let mut seconds = DEFAULT_AFFINITY_SECONDS;
    if let Some(config) = config {
        if !by_client {
            config.warn("has no effect without `sessionAffinity: ClientIP`");
        }
        let mut fields = config.fields();
        if let Some(client_ip) = fields.get("clientIP") {
            let mut client_ip = client_ip.fields();
            if let Some(timeout) = client_ip.get("timeoutSeconds") {
                seconds = timeout.integer(1..=MAX_AFFINITY_SECONDS);
            }
            client_ip.finish();
        }
        fields.finish();
    }
    by_client.then(|| Duration::from_secs(seconds.into()))
}

fn ip_families(list: &Cursor<'_>) -> Vec<IpFamily> {
    let items = list.items();
    let mut families = Vec::new();
    for item in &items {
        let choices = [("IPv4", IpFamily::IPv4), ("IPv6", IpFamily::IPv6)];
        let Some(family) = item.choice(&choices) else {
            continue;
        };
        if families.contains(&family) {
            item.error("is given twice", "every family once");
        }
        families.push(family);
    }
    families
}
