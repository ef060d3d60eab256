//! The machine's stand-in for a network of nodes: a fabric namespace, a namespace per node, one per pod.
//!
//! ```text
//!   fabric namespace          node namespace                    pod namespace
//!   bridge `fabric` ── veth ── `uplink`   bridge `pods` ── veth ── `eth0`
//! ```
//! Each node routes its pods' addresses and reaches the other nodes' over the fabric. Nothing leads to the
//! host's own network. Namespaces are held by descriptor only, so that they vanish with this process.
//! Netlink is in `links`, addresses are in `ipam`.

mod ipam;
mod links;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use api::mesh::MeshConfig;
use ipnet::{Ipv4Net, Ipv6Net};
use linux::netns::Netns;

use self::{
    ipam::Ipam,
    links::{Links, Veth, VethEnd},
};
use crate::error::Error;

/// Interface numbers in namespaces that we made; giving them saves asking for them.
const LOOPBACK_INDEX: u32 = 1;
const BRIDGE_INDEX: u32 = 10;
const UPLINK_INDEX: u32 = 11;
const POD_ETH0_INDEX: u32 = 2;
/// Node sides of pods' veths count up from here; a number is never used twice.
const FIRST_POD_INDEX: u32 = 1000;
/// The first node's place in the fabric's range; the fabric's own bridge has place 1.
const FIRST_NODE_PLACE: u32 = 10;

/// All namespaces of the nodes.
#[derive(Debug)]
pub struct Fabric {
    netns: Netns,
    nodes: BTreeMap<String, Arc<NodeNetwork>>,
}

impl Fabric {
    /// Makes the fabric and `nodes`, numbered in the order given. Needs a tokio runtime.
    ///
    /// # Errors
    /// Missing rights, or ranges of `mesh` that are too small.
    pub async fn create(mesh: &MeshConfig, nodes: &[String]) -> Result<Self, Error> {
        let netns = new_namespace(NODE_SYSCTLS)?;
        let links = Links::open(&netns)?;
        links.up(LOOPBACK_INDEX).await?;
        links
            .bridge("fabric", BRIDGE_INDEX, [0x0a, 0xfa, 0, 0, 0, 1])
            .await?;
        let own = place(mesh, 1);
        links
            .address(BRIDGE_INDEX, own.0.into(), mesh.fabric_cidr_v4.prefix_len())
            .await?;
        links
            .address(BRIDGE_INDEX, own.1.into(), mesh.fabric_cidr_v6.prefix_len())
            .await?;

        let mut made = BTreeMap::new();
        for (index, name) in nodes.iter().enumerate() {
            let node = NodeNetwork::create(mesh, name, index, &links).await?;
            made.insert(name.clone(), Arc::new(node));
        }
        for node in made.values() {
            for other in made.values().filter(|other| other.name != node.name) {
                node.route_to(other).await?;
            }
        }
        Ok(Self { netns, nodes: made })
    }

    /// The namespace that joins the nodes. The control plane may listen in it.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A node's network.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Arc<NodeNetwork>> {
        self.nodes.get(name)
    }

    /// All nodes, by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<NodeNetwork>> {
        self.nodes.values()
    }
}

/// The network of one node.
#[derive(Debug)]
pub struct NodeNetwork {
    name: String,
    netns: Netns,
    links: Links,
    fabric_address: (Ipv4Addr, Ipv6Addr),
    range_v4: Ipv4Net,
    range_v6: Ipv6Net,
    ipam: Mutex<Ipam>,
    next_index: AtomicU32,
}

/// The network of one pod. [`NodeNetwork::release`] gives its addresses back.
#[derive(Debug)]
pub struct PodNetwork {
    /// The pod's namespace, with `lo` and `eth0` up.
    pub netns: Netns,
    /// IPv4 first, then IPv6.
    pub addresses: [IpAddr; 2],
    /// Index of the veth's other side, in the node's namespace.
    pub host_ifindex: u32,
    /// Hardware address of `eth0`.
    pub mac: [u8; 6],
    place: u8,
}

