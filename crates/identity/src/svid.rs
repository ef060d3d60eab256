//! What a workload proves its identity with (an SVID), what others check it against (a trust bundle), and where
//! both come from.

use std::{
    fmt,
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;

use crate::SpiffeId;

/// An X.509-SVID with its key.
pub struct Svid {
    /// Whose it is.
    pub id: SpiffeId,
    /// The certificate, then those that lead to a root, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// The certificate's key (P-256).
    pub key: PrivatePkcs8KeyDer<'static>,
    /// Not valid before.
    pub not_before: SystemTime,
    /// Not valid after.
    pub not_after: SystemTime,
    /// Serial number, in hexadecimal.
    pub serial: String,
}

/// What the certificates and tokens of a trust domain are checked against.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrustBundle {
    /// The trust domain.
    pub trust_domain: String,
    /// Root certificates; more than one while roots are rotated.
    pub roots: Vec<CertificateDer<'static>>,
    /// Keys that JWT-SVIDs are signed with: a JWK set (RFC 7517) as JSON.
    pub jwt_keys: String,
}

/// Why there is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    /// The authority says no.
    #[error("the certificate authority refuses: {0}")]
    Refused(String),
    /// The authority does not answer: trying again may help.
    #[error("the certificate authority is not reachable: {0}")]
    Unavailable(String),
}

/// Where identities come from: the agent's keeper of certificates, or a test's.
pub trait IdentitySource: Send + Sync + 'static {
    /// The newest SVID of an identity that runs on this node; `None` until there is one, and for others.
    fn svid(&self, id: &SpiffeId) -> watch::Receiver<Option<Arc<Svid>>>;

    /// The trust domain's bundle.
    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>>;

    /// A JWT-SVID (RFC 7519) of an identity that runs on this node, for these audiences.
    fn jwt(
        &self,
        id: &SpiffeId,
        audience: &[String],
    ) -> impl Future<Output = Result<String, JwtError>> + Send;
}

impl Svid {
    /// How long it is valid in all.
    #[must_use]
    pub fn lifetime(&self) -> Duration {
        self.not_after
            .duration_since(self.not_before)
            .unwrap_or_default()
    }
}

impl fmt::Debug for Svid {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}
