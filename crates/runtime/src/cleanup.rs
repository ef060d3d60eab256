//! Removing everything that a mesh may leave on the machine: processes, cgroups, mounts, files.
//!
//! For a supervisor that ends, for the [guardian](crate::guardian) of one that was killed, for `heddle down`
//! and for the next `heddle up`. Network namespaces need no care: they are held by descriptors only.
//! Nothing is touched but what lies below the two folders of [`Remains`], whose names are checked.
//!
//! Who cleans must hold the mesh's lock, or know that no supervisor of that mesh runs.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use linux::{
    cgroup::{self, Cgroup},
    mounts,
};
use nix::mount::{MntFlags, umount2};
use thiserror::Error;

/// Every cgroup of a mesh lies below a folder whose name starts with this.
const CGROUP_PREFIX: &str = "heddle.";
/// How long killed processes may take to be gone; a process in the kernel's hands (state D) takes longer.
const KILL_PATIENCE: Duration = Duration::from_secs(10);
/// A process that was being started while its cgroup was killed is met by another try.
const TRIES: usize = 3;

/// What cannot be removed. The rest is, and cleaning again tries again.
#[derive(Debug, Error)]
pub enum Error {
    /// The path is not one of a mesh; nothing was touched.
    #[error("will not clean {path}: {reason}", path = path.display())]
    Refused {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Processes cannot be killed, or a cgroup cannot be removed.
    #[error(
        "{0}; a process that survives SIGKILL waits in the kernel, see its state with `ps -o pid,stat,wchan,cmd`"
    )]
    Cgroup(#[from] cgroup::Error),
    /// Something is still mounted, so no file was removed.
    #[error("cannot unmount {path}: {source}; unmount it with `umount -l {path}`, then try again", path = path.display())]
    Unmount {
        /// Where it is mounted.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A file or folder.
    #[error("cannot {what} {path}: {source}", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Where a mesh leaves things.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remains {
    /// Its folder of sockets, mounts, states and logs: `/run/heddle/MESH`. All of it is removed.
    pub run_dir: PathBuf,
    /// Its cgroup v2 folder, `CGROUP2/heddle.MESH`. Folders of the same name in v1 hierarchies are its too.
    pub cgroup: PathBuf,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Report {
    /// How many processes were there to kill.
    pub killed: usize,
    /// What was unmounted, in this order.
    pub unmounted: Vec<PathBuf>,
    /// The topmost cgroups that were removed.
    pub cgroups: Vec<PathBuf>,
    /// Whether there were files to remove.
    pub files: bool,
    /// What could not be done.
    pub errors: Vec<Error>,
}

impl Report {
    /// Whether there was nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.killed == 0
            && self.unmounted.is_empty()
            && self.cgroups.is_empty()
            && !self.files
            && self.errors.is_empty()
    }
}

/// Kills, unmounts and removes everything of a mesh. With nothing there it does nothing.
/// Blocks, for a moment as a rule, for some 30 seconds when processes do not die.
pub fn clean_mesh(remains: &Remains) -> Report {
    let mut report = Report::default();
    if let Err(error) = check(remains) {
        report.errors.push(error);
        return report;
    }
    if let Err(error) = remove_cgroups(remains, &mut report) {
        report.errors.push(error);
    }
    // A mounted folder must not be emptied: what is mounted may be the machine's own files.
    match unmount(remains, &mut report).and_then(|()| remove_files(remains, &mut report)) {
        Ok(()) => {}
        Err(error) => report.errors.push(error),
    }
    report
}

/// Whether there is anything to clean.
///
/// # Errors
/// As those of [`clean_mesh`]: it cannot be seen, or the paths are refused.
pub fn leftovers(remains: &Remains) -> Result<bool, Error> {
    check(remains)?;
    Ok(!cgroups(remains)?.is_empty()
        || !mounted_below(remains)?.is_empty()
        || exists(&remains.run_dir))
}

fn check(remains: &Remains) -> Result<(), Error> {
    let refuse = |path: &Path, reason| {
        Err(Error::Refused {
            path: path.into(),
            reason,
        })
    };
    for path in [&remains.run_dir, &remains.cgroup] {
        let mut components = path.components();
        if components.next() != Some(Component::RootDir)
            || !components.all(|component| matches!(component, Component::Normal(_)))
        {
            return refuse(path, "the path must be absolute and without `..`");
        }
    }
    // `/`, a folder of `/`, or a link to one is never a mesh's.
    if remains.run_dir.components().count() < 3 {
        return refuse(&remains.run_dir, "a mesh's folder lies deeper than that");
    }
    if fs::canonicalize(&remains.run_dir).is_ok_and(|real| real != remains.run_dir) {
        return refuse(&remains.run_dir, "the path leads through a symbolic link");
    }
    let cgroup_name = remains.cgroup.file_name().and_then(|name| name.to_str());
    if !cgroup_name
        .is_some_and(|name| name.len() > CGROUP_PREFIX.len() && name.starts_with(CGROUP_PREFIX))
    {
        return refuse(&remains.cgroup, "a mesh's cgroup is named heddle.MESH");
    }
    if exists(&remains.cgroup) && !exists(&remains.cgroup.join("cgroup.procs")) {
        return refuse(&remains.cgroup, "this folder is no cgroup");
    }
    if is_mine(&remains.cgroup)? {
        return refuse(
            &remains.cgroup,
            "this very process runs in it; run the command outside of the mesh",
        );
    }
    Ok(())
}

/// Whether the calling process is in the cgroup, by the cgroup's name in the process's path.
fn is_mine(cgroup: &Path) -> Result<bool, Error> {
    let path = Path::new("/proc/self/cgroup");
    let text = fs::read_to_string(path).map_err(|source| failed("read", path, source))?;
    let name = cgroup.file_name();
    Ok(text
        .lines()
        .filter_map(|line| line.strip_prefix("0::"))
        .flat_map(|path| Path::new(path).components())
        .any(|component| Some(component.as_os_str()) == name))
}

/// The topmost folders, v2 first, that are there.
fn cgroups(remains: &Remains) -> Result<Vec<PathBuf>, Error> {
    let mounted = list_mounts()?;
    let relative = mounted
        .iter()
        .filter(|mount| mount.filesystem == "cgroup2")
        .find_map(|mount| remains.cgroup.strip_prefix(&mount.target).ok());
    let v1 = mounted
        .iter()
        .filter(|mount| mount.filesystem == "cgroup")
        .filter_map(|mount| Some(mount.target.join(relative?)));
    // A hierarchy that is mounted twice, or seen through a link, is met once.
    let mut seen = BTreeSet::new();
    Ok(std::iter::once(remains.cgroup.clone())
        .chain(v1)
        .filter(|path| exists(path) && seen.insert(path.clone()))
        .collect())
}

fn remove_cgroups(remains: &Remains, report: &mut Report) -> Result<(), Error> {
    let found = cgroups(remains)?;
    report.killed = processes_below(&remains.cgroup);
    let mut result = Ok(());
    for path in found {
        match remove_cgroup(&path, path == remains.cgroup) {
            Ok(()) => report.cgroups.push(path),
            Err(error) => result = Err(error.into()),
        }
    }
    result
}

fn remove_cgroup(path: &Path, is_v2: bool) -> Result<(), cgroup::Error> {
    let mut result = Ok(());
    for _ in 0..TRIES {
        // Whoever is in a v1 folder is in the v2 one too, and dead by now.
        result = if is_v2 {
            kill_and_remove(path)
        } else {
            cgroup::remove_tree(path)
        };
        if result.is_ok() || !exists(path) {
            return Ok(());
        }
    }
    result
}

fn kill_and_remove(path: &Path) -> Result<(), cgroup::Error> {
    let cgroup = Cgroup::open(path)?;
    cgroup.kill()?;
    cgroup.wait_empty(KILL_PATIENCE)?;
    cgroup.remove_tree()
}

fn processes_below(path: &Path) -> usize {
    let here = fs::read_to_string(path.join("cgroup.procs")).map_or(0, |text| text.lines().count());
    let below: usize = fs::read_dir(path)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| processes_below(&entry.path()))
        .sum();
    here + below
}

