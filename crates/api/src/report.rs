//! What the processes of a mesh tell operators: flow records, status, explanations. The JSON of `-o json`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::pod::{PodPhase, PodStatus};

/// One connection (or a refused try), as `heddle flows` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowRecord {
    /// Number within the node; grows by one per record. 0 for an open connection, which is no record yet.
    pub sequence: u64,
    /// When it happened, milliseconds since 1970.
    pub time_ms: u64,
    /// The node that recorded it.
    pub node: String,
    /// Whose side recorded it. A connection between two nodes has a record on each.
    #[serde(default)]
    pub reporter: FlowReporter,
    /// What happened.
    pub event: FlowEventKind,
    /// TCP's state: `established`, `close-wait`, … while it is open, `closed` after that; empty if there was no
    /// connection.
    #[serde(default)]
    pub state: String,
    /// The client.
    pub source: FlowEnd,
    /// The server (for a refused try: where it would have gone).
    pub destination: FlowEnd,
    /// `NAMESPACE/NAME` of the service that the client dialled, if it dialled one.
    pub service: Option<String>,
    /// `TCP` or `UDP`.
    pub protocol: String,
    /// Which of the four paths carried it.
    pub path: String,
    /// On the direct path: bytes went past the TCP stack (of one that has just been opened: may go).
    #[serde(default)]
    pub spliced: bool,
    /// Allowed or denied.
    pub verdict: Verdict,
    /// Why, one word of a fixed set.
    pub reason: String,
    /// `NAMESPACE/NAME` of the policy that decided.
    pub policy: Option<String>,
    /// Bytes that the client sent and the server acknowledged.
    pub bytes_sent: u64,
    /// Bytes that the client received.
    pub bytes_received: u64,
    /// Smoothed round-trip time, microseconds; 0 before it was measured.
    pub rtt_us: u32,
    /// Retransmitted segments.
    pub retransmits: u32,
    /// Since `connect()`, microseconds.
    pub duration_us: u64,
    /// Identifies the connection on its node, so that its opening and closing can be joined.
    pub connection: u64,
}

/// A side of a connection, as Istio's metrics name it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowReporter {
    /// The client's.
    #[default]
    Source,
    /// The server's.
    Destination,
}

/// What a flow record tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowEventKind {
    /// Established.
    Opened,
    /// Ended; the figures are final.
    Closed,
    /// Ended without ever having been established (nobody listened, or it was given up).
    Failed,
    /// Refused.
    Refused,
    /// Open at the moment of the question; the figures are as they stand.
    Open,
    /// Ended by Heddle because it is no longer allowed; reason and policy say why, the figures are final.
    Ended,
}

/// Allowed or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Policy allows it.
    Allowed,
    /// Refused.
    Denied,
}

/// One end of a connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowEnd {
    /// Namespace; empty outside the mesh.
    pub namespace: String,
    /// Name of the `Workload` object; empty outside the mesh.
    pub workload: String,
    /// Replica name; empty outside the mesh.
    pub pod: String,
    /// SPIFFE id; empty if nobody vouches for it.
    pub identity: String,
    /// Address, if known.
    pub address: Option<IpAddr>,
    /// Port; 0 if not known.
    pub port: u16,
}

/// How a node agent stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Node name.
    pub node: String,
    /// Process id of the agent.
    pub pid: u32,
    /// All of the control plane's state was received at least once.
    pub synced: bool,
    /// The stream to the control plane is open.
    pub connected: bool,
    /// Version of the agent.
    pub version: String,
    /// Workloads enrolled and under policy.
    pub enrolled: Vec<String>,
    /// Attached kernel programs.
    pub programs: Vec<ProgramStatus>,
    /// Room in the kernel's maps.
    pub maps: Vec<MapStatus>,
    /// How often each reason came up.
    pub reasons: Vec<ReasonCount>,
    /// Established connections that were ended because they are no longer allowed.
    #[serde(default)]
    pub ended: Vec<EndedCount>,
    /// Certificates of the agent and of the node's workloads.
    #[serde(default)]
    pub certificates: Vec<Certificate>,
    /// What could not be put into effect, newest last.
    pub problems: Vec<String>,
    /// Flow records that were lost before they could be read.
    pub flows_lost: u64,
}

/// The certificate of one identity on one node, as `heddle certs` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// SPIFFE id.
    pub identity: String,
    /// How it stands.
    pub state: CertificateState,
    /// Serial number in hexadecimal; empty while there is no certificate.
    pub serial: String,
    /// Seconds since 1970.
    pub not_before: Option<u64>,
    /// Seconds since 1970.
    pub not_after: Option<u64>,
    /// How often it was signed since the agent started.
    pub issued: u64,
    /// Why the last try to get or renew it failed.
    pub last_error: Option<String>,
    /// The workloads that have the identity.
    pub users: Vec<String>,
}

/// How a certificate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CertificateState {
    /// Valid; renewed when it is due.
    Valid,
    /// Valid, but its renewal fails.
    Stale,
    /// There is none yet, or it has expired; it is being asked for.
    Pending,
    /// There is none, and the authority says no.
    Refused,
}

