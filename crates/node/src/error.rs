//! What can stop a node agent, or one workload's enrolment.

use std::io;

/// A failure of the node agent.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The configuration file cannot be used.
    #[error("configuration {path}: {message}")]
    Config {
        /// The file.
        path: String,
        /// What is wrong with it.
        message: String,
    },
    /// The kernel holds numbers whose meaning is gone.
    #[error(
        "ids.json is missing from {path}, so that the numbers in the kernel cannot be told any more: the last policy \
         stays in force; start the mesh anew (heddle down, heddle up)"
    )]
    NumbersLost {
        /// The node's state folder.
        path: String,
    },
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] kernel::KernelError),
    /// DNS cannot be served.
    #[error(transparent)]
    Dns(#[from] crate::dns::DnsError),
    /// Certificates cannot be kept.
    #[error(transparent)]
    Identity(#[from] identity::keeper::KeeperError),
    /// A metric could not be registered.
    #[error(transparent)]
    Telemetry(#[from] telemetry::TelemetryError),
    /// The socket to who starts workloads.
    #[error("enrolment: {0}")]
    Enroll(#[from] linux::seqpacket::Error),
    /// The other end of the enrolment socket does not follow the protocol.
    #[error("enrolment: {0}")]
    Protocol(String),
    /// A system call failed.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl From<io::Error> for NodeError {
    fn from(source: io::Error) -> Self {
        Self::Io {
            action: "use the node's state folder".into(),
            source,
        }
    }
}

impl NodeError {
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }
}
