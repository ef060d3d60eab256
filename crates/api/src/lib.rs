//! What users write and what the planes say to each other, as plain types.
//!
//! - [`mesh`]: the settings of one mesh (names, address ranges) with their defaults.
//! - [`pod`]: one replica of a workload, as control asks for it and the runtime reports it.
//! - [`enroll`]: the messages between who starts workloads and the node agent.
//! - [`node_config`]: what a node agent is told at its start.
//!
//! No I/O lives here beyond reading text that a caller hands in.

pub mod enroll;
pub mod mesh;
pub mod node_config;
pub mod pod;
pub mod yaml;
