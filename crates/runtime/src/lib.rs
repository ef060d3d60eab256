//! The standalone runtime: what the kubelet, the container runtime and the CNI are on Kubernetes.

pub mod container;
pub mod error;
pub mod fabric;
pub mod init;
pub mod layout;

pub use error::Error;
