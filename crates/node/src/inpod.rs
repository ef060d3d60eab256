//! What the agent has inside of a workload's network namespace: listening sockets, and the routes by which
//! connections that it makes in a client's name stay there. (A socket stays in the namespace that it was made in,
//! whichever thread uses it: ztunnel's "in-pod" way.)
//!
//! The listening sockets outlive the agent in the store of who starts workloads (`api::enroll`): while no agent runs,
//! connections wait in them.

pub(crate) mod routes;
pub(crate) mod sockets;
