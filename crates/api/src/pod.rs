//! One replica of a workload ("pod"): what control asks the runtime for, and what the runtime reports.
//!
//! Control expands each `Workload` object into [`PodSpec`]s and places them on nodes. The runtime
//! makes them real and answers with [`PodStatus`]. Neither knows how the other works.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use serde::{Deserialize, Serialize};

/// One replica that should run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodSpec {
    /// `NAMESPACE/NAME`: unique in the mesh and stable over restarts.
    pub uid: String,
    /// Replica name, `WORKLOAD-INDEX`: a DNS label; also its hostname.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Name of the `Workload` object.
    pub workload: String,
    /// Service account.
    pub service_account: String,
    /// The node it runs on.
    pub node: String,
    /// Labels, which services and policies select on.
    pub labels: BTreeMap<String, String>,
    /// Program and arguments; never empty.
    pub command: Vec<String>,
    /// Environment, added to a small fixed one (PATH, HOME, HOSTNAME).
    pub env: BTreeMap<String, String>,
    /// User name or uid, `None` for root.
    pub user: Option<String>,
    /// Working directory, `None` for `/`.
    pub working_dir: Option<String>,
    /// Files to place before the start: absolute path to content.
    pub files: BTreeMap<String, PodFile>,
    /// Ports the program listens on.
    pub ports: Vec<PodPort>,
    /// Decides whether the replica gets traffic.
    pub readiness: Option<Probe>,
    /// Decides whether the program is restarted.
    pub liveness: Option<Probe>,
    /// CPU and memory limits.
    pub resources: Resources,
    /// What happens when the program ends.
    pub restart_policy: RestartPolicy,
    /// Time from SIGTERM to SIGKILL.
    pub termination_grace: Duration,
    /// Hash of everything above that needs a restart when it changes (not the labels).
    pub template_hash: String,
}

/// A file placed in a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodFile {
    /// Text content.
    pub content: String,
    /// Permission bits; default 0644.
    pub mode: u32,
}

/// A port of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodPort {
    /// Name that services refer to.
    pub name: Option<String>,
    /// Port number the program listens on.
    pub port: u16,
    /// Transport.
    pub protocol: Protocol,
    /// Port on the host's loopback that leads here.
    pub publish: Option<u16>,
}

/// Transport protocol of a port.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
pub enum Protocol {
    /// TCP, the default.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// UDP.
    #[serde(rename = "UDP")]
    Udp,
}

/// A probe, run inside the replica's network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What is tried.
    pub action: ProbeAction,
    /// Wait before the first try.
    pub initial_delay: Duration,
    /// Time between tries.
    pub period: Duration,
    /// A try that takes longer has failed.
    pub timeout: Duration,
    /// Consecutive failures that turn the probe's answer to "no".
    pub failure_threshold: u32,
    /// Consecutive successes that turn it to "yes".
    pub success_threshold: u32,
}

/// What a probe tries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProbeAction {
    /// Connect to the port.
    Tcp {
        /// Port on the replica's own address.
        port: u16,
    },
    /// GET the path; 200 to 399 is success.
    Http {
        /// Port on the replica's own address.
        port: u16,
        /// Path with query.
        path: String,
        /// Extra request headers.
        headers: Vec<(String, String)>,
    },
    /// Run a command in the replica; exit code 0 is success.
    Exec {
        /// Program and arguments.
        command: Vec<String>,
    },
}

/// Limits of one replica.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
}

/// What happens when the program ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartPolicy {
    /// Start it again, with back-off.
    #[default]
    Always,
    /// Start it again unless it ended with 0.
    OnFailure,
    /// Leave it.
    Never,
}

/// What the runtime says of one replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    /// [`PodSpec::uid`].
    pub uid: String,
    /// [`PodSpec::node`].
    pub node: String,
    /// Addresses; empty until the namespace is there.
    pub addresses: Vec<IpAddr>,
    /// Where it stands.
    pub phase: PodPhase,
    /// May get traffic.
    pub ready: bool,
    /// How often the program was started again.
    pub restarts: u32,
    /// The last thing worth knowing (exit code, probe failure, refusal).
    pub message: Option<String>,
}

/// Where a replica stands in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum PodPhase {
    /// Being made: namespace, enrolment with the node agent.
    Pending,
    /// The program runs.
    Running,
    /// Waits to be started again.
    BackOff,
    /// Ended with 0 and stays ended.
    Succeeded,
    /// Ended with an error and stays ended.
    Failed,
    /// Told to stop; gets no new connections.
    Terminating,
}
