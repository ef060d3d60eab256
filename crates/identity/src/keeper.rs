//! The agent's keeper of certificates: fetches those of the identities that run on its node, renews them, and hands them out.
//!
//! Keys are made here and leave the process only into the state folder, from which a restarted agent goes on while the
//! authority is away. The node's own identity is obtained with a join token once; with it the keeper asks for all others.
//!
//! ```text
//! node      ──── join token, then mTLS ────┐
//! identities ── one task each, renewed ────┼── client ── authority (control)
//! bundle    ──── stream, tried again ──────┘
//! ```
//! - `client`: calls to the authority over TLS
//! - `node`: the node's own certificate, and the connection that is made with it
//! - `renewal`: the life of one identity's certificate
//! - `roots`: the trust bundle as it changes
//! - `schedule`: when to renew, when to try again
//! - `state`: what is kept in the folder
//! - `status`: what `heddle certs` shows

mod client;
mod node;
mod renewal;
mod roots;
mod schedule;
mod state;
mod status;

use std::{
    collections::{BTreeSet, HashMap},
    fmt, io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use api::report::Certificate;
use futures::future::BoxFuture;
use linux::netns::Netns;
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;

use self::{client::Failure, renewal::Health, state::State};
use crate::{
    IdentitySource, JwtError, SpiffeId, Svid, TrustBundle, certificate,
    certificate::CertificateError, spiffe::SpiffeError,
};

/// Identities on one node.
const MAX_IDENTITIES: usize = 4096;
/// Certificates that are asked for at a time.
const FETCHES_AT_A_TIME: usize = 8;
/// A token that takes longer to mint is of no use to who waits for it.
const JWT_PATIENCE: Duration = Duration::from_secs(5);

/// Gets a join token from whoever started the agent; an error is a text for the operator.
pub type JoinToken = Arc<dyn Fn() -> BoxFuture<'static, Result<String, String>> + Send + Sync>;

/// What a keeper is started with.
#[derive(Clone)]
pub struct KeeperConfig {
    /// The mesh's trust domain.
    pub trust_domain: String,
    /// Name of this node.
    pub node: String,
    /// The authority.
    pub control: SocketAddr,
    /// The namespace to connect to it from; `None` for this process's own.
    pub netns: Option<Netns>,
    /// Roots (PEM) to trust until the authority says which: from who started the agent.
    pub roots: String,
    /// The folder for keys and certificates. Made with mode 0700 if it is not there.
    pub state_dir: PathBuf,
    /// Asked when there is no node certificate, or it has expired.
    pub join_token: JoinToken,
    /// Lifetime to ask for; `None` leaves it to the authority.
    pub lifetime: Option<Duration>,
}

/// Why a keeper does not start, or does not take an identity.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The names do not make an id.
    #[error(transparent)]
    Name(#[from] SpiffeError),
    /// The roots to begin with are none.
    #[error("the roots to trust first are of no use: {0}")]
    Roots(#[from] CertificateError),
    /// The folder cannot be used.
    #[error("certificates cannot be kept in {}: {source}", path.display())]
    State {
        /// The folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Not an identity of a workload of this mesh.
    #[error("`{0}` is no workload's identity in this trust domain")]
    NotAWorkload(SpiffeId),
    /// Too many.
    #[error("no more than {MAX_IDENTITIES} identities on one node")]
    TooMany,
}

/// The running keeper. Clones share it; its tasks end when the last one is dropped.
#[derive(Clone)]
pub struct Keeper {
    shared: Arc<Shared>,
    /// Ends the tasks, which hold `shared` themselves.
    _stop: Arc<StopOnDrop>,
}

struct StopOnDrop(CancellationToken);

struct Shared {
    config: KeeperConfig,
    id: SpiffeId,
    state: State,
    bundle: watch::Sender<Arc<TrustBundle>>,
    node: watch::Sender<Option<Arc<Svid>>>,
    node_health: Mutex<Health>,
    /// The connection that is made with the newest node certificate.
    channel: watch::Sender<Option<client::Client>>,
    /// Counts how often the authority was reached again: who waits to try again tries then.
    reached: watch::Sender<u64>,
    /// The authority does not take the node's certificate, however good it looks here.
    rejected: Notify,
    fetches: Semaphore,
    entries: Mutex<HashMap<SpiffeId, Entry>>,
    /// Where who asks for an identity of another node waits, for ever.
    nobody: watch::Sender<Option<Arc<Svid>>>,
    stop: CancellationToken,
}

struct Entry {
    users: BTreeSet<String>,
    svid: watch::Sender<Option<Arc<Svid>>>,
    health: Arc<Mutex<Health>>,
    stop: CancellationToken,
}

impl Keeper {
    /// Begins with what the state folder holds, and goes on from there in the background. Needs a tokio runtime.
    ///
    /// # Errors
    /// Names or roots that are none; a folder that cannot be used. An authority that is away is no error.
    pub fn start(config: KeeperConfig) -> Result<Self, KeeperError> {
        let id = SpiffeId::of_node(&config.trust_domain, &config.node)?;
        let first = certificate::from_pem(&config.roots)?;
        let state = State::open(&config.state_dir).map_err(|source| KeeperError::State {
            path: config.state_dir.clone(),
            source,
        })?;
        let bundle = state.load_bundle(&config.trust_domain, first);
        if bundle.roots.is_empty() {
            return Err(CertificateError::Missing.into());
        }
        let now = SystemTime::now();
        let node = state.load_svid(&id, &bundle.roots, now);
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            id,
            state,
            bundle: watch::Sender::new(Arc::new(bundle)),
            node: watch::Sender::new(node.map(Arc::new)),
            node_health: Mutex::default(),
            channel: watch::Sender::new(None),
            reached: watch::Sender::new(0),
            rejected: Notify::new(),
            fetches: Semaphore::new(FETCHES_AT_A_TIME),
            entries: Mutex::default(),
            nobody: watch::Sender::new(None),
            stop: stop.clone(),
            config,
        });
        for task in [
            tokio::spawn(node::keep(Arc::clone(&shared))),
            tokio::spawn(node::connect(Arc::clone(&shared))),
            tokio::spawn(roots::follow(Arc::clone(&shared))),
        ] {
            // Each ends by `stop`.
            drop(task);
        }
        Ok(Self {
            shared,
            _stop: Arc::new(StopOnDrop(stop)),
        })
    }

    /// `who` needs this identity: its certificate is fetched now, and renewed until everybody has released it. The answer is
    /// what [`IdentitySource::svid`] gives from now on. Saying it twice is saying it once.
    ///
    /// # Errors
    /// It is not the id of a workload of this trust domain; there are too many.
    pub fn want(
        &self,
        id: &SpiffeId,
        who: &str,
    ) -> Result<watch::Receiver<Option<Arc<Svid>>>, KeeperError> {
        if id.trust_domain() != self.shared.config.trust_domain || id.account().is_none() {
            return Err(KeeperError::NotAWorkload(id.clone()));
        }
        let mut entries = self.shared.entries();
        if let Some(entry) = entries.get_mut(id) {
            entry.users.insert(who.to_owned());
            return Ok(entry.svid.subscribe());
        }
        if entries.len() >= MAX_IDENTITIES {
            return Err(KeeperError::TooMany);
        }
        let roots = self.shared.bundle.borrow().roots.clone();
        let kept = self.shared.state.load_svid(id, &roots, SystemTime::now());
        let entry = Entry {
            users: BTreeSet::from([who.to_owned()]),
            svid: watch::Sender::new(kept.map(Arc::new)),
            health: Arc::default(),
            stop: self.shared.stop.child_token(),
        };
        let receiver = entry.svid.subscribe();
        tokio::spawn(renewal::keep(
            Arc::clone(&self.shared),
            id.clone(),
            entry.svid.clone(),
            Arc::clone(&entry.health),
            entry.stop.clone(),
        ));
        entries.insert(id.clone(), entry);
        Ok(receiver)
    }

    /// `who` is gone. When nobody needs the identity any more, its key is forgotten and its watchers see `None`.
    pub fn release(&self, id: &SpiffeId, who: &str) {
        let mut entries = self.shared.entries();
        let Some(entry) = entries.get_mut(id) else {
            return;
        };
        entry.users.remove(who);
        if !entry.users.is_empty() {
            return;
        }
        entry.stop.cancel();
        entry.svid.send_replace(None);
        entries.remove(id);
        self.shared.state.remove_svid(id);
    }

    /// The node's own certificate.
    #[must_use]
    pub fn node_svid(&self) -> watch::Receiver<Option<Arc<Svid>>> {
        self.shared.node.subscribe()
    }

    /// Every identity, the node's first, then by name.
    #[must_use]
    pub fn status(&self) -> Vec<Certificate> {
        let now = SystemTime::now();
        let entries = self.shared.entries();
        let told = entries.iter().map(|(id, entry)| {
            let svid = entry.svid.borrow().clone();
            status::certificate(id, svid.as_deref(), &lock(&entry.health), &entry.users, now)
        });
        let mut all: Vec<Certificate> = told.collect();
        drop(entries);
        all.sort_by(|one, other| one.identity.cmp(&other.identity));
        let svid = self.shared.node.borrow().clone();
        let health = lock(&self.shared.node_health);
        let of_node = status::certificate(
            &self.shared.id,
            svid.as_deref(),
            &health,
            &BTreeSet::new(),
            now,
        );
        all.insert(0, of_node);
        all
    }
}

impl IdentitySource for Keeper {
    /// Only for identities that are wanted ([`Keeper::want`]); for others it stays `None`.
    fn svid(&self, id: &SpiffeId) -> watch::Receiver<Option<Arc<Svid>>> {
        match self.shared.entries().get(id) {
            Some(entry) => entry.svid.subscribe(),
            None => self.shared.nobody.subscribe(),
        }
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.shared.bundle.subscribe()
    }

    async fn jwt(&self, id: &SpiffeId, audience: &[String]) -> Result<String, JwtError> {
        if !self.shared.entries().contains_key(id) {
            let refusal = format!("`{id}` does not run on this node");
            return Err(JwtError::Refused(refusal));
        }
        let unavailable = || JwtError::Unavailable("there is no connection yet".into());
        let client = self.shared.channel.borrow().clone();
        let client = client.ok_or_else(unavailable)?;
        match tokio::time::timeout(JWT_PATIENCE, client.mint_jwt(id, audience)).await {
            Ok(Ok(token)) => Ok(token),
            Ok(Err(failure @ Failure::Refused(_))) => Err(JwtError::Refused(failure.to_string())),
            Ok(Err(failure)) => Err(JwtError::Unavailable(failure.to_string())),
            Err(_) => Err(JwtError::Unavailable(format!(
                "no answer within {JWT_PATIENCE:?}"
            ))),
        }
    }
}

impl Shared {
    fn entries(&self) -> MutexGuard<'_, HashMap<SpiffeId, Entry>> {
        lock(&self.entries)
    }
}

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl fmt::Debug for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keeper")
            .field("id", &self.shared.id)
            .field("control", &self.shared.config.control)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for KeeperConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeeperConfig")
            .field("node", &self.node)
            .field("control", &self.control)
            .field("state_dir", &self.state_dir)
            .finish_non_exhaustive()
    }
}

/// What is behind these locks is whole after every statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