/// What is mounted on the run folder and below it; the latest first, so that whatever is mounted on top of
/// another comes before it.
fn mounted_below(remains: &Remains) -> Result<Vec<PathBuf>, Error> {
    let targets = list_mounts()?.into_iter().map(|mount| mount.target);
    let mut found: Vec<_> = targets
        .filter(|target| target.starts_with(&remains.run_dir))
        .collect();
    found.reverse();
    found.sort_by_key(|target| std::cmp::Reverse(target.components().count()));
    Ok(found)
}

fn unmount(remains: &Remains, report: &mut Report) -> Result<(), Error> {
    let mut last_error = None;
    for target in mounted_below(remains)? {
        // Lazily: a busy mount is gone from the tree at once, and from the kernel with its last user.
        match umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => report.unmounted.push(target),
            Err(errno) => last_error = Some(errno),
        }
    }
    // One that went away by itself, with the mount below it, was no failure: what counts is what is left.
    match (mounted_below(remains)?.pop(), last_error) {
        (None, _) => Ok(()),
        (Some(path), errno) => Err(Error::Unmount {
            path,
            source: errno.unwrap_or(nix::Error::EBUSY).into(),
        }),
    }
}

fn remove_files(remains: &Remains, report: &mut Report) -> Result<(), Error> {
    match fs::remove_dir_all(&remains.run_dir) {
        Ok(()) => {
            report.files = true;
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(failed("remove", &remains.run_dir, source)),
    }
}

fn list_mounts() -> Result<Vec<mounts::Mount>, Error> {
    mounts::list().map_err(|source| failed("read", Path::new("/proc/self/mountinfo"), source))
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> Error {
    Error::Io {
        what,
        path: path.into(),
        source,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{os::unix::process::ExitStatusExt, process::Command};

    use linux::place::Placement;
    use nix::mount::{MsFlags, mount};

    use super::*;

    /// A mesh of the test's own; nothing of it exists yet.
    pub(crate) fn remains(name: &str) -> Remains {
        let name = format!("test-{name}-{}", std::process::id());
        let temporary = fs::canonicalize(std::env::temp_dir()).unwrap();
        Remains {
            run_dir: temporary.join(format!("heddle-{name}")),
            cgroup: cgroup::find_mount()
                .unwrap()
                .unwrap()
                .join(format!("heddle.{name}")),
        }
    }

    fn put(what: &str, target: &Path) {
        fs::create_dir_all(target).unwrap();
        mount(
            Some("none"),
            target,
            Some(what),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
    }

    #[test]
    fn a_whole_mesh_goes_and_what_was_bound_into_it_stays() {
        let remains = remains("whole");
        let run_dir = &remains.run_dir;
        let outside = run_dir.with_extension("outside");
        fs::create_dir_all(&outside).unwrap();
        fs::write(outside.join("precious"), "kept").unwrap();

        fs::create_dir_all(run_dir.join("nodes/a")).unwrap();
        fs::write(run_dir.join("lock"), "").unwrap();
        put("bpf", &run_dir.join("bpf"));
        put("tmpfs", &run_dir.join("w"));
        put("tmpfs", &run_dir.join("w/inner"));
        put("tmpfs", &run_dir.join("w/inner"));
        fs::create_dir_all(run_dir.join("bound")).unwrap();
        mount(
            Some(&outside),
            &run_dir.join("bound"),
            None::<&str>,
            MsFlags::MS_BIND,
            None::<&str>,
        )
        .unwrap();
        std::os::unix::fs::symlink(&outside, run_dir.join("link")).unwrap();
        let busy = fs::File::create(run_dir.join("w/inner/busy")).unwrap();

        let leaf = Cgroup::create(remains.cgroup.join("node/w/a/app")).unwrap();
        let mut command = Command::new("sleep");
        command.arg("60");
        Placement::new()
            .cgroup(leaf.path())
            .unwrap()
            .apply(&mut command);
        let mut child = command.spawn().unwrap();
        let v1_folders: Vec<_> = mounts::list()
            .unwrap()
            .into_iter()
            .filter(|mount| mount.filesystem == "cgroup" && mount.super_options.contains("memory"))
            .map(|mount| mount.target.join(remains.cgroup.file_name().unwrap()))
            .collect();
        for folder in &v1_folders {
            fs::create_dir_all(folder.join("node")).unwrap();
        }

        assert!(leftovers(&remains).unwrap());
        let report = clean_mesh(&remains);
        assert!(report.errors.is_empty(), "{report:?}");
        assert_eq!(report.killed, 1);
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        assert_eq!(report.unmounted.len(), 5, "{report:?}");
        assert_eq!(report.cgroups.len(), 1 + v1_folders.len());
        for gone in v1_folders.iter().chain([run_dir, &remains.cgroup]) {
            assert!(!exists(gone), "{}", gone.display());
        }
        assert_eq!(fs::read(outside.join("precious")).unwrap(), b"kept");
        drop(busy);
        fs::remove_dir_all(outside).unwrap();

        assert!(!leftovers(&remains).unwrap());
        assert!(clean_mesh(&remains).is_empty());
    }

    #[test]
    fn a_run_folder_that_is_a_mount_itself_goes() {
        let remains = remains("mounted");
        put("tmpfs", &remains.run_dir);
        fs::write(remains.run_dir.join("up.json"), "{}").unwrap();
        let report = clean_mesh(&remains);
        assert!(report.errors.is_empty(), "{report:?}");
        assert_eq!(report.unmounted, [remains.run_dir.as_path()]);
        assert!(!exists(&remains.run_dir));
    }

    #[test]
    fn paths_that_are_not_of_a_mesh_are_refused() {
        let good = remains("refused");
        let link = good.run_dir.with_extension("link");
        std::os::unix::fs::symlink("/etc", &link).unwrap();
        let bad_run_dirs = ["/", "/run", "run/heddle/x", "/run/heddle/../x"];
        for run_dir in bad_run_dirs.iter().map(Path::new).chain([link.as_path()]) {
            let remains = Remains {
                run_dir: run_dir.into(),
                ..good.clone()
            };
            let report = clean_mesh(&remains);
            assert!(
                matches!(report.errors[..], [Error::Refused { .. }]),
                "{report:?}"
            );
            assert!(leftovers(&remains).is_err());
        }
        fs::remove_file(link).unwrap();
        let mount = good.cgroup.parent().unwrap();
        for cgroup in [
            mount.to_path_buf(),
            mount.join("user.slice"),
            mount.join("heddle."),
        ] {
            let remains = Remains {
                cgroup,
                ..good.clone()
            };
            assert!(matches!(leftovers(&remains), Err(Error::Refused { .. })));
        }
    }
}
