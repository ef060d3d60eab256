//! Keeps this process on one CPU: where the scheduler puts the two ends of a ping-pong moves its
//! latency far more than what is being measured.

use anyhow::Context;
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};

/// Pins the process to `cpu` (modulo the number of CPUs). Threads started later inherit it.
pub(crate) fn pin(cpu: Option<usize>) -> anyhow::Result<()> {
    let Some(cpu) = cpu else { return Ok(()) };
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    let mut set = CpuSet::new();
    set.set(cpu % count)
        .with_context(|| format!("CPU {cpu} is out of range"))?;
    sched_setaffinity(Pid::from_raw(0), &set)
        .with_context(|| format!("cannot keep this process on CPU {}", cpu % count))
}
