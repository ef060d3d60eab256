//! CPU and memory limits of a cgroup: on v2 where it has the controllers, else in the v1 hierarchies.
//!
//! A controller belongs to one hierarchy at a time. Where v1 has `cpu` or `memory`, the limit goes to a
//! folder of the same relative path there, and the limited processes must join that folder too.
//! What was applied is always said; a limit is never dropped silently.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use super::{Cgroup, Error, failed, remove_tree, write};
use crate::mounts;

/// The period over which a CPU limit is kept, in microseconds (the kernel's default).
const CPU_PERIOD_MICROSECONDS: u64 = 100_000;
/// The smallest quota that the kernel takes, in microseconds.
const CPU_QUOTA_FLOOR_MICROSECONDS: u64 = 1_000;

/// What is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Thousandths of a CPU.
    pub cpu_millis: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
}

/// What became of one limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// None was asked for.
    NotAsked,
    /// Set in the cgroup itself.
    V2,
    /// Set in the v1 hierarchy, in this folder.
    V1(PathBuf),
    /// Not set.
    Unavailable(String),
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAsked => f.write_str("not asked for"),
            Self::V2 => f.write_str("cgroup v2"),
            Self::V1(folder) => write!(f, "cgroup v1 ({})", folder.display()),
            Self::Unavailable(reason) => write!(f, "not applied: {reason}"),
        }
    }
}

/// What became of all limits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppliedLimits {
    /// The CPU limit.
    pub cpu: Applied,
    /// The memory limit.
    pub memory: Applied,
}

impl AppliedLimits {
    /// The v1 folders that the limited processes must join besides the v2 one.
    pub fn v1_folders(&self) -> impl Iterator<Item = &Path> {
        [&self.cpu, &self.memory]
            .into_iter()
            .filter_map(|applied| match applied {
                Applied::V1(folder) => Some(folder.as_path()),
                _ => None,
            })
    }
}

/// The hierarchies of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchies {
    v2: PathBuf,
    v1_cpu: Option<PathBuf>,
    v1_memory: Option<PathBuf>,
}

impl Hierarchies {
    /// Looks for them; `v2` is the cgroup2 mount.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn find(v2: PathBuf) -> Result<Self, Error> {
        let mounted = mounts::list()
            .map_err(|source| failed("read", Path::new("/proc/self/mountinfo"), source))?;
        let v1 = |controller: &str| {
            mounted
                .iter()
                .find(|mount| {
                    mount.filesystem == "cgroup"
                        && mount
                            .super_options
                            .split(',')
                            .any(|option| option == controller)
                })
                .map(|mount| mount.target.clone())
        };
        Ok(Self {
            v1_cpu: v1("cpu"),
            v1_memory: v1("memory"),
            v2,
        })
    }

    /// Limits `cgroup`, a folder below `top` that holds processes but has none above it that do.
    /// Controllers are enabled from `top` down, never above it.
    ///
    /// # Errors
    /// A v1 folder cannot be made. A limit that cannot be set is no error: it is said in the answer.
    pub fn limit(
        &self,
        top: &Cgroup,
        cgroup: &Cgroup,
        limits: &Limits,
    ) -> Result<AppliedLimits, Error> {
        let cpu = match limits.cpu_millis {
            None => Applied::NotAsked,
            Some(millis) => {
                let quota =
                    (millis * CPU_PERIOD_MICROSECONDS / 1000).max(CPU_QUOTA_FLOOR_MICROSECONDS);
                let files = Files {
                    controller: "cpu",
                    v2: ("cpu.max", format!("{quota} {CPU_PERIOD_MICROSECONDS}")),
                    v1: ("cpu.cfs_quota_us", quota.to_string()),
                };
                self.one(top, cgroup, &files, self.v1_cpu.as_deref())?
            }
        };
        let memory = match limits.memory_bytes {
            None => Applied::NotAsked,
            Some(bytes) => {
                let files = Files {
                    controller: "memory",
                    v2: ("memory.max", bytes.to_string()),
                    v1: ("memory.limit_in_bytes", bytes.to_string()),
                };
                self.one(top, cgroup, &files, self.v1_memory.as_deref())?
            }
        };
        Ok(AppliedLimits { cpu, memory })
    }

    /// Removes what [`Hierarchies::limit`] made in the v1 hierarchies for `cgroup` and those below it.
    ///
    /// # Errors
    /// Processes are left in a folder.
    pub fn remove_v1(&self, cgroup: &Path) -> Result<(), Error> {
        let Ok(relative) = cgroup.strip_prefix(&self.v2) else {
            return Ok(());
        };
        for hierarchy in [&self.v1_cpu, &self.v1_memory].into_iter().flatten() {
            remove_tree(&hierarchy.join(relative))?;
        }
        Ok(())
    }

    fn one(
        &self,
        top: &Cgroup,
        cgroup: &Cgroup,
        files: &Files,
        v1: Option<&Path>,
    ) -> Result<Applied, Error> {
        let relative = cgroup
            .path()
            .strip_prefix(&self.v2)
            .unwrap_or(Path::new(""));
        if has_controller(top.path(), files.controller) {
            return Ok(match enable_and_set(top, cgroup, files) {
                Ok(()) => Applied::V2,
                Err(error) => Applied::Unavailable(error.to_string()),
            });
        }
        let Some(hierarchy) = v1 else {
            let controller = files.controller;
            return Ok(Applied::Unavailable(format!(
                "neither cgroup v2 nor v1 offers the {controller} controller here; enable it with `echo +{controller} > {}`",
                self.v2.join("cgroup.subtree_control").display(),
            )));
        };
        let folder = hierarchy.join(relative);
        fs::create_dir_all(&folder).map_err(|source| failed("create", &folder, source))?;
        Ok(match write(&folder.join(files.v1.0), &files.v1.1) {
            Ok(()) => Applied::V1(folder),
            Err(error) => Applied::Unavailable(error.to_string()),
        })
    }
}

