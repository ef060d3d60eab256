//! A network namespace of the benchmark's own, held by a descriptor: it goes away with the program.

use std::{fs::File, thread};

use anyhow::Context;
use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace.
#[derive(Debug)]
pub(super) struct Namespace {
    pub(super) file: File,
}

impl Namespace {
    /// Makes a new one. Its loopback is down.
    pub(super) fn create() -> anyhow::Result<Self> {
        let file = on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
            File::open("/proc/thread-self/ns/net").context("cannot open the new network namespace")
        })?;
        Ok(Self { file })
    }

    /// Runs `body` on a thread that is in the namespace. Sockets and processes made there stay there.
    pub(super) fn run<T: Send>(
        &self,
        body: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        on_a_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).context("cannot enter a namespace")?;
            body()
        })
    }
}

/// Namespaces are entered by threads that end right after, so that no other work lands there.
fn on_a_thread<T: Send>(body: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    thread::scope(|scope| match scope.spawn(body).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
