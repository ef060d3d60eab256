//! What every test of real programs stands on: a bpffs for its pins and a cgroup for its processes, gone at the end with all
//! that is in them. Not a test program of its own: those that need it include it by path.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use kernel::{Kernel, Reason};
use linux::cgroup::{self, Cgroup};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// How long killed processes may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);

/// A bpffs and a cgroup.
pub(crate) struct Ground {
    bpffs: tempfile::TempDir,
    cgroup: Cgroup,
}

impl Ground {
    /// The cgroup is called `name`.
    pub(crate) fn new(name: &str) -> Self {
        let bpffs = tempfile::tempdir().unwrap();
        let none = None::<&str>;
        mount(
            Some("bpf"),
            bpffs.path(),
            Some("bpf"),
            MsFlags::empty(),
            none,
        )
        .expect("mounting a bpffs needs root");
        let root = cgroup::find_mount().unwrap().expect("cgroup2 is mounted");
        let cgroup = Cgroup::create(root.join(name)).unwrap();
        Self { bpffs, cgroup }
    }

    /// The node's folder on the bpffs.
    pub(crate) fn pin_dir(&self) -> PathBuf {
        self.bpffs.path().join("node")
    }

    pub(crate) fn cgroup(&self) -> &Path {
        self.cgroup.path()
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // A failed test is told by what failed, not by what it left in its way.
        drop(fs::remove_dir_all(self.pin_dir()));
        let _ = umount2(self.bpffs.path(), MntFlags::MNT_DETACH);
        drop(self.cgroup.kill());
        drop(self.cgroup.wait_empty(PATIENCE));
        drop(self.cgroup.remove_tree());
    }
}

/// How often a reason came up.
pub(crate) fn count(kernel: &Kernel, reason: Reason) -> u64 {
    let counts = kernel.reason_counts().unwrap();
    counts.iter().find(|(other, _)| *other == reason).unwrap().1
}
