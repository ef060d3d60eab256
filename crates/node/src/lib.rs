//! The node agent: what `heddle node` runs, one process per node.
//!
//! It receives the mesh's state over xDS ([`state`]), its node's workloads over the enrolment socket
//! ([`agent`]), and puts both into the kernel ([`dataplane`], [`policy`]); it answers names inside every
//! workload ([`dns`]), reads flow records ([`flows`]), looks at open connections and ends what policy forbids
//! ([`connections`]), and serves operators ([`http`], [`explain`]).
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
mod ids;
mod local_dns;
mod names;
mod policy;
mod state;

pub use agent::run;
pub use error::NodeError;
