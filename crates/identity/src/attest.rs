//! Which workload a connection comes from: the kernel names the process, its cgroup names the workload.
//!
//! Nothing that a caller says is asked for. A workload cannot leave its cgroup (it has no writable cgroupfs), and its cgroup
//! is made before and removed after its processes.

use std::{
    collections::BTreeMap,
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use linux::{
    cgroup::location::CgroupMount,
    peer::{Moment, Peer, PeerError},
};

use crate::SpiffeId;

/// A workload that has connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// The workload's uid.
    pub uid: Arc<str>,
    /// Its identity.
    pub id: SpiffeId,
}

/// Why nobody is named.
#[derive(Debug, thiserror::Error)]
pub enum AttestError {
    /// A process, but of no workload of this node.
    #[error("process {pid} (user {uid}, cgroup {}) belongs to no workload of this node", cgroup.display())]
    Stranger {
        /// The process.
        pid: u32,
        /// Its user.
        uid: u32,
        /// Its cgroup.
        cgroup: PathBuf,
    },
    /// It is not known which process it is.
    #[error("the peer cannot be told: {0}")]
    Peer(#[from] PeerError),
}

impl AttestError {
    /// Whether the same caller may be recognised if it connects again.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Peer(PeerError::TooYoung { .. } | PeerError::Io { .. })
        )
    }
}

/// Names the workload behind a connection.
pub trait Attestor: Send + Sync + 'static {
    /// The workload that connected `stream`, which was not connected yet at `unconnected`. May block for a
    /// moment, on files in `/proc`.
    ///
    /// # Errors
    /// It is no workload, or that cannot be told.
    fn attest(&self, stream: &UnixStream, unconnected: Moment) -> Result<Caller, AttestError>;
}

/// The node's workloads by cgroup: a snapshot that is replaced as a whole. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Workloads {
    by_cgroup: Arc<ArcSwap<BTreeMap<PathBuf, Caller>>>,
}

impl Workloads {
    /// Replaces all of them. A workload's cgroup is an absolute path on the cgroup2 mount, and counts with all below it.
    pub fn replace(&self, workloads: impl IntoIterator<Item = (PathBuf, Caller)>) {
        self.by_cgroup
            .store(Arc::new(workloads.into_iter().collect()));
    }

    /// The workload that a cgroup belongs to.
    #[must_use]
    pub fn find(&self, cgroup: &Path) -> Option<Caller> {
        let by_cgroup = self.by_cgroup.load();
        cgroup
            .ancestors()
            .find_map(|folder| by_cgroup.get(folder).cloned())
    }
}

/// Asks the kernel.
#[derive(Debug)]
pub struct KernelAttestor {
    workloads: Workloads,
    mount: CgroupMount,
}

impl KernelAttestor {
    /// Recognises these workloads.
    ///
    /// # Errors
    /// No cgroup2 is mounted.
    pub fn new(workloads: Workloads) -> Result<Self, linux::cgroup::Error> {
        Ok(Self {
            workloads,
            mount: CgroupMount::find()?,
        })
    }
}

impl Attestor for KernelAttestor {
    fn attest(&self, stream: &UnixStream, unconnected: Moment) -> Result<Caller, AttestError> {
        let peer = Peer::of(stream.as_fd(), unconnected)?;
        let cgroup = peer.cgroup(&self.mount)?;
        self.workloads
            .find(&cgroup)
            .ok_or_else(|| AttestError::Stranger {
                pid: peer.pid(),
                uid: peer.uid(),
                cgroup,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_counts_with_all_below_it_and_nothing_beside() {
        let workloads = Workloads::default();
        let caller = |uid: &str| Caller {
            uid: uid.into(),
            id: format!("spiffe://d/ns/shop/sa/{uid}").parse().unwrap(),
        };
        workloads.replace([
            ("/cg/n/w/shop.web".into(), caller("web")),
            ("/cg/n/w/shop.web-1".into(), caller("web-1")),
        ]);
        let find = |path: &str| workloads.find(Path::new(path)).map(|found| found.uid);
        assert_eq!(find("/cg/n/w/shop.web").as_deref(), Some("web"));
        assert_eq!(find("/cg/n/w/shop.web/app/deep").as_deref(), Some("web"));
        assert_eq!(find("/cg/n/w/shop.web-1/app").as_deref(), Some("web-1"));
        for stranger in ["/cg/n/w", "/cg/n/w/shop.we", "/cg/n/w/shop.web-2/app", "/"] {
            assert_eq!(find(stranger), None, "{stranger}");
        }
        workloads.replace([]);
        assert_eq!(find("/cg/n/w/shop.web"), None);
    }
}
