//! Cgroup v2 folders: made, joined, killed, removed. Limits are in [`limits`], names in `/proc` in
//! [`location`].
//!
//! A cgroup is the one handle on "everything that this workload started" that no program escapes:
//! teardown kills by cgroup, never by process name or parent.

pub mod limits;
pub mod location;

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use thiserror::Error;

use crate::mounts;

/// Time between two looks at a cgroup that is being emptied.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How long [`Cgroup::remove_tree`] waits for ended processes to be gone from the kernel's lists.
const REMOVE_PATIENCE: Duration = Duration::from_secs(2);

/// What can go wrong with cgroups.
#[derive(Debug, Error)]
pub enum Error {
    /// A file or folder of the hierarchy.
    #[error("cgroup {what} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No cgroup2 mount, and none could be made.
    #[error("no cgroup2 filesystem is mounted, and mounting one at {path} failed: {source}. It needs root and CONFIG_CGROUPS; mount one with `mount -t cgroup2 none DIR`", path = path.display())]
    NoCgroup2 {
        /// Where it was tried.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Processes remained.
    #[error("cgroup {path}: {left} processes are left after {waited:?}", path = path.display())]
    NotEmpty {
        /// The cgroup.
        path: PathBuf,
        /// How many.
        left: usize,
        /// How long was waited.
        waited: Duration,
    },
}

/// Where cgroup2 is mounted, if it is.
///
/// # Errors
/// `/proc` is not mounted.
pub fn find_mount() -> Result<Option<PathBuf>, Error> {
    let path = Path::new("/proc/self/mountinfo");
    let found = mounts::list().map_err(|source| failed("read", path, source))?;
    Ok(found
        .into_iter()
        .filter(|mount| mount.filesystem == "cgroup2")
        .map(|mount| mount.target)
        .min_by_key(|target| target.as_os_str().len()))
}

/// Where cgroup2 is mounted; where it is not, mounts it at `fallback`.
///
/// # Errors
/// [`Error::NoCgroup2`].
pub fn find_or_mount(fallback: &Path) -> Result<PathBuf, Error> {
    if let Some(found) = find_mount()? {
        return Ok(found);
    }
    fs::create_dir_all(fallback)
        .and_then(|()| {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            Ok(mount(
                Some("none"),
                fallback,
                Some("cgroup2"),
                flags,
                None::<&str>,
            )?)
        })
        .map_err(|source| Error::NoCgroup2 {
            path: fallback.into(),
            source,
        })?;
    Ok(fallback.into())
}

/// A cgroup v2 folder. Dropping it removes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// A folder that exists.
    ///
    /// # Errors
    /// It does not exist or is no cgroup.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let procs = path.join("cgroup.procs");
        fs::metadata(&procs).map_err(|source| failed("open", &procs, source))?;
        Ok(Self { path })
    }

    /// Makes the folder and those above it; one that exists is taken as it is.
    ///
    /// # Errors
    /// `EROFS` or `EACCES` where the hierarchy is not ours to change; `EAGAIN` past `cgroup.max.descendants`.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        fs::create_dir_all(&path).map_err(|source| failed("create", &path, source))?;
        Self::open(path)
    }

    /// Makes or takes the child `name`.
    ///
    /// # Errors
    /// As [`Cgroup::create`].
    pub fn child(&self, name: &str) -> Result<Self, Error> {
        Self::create(self.path.join(name))
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The id that `bpf_get_current_cgroup_id` gives: the folder's inode number.
    ///
    /// # Errors
    /// The folder is gone.
    pub fn id(&self) -> Result<u64, Error> {
        let metadata =
            fs::metadata(&self.path).map_err(|source| failed("stat", &self.path, source))?;
        Ok(metadata.ino())
    }

    /// Moves a process here, with all its threads.
    ///
    /// # Errors
    /// The process has ended; `EBUSY` if children of this cgroup have controllers enabled.
    pub fn add_pid(&self, pid: u32) -> Result<(), Error> {
        write(&self.path.join("cgroup.procs"), &pid.to_string())
    }

    /// Process ids in this cgroup, not in those below.
    ///
    /// # Errors
    /// The folder is gone.
    pub fn procs(&self) -> Result<Vec<u32>, Error> {
        let path = self.path.join("cgroup.procs");
        let text = fs::read_to_string(&path).map_err(|source| failed("read", &path, source))?;
        Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
    }

    /// Sends SIGKILL to all processes here and below, those that are being forked included. A folder that is gone is fine.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn kill(&self) -> Result<(), Error> {
        let path = self.path.join("cgroup.kill");
        match fs::write(&path, "1") {
            Ok(()) => Ok(()),
            Err(_) if !self.path.exists() => Ok(()),
            // Before Linux 5.14 there is no such file.
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.kill_one_by_one(),
            Err(source) => Err(failed("write", &path, source)),
        }
    }

    /// Waits until no process is here or below. A folder that is gone is empty.
    ///
    /// # Errors
    /// [`Error::NotEmpty`] after `patience`.
    pub fn wait_empty(&self, patience: Duration) -> Result<(), Error> {
        let start = Instant::now();
        while self.is_populated() {
            if start.elapsed() > patience {
                return Err(Error::NotEmpty {
                    path: self.path.clone(),
                    left: self.procs_below().len(),
                    waited: patience,
                });
            }
            thread::sleep(LOOK_AGAIN);
        }
        Ok(())
    }

    /// Removes this folder and all below it. A folder that is gone is fine.
    ///
    /// # Errors
    /// Processes are left in it (`EBUSY`).
    pub fn remove_tree(&self) -> Result<(), Error> {
        remove_tree(&self.path)
    }

    /// Whether a process is here or below.
    #[must_use]
    pub fn is_populated(&self) -> bool {
        fs::read_to_string(self.path.join("cgroup.events"))
            .is_ok_and(|text| text.lines().any(|line| line == "populated 1"))
    }

    fn kill_one_by_one(&self) -> Result<(), Error> {
        let start = Instant::now();
        loop {
            let left = self.procs_below();
            if left.is_empty() {
                return Ok(());
            }
            if start.elapsed() > REMOVE_PATIENCE {
                return Err(Error::NotEmpty {
                    path: self.path.clone(),
                    left: left.len(),
                    waited: REMOVE_PATIENCE,
                });
            }
            for pid in left {
                // One that ended meanwhile is what we want.
                let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    fn procs_below(&self) -> Vec<u32> {
        let mut found = self.procs().unwrap_or_default();
        for child in folders(&self.path) {
            found.extend(Self { path: child }.procs_below());
        }
        found
    }
}

/// Removes a folder of any cgroup hierarchy and those below it, deepest first.
///
/// # Errors
/// Processes are left in it (`EBUSY`).
pub fn remove_tree(path: &Path) -> Result<(), Error> {
    for child in folders(path) {
        remove_tree(&child)?;
    }
    let start = Instant::now();
    loop {
        match fs::remove_dir(path) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            // Killed processes leave their cgroup only when their parent, or init, has noticed.
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY)
                    && start.elapsed() < REMOVE_PATIENCE =>
            {
                thread::sleep(LOOK_AGAIN);
            }
            Err(source) => return Err(failed("remove", path, source)),
        }
    }
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).map_err(|source| failed("write", path, source))
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io {
        what,
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::Command};

    use super::*;
    use crate::place::Placement;

    #[test]
    fn a_tree_is_made_joined_killed_and_removed() {
        let root = find_mount().unwrap().unwrap();
        let top = Cgroup::create(root.join(format!("heddle.test-{}", std::process::id()))).unwrap();
        let leaf = top.child("a").unwrap().child("b").unwrap();
        assert_ne!(top.id().unwrap(), leaf.id().unwrap());
        assert!(!top.is_populated());

        let mut command = Command::new("sleep");
        command.arg("60");
        Placement::new()
            .cgroup(leaf.path())
            .unwrap()
            .apply(&mut command);
        let mut first = command.spawn().unwrap();
        let mut second = Command::new("sleep").arg("60").spawn().unwrap();
        top.add_pid(second.id()).unwrap();

        assert_eq!(leaf.procs().unwrap(), [first.id()]);
        assert_eq!(top.procs().unwrap(), [second.id()]);
        assert!(matches!(
            top.wait_empty(Duration::from_millis(10)),
            Err(Error::NotEmpty { left: 2, .. })
        ));
        top.kill().unwrap();
        assert_eq!(first.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert_eq!(second.wait().unwrap().signal(), Some(libc::SIGKILL));
        top.wait_empty(Duration::from_secs(5)).unwrap();
        top.remove_tree().unwrap();
        assert!(!top.path().exists());
        top.remove_tree().unwrap();
        top.kill().unwrap();
    }
}
