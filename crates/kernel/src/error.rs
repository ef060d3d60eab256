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
    #[error(
        "the kernel refused program {program}: {words}; what an earlier agent attached stays in force\n{source}"
    )]
    Program {
        /// Program name.
        program: String,
        /// The verifier's conclusion.
        words: String,
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
    #[error(
        "map {table} is full ({capacity} entries), and what finds no room is refused: \
         start the mesh with --map-size {setting}=N and a larger N"
    )]
    Full {
        /// Map name.
        table: &'static str,
        /// Its size.
        capacity: u32,
        /// What a user sets to make it larger.
        setting: &'static str,
    },
    /// A map could not take the place of an earlier one; the earlier ones stay in force.
    #[error("cannot {action} map {map}: {source}; the kernel goes on with what it has")]
    Migration {
        /// Map name.
        map: &'static str,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
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
    pub(crate) fn program(program: &str, source: aya::programs::ProgramError) -> Self {
        let words = match &source {
            aya::programs::ProgramError::LoadError {
                verifier_log,
                io_error,
            } => conclusion(&verifier_log.to_string()).unwrap_or_else(|| io_error.to_string()),
            other => other.to_string(),
        };
        Self::Program {
            program: program.to_owned(),
            words,
            source: Box::new(source),
        }
    }

    pub(crate) fn map(table: &'static str, source: aya::maps::MapError) -> Self {
        Self::Map {
            table,
            source: Box::new(source),
        }
    }
}

/// The line of the verifier's log that says why: the last one that is no statistic.
fn conclusion(log: &str) -> Option<String> {
    let statistics = ["processed ", "verification time ", "stack depth "];
    let lines = log.lines().map(str::trim);
    let mut words = lines
        .filter(|line| !line.is_empty() && !statistics.iter().any(|start| line.starts_with(start)));
    words.next_back().map(ToOwned::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_conclusion_stands_before_its_statistics() {
        let log = "0: R1=ctx()\n1: (61) r0 = *(u32 *)(r2 +0)\nR2 !read_ok\nverification time 3 usec\n\
                   stack depth 0\nprocessed 2 insns (limit 1000000)\n";
        assert_eq!(conclusion(log).as_deref(), Some("R2 !read_ok"));
        assert_eq!(conclusion(""), None);
    }
}
