//! The standalone runtime: what the kubelet, the container runtime and the CNI are on Kubernetes.
//!
//! `heddle up` uses it like this: [`preflight`] says what the machine lacks; [`claim`] takes the mesh (lock,
//! a clean start, the [`guardian`]); [`supervisor`] makes the network ([`fabric`]), starts the node agents and
//! runs the pods that control asks for; at the end [`claim`] leaves nothing behind ([`cleanup`]).
//!
//! - [`container`] and [`init`]: one replica, from outside and from inside. [`exec`] enters one that runs.
//! - [`enroll`]: the starter's side of `api::enroll`.
//! - [`publish`]: ports on the host's loopback.
//! - [`layout`]: every path. [`logs`]: output of pods and agents.

mod agent;
mod backoff;
pub mod claim;
pub mod cleanup;
pub mod container;
pub mod enroll;
pub mod error;
pub mod exec;
pub mod fabric;
pub mod guardian;
pub mod init;
pub mod layout;
pub mod logs;
pub mod preflight;
mod probe;
pub mod publish;
pub mod supervisor;

pub use agent::AgentState;
pub use error::Error;
