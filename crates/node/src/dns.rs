//! DNS inside each workload.
//!
//! The kernel redirects a workload's queries to sockets that the agent opened on the workload's own addresses
//! ([`DnsSockets`]). [`DnsServer`] answers names of the mesh from a snapshot ([`Zone`]) and passes all
//! others to the machine's resolver ([`Upstream`]).
//!
//! One query's way: `server` receives it, `message` parses it and limits the answer's size, `names` decides
//! what the name means, `answer` finds the records; or `upstream` asks somebody else.

mod answer;
mod message;
mod metrics;
mod names;
mod server;
mod sharded;
mod sockets;
mod upstream;
mod zone;

use std::{io, net::SocketAddr};

use thiserror::Error;

pub use metrics::DnsMetrics;
pub use server::{DnsHandle, DnsServer, WorkloadDns};
pub use sockets::DnsSockets;
pub use upstream::{Nameserver, NameserverError, Upstream, UpstreamConfig};
pub use zone::{DnsEndpoint, DnsMembership, DnsPort, DnsService, Zone};

/// Port of the agent's sockets in a workload's namespace; the kernel redirects port 53 to it.
pub const DNS_PORT: u16 = 15053;

/// Why DNS cannot be served.
#[derive(Debug, Error)]
pub enum DnsError {
    /// The mesh's settings are wrong.
    #[error("cluster domain {domain:?} is no domain name: {source}")]
    ClusterDomain {
        /// As configured.
        domain: String,
        /// What is wrong with it.
        source: hickory_proto::ProtoError,
    },
    /// The address is not in this network namespace, or something else has the port.
    #[error("cannot open the DNS socket {address} in the workload's network namespace: {source}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// The system's answer.
        source: io::Error,
    },
    /// The store of descriptors gave something else; open new sockets instead.
    #[error("a stored descriptor is not a DNS socket: {reason}")]
    NotDns {
        /// What it is.
        reason: String,
    },
    /// Not called on a tokio runtime with I/O, or out of resources.
    #[error("cannot serve a DNS socket: {source}")]
    Serve {
        /// The system's answer.
        source: io::Error,
    },
    /// Names outside the mesh cannot be resolved.
    #[error("cannot start the thread that asks the machine's resolver: {source}")]
    Upstream {
        /// The system's answer, or the namespace's.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests;
