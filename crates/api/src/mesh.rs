//! The settings of one mesh: its name, trust domain and address ranges.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Settings that every process of a mesh shares. `heddle up` decides them and hands them on as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshConfig {
    /// The mesh's name: a DNS label. Names the cgroup, the runtime folder and the pins.
    pub name: String,
    /// SPIFFE trust domain.
    pub trust_domain: String,
    /// DNS suffix of service names.
    pub cluster_domain: String,
    /// Namespace whose policies apply to the whole mesh (Istio's root namespace).
    pub root_namespace: String,
    /// Addresses of workloads; every node gets a /24 of it.
    pub pod_cidr_v4: Ipv4Net,
    /// Addresses of workloads; every node gets a /64 of it.
    pub pod_cidr_v6: Ipv6Net,
    /// Virtual addresses of services.
    pub service_cidr_v4: Ipv4Net,
    /// Virtual addresses of services.
    pub service_cidr_v6: Ipv6Net,
    /// Addresses of the nodes on the fabric.
    pub fabric_cidr_v4: Ipv4Net,
    /// Addresses of the nodes on the fabric.
    pub fabric_cidr_v6: Ipv6Net,
}

impl Default for MeshConfig {
    fn default() -> Self {
        Self {
            name: "default".into(),
            trust_domain: "cluster.local".into(),
            cluster_domain: "cluster.local".into(),
            root_namespace: "istio-system".into(),
            pod_cidr_v4: net4([10, 244, 0, 0], 16),
            pod_cidr_v6: net6(0xfd10_0244, 48),
            service_cidr_v4: net4([10, 96, 0, 0], 16),
            service_cidr_v6: net6(0xfd10_0096, 112),
            fabric_cidr_v4: net4([172, 30, 0, 0], 24),
            fabric_cidr_v6: net6(0xfd10_0172, 64),
        }
    }
}

impl MeshConfig {
    /// The virtual address of the mesh's DNS (the tenth of the service range, as Kubernetes has it).
    #[must_use]
    pub fn dns_v4(&self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.service_cidr_v4.network()) + 10)
    }

    /// The virtual IPv6 address of the mesh's DNS.
    #[must_use]
    pub fn dns_v6(&self) -> Ipv6Addr {
        Ipv6Addr::from(u128::from(self.service_cidr_v6.network()) + 10)
    }

    /// Where the control plane is on the fabric: the first place of its ranges.
    #[must_use]
    pub fn control_addresses(&self) -> [IpAddr; 2] {
        let v4 = u32::from(self.fabric_cidr_v4.network()) + 1;
        let v6 = u128::from(self.fabric_cidr_v6.network()) + 1;
        [Ipv4Addr::from(v4).into(), Ipv6Addr::from(v6).into()]
    }

    /// Whether `address` is a service's virtual address.
    #[must_use]
    pub fn is_service_address(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => self.service_cidr_v4.contains(&v4),
            IpAddr::V6(v6) => self.service_cidr_v6.contains(&v6),
        }
    }

    /// The SPIFFE id of a service account: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
    #[must_use]
    pub fn spiffe_id(&self, namespace: &str, service_account: &str) -> String {
        format!(
            "spiffe://{}/ns/{namespace}/sa/{service_account}",
            self.trust_domain
        )
    }
}

fn net4(address: [u8; 4], prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::from(address), prefix)
}

fn net6(first_32_bits: u32, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::from(u128::from(first_32_bits) << 96), prefix)
}
