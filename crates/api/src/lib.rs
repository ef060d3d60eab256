//! What users write and what the planes say to each other, as plain types.
//!
//! - [`mesh`]: the settings of one mesh (names, address ranges) with their defaults.
//! - [`pod`]: one replica of a workload, as control asks for it and the runtime reports it.
//! - [`enroll`]: the messages between who starts workloads and the node agent.
//! - [`node_config`]: what a node agent is told at its start, [`map_sizes`] among it.
//! - [`parse()`]: the text of a file to [`objects`] and [`problem`]s, by way of [`yaml`] trees that know their positions.
//! - [`check`]: what is wrong between objects.
//!
//! No I/O lives here beyond reading text that a caller hands in.

pub mod check;
mod decode;
pub mod enroll;
pub mod map_sizes;
pub mod mesh;
pub mod node_config;
pub mod objects;
mod parse;
pub mod pod;
pub mod problem;
pub mod report;
pub mod yaml;

pub use parse::{Located, Parsed, Source, parse};
