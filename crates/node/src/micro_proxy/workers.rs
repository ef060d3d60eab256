//! The threads that carry bytes: one per core, each with a runtime of its own. A connection stays on the worker that
//! accepted it, and so does the tunnel that it goes through.

use std::{future::Future, io, num::NonZero, thread};

use linux::netns::Netns;
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// More would only share the cores with the workloads.
const MOST: usize = 16;

/// All workers. They end when this is dropped, with all that they carry.
#[derive(Debug)]
pub(crate) struct Workers {
    handles: Vec<Handle>,
    /// The network namespace that their threads are in.
    home: Netns,
    stop: CancellationToken,
}

impl Workers {
    /// As many as this process may use cores.
    pub(crate) fn start() -> io::Result<Self> {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let stop = CancellationToken::new();
        let mut handles = Vec::new();
        for index in 0..cores.min(MOST) {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            handles.push(runtime.handle().clone());
            let stopped = stop.clone();
            thread::Builder::new()
                .name(format!("worker-{index}"))
                .spawn(move || runtime.block_on(stopped.cancelled()))?;
        }
        Ok(Self {
            handles,
            home: Netns::current()?,
            stop,
        })
    }

    pub(crate) fn count(&self) -> usize {
        self.handles.len()
    }

    /// The namespace that a worker's thread is in, to come back to.
    pub(crate) fn home(&self) -> &Netns {
        &self.home
    }

    /// Runs something on a worker; numbers beyond the last begin anew.
    pub(crate) fn spawn(&self, index: usize, work: impl Future<Output = ()> + Send + 'static) {
        if let Some(handle) = self.handles.get(index % self.handles.len()) {
            handle.spawn(work);
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
