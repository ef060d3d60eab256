//! What the agents of a mesh take: CPU time from their cgroups, memory from their processes.

use std::{fs, path::PathBuf};

use anyhow::Context;
use runtime::layout::Layout;
use serde::Serialize;

/// The agents of both nodes.
#[derive(Debug)]
pub(super) struct Agents {
    /// The client's first.
    cgroups: [PathBuf; 2],
}

/// Resident memory of the two agents in bytes, the client's first.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Resident {
    /// All pages, those of the program's own file included.
    pub(super) all: [u64; 2],
    /// What it has allocated.
    pub(super) anonymous: [u64; 2],
}

impl Agents {
    pub(super) fn of(mesh: &str, nodes: [&str; 2]) -> anyhow::Result<Self> {
        let layout = Layout::new(mesh)?;
        Ok(Self {
            cgroups: nodes.map(|node| layout.node_cgroup(node).join("agent")),
        })
    }

    /// CPU time of both in microseconds.
    pub(super) fn cpu(&self) -> anyhow::Result<u64> {
        let mut sum = 0;
        for cgroup in &self.cgroups {
            let stat = read(&cgroup.join("cpu.stat"))?;
            sum += field(&stat, "usage_usec").context("cpu.stat does not say usage_usec")?;
        }
        Ok(sum)
    }

    pub(super) fn memory(&self) -> anyhow::Result<Resident> {
        let mut resident = Resident::default();
        for (index, cgroup) in self.cgroups.iter().enumerate() {
            for pid in read(&cgroup.join("cgroup.procs"))?.lines() {
                let status = read(&PathBuf::from(format!("/proc/{pid}/status")))?;
                let kilobytes = |name| field(&status, name).context("a process without memory");
                resident.all[index] += kilobytes("VmRSS:")? * 1024;
                resident.anonymous[index] += kilobytes("RssAnon:")? * 1024;
            }
        }
        Ok(resident)
    }
}

fn read(path: &PathBuf) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The number behind a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_line() {
        let status = "Name:\theddle\nVmRSS:\t   10240 kB\nRssAnon:\t    4096 kB\n";
        assert_eq!(field(status, "VmRSS:"), Some(10_240));
        assert_eq!(
            field("usage_usec 77\nuser_usec 5\n", "usage_usec"),
            Some(77)
        );
        assert_eq!(field(status, "VmSwap:"), None);
    }
}
