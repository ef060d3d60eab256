//! The node agent: what `heddle node` runs, one process per node.
//!
//! It receives the mesh's state over xDS ([`state`]), its node's workloads over the enrolment socket
//! ([`agent`]), and puts both into the kernel ([`dataplane`], [`policy`]); it answers names inside every
//! workload ([`dns`]), reads flow records ([`flows`]), looks at open connections and ends what policy forbids
//! ([`connections`]), carries what crosses nodes ([`micro_proxy`], with sockets inside the workloads' namespaces,
//! [`inpod`]), and serves operators ([`http`], [`explain`]).
//!
//! Certificates and the socket that hands them to workloads are in [`identities`].
//!
//! It starts no workloads: that is crate `runtime`, or a kubelet. It can die at any time: what it decided
//! stays in force in the kernel, and its successor takes over.

mod agent;
mod alias;
mod connections;
mod dataplane;
pub mod dns;
mod error;
mod explain;
mod flows;
mod health;
mod http;
mod identities;
mod ids;
mod inpod;
mod local_dns;
mod micro_proxy;
mod names;
mod policy;
mod state;

pub use agent::run;
pub use error::NodeError;
