//! Messages between who starts workloads (`heddle up`; on Kubernetes a CNI plugin) and the node agent.
//!
//! They travel as one JSON document per packet over a `SOCK_SEQPACKET` Unix socket, file descriptors
//! beside them (`linux::seqpacket`). The starter also keeps descriptors for the agent, so that an
//! agent's death loses no listening socket (the fd store of the data-path contract).
//!
//! Order of a session: agent sends [`FromAgent::Hello`]; starter answers [`ToAgent::Hello`], then every
//! [`ToAgent::StoredFd`] and [`ToAgent::WorkloadAdded`] it holds, then [`ToAgent::SnapshotDone`]. After that, changes as they come.
//! A workload's program starts only after [`FromAgent::WorkloadReady`]: enforcement comes first.

use std::{net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// From who starts workloads to the node agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToAgent {
    /// First message. One fd: the network namespace from which the machine's resolver is reachable.
    Hello {
        /// Node name, for a check that the right two talk.
        node: String,
    },
    /// A descriptor that an earlier agent stored. One fd.
    StoredFd {
        /// The name it was stored under.
        name: String,
    },
    /// A workload exists and waits for [`FromAgent::WorkloadReady`]. One fd: its network namespace.
    WorkloadAdded(EnrolledWorkload),
    /// The workload is to stop soon: what others carry to it should go elsewhere from now on. It still serves.
    WorkloadDraining {
        /// [`EnrolledWorkload::uid`].
        uid: String,
    },
    /// No process of the workload is left; its descriptors may be dropped from the store. Its network namespace stays
    /// until [`FromAgent::WorkloadGone`], for a moment.
    WorkloadRemoved {
        /// [`EnrolledWorkload::uid`].
        uid: String,
    },
    /// All that existed when the agent connected has been sent.
    SnapshotDone,
    /// The answer to [`FromAgent::JoinTokenWanted`].
    JoinToken {
        /// Proves to the control plane, once and soon, that this is the node's agent.
        token: String,
    },
}

/// From the node agent to who starts workloads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromAgent {
    /// First message.
    Hello {
        /// Node name.
        node: String,
    },
    /// Policy for the workload is in the kernel: its program may start.
    WorkloadReady {
        /// [`EnrolledWorkload::uid`].
        uid: String,
    },
    /// The workload cannot be enrolled; it must not start.
    WorkloadRefused {
        /// [`EnrolledWorkload::uid`].
        uid: String,
        /// Why, for the workload's status.
        error: String,
    },
    /// Everything is known and in the kernel: this agent has taken over. Comes once, after all that was ready then.
    TakenOver,
    /// The agent has closed all that it had in the network namespace of a workload that was removed.
    WorkloadGone {
        /// [`EnrolledWorkload::uid`].
        uid: String,
    },
    /// The agent has no certificate of its own, and asks for what it takes to get one.
    JoinTokenWanted,
    /// The agent ends as soon as what it carries has ended: its successor may start.
    Leaving,
    /// Keep the one fd sent along under this name, replacing an earlier one.
    StoreFd {
        /// Name, unique within the node: `dns-udp4/NAMESPACE/POD@INSTANCE`.
        name: String,
    },
    /// Forget the fd kept under this name.
    DropFd {
        /// The name it was stored under.
        name: String,
    },
}

/// What the agent must know of a workload to enforce its policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolledWorkload {
    /// `NAMESPACE/POD`.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Pod name.
    pub name: String,
    /// Name of the object that it is a replica of.
    pub workload: String,
    /// Service account.
    pub service_account: String,
    /// The workload's addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// Absolute path of the cgroup (`.../w/POD`) that has `app` and `proxy` below it.
    pub cgroup: PathBuf,
    /// Index of the veth's node side, in the agent's own network namespace.
    pub host_ifindex: u32,
    /// Hardware address of the workload's side of the veth.
    pub mac: [u8; 6],
    /// Changes when the namespace was made anew under the same uid.
    pub instance: String,
}
