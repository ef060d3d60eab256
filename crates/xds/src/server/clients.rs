//! Acknowledgements on record: what every connected client has, for "live on 2 of 2 nodes".
//!
//! Streams write here after each step; nothing is decided from it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;
use tokio::sync::watch;

/// One connected client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClientState {
    /// `NODE_NAME` of the client's metadata, else its node id.
    pub node: String,
    /// The xDS node id.
    pub node_id: String,
    /// What it has of every type that it subscribed to.
    pub types: Vec<ClientTypeState>,
}

/// What one client has of one type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ClientTypeState {
    /// The type.
    pub type_url: String,
    /// The client has answered everything up to this generation of the cache.
    pub generation: u64,
    /// `system_version_info` of the last response that it accepted; empty before.
    pub accepted_version: String,
    /// Nonce of the last response that it accepted; empty before.
    pub accepted_nonce: String,
    /// Number of resources that it holds.
    pub held: usize,
    /// Resources that it was sent and rejected, at most 100, in name order.
    pub rejected: Vec<String>,
    /// What it said of the last response that it rejected, until a later one is accepted.
    pub last_error: Option<String>,
    /// A response waits for its answer.
    pub in_flight: bool,
}

impl ClientState {
    /// Whether the client has accepted everything of `type_url` up to `generation`.
    #[must_use]
    pub fn has(&self, type_url: &str, generation: u64) -> bool {
        self.types
            .iter()
            .any(|state| state.type_url == type_url && state.generation >= generation)
    }
}

/// All connected clients. Clones share one state.
#[derive(Debug, Clone)]
pub(crate) struct Clients {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    by_stream: Mutex<BTreeMap<u64, ClientState>>,
    changes: watch::Sender<u64>,
}

/// One client's place in the record; it is forgotten when this is dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    clients: Clients,
    stream: u64,
}

impl Default for Clients {
    fn default() -> Self {
        Self {
            shared: Arc::new(Shared {
                by_stream: Mutex::default(),
                changes: watch::Sender::new(0),
            }),
        }
    }
}

impl Clients {
    pub(crate) fn register(&self, stream: u64, state: ClientState) -> Registration {
        self.lock().insert(stream, state);
        self.notify();
        Registration {
            clients: self.clone(),
            stream,
        }
    }

    pub(crate) fn list(&self) -> Vec<ClientState> {
        self.lock().values().cloned().collect()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    fn notify(&self) {
        self.shared.changes.send_modify(|changes| *changes += 1);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, ClientState>> {
        // Entries are replaced whole, so a panic elsewhere leaves nothing half written.
        self.shared
            .by_stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registration {
    pub(crate) fn node(&self) -> String {
        self.clients
            .lock()
            .get(&self.stream)
            .map(|state| state.node.clone())
            .unwrap_or_default()
    }

    pub(crate) fn update(&self, types: Vec<ClientTypeState>) {
        let changed = match self.clients.lock().get_mut(&self.stream) {
            Some(state) if state.types != types => {
                state.types = types;
                true
            }
            _ => false,
        };
        if changed {
            self.clients.notify();
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.clients.lock().remove(&self.stream);
        self.clients.notify();
    }
}
