//! Every path that a mesh uses on the machine, and the lock that makes sure that one `heddle up` owns them.
//!
//! Nothing of a mesh lies outside of its run folder and its cgroup; `cleanup` relies on it.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read, Seek, Write},
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::fcntl::{Flock, FlockArg};

use crate::{
    cleanup::Remains,
    error::{During, Error},
};

/// Folder of the run folders of all meshes.
pub const RUN_DIR: &str = "/run/heddle";
/// Where a container sees its node's [`Layout::identity_dir`].
pub const IDENTITY_FOLDER: &str = "/run/spiffe/workload";
/// Name of the socket in it.
pub const IDENTITY_SOCKET: &str = "agent.sock";
/// How long a new `up` waits for one that is just ending, or for its guardian.
const LOCK_PATIENCE: Duration = Duration::from_secs(3);

/// The paths of one mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    mesh: String,
    run: PathBuf,
    cgroup_mount: PathBuf,
}

impl Layout {
    /// The paths of mesh `mesh`. Mounts cgroup2 below [`RUN_DIR`] if it is mounted nowhere.
    ///
    /// # Errors
    /// The name is no DNS label; there is no cgroup2.
    pub fn new(mesh: &str) -> Result<Self, Error> {
        Self::below(Path::new(RUN_DIR), mesh)
    }

    /// As [`Layout::new`], with another folder in place of [`RUN_DIR`].
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn below(run_dir: &Path, mesh: &str) -> Result<Self, Error> {
        check_label("mesh", mesh)?;
        Ok(Self {
            mesh: mesh.into(),
            run: run_dir.join(mesh),
            cgroup_mount: linux::cgroup::find_or_mount(&run_dir.join("cgroup2"))?,
        })
    }

    /// Name of the mesh.
    #[must_use]
    pub fn mesh(&self) -> &str {
        &self.mesh
    }

    /// `/run/heddle/MESH`.
    #[must_use]
    pub fn run_dir(&self) -> &Path {
        &self.run
    }

    /// Held by the one `heddle up` of the mesh; beside the run folder, so that the folder can be removed under it.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        let mut name = self.mesh.clone();
        name.push_str(".lock");
        self.run.with_file_name(name)
    }

    /// What `up` says of itself to the operator's tools.
    #[must_use]
    pub fn up_json(&self) -> PathBuf {
        self.run.join("up.json")
    }

    /// Where `up` serves the operator's tools.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    /// Where the control plane serves xDS.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// The mesh's bpffs.
    #[must_use]
    pub fn bpf_mount(&self) -> PathBuf {
        self.run.join("bpf")
    }

    /// The node's folder on the bpffs.
    #[must_use]
    pub fn pin_dir(&self, node: &str) -> PathBuf {
        self.bpf_mount().join(node)
    }

    /// The node's folder.
    #[must_use]
    pub fn node_dir(&self, node: &str) -> PathBuf {
        self.run.join("nodes").join(node)
    }

    /// Where `up` speaks `api::enroll` to the node's agent.
    #[must_use]
    pub fn enroll_socket(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("enroll.sock")
    }

    /// Where the node's agent serves the operator's tools.
    #[must_use]
    pub fn agent_socket(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("agent.sock")
    }

    /// What every workload of the node sees, read-only: nothing but the socket below.
    #[must_use]
    pub fn identity_dir(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("identity")
    }

    /// Where the node's agent hands identities out to workloads.
    #[must_use]
    pub fn identity_socket(&self, node: &str) -> PathBuf {
        self.identity_dir(node).join(IDENTITY_SOCKET)
    }

    /// The agent's settings (`api::node_config`).
    #[must_use]
    pub fn agent_config(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("agent.json")
    }

    /// What the agent keeps over restarts.
    #[must_use]
    pub fn state_dir(&self, node: &str) -> PathBuf {
        self.node_dir(node).join("state")
    }

    /// Output of a pod.
    #[must_use]
    pub fn pod_log(&self, namespace: &str, pod: &str) -> PathBuf {
        self.run
            .join("logs")
            .join(namespace)
            .join(format!("{pod}.log"))
    }

    /// Output of a node's agent.
    #[must_use]
    pub fn agent_log(&self, node: &str) -> PathBuf {
        self.run.join("logs").join(format!("agent-{node}.log"))
    }

    /// The tmpfs that takes what pods write.
    #[must_use]
    pub fn scratch_mount(&self) -> PathBuf {
        self.run.join("w")
    }

    /// What one pod writes: `upper`, `work` and the mount point `root`.
    #[must_use]
    pub fn pod_scratch(&self, namespace: &str, pod: &str) -> PathBuf {
        self.scratch_mount().join(namespace).join(pod)
    }

    /// Where cgroup2 is mounted.
    #[must_use]
    pub fn cgroup_mount(&self) -> &Path {
        &self.cgroup_mount
    }

    /// The mesh's cgroup.
    #[must_use]
    pub fn cgroup(&self) -> PathBuf {
        self.cgroup_mount.join(format!("heddle.{}", self.mesh))
    }

    /// A node's cgroup: `agent`, `l7` and `w` lie below.
    #[must_use]
    pub fn node_cgroup(&self, node: &str) -> PathBuf {
        self.cgroup().join(node)
    }

    /// A pod's cgroup: `app` and `proxy` lie below.
    #[must_use]
    pub fn pod_cgroup(&self, node: &str, namespace: &str, pod: &str) -> PathBuf {
        self.node_cgroup(node)
            .join("w")
            .join(format!("{namespace}.{pod}"))
    }
}