impl NodeNetwork {
    /// The node's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The node's addresses on the fabric.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.fabric_address.0.into(), self.fabric_address.1.into()]
    }

    /// Addresses of the node's pods.
    #[must_use]
    pub fn ranges(&self) -> (Ipv4Net, Ipv6Net) {
        (self.range_v4, self.range_v6)
    }

    /// Makes a pod's namespace and joins it to the node.
    ///
    /// # Errors
    /// [`Error::NoFreeAddress`]; the kernel is out of something.
    pub async fn attach(&self) -> Result<PodNetwork, Error> {
        let place = lock(&self.ipam)
            .take()
            .ok_or_else(|| Error::NoFreeAddress {
                node: self.name.clone(),
                range: self.range_v4.to_string(),
            })?;
        let made = self.attach_at(place).await;
        if made.is_err() {
            lock(&self.ipam).give_back(place);
        }
        made
    }

    /// Removes a pod's interface and gives its addresses back.
    pub async fn release(&self, pod: PodNetwork) {
        if let Err(error) = self.links.delete(pod.host_ifindex).await {
            // The interface goes with the namespace anyway, only later.
            tracing::debug!(node = self.name, %error, "pod interface was gone already");
        }
        lock(&self.ipam).give_back(pod.place);
    }

    async fn create(
        mesh: &MeshConfig,
        name: &str,
        index: usize,
        fabric: &Links,
    ) -> Result<Self, Error> {
        let range_v4 = mesh
            .pod_cidr_v4
            .subnets(24)
            .ok()
            .and_then(|mut ranges| ranges.nth(index))
            .ok_or_else(|| too_small(mesh.pod_cidr_v4, index))?;
        let range_v6 = mesh
            .pod_cidr_v6
            .subnets(64)
            .ok()
            .and_then(|mut ranges| ranges.nth(index))
            .ok_or_else(|| too_small(mesh.pod_cidr_v6, index))?;
        let number = u32::try_from(index).map_err(|_| too_small(mesh.fabric_cidr_v4, index))?;
        let fabric_address = place(mesh, FIRST_NODE_PLACE + number);
        if !mesh.fabric_cidr_v4.contains(&fabric_address.0)
            || fabric_address.0 == mesh.fabric_cidr_v4.broadcast()
        {
            return Err(too_small(mesh.fabric_cidr_v4, index));
        }

        let netns = new_namespace(NODE_SYSCTLS)?;
        give_pods_tables_of_their_own(&netns)?;
        let links = Links::open(&netns)?;
        links.up(LOOPBACK_INDEX).await?;
        fabric
            .veth(&Veth {
                name: format!("n{index}"),
                index: FIRST_POD_INDEX + number,
                controller: BRIDGE_INDEX,
                mac: [0x0a, 0xfb, 0, 0, 0, number as u8],
                peer: VethEnd {
                    name: "uplink",
                    index: UPLINK_INDEX,
                    mac: [0x0a, 0xfc, 0, 0, 0, number as u8],
                    netns: &netns,
                },
            })
            .await?;
        links.up(UPLINK_INDEX).await?;
        links
            .address(
                UPLINK_INDEX,
                fabric_address.0.into(),
                mesh.fabric_cidr_v4.prefix_len(),
            )
            .await?;
        links
            .address(
                UPLINK_INDEX,
                fabric_address.1.into(),
                mesh.fabric_cidr_v6.prefix_len(),
            )
            .await?;
        links
            .bridge("pods", BRIDGE_INDEX, mac(0x0a, gateway(range_v4)))
            .await?;
        links
            .address(BRIDGE_INDEX, gateway(range_v4).into(), 24)
            .await?;
        links
            .address(BRIDGE_INDEX, gateway6(range_v6).into(), 64)
            .await?;

        Ok(Self {
            name: name.into(),
            netns,
            links,
            fabric_address,
            range_v4,
            range_v6,
            ipam: Mutex::new(Ipam::new()),
            next_index: AtomicU32::new(FIRST_POD_INDEX),
        })
    }

    async fn route_to(&self, other: &Self) -> Result<(), Error> {
        let (via4, via6) = other.fabric_address;
        self.links.route(other.range_v4.into(), via4.into()).await?;
        self.links.route(other.range_v6.into(), via6.into()).await
    }

    async fn attach_at(&self, place: u8) -> Result<PodNetwork, Error> {
        let host_ifindex = self.next_index.fetch_add(1, Ordering::Relaxed);
        let v4 = Ipv4Addr::from(u32::from(self.range_v4.network()) + u32::from(place));
        let v6 = Ipv6Addr::from(u128::from(self.range_v6.network()) + u128::from(place));
        let node = self.netns.clone();
        let netns = tokio::task::spawn_blocking(move || new_pod_namespace(&node))
            .await
            .map_err(|error| Error::Container(error.to_string()))??;
        let links = Links::open(&netns)?;
        links.up(LOOPBACK_INDEX).await?;
        let pod_mac = mac(0x0a, v4);
        self.links
            .veth(&Veth {
                name: format!("w{host_ifindex}"),
                index: host_ifindex,
                controller: BRIDGE_INDEX,
                mac: mac(0x0e, v4),
                peer: VethEnd {
                    name: "eth0",
                    index: POD_ETH0_INDEX,
                    mac: pod_mac,
                    netns: &netns,
                },
            })
            .await?;
        links.up(POD_ETH0_INDEX).await?;
        links.address(POD_ETH0_INDEX, v4.into(), 24).await?;
        links.address(POD_ETH0_INDEX, v6.into(), 64).await?;
        links
            .route(Ipv4Net::default().into(), gateway(self.range_v4).into())
            .await?;
        links
            .route(Ipv6Net::default().into(), gateway6(self.range_v6).into())
            .await?;
        Ok(PodNetwork {
            netns,
            addresses: [v4.into(), v6.into()],
            host_ifindex,
            mac: pod_mac,
            place,
        })
    }
}

