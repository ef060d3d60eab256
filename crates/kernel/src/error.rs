//! What can go wrong with the kernel.

use std::{io, path::PathBuf};

/// A failure of this crate. All are the machine's (kernel, permissions, mounts) but [`KernelError::Full`].
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The object or one of its maps could not be loaded.
    #[error(
        "cannot load the kernel programs: {0} (the kernel needs CONFIG_BPF_SYSCALL and CONFIG_CGROUP_BPF, \
             and this process CAP_BPF and CAP_NET_ADMIN)"
    )]
    Load(#[from] aya::EbpfError),
    /// The verifier refused a program, or its type is not supported.
    #[error("the kernel refused program {program}: {source}")]
    Program {
        /// Program name.
        program: String,
        /// What the kernel said, with the verifier's log.
        source: Box<aya::programs::ProgramError>,
    },
    /// The object lacks something this crate expects: a build that mixes versions.
    #[error("the kernel object has no {kind} named {name}")]
    Missing {
        /// "map" or "program".
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// A map operation failed.
    #[error("map {table}: {source}")]
    Map {
        /// Map name.
        table: &'static str,
        /// What the kernel said.
        source: Box<aya::maps::MapError>,
    },
    /// Writing or removing many entries at once failed.
    #[error("map {table}: {source}")]
    Batch {
        /// Map name.
        table: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A map has no room; what was to be inserted is refused by the data path.
    #[error("map {table} is full ({capacity} entries): raise its size in the node's configuration")]
    Full {
        /// Map name.
        table: &'static str,
        /// Its size.
        capacity: u32,
    },
    /// Attaching, replacing or pinning a link failed.
    #[error("cannot {action} {program}: {source}")]
    Attach {
        /// What was tried.
        action: &'static str,
        /// Program name.
        program: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pin folder is not on a bpffs, or cannot be used.
    #[error("cannot use {path} for pins: {source} (it must be on a mounted bpffs)")]
    PinFolder {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl KernelError {
    pub(crate) fn map(table: &'static str, source: aya::maps::MapError) -> Self {
        Self::Map {
            table,
            source: Box::new(source),
        }
    }
}
