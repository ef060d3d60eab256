//! What `heddle node` reads at its start: written by whoever starts node agents (`heddle up`).
//!
//! It is a JSON file named by `heddle node --config PATH`. Everything that can change while the agent runs
//! comes over its sockets instead: workloads over [`crate::enroll`], services and policies over xDS.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::{map_sizes::MapSizes, mesh::MeshConfig};

/// Settings of one node agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeConfig {
    /// The mesh that the node belongs to.
    pub mesh: MeshConfig,
    /// The node's name.
    pub node: String,
    /// Where the control plane serves xDS.
    pub xds_socket: PathBuf,
    /// Where [`crate::enroll`] is spoken; the agent connects.
    pub enroll_socket: PathBuf,
    /// Where the agent listens for the operator's tools.
    pub api_socket: PathBuf,
    /// Where the agent hands identities out to workloads; the folder exists, and every workload sees it.
    pub identity_socket: PathBuf,
    /// The agent's own folder on a bpffs, which exists.
    pub pin_dir: PathBuf,
    /// The agent's own folder for what must outlive it.
    pub state_dir: PathBuf,
    /// Absolute path of the node's cgroup v2, which has `agent`, `l7` and `w` below it.
    pub cgroup: PathBuf,
    /// Name servers for names outside the mesh (`ADDRESS` or `ADDRESS:PORT`); empty for those of the machine's
    /// `/etc/resolv.conf`.
    #[serde(default)]
    pub dns_upstream: Vec<String>,
    /// Where certificates come from.
    pub authority: AuthorityConfig,
    /// Room in the kernel's maps. An agent that is started with other sizes moves what is in them over.
    #[serde(default)]
    pub maps: MapSizes,
}

/// The mesh's certificate authority, as an agent finds and recognises it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityConfig {
    /// Where the control plane signs certificates, reachable from the node's network namespace.
    pub address: SocketAddr,
    /// Root certificates (PEM) to recognise it by the first time.
    pub roots: String,
}