impl Layout {
    /// What `cleanup` removes.
    #[must_use]
    pub fn remains(&self) -> Remains {
        Remains {
            run_dir: self.run.clone(),
            cgroup: self.cgroup(),
        }
    }
}

/// Whether `name` may become a file name: a DNS label (RFC 1123).
pub(crate) fn check_label(what: &'static str, name: &str) -> Result<(), Error> {
    let well_formed = !name.is_empty()
        && name.len() <= 63
        && !name.starts_with('-')
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if well_formed {
        Ok(())
    } else {
        Err(Error::BadName {
            what,
            name: name.into(),
        })
    }
}

/// The right to change anything of a mesh. It ends with the process.
#[derive(Debug)]
pub struct Lock {
    file: Flock<File>,
    path: PathBuf,
}

impl Lock {
    /// Takes the lock and writes into it who we are.
    ///
    /// # Errors
    /// [`Error::AlreadyUp`] with what the holder wrote; the folder cannot be made.
    pub fn take(layout: &Layout, who: &str) -> Result<Self, Error> {
        let path = layout.lock();
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).during(|| format!("create {}", parent.display()))?;
        }
        let start = Instant::now();
        loop {
            if let Some(mut lock) = Self::try_take(&path)? {
                lock.describe(who)?;
                return Ok(lock);
            }
            if start.elapsed() > LOCK_PATIENCE {
                return Err(Error::AlreadyUp {
                    mesh: layout.mesh.clone(),
                    holder: holder(&path),
                    lock: path.display().to_string(),
                });
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Takes the lock if no one holds it.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn try_take(path: &Path) -> Result<Option<Self>, Error> {
        let open = || {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)
        };
        let file = open().during(|| format!("open {}", path.display()))?;
        let Ok(file) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            return Ok(None);
        };
        // A holder removes the file at its end: what we have locked may be a file that no one else can find.
        let ours = file
            .metadata()
            .during(|| format!("stat {}", path.display()))?;
        let same = fs::metadata(path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino()));
        Ok(same.then(|| Self {
            file,
            path: path.into(),
        }))
    }

    /// A descriptor that shares the lock: it is held as long as any duplicate is open.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn share(&self) -> Result<OwnedFd, Error> {
        let shared = self.file.try_clone();
        shared
            .map(OwnedFd::from)
            .during(|| format!("share the lock {}", self.path.display()))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file and gives the lock up: nothing of the mesh is left.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(self) -> Result<(), Error> {
        fs::remove_file(&self.path).during(|| format!("remove {}", self.path.display()))
    }

    fn describe(&mut self, who: &str) -> Result<(), Error> {
        let text = format!("{who}, process {}\n", std::process::id());
        let path = &self.path;
        self.file
            .set_permissions(fs::Permissions::from_mode(0o644))
            .and_then(|()| self.file.set_len(0))
            .and_then(|()| self.file.rewind())
            .and_then(|()| self.file.write_all(text.as_bytes()))
            .during(|| format!("write {}", path.display()))
    }
}

fn holder(path: &Path) -> String {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(256).read_to_string(&mut text));
    match read {
        Ok(_) if !text.trim().is_empty() => text.trim().into(),
        _ => "another process".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_the_other_hears_who() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::below(dir.path(), "locked").unwrap();
        let lock = Lock::take(&layout, "heddle up shop").unwrap();
        let error = Lock::take(&layout, "heddle up other")
            .unwrap_err()
            .to_string();
        let expected = format!("heddle up shop, process {} holds", std::process::id());
        assert!(error.contains(&expected), "{error}");
        lock.remove().unwrap();
        assert!(!layout.lock().exists());
        drop(Lock::take(&layout, "heddle up other").unwrap());
    }

    #[test]
    fn names_cannot_climb_out() {
        for name in ["", "..", "a/b", "A", "-a", &"a".repeat(64)] {
            assert!(
                matches!(Layout::new(name), Err(Error::BadName { .. })),
                "{name}"
            );
        }
    }
}