impl CertificateState {
    /// One word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Valid => "valid",
            Self::Stale => "stale",
            Self::Pending => "pending",
            Self::Refused => "refused",
        }
    }
}

/// One attached kernel program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStatus {
    /// Program name.
    pub program: String,
    /// What it is attached to.
    pub target: String,
}

/// Use of one kernel map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapStatus {
    /// Map name.
    pub map: String,
    /// Entries; absent for what cannot be counted. Of maps that the kernel writes: as counted last, seconds ago.
    pub entries: Option<usize>,
    /// Room for so many (bytes of the flow records' ring buffer); absent if memory is the only bound.
    pub capacity: Option<u32>,
}

/// How often one reason came up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReasonCount {
    /// The reason's name.
    pub reason: String,
    /// What it means.
    pub text: String,
    /// Count since the node's maps were made.
    pub count: u64,
}

/// How many established connections were ended for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedCount {
    /// Why: a reason of the kernel's, or `endpoint-gone` (docs/connections.md).
    pub reason: String,
    /// `NAMESPACE/NAME` of the policy that no longer allows them, if one does not.
    pub policy: Option<String>,
    /// Count since the agent started.
    pub count: u64,
}

/// The answer of `heddle explain`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The client.
    pub source: FlowEnd,
    /// As asked: `HOST:PORT`.
    pub asked: String,
    /// `NAMESPACE/NAME` of the service that the name or address belongs to.
    pub service: Option<String>,
    /// The path it takes, or `refused`.
    pub path: String,
    /// Whether a connection would be made (to at least one endpoint).
    pub verdict: Verdict,
    /// Why, one word of a fixed set.
    pub reason: String,
    /// The same in a sentence.
    pub text: String,
    /// What the program sees: `connected`, or the name of an errno.
    pub outcome: String,
    /// Every endpoint that the kernel may pick.
    pub endpoints: Vec<ExplainedEndpoint>,
}

/// One endpoint in an explanation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainedEndpoint {
    /// The server.
    pub destination: FlowEnd,
    /// Its node.
    pub node: String,
    /// Share of new connections, thousandths.
    pub share: u32,
    /// Verdict for this endpoint.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
    /// `NAMESPACE/NAME` of the policy that decides.
    pub policy: Option<String>,
    /// The policies that apply to the endpoint, all of them.
    pub policies: Vec<String>,
    /// Both ends have asked for spliced connections (`heddle.dev/splice`).
    #[serde(default)]
    pub spliced: bool,
}

/// A whole mesh, as `heddle status -o json` prints it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MeshStatus {
    /// Name of the mesh.
    pub mesh: String,
    /// Process id of `heddle up`.
    pub pid: u32,
    /// Folder with the objects.
    pub source: String,
    /// Every replica, wanted or still there.
    pub workloads: Vec<Replica>,
    /// Every node.
    pub nodes: Vec<NodeEntry>,
    /// Every object, with where it comes from and how far it got.
    pub objects: Vec<ObjectEntry>,
    /// Ports on the host's loopback.
    pub published: Vec<PublishedEntry>,
    /// What is wrong with the objects, with file, line and column.
    pub problems: Vec<String>,
}

impl MeshStatus {
    /// Every replica is ready (or has ended as it should), every node has its policy, and nothing is wrong.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.workloads
            .iter()
            .all(|replica| replica.status.ready || replica.status.phase == PodPhase::Succeeded)
            && self
                .nodes
                .iter()
                .all(|node| node.status.as_ref().is_some_and(|status| status.synced))
            && self
                .published
                .iter()
                .all(|published| published.error.is_none())
    }

    /// Everything that is wrong anywhere, one line each.
    #[must_use]
    pub fn all_problems(&self) -> Vec<String> {
        let mut all = self.problems.clone();
        for node in &self.nodes {
            let of_agent = node.status.iter().flat_map(|status| &status.problems);
            all.extend(of_agent.map(|problem| format!("node {}: {problem}", node.node)));
        }
        all.extend(
            self.published
                .iter()
                .filter_map(|published| published.error.clone()),
        );
        all
    }
}

/// One replica and what the runtime says of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// Namespace.
    pub namespace: String,
    /// Name of the `Workload` object.
    pub workload: String,
    /// Replica name.
    pub name: String,
    /// Service account.
    pub service_account: String,
    /// What the runtime says of it.
    pub status: PodStatus,
}

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeEntry {
    /// Node name.
    pub node: String,
    /// What its agent says; `None` while it is away.
    pub status: Option<NodeStatus>,
    /// Why it is away.
    pub error: Option<String>,
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectEntry {
    /// `KIND NAMESPACE/NAME`.
    pub object: String,
    /// File and line it was read from.
    pub source: String,
    /// `accepted`, or `rejected` (its last good version, if there was one, is in force).
    pub state: String,
    /// The version in force has reached so many of the nodes.
    pub live_on: usize,
    /// Number of nodes.
    pub nodes: usize,
}

/// One published port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedEntry {
    /// Port on 127.0.0.1 and ::1.
    pub host_port: u16,
    /// `NAMESPACE/WORKLOAD`.
    pub workload: String,
    /// Why it is not open.
    pub error: Option<String>,
}
