//! What the runtime tells a container's init, and what init answers.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

use api::pod::PodFile;
use serde::{Deserialize, Serialize};

/// What the inside of a container is to be like.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitSpec {
    /// Its host name.
    pub hostname: String,
    /// Its addresses, for `/etc/hosts`.
    pub addresses: Vec<IpAddr>,
    /// A folder of its own on a writable filesystem: takes what it writes.
    pub scratch: PathBuf,
    /// A folder of the machine to show read-only where identities are handed out
    /// ([`IDENTITY_FOLDER`](crate::layout::IDENTITY_FOLDER)).
    pub identity: Option<PathBuf>,
    /// The one name server in `/etc/resolv.conf`.
    pub nameserver: Ipv4Addr,
    /// Search list in `/etc/resolv.conf`.
    pub search: Vec<String>,
    /// Files to place, by absolute path.
    pub files: BTreeMap<String, PodFile>,
    /// What to run.
    pub program: ProgramSpec,
}

/// A program to run inside of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramSpec {
    /// Program and arguments. The program is looked for in the environment's PATH.
    pub command: Vec<String>,
    /// Environment, besides PATH, HOME and HOSTNAME, which it may override.
    pub env: BTreeMap<String, String>,
    /// User name or uid, as the container's `/etc/passwd` has it; `None` for root.
    pub user: Option<String>,
    /// Working directory, `None` for `/`.
    pub working_dir: Option<String>,
}

/// From the runtime to init.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToInit {
    /// The first message. Descriptors: the [`InitSpec`] as a file, then those that the program gets from number 3 on.
    Start,
    /// Send SIGTERM to the program.
    Terminate,
}

/// From init to the runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromInit {
    /// The program runs.
    Started,
    /// It could not be started; init is about to exit.
    Failed {
        /// Why.
        error: String,
    },
}
