//! The machine's resolver, for names outside the mesh.
//!
//! The agent lives in a node's network namespace, from which the machine's resolver cannot be reached. So
//! queries are forwarded by a thread of its own in another namespace, over a bounded channel.
//! How one query is asked is in [`exchange`], which servers there are in [`config`].

mod config;
mod exchange;

use std::{
    io,
    sync::{Arc, mpsc as startup},
    thread,
};

use tokio::{
    runtime,
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Instant, timeout_at},
};

pub use config::{Nameserver, NameserverError, UpstreamConfig};

use super::{DnsError, message::Transport};

/// Queries under way. Each has a socket per server that has not answered yet: this bounds descriptors.
const MAX_IN_FLIGHT: usize = 256;
/// Queries waiting to be under way; one more is answered with SERVFAIL at once.
const MAX_WAITING: usize = 1024;

/// Forwards queries to the machine's resolver. A clone is another handle on the same thread, which ends with the last.
#[derive(Debug, Clone)]
pub struct Upstream {
    queries: mpsc::Sender<Forward>,
}

#[derive(Debug)]
struct Forward {
    query: Vec<u8>,
    transport: Transport,
    received: Instant,
    answer: oneshot::Sender<Vec<u8>>,
}

impl Upstream {
    /// Starts the thread. `enter` runs on it first, to move it into the network namespace from which the
    /// servers can be reached. Waits until that is done.
    ///
    /// # Errors
    /// [`DnsError::Upstream`] if the thread cannot start or `enter` fails.
    pub fn start(
        config: UpstreamConfig,
        enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> Result<Self, DnsError> {
        let failed = |source| DnsError::Upstream { source };
        let (queries, receiver) = mpsc::channel(MAX_WAITING);
        let (started, outcome) = startup::channel();
        let run = move || {
            let runtime =
                enter().and_then(|()| runtime::Builder::new_current_thread().enable_all().build());
            // Sending fails only if the starter is gone, and with it whom to tell.
            match runtime {
                Ok(runtime) => {
                    let _ = started.send(Ok(()));
                    runtime.block_on(forward_all(receiver, config));
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                }
            }
        };
        let thread = thread::Builder::new().name("dns-upstream".into());
        thread.spawn(run).map_err(failed)?;
        outcome
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("the thread panicked as it started")))
            .map_err(failed)?;
        Ok(Self { queries })
    }

    /// The resolver's answer to `query`, with the query's id; `None` if there is none in time or too many
    /// queries wait already. `query` must be well-formed and have one question.
    pub(super) async fn ask(&self, query: Vec<u8>, transport: Transport) -> Option<Vec<u8>> {
        let (answer, answered) = oneshot::channel();
        let forward = Forward {
            query,
            transport,
            received: Instant::now(),
            answer,
        };
        self.queries.try_send(forward).ok()?;
        answered.await.ok()
    }
}

async fn forward_all(mut queries: mpsc::Receiver<Forward>, config: UpstreamConfig) {
    let config = Arc::new(config);
    let mut in_flight = JoinSet::new();
    while let Some(forward) = queries.recv().await {
        in_flight.spawn(forward_one(forward, Arc::clone(&config)));
        while in_flight.try_join_next().is_some() {}
        if in_flight.len() >= MAX_IN_FLIGHT {
            in_flight.join_next().await;
        }
    }
}

async fn forward_one(mut forward: Forward, config: Arc<UpstreamConfig>) {
    let exchange = exchange::ask(&config, &forward.query, forward.transport);
    tokio::select! {
        answer = timeout_at(forward.received + config.deadline, exchange) => {
            if let Ok(Some(answer)) = answer {
                // Sending fails only if the asker is gone.
                let _ = forward.answer.send(answer);
            }
        }
        () = forward.answer.closed() => {}
    }
}

#[cfg(test)]
mod tests;
