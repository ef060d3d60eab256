//! The certificate authority as a service of the control plane: who may ask it, for what, how often.
//!
//! What is signed, and with which root, is `identity::authority`'s.
//!
//! - `service`: the gRPC calls
//! - `listener`, `peer`: TLS connections and who is at their other end
//! - `tokens`: how a node without a certificate comes to its first
//! - `placements`: which accounts run on which node
//! - `limits`, `counters`: how often, and how it went

mod counters;
mod limits;
mod listener;
mod peer;
mod placements;
mod service;
mod tokens;

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use identity::{
    SpiffeId,
    authority::{Authority, AuthorityConfig, AuthorityError, DEFAULT_LIFETIME, SignError},
    ca_api::SERVER_ACCOUNT,
};
use linux::netns::Netns;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub(crate) use self::placements::Placed;
pub use self::{
    counters::CaStatus,
    limits::CaLimits,
    placements::Placements,
    tokens::{JoinTokenError, JoinTokens, TOKEN_LIFETIME},
};
use self::{counters::Counters, limits::RateLimits, service::Service};

/// How often the authority looks whether a root is due.
const TICK: Duration = Duration::from_millis(500);

/// Settings of the certificate authority.
#[derive(Debug, Clone)]
pub struct CaConfig {
    /// Where its root is kept.
    pub state_dir: PathBuf,
    /// An operator's CA in place of one of our own.
    pub operator: Option<OperatorCa>,
    /// Lifetime of certificates.
    pub lifetime: Duration,
    /// After a new root is announced, the time until it signs.
    pub propagation: Duration,
    /// What it takes on.
    pub limits: CaLimits,
}

/// Files of an operator's CA, in PEM.
#[derive(Debug, Clone)]
pub struct OperatorCa {
    /// The certificate that signs, then its chain up to the root.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Why the authority does not start or listen.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The CA itself.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// An operator's file cannot be read.
    #[error("the CA's file {} cannot be read: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        reason: io::Error,
    },
    /// The CA is none that can be used.
    #[error("the CA in {}: {reason}", path.display())]
    Operator {
        /// The certificate's file.
        path: PathBuf,
        /// What is wrong.
        reason: AuthorityError,
    },
    /// The socket is refused.
    #[error("the certificate authority cannot listen on {address}: {reason}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The system's answer.
        reason: io::Error,
    },
    /// There is no certificate for the server itself.
    #[error("the certificate authority has no certificate for its own server: {0}")]
    Server(String),
}

/// The running authority. It ends when this is dropped.
pub struct CertificateAuthority {
    authority: Arc<Authority>,
    service: Service,
    tokens: Arc<JoinTokens>,
    counters: Arc<Counters>,
    id: SpiffeId,
    limits: CaLimits,
    stop: CancellationToken,
    tasks: Mutex<Vec<JoinHandle<()>>>,
}

impl CaConfig {
    /// The defaults: a root of our own, certificates for 24 hours.
    #[must_use]
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            state_dir,
            operator: None,
            lifetime: DEFAULT_LIFETIME,
            propagation: Duration::from_secs(10),
            limits: CaLimits::default(),
        }
    }
}

impl CertificateAuthority {
    /// Opens what the folder holds. Needs a tokio runtime; [`Self::listen_on`] makes it reachable.
    ///
    /// # Errors
    /// The folder or the operator's files cannot be used.
    pub fn open(
        config: &CaConfig,
        trust_domain: &str,
        placements: Arc<dyn Placements>,
    ) -> Result<Self, CaError> {
        let settings = AuthorityConfig {
            lifetime: config.lifetime,
            propagation: config.propagation,
            ..AuthorityConfig::new(trust_domain)
        };
        let authority = match &config.operator {
            Some(files) => {
                let (certificate, key) = (read(&files.certificate)?, read(&files.key)?);
                Authority::open(settings, &config.state_dir, Some((&certificate, &key))).map_err(
                    |reason| CaError::Operator {
                        path: files.certificate.clone(),
                        reason,
                    },
                )?
            }
            None => Authority::open(settings, &config.state_dir, None)?,
        };
        Self::start(authority, trust_domain, placements, config.limits.clone())
    }

    /// As [`Self::open`], around an authority that is there.
    ///
    /// # Errors
    /// The trust domain's name makes no ids.
    pub fn start(
        authority: Authority,
        trust_domain: &str,
        placements: Arc<dyn Placements>,
        limits: CaLimits,
    ) -> Result<Self, CaError> {
        let (namespace, account) = SERVER_ACCOUNT;
        let id = SpiffeId::of_account(trust_domain, namespace, account)
            .map_err(|error| CaError::Server(error.to_string()))?;
        let (authority, tokens) = (Arc::new(authority), Arc::new(JoinTokens::default()));
        let (counters, stop) = (Arc::new(Counters::default()), CancellationToken::new());
        let service = Service::new(
            Arc::clone(&authority),
            trust_domain.to_owned(),
            placements,
            Arc::clone(&tokens),
            RateLimits::new(&limits),
            Arc::clone(&counters),
            stop.clone(),
        );
        let ticks = tokio::spawn(tick(Arc::clone(&authority), service.clone(), stop.clone()));
        Ok(Self {
            authority,
            service,
            tokens,
            counters,
            id,
            limits,
            stop,
            tasks: Mutex::new(vec![ticks]),
        })
    }

    /// Listens on addresses inside a network namespace; port 0 lets the system choose. The answer is what was bound, in
    /// the same order.
    ///
    /// # Errors
    /// A socket is refused; the server's own certificate cannot be signed.
    pub fn listen_on(
        &self,
        netns: &Netns,
        addresses: &[SocketAddr],
    ) -> Result<Vec<SocketAddr>, CaError> {
        let listeners = listener::bind(netns, addresses)?;
        let tls = listener::ServerTls::new(
            Arc::clone(&self.authority),
            self.id.clone(),
            addresses.iter().map(SocketAddr::ip).collect(),
        )?;
        let bound = listeners.iter().map(|(_, address)| *address).collect();
        let tasks = listener::serve(
            listeners
                .into_iter()
                .map(|(listener, _)| listener)
                .collect(),
            tls,
            self.service.clone(),
            &self.limits,
            Arc::clone(&self.counters),
            &self.stop,
        );
        self.tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend(tasks);
        Ok(bound)
    }

    /// Tokens with which nodes join.
    #[must_use]
    pub fn tokens(&self) -> &JoinTokens {
        &self.tokens
    }

    /// What signs.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// How it went so far.
    #[must_use]
    pub fn status(&self) -> CaStatus {
        self.counters.status()
    }

    /// Ends all streams and stops listening.
    pub async fn shutdown(self) {
        self.stop.cancel();
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        for task in tasks {
            if let Err(error) = task.await {
                tracing::warn!(%error, "a task of the certificate authority ended abnormally");
            }
        }
    }
}

impl Drop for CertificateAuthority {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl std::fmt::Debug for CertificateAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateAuthority")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Lets the authority's roots come and go.
async fn tick(authority: Arc<Authority>, service: Service, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(TICK) => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = authority.advance(service.all_informed()) {
            tracing::error!(%error, "the rotation of roots does not go on");
        }
    }
}

fn read(path: &Path) -> Result<String, CaError> {
    fs::read_to_string(path).map_err(|reason| CaError::File {
        path: path.to_owned(),
        reason,
    })
}

impl From<SignError> for CaError {
    fn from(error: SignError) -> Self {
        Self::Server(error.to_string())
    }
}
