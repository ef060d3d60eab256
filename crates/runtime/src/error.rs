//! The runtime's error type.

use std::io;

use thiserror::Error;

/// What can go wrong in the runtime. Each says what was tried and on what.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried, with its input.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A request to the kernel's network configuration.
    #[error("cannot {what}: {source}")]
    Netlink {
        /// What was tried, with its input.
        what: String,
        /// The kernel's answer.
        source: Box<rtnetlink::Error>,
    },
    /// Cgroups.
    #[error(transparent)]
    Cgroup(#[from] linux::cgroup::Error),
    /// A control socket.
    #[error(transparent)]
    Socket(#[from] linux::seqpacket::Error),
    /// A range of [`api::mesh::MeshConfig`] is too small.
    #[error(
        "the range {range} has no room for node number {index}: give the mesh a larger one (a /24 or a /64 per node is cut from it)"
    )]
    RangeTooSmall {
        /// The range.
        range: String,
        /// Number of the node, from 0.
        index: usize,
    },
    /// Every address of a node is in use.
    #[error("node {node} has no free address in {range}: move replicas to another node")]
    NoFreeAddress {
        /// The node.
        node: String,
        /// Its range.
        range: String,
    },
    /// Another process runs this mesh.
    #[error(
        "mesh {mesh} is already up: {holder} holds {lock}. Stop it with `heddle down`, or give this one another name"
    )]
    AlreadyUp {
        /// The mesh.
        mesh: String,
        /// Who, as far as it said.
        holder: String,
        /// The lock file.
        lock: String,
    },
    /// A name that cannot become part of a path.
    #[error("the {what} `{name}` is not a DNS label (a-z, 0-9, -, at most 63 characters)")]
    BadName {
        /// What is named.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// No such pod or node.
    #[error("there is no {what} `{name}`")]
    Unknown {
        /// What was looked for.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The pod has no running program.
    #[error("pod {uid} is not running ({phase:?})")]
    NotRunning {
        /// The pod.
        uid: String,
        /// Where it stands.
        phase: api::pod::PodPhase,
    },
    /// The program could not be started; the message comes from inside the container.
    #[error("{0}")]
    Container(String),
    /// Text that another process wrote is not understood.
    #[error("cannot read {what}: {source}")]
    Json {
        /// What it is.
        what: String,
        /// Where it went wrong.
        source: serde_json::Error,
    },
    /// Something of the mesh is still there after cleaning up.
    #[error("mesh {mesh} is not clean: {left}")]
    NotClean {
        /// The mesh.
        mesh: String,
        /// What is left.
        left: String,
    },
}

/// Adds to a result what was tried.
pub(crate) trait During<T> {
    /// Names what was tried: "cannot WHAT".
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Io {
            what: what(),
            source,
        })
    }
}

impl<T> During<T> for nix::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(io::Error::from).during(what)
    }
}

impl<T> During<T> for Result<T, rtnetlink::Error> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Netlink {
            what: what(),
            source: Box::new(source),
        })
    }
}

impl<T> During<T> for serde_json::Result<T> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Json {
            what: what(),
            source,
        })
    }
}
