//! What a workload proves itself with, and checks others against, ready for TLS: made anew whenever its certificate or
//! the trust bundle changes. Whoever opens or accepts a tunnel takes what is there at that moment.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use identity::{IdentitySource, SpiffeId, Svid, TrustBundle, spiffe::SpiffeError};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tunnel::{ClientTls, ServerTls, TlsError, tls};

/// Settings kept per identity of the other end. Beyond it they are all made anew.
const MAX_PEERS: usize = 1024;

/// A workload's credentials.
#[derive(Debug)]
pub(crate) struct Credentials {
    svid: Arc<Svid>,
    bundle: Arc<TrustBundle>,
    /// For tunnels from other nodes.
    pub(crate) server: ServerTls,
    generation: u32,
    peers: Mutex<HashMap<String, Towards>>,
}

/// For tunnels to one identity.
#[derive(Debug, Clone)]
pub(crate) struct Towards {
    pub(crate) expected: Arc<[SpiffeId]>,
    pub(crate) tls: ClientTls,
}

/// Credentials that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CredentialsError {
    #[error("the server's identity is none: {0}")]
    Identity(#[from] SpiffeError),
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl Credentials {
    fn new(svid: Arc<Svid>, bundle: Arc<TrustBundle>, generation: u32) -> Result<Self, TlsError> {
        Ok(Self {
            server: tls::server_config(&svid, &bundle.roots, &bundle.trust_domain)?,
            svid,
            bundle,
            generation,
            peers: Mutex::default(),
        })
    }

    /// What tells the workload's pooled connections under these credentials from others'.
    pub(crate) fn source(&self, workload: u32) -> u64 {
        u64::from(workload) << 32 | u64::from(self.generation)
    }

    /// Settings to open a tunnel to an identity with.
    pub(crate) fn towards(&self, identity: &str) -> Result<Towards, CredentialsError> {
        // Nothing that holds the lock can panic half-way through a change.
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = peers.get(identity) {
            return Ok(known.clone());
        }
        let id: SpiffeId = identity.parse()?;
        let expected: Arc<[SpiffeId]> = Arc::new([id]);
        let made = Towards {
            tls: tls::client_config(&self.svid, &self.bundle.roots, Arc::clone(&expected))?,
            expected,
        };
        if peers.len() >= MAX_PEERS {
            peers.clear();
        }
        peers.insert(identity.to_owned(), made.clone());
        Ok(made)
    }
}

/// Follows an identity's certificate and the trust bundle until `stop`. Calls `replaced` with the number of credentials
/// that are no longer used.
pub(crate) fn follow(
    source: &impl IdentitySource,
    id: &SpiffeId,
    stop: CancellationToken,
    replaced: impl Fn(&Credentials) + Send + 'static,
) -> watch::Receiver<Option<Arc<Credentials>>> {
    let (mut svid, mut bundle) = (source.svid(id), source.bundle());
    let (sender, receiver) = watch::channel(None::<Arc<Credentials>>);
    let id = id.clone();
    tokio::spawn(async move {
        let mut generation = 0;
        loop {
            let (newest, roots) = (
                svid.borrow_and_update().clone(),
                bundle.borrow_and_update().clone(),
            );
            if let Some(newest) = newest.filter(|_| !roots.roots.is_empty()) {
                generation += 1;
                match Credentials::new(newest, roots, generation) {
                    Ok(made) => {
                        let before = sender.send_replace(Some(Arc::new(made)));
                        if let Some(before) = before {
                            replaced(&before);
                        }
                    }
                    // What there was goes on until it ends.
                    Err(error) => tracing::error!(%id, %error, "a new certificate cannot be used"),
                }
            }
            let gone = tokio::select! {
                changed = svid.changed() => changed.is_err(),
                changed = bundle.changed() => changed.is_err(),
                () = stop.cancelled() => true,
            };
            if gone {
                return;
            }
        }
    });
    receiver
}
