//! What a mesh may leave on the machine, and must not: its folder, its cgroups, mounts, processes.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use linux::{cgroup, mounts};

/// Folder of sockets, logs and mounts of a mesh.
pub(crate) fn run_dir(mesh: &str) -> PathBuf {
    Path::new("/run/heddle").join(mesh)
}

/// A mesh's cgroup.
pub(crate) fn cgroup_of(mesh: &str) -> PathBuf {
    let mount = cgroup::find_mount().unwrap().expect("cgroup2 is mounted");
    mount.join(format!("heddle.{mesh}"))
}

/// Everything that is there, one line each.
pub(crate) fn of(mesh: &str) -> Vec<String> {
    let run_dir = run_dir(mesh);
    let mut left = Vec::new();
    let paths = [
        run_dir.clone(),
        run_dir.with_extension("lock"),
        run_dir.with_extension("log"),
    ];
    for path in paths.iter().chain(&cgroups(mesh)) {
        if path.exists() {
            left.push(format!("file {}", path.display()));
        }
    }
    for mount in mounts::list().unwrap() {
        if mount.target.starts_with(&run_dir) {
            left.push(format!("mount {}", mount.target.display()));
        }
    }
    for (pid, command) in processes_of(mesh) {
        left.push(format!("process {pid}: {command}"));
    }
    left
}

/// Every process in a cgroup and below it.
pub(crate) fn processes_below(cgroup: &Path) -> BTreeSet<u32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let mut all: BTreeSet<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(processes_below(&entry.path()));
        }
    }
    all
}

/// Processes on whose command line the mesh's name stands: Heddle's own.
pub(crate) fn processes_of(mesh: &str) -> Vec<(u32, String)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let command = fs::read(entry.path().join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            command.contains(mesh).then_some((pid, command))
        })
        .collect()
}

/// The mesh's folders in cgroup v2 and in all v1 hierarchies.
fn cgroups(mesh: &str) -> Vec<PathBuf> {
    let name = format!("heddle.{mesh}");
    mounts::list()
        .unwrap()
        .into_iter()
        .filter(|mount| mount.filesystem.starts_with("cgroup"))
        .map(|mount| mount.target.join(&name))
        .collect()
}