struct Files {
    controller: &'static str,
    v2: (&'static str, String),
    v1: (&'static str, String),
}

fn has_controller(folder: &Path, controller: &str) -> bool {
    fs::read_to_string(folder.join("cgroup.controllers"))
        .is_ok_and(|text| text.split_whitespace().any(|name| name == controller))
}

/// A controller is usable in a folder when every folder above it passes it on.
fn enable_and_set(top: &Cgroup, cgroup: &Cgroup, files: &Files) -> Result<(), Error> {
    let above: Vec<&Path> = cgroup
        .path()
        .ancestors()
        .skip(1)
        .take_while(|folder| folder.starts_with(top.path()))
        .collect();
    for folder in above.into_iter().rev() {
        write(
            &folder.join("cgroup.subtree_control"),
            &format!("+{}", files.controller),
        )?;
    }
    write(&cgroup.path().join(files.v2.0), &files.v2.1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::find_mount;

    #[test]
    fn limits_are_set_somewhere_or_said_to_be_missing() {
        let root = find_mount().unwrap().unwrap();
        let hierarchies = Hierarchies::find(root.clone()).unwrap();
        let top =
            Cgroup::create(root.join(format!("heddle.limits-{}", std::process::id()))).unwrap();
        let cgroup = top.child("pod").unwrap().child("app").unwrap();
        let asked = Limits {
            cpu_millis: Some(500),
            memory_bytes: Some(64 << 20),
        };
        let applied = hierarchies.limit(&top, &cgroup, &asked).unwrap();
        let expectations = [
            (
                &applied.cpu,
                "cpu.max",
                "50000 100000",
                "cpu.cfs_quota_us",
                "50000",
            ),
            (
                &applied.memory,
                "memory.max",
                "67108864",
                "memory.limit_in_bytes",
                "67108864",
            ),
        ];
        for (outcome, v2_file, v2_text, v1_file, v1_text) in expectations {
            match outcome {
                Applied::V2 => {
                    assert_eq!(
                        fs::read_to_string(cgroup.path().join(v2_file))
                            .unwrap()
                            .trim(),
                        v2_text
                    );
                }
                Applied::V1(folder) => {
                    assert_eq!(
                        fs::read_to_string(folder.join(v1_file)).unwrap().trim(),
                        v1_text
                    );
                }
                Applied::Unavailable(reason) => assert!(reason.contains("controller"), "{reason}"),
                Applied::NotAsked => panic!("it was asked for"),
            }
        }
        let nothing = hierarchies
            .limit(&top, &cgroup, &Limits::default())
            .unwrap();
        assert_eq!(nothing.v1_folders().count(), 0);

        hierarchies.remove_v1(top.path()).unwrap();
        top.remove_tree().unwrap();
        for folder in applied.v1_folders() {
            assert!(!folder.exists());
        }
    }
}
