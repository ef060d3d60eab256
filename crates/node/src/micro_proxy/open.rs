//! The connections that the agent carries to one workload, so that a change of policy ends those that it forbids.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio_util::sync::CancellationToken;

use crate::policy::{self, Client, Judgement, Policies, Server};

/// Open connections, by number.
#[derive(Debug, Default)]
pub(crate) struct OpenConnections {
    next: AtomicU64,
    open: Mutex<HashMap<u64, Arc<OpenConnection>>>,
}

/// One of them, with what policy decides by.
#[derive(Debug)]
pub(crate) struct OpenConnection {
    client: Client,
    address: IpAddr,
    port: u16,
    /// Cancelled to end it.
    pub(crate) ended: CancellationToken,
    /// Why it was ended.
    cause: OnceLock<Judgement>,
}

/// Takes a connection off the list when it is dropped.
#[derive(Debug)]
pub(crate) struct Listed {
    number: u64,
    pub(crate) connection: Arc<OpenConnection>,
    list: Arc<OpenConnections>,
}

impl OpenConnections {
    /// Puts a connection on the list.
    pub(crate) fn add(self: &Arc<Self>, client: Client, address: IpAddr, port: u16) -> Listed {
        let connection = Arc::new(OpenConnection {
            client,
            address,
            port,
            ended: CancellationToken::new(),
            cause: OnceLock::new(),
        });
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(number, Arc::clone(&connection));
        Listed {
            number,
            connection,
            list: Arc::clone(self),
        }
    }

    /// Ends what these policies do not allow.
    pub(crate) fn judge(&self, policies: &Policies) {
        let all: Vec<Arc<OpenConnection>> = self.lock().values().cloned().collect();
        for connection in all {
            let judgement = connection.judge(policies);
            if !judgement.allowed && connection.cause.set(judgement).is_ok() {
                connection.ended.cancel();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<OpenConnection>>> {
        // A map of whole entries is never half changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OpenConnection {
    /// What policies say of it.
    pub(crate) fn judge(&self, policies: &Policies) -> Judgement {
        let server = Server {
            address: Some(self.address),
            port: Some(self.port),
        };
        policy::judge(policies, &self.client, server)
    }

    /// Why policy ended it, if it did.
    pub(crate) fn cause(&self) -> Option<&Judgement> {
        self.cause.get()
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.list.lock().remove(&self.number);
    }
}
