//! The standalone runtime: what the kubelet, the container runtime and the CNI are on Kubernetes.

pub mod error;
pub mod fabric;
pub mod layout;

pub use error::Error;
