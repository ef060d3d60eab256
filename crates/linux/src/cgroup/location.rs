//! From a cgroup's name in `/proc/PID/cgroup` to its folder.

use std::path::{Component, Path, PathBuf};

use super::{Error, failed};
use crate::mounts::{self, Mount};

/// Where cgroup2 is mounted, and which part of the hierarchy is seen there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupMount {
    target: PathBuf,
    root: PathBuf,
}

impl CgroupMount {
    /// The mount that [`super::find_mount`] names.
    ///
    /// # Errors
    /// There is none; `/proc` is not mounted.
    pub fn find() -> Result<Self, Error> {
        let path = Path::new("/proc/self/mountinfo");
        let found = mounts::list().map_err(|source| failed("read", path, source))?;
        let Mount { target, root, .. } = found
            .into_iter()
            .filter(|mount| mount.filesystem == "cgroup2")
            .min_by_key(|mount| mount.target.as_os_str().len())
            .ok_or_else(|| failed("find in", path, std::io::ErrorKind::NotFound.into()))?;
        Ok(Self { target, root })
    }

    /// The folder of the cgroup that `/proc/PID/cgroup` calls `name`; `None` if it lies outside of the mount.
    ///
    /// Both names begin at the root of this process's cgroup namespace; what lies above it begins with `..`.
    #[must_use]
    pub fn folder(&self, name: &str) -> Option<PathBuf> {
        let below = Path::new(name).strip_prefix(&self.root).ok()?;
        let plain = below
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        // An empty rest must not leave a slash at the end.
        plain.then(|| self.target.join(below).components().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_folders_inside_of_the_mount_only() {
        let whole = CgroupMount {
            target: "/sys/fs/cgroup".into(),
            root: "/".into(),
        };
        let folder = |mount: &CgroupMount, name| mount.folder(name);
        assert_eq!(folder(&whole, "/"), Some("/sys/fs/cgroup".into()));
        assert_eq!(folder(&whole, "/a/b"), Some("/sys/fs/cgroup/a/b".into()));
        assert_eq!(folder(&whole, "/../a"), None);
        assert_eq!(folder(&whole, "a"), None);
        let part = CgroupMount {
            target: "/cg".into(),
            root: "/box".into(),
        };
        assert_eq!(folder(&part, "/box/a"), Some("/cg/a".into()));
        assert_eq!(folder(&part, "/boxes/a"), None);
        assert_eq!(folder(&part, "/"), None);
    }

    #[test]
    fn the_machines_mount_is_found() {
        let mount = CgroupMount::find().unwrap();
        assert_eq!(Some(mount.target), super::super::find_mount().unwrap());
    }
}