/// Settings that hold before any interface exists. No duplicate address detection: addresses work at once.
const COMMON_SYSCTLS: &[(&str, &str)] = &[
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/accept_ra", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    // A new namespace starts with the host's values, which may be strict.
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
];
const NODE_SYSCTLS: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
];
/// Programs bind port 80 without a capability: the namespace is theirs.
const POD_SYSCTLS: &[(&str, &str)] = &[("ipv4/ip_unprivileged_port_start", "0")];

/// Slots of the socket tables of a namespace made inside a node's, instead of a share in the machine's: who lists a
/// pod's sockets walks through these, not through everybody's. Several connections share a slot if there are more
/// (128 KiB per pod for TCP). Kernels before Linux 6.1 (TCP) and 6.3 (UDP) know of no such tables.
const CHILD_SYSCTLS: &[(&str, &str)] = &[
    ("ipv4/tcp_child_ehash_entries", "16384"),
    ("ipv4/udp_child_hash_entries", "1024"),
];

fn give_pods_tables_of_their_own(node: &Netns) -> Result<(), Error> {
    let failed = |what: String| move |source| Error::Io { what, source };
    node.run(|| {
        for (name, value) in CHILD_SYSCTLS {
            let path = format!("/proc/sys/net/{name}");
            match std::fs::write(&path, value) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                outcome => outcome.map_err(failed(format!("write {value} to {path}")))?,
            }
        }
        Ok(())
    })
    .map_err(failed("enter a network namespace".into()))?
}

/// Limits that the kernel derives from the size of the table, which is no reason for them to be lower in a pod.
const LIMITS: &[&str] = &["ipv4/tcp_max_tw_buckets", "ipv4/tcp_max_syn_backlog"];

/// A pod's namespace, with tables as its node says and the node's limits.
fn new_pod_namespace(node: &Netns) -> Result<Netns, Error> {
    let failed = |what: String| move |source| Error::Io { what, source };
    let path = |name: &str| format!("/proc/sys/net/{name}");
    let (netns, limits) = node
        .run(|| {
            let netns = new_namespace(POD_SYSCTLS)?;
            let limits = LIMITS.iter().map(|name| {
                let limit = std::fs::read_to_string(path(name));
                limit.map_err(failed(format!("read {}", path(name))))
            });
            Ok::<_, Error>((netns, limits.collect::<Result<Vec<_>, _>>()?))
        })
        .map_err(failed("enter a node's network namespace".into()))??;
    netns
        .run(|| {
            for (name, limit) in LIMITS.iter().zip(&limits) {
                std::fs::write(path(name), limit)
                    .map_err(failed(format!("write {limit} to {}", path(name))))?;
            }
            Ok::<(), Error>(())
        })
        .map_err(failed("enter a network namespace".into()))??;
    Ok(netns)
}

fn new_namespace(sysctls: &[(&str, &str)]) -> Result<Netns, Error> {
    let failed = |what: String| move |source| Error::Io { what, source };
    let netns = Netns::create().map_err(failed("create a network namespace".into()))?;
    netns
        .run(|| {
            for (name, value) in COMMON_SYSCTLS.iter().chain(sysctls) {
                let path = format!("/proc/sys/net/{name}");
                std::fs::write(&path, value).map_err(failed(format!(
                    "write {value} to {path} in a new namespace"
                )))?;
            }
            Ok::<(), Error>(())
        })
        .map_err(failed("enter a network namespace".into()))??;
    Ok(netns)
}

fn place(mesh: &MeshConfig, place: u32) -> (Ipv4Addr, Ipv6Addr) {
    (
        Ipv4Addr::from(u32::from(mesh.fabric_cidr_v4.network()).saturating_add(place)),
        Ipv6Addr::from(u128::from(mesh.fabric_cidr_v6.network()).saturating_add(place.into())),
    )
}

fn gateway(range: Ipv4Net) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(range.network()) + 1)
}

fn gateway6(range: Ipv6Net) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(range.network()) + 1)
}

/// A locally administered unicast address (IEEE 802) that tells the IPv4 address.
fn mac(first: u8, address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [first, 0x58, a, b, c, d]
}

fn too_small(range: impl ToString, index: usize) -> Error {
    Error::RangeTooSmall {
        range: range.to_string(),
        index,
    }
}

fn lock(ipam: &Mutex<Ipam>) -> std::sync::MutexGuard<'_, Ipam> {
    // The allocator cannot panic half-way: its state is valid whatever happened to another holder.
    ipam.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
