//! The standalone runtime: what the kubelet, the container runtime and the CNI are on Kubernetes.

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
pub mod publish;

pub use error::Error;
