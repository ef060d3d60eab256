//! The certificate authority of a trust domain, without the network: `control` serves it.
//!
//! An authority has *generations*: a CA certificate with its chain and key, and a key for JWT-SVIDs. One of them signs.
//! [`Authority::rotate_root`] announces another one: its root is trusted from then on, but it signs only when every node
//! had time to learn it. The old one stays trusted until the last certificate that it signed has expired.
//!
//! - `signer`: one CA certificate, what makes it one, and what it signs
//! - `request`: certificate requests
//! - `jwt`: tokens
//! - `store`: what is kept over restarts

mod error;
mod jwt;
mod request;
mod signer;
mod store;

use std::{
    fmt,
    net::IpAddr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use jsonwebtoken::jwk::JwkSet;
use rcgen::KeyPair;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use tokio::sync::watch;

pub use self::{
    error::{AuthorityError, SignError},
    jwt::{MAX_TOKEN_LIFETIME, Token},
    request::Request,
};
use self::{
    jwt::JwtKey,
    signer::{Leaf, Signer},
    store::Store,
};
use crate::{SpiffeId, Svid, TrustBundle, certificate};

/// Lifetime of certificates where none is asked for.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The shortest lifetime: short enough for tests, long enough to be renewed at half of it.
pub const LEAST_LIFETIME: Duration = Duration::from_secs(2);
/// The longest lifetime.
pub const MOST_LIFETIME: Duration = Duration::from_secs(90 * 86400);
/// Generations at a time: one that signs, one announced, the others still trusted.
const MAX_GENERATIONS: usize = 8;
/// A rotation waits so many propagation delays at most for nodes that do not learn of it.
const MAX_DELAYS: u32 = 10;

/// Tells the time; tests bring their own.
pub type Clock = Arc<dyn Fn() -> SystemTime + Send + Sync>;

/// Settings of an authority.
#[derive(Clone)]
pub struct AuthorityConfig {
    /// Whose identities it signs.
    pub trust_domain: String,
    /// Lifetime of certificates; requests may ask for less.
    pub lifetime: Duration,
    /// After a new root is announced, the time until it signs.
    pub propagation: Duration,
    /// The time.
    pub clock: Clock,
}

/// The CA. Everything is checked and done under one lock; signing takes some tens of microseconds.
pub struct Authority {
    config: AuthorityConfig,
    store: Option<Store>,
    generations: Mutex<Vec<Generation>>,
    bundle: watch::Sender<Arc<TrustBundle>>,
}

/// A certificate that was signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// The certificate, then those that lead to the root, without it.
    pub chain: Vec<CertificateDer<'static>>,
    /// Every root that is trusted now.
    pub roots: Vec<CertificateDer<'static>>,
}

/// A CA certificate and a JWT key that came and go together.
#[derive(Debug)]
struct Generation {
    signer: Signer,
    jwt: JwtKey,
    stage: Stage,
    /// Brought by the operator: its key is not kept.
    operator: bool,
    /// When it came to this stage.
    since: SystemTime,
    /// Nothing that it signed is valid after this.
    last_expiry: SystemTime,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "camelCase")]
enum Stage {
    Announced,
    Signing,
    Retired,
}

impl AuthorityConfig {
    /// The defaults: certificates for 24 hours, and 10 seconds for a new root to be known.
    #[must_use]
    pub fn new(trust_domain: &str) -> Self {
        Self {
            trust_domain: trust_domain.to_owned(),
            lifetime: DEFAULT_LIFETIME,
            propagation: Duration::from_secs(10),
            clock: Arc::new(SystemTime::now),
        }
    }

    fn check(&self) -> Result<(), AuthorityError> {
        if (LEAST_LIFETIME..=MOST_LIFETIME).contains(&self.lifetime) {
            return Ok(());
        }
        Err(AuthorityError::Lifetime {
            given: self.lifetime,
            least: LEAST_LIFETIME,
            most: MOST_LIFETIME,
        })
    }
}

impl Authority {
    /// A new root, kept nowhere.
    ///
    /// # Errors
    /// A lifetime out of bounds.
    pub fn generate(config: AuthorityConfig) -> Result<Self, AuthorityError> {
        let signer = Signer::generate(&config.trust_domain, (config.clock)())?;
        Self::start(config, None, Vec::new(), signer, false)
    }

    /// The operator's CA: an intermediate or root certificate, then its chain up to the root. Nothing is kept.
    ///
    /// # Errors
    /// Everything that makes it no CA that can sign now.
    pub fn load(
        config: AuthorityConfig,
        certificate_pem: &str,
        key_pem: &str,
    ) -> Result<Self, AuthorityError> {
        let signer = Signer::from_pem(certificate_pem, Some(key_pem))?;
        signer.check((config.clock)())?;
        Self::start(config, None, Vec::new(), signer, true)
    }

    /// The CA that is kept in a folder; a new root if the folder is empty. `operator`: certificate and key as for
    /// [`Authority::load`]; roots that were in use before stay trusted until what they signed has expired.
    ///
    /// # Errors
    /// The folder cannot be used or is in use, or what it holds is damaged; the operator's CA is none.
    pub fn open(
        config: AuthorityConfig,
        folder: &Path,
        operator: Option<(&str, &str)>,
    ) -> Result<Self, AuthorityError> {
        config.check()?;
        let now = (config.clock)();
        let operator = match operator {
            Some((certificate, key)) => {
                let signer = Signer::from_pem(certificate, Some(key))?;
                signer.check(now)?;
                Some(signer)
            }
            None => None,
        };
        let store = Store::open(folder)?;
        let mut generations = store.load(&config.trust_domain)?;
        let signing = |generation: &Generation| generation.stage == Stage::Signing;
        match operator {
            Some(signer) => {
                let same = generations.iter_mut().find(|kept| {
                    kept.stage == Stage::Signing && kept.signer.chain() == signer.chain()
                });
                if let Some(kept) = same {
                    kept.signer = signer;
                    kept.operator = true;
                    return Self::run(config, Some(store), generations);
                }
                for kept in &mut generations {
                    kept.retire(now);
                }
                Self::start(config, Some(store), generations, signer, true)
            }
            None => match generations.iter().find(|kept| signing(kept)) {
                Some(kept) if kept.operator => Err(AuthorityError::OperatorMissing {
                    path: store.path().to_owned(),
                }),
                Some(kept) => {
                    kept.signer.check(now)?;
                    Self::run(config, Some(store), generations)
                }
                None => {
                    let signer = Signer::generate(&config.trust_domain, now)?;
                    Self::start(config, Some(store), generations, signer, false)
                }
            },
        }
    }

    fn start(
        config: AuthorityConfig,
        store: Option<Store>,
        mut generations: Vec<Generation>,
        signer: Signer,
        operator: bool,
    ) -> Result<Self, AuthorityError> {
        let now = (config.clock)();
        generations.push(Generation::new(signer, Stage::Signing, operator, now)?);
        Self::run(config, store, generations)
    }

    fn run(
        config: AuthorityConfig,
        store: Option<Store>,
        generations: Vec<Generation>,
    ) -> Result<Self, AuthorityError> {
        config.check()?;
        let bundle = bundle(&config.trust_domain, &generations)?;
        let authority = Self {
            config,
            store,
            generations: Mutex::new(generations),
            bundle: watch::Sender::new(Arc::new(bundle)),
        };
        authority.probe()?;
        authority.save(&authority.lock())?;
        Ok(authority)
    }

    /// Whatever a CA certificate says of itself, only what others accept counts (name constraints, for one).
    fn probe(&self) -> Result<(), AuthorityError> {
        let unusable = |error: &dyn fmt::Display| AuthorityError::Unusable(error.to_string());
        let id = SpiffeId::of_node(&self.config.trust_domain, "probe")
            .map_err(|error| unusable(&error))?;
        let key = KeyPair::generate().map_err(AuthorityError::crypto)?;
        let generations = self.lock();
        let now = (self.config.clock)();
        let leaf = Leaf {
            id: &id,
            dns: &[],
            addresses: &[],
            now,
            lifetime: LEAST_LIFETIME,
        };
        let signing = signing(&generations)?;
        let chain = signing
            .signer
            .sign(&leaf, &key)
            .map_err(|error| unusable(&error))?;
        certificate::verify(&chain, &[signing.signer.root().clone()], now)
            .map_err(|error| unusable(&error))
    }

    /// Signs a request for `id`. Of the request only key and names count; `lifetime` is cut to what is configured.
    ///
    /// # Errors
    /// The request asks for another name; `id` is another trust domain's; the CA has expired or cannot write its state.
    pub fn sign(
        &self,
        request: &Request,
        id: &SpiffeId,
        lifetime: Option<Duration>,
    ) -> Result<Issued, SignError> {
        request.check_name(id)?;
        self.check_domain(id)?;
        self.issue(id, &[], &[], lifetime, &request.key)
    }

    /// A certificate for a server of the authority's own, with DNS names and addresses beside its id.
    ///
    /// # Errors
    /// As [`Authority::sign`].
    pub fn sign_server(
        &self,
        id: &SpiffeId,
        dns: &[&str],
        addresses: &[IpAddr],
    ) -> Result<Svid, SignError> {
        self.check_domain(id)?;
        let key = KeyPair::generate().map_err(AuthorityError::crypto)?;
        let issued = self.issue(id, dns, addresses, None, &key)?;
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Ok(Svid::new(issued.chain, key).map_err(AuthorityError::crypto)?)
    }

    fn issue(
        &self,
        id: &SpiffeId,
        dns: &[&str],
        addresses: &[IpAddr],
        lifetime: Option<Duration>,
        key: &impl rcgen::PublicKeyData,
    ) -> Result<Issued, SignError> {
        let now = (self.config.clock)();
        let lifetime = lifetime
            .unwrap_or(self.config.lifetime)
            .clamp(LEAST_LIFETIME, self.config.lifetime);
        let leaf = Leaf {
            id,
            dns,
            addresses,
            now,
            lifetime,
        };
        let mut generations = self.lock();
        let chain = signing(&generations)?.signer.sign(&leaf, key)?;
        // Known before it is out: a root must not go before what it signed.
        self.note_expiry(&mut generations, now + lifetime)?;
        let roots = roots(&generations);
        Ok(Issued { chain, roots })
    }

    /// A JWT-SVID. `lifetime` is cut to [`MAX_TOKEN_LIFETIME`].
    ///
    /// # Errors
    /// No or too many audiences; `id` is another trust domain's.
    pub fn mint_jwt(
        &self,
        id: &SpiffeId,
        audience: &[String],
        lifetime: Option<Duration>,
    ) -> Result<Token, SignError> {
        self.check_domain(id)?;
        let now = (self.config.clock)();
        let lifetime = lifetime.unwrap_or(MAX_TOKEN_LIFETIME);
        let mut generations = self.lock();
        let token = signing(&generations)?
            .jwt
            .mint(id, audience, lifetime, now)?;
        self.note_expiry(&mut generations, token.expires_at)?;
        Ok(token)
    }

    /// What the trust domain's certificates and tokens are checked against, as it changes.
    #[must_use]
    pub fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    /// All roots as PEM: what a new agent trusts first.
    #[must_use]
    pub fn roots_pem(&self) -> String {
        certificate::to_pem(&self.bundle.borrow().roots)
    }

    /// Announces a new root. It signs after the propagation delay; see [`Authority::advance`].
    ///
    /// # Errors
    /// A rotation is under way; the root is an operator's; too many old ones are still trusted.
    pub fn rotate_root(&self) -> Result<(), AuthorityError> {
        let now = (self.config.clock)();
        let mut generations = self.lock();
        if signing(&generations)?.operator {
            return Err(AuthorityError::OperatorRoot);
        }
        if generations.iter().any(|it| it.stage == Stage::Announced) {
            return Err(AuthorityError::RotationUnderWay);
        }
        if generations.len() >= MAX_GENERATIONS {
            return Err(AuthorityError::TooManyRoots(generations.len() - 1));
        }
        let signer = Signer::generate(&self.config.trust_domain, now)?;
        generations.push(Generation::new(signer, Stage::Announced, false, now)?);
        if let Err(error) = self.save(&generations) {
            generations.pop();
            return Err(error);
        }
        self.publish(&generations)
    }

    /// Lets time pass: an announced root that is due begins to sign, roots that nothing depends on are dropped, one that is
    /// near its end is rotated. Call it every second or so. `informed`: every node that listens has the newest bundle; a rotation
    /// waits for that, but not for ever.
    ///
    /// # Errors
    /// The state cannot be written. Nothing is changed then.
    pub fn advance(&self, informed: bool) -> Result<(), AuthorityError> {
        let now = (self.config.clock)();
        if self.is_near_end(now) {
            match self.rotate_root() {
                Ok(())
                | Err(AuthorityError::RotationUnderWay | AuthorityError::TooManyRoots(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let mut generations = self.lock();
        let age = |since: SystemTime| now.duration_since(since).unwrap_or_default();
        let due = generations.iter().position(|generation| {
            generation.stage == Stage::Announced
                && age(generation.since) >= self.config.propagation
                && (informed || age(generation.since) >= self.config.propagation * MAX_DELAYS)
        });
        let ended = |generation: &Generation| {
            generation.stage == Stage::Retired && generation.last_expiry <= now
        };
        if due.is_none() && !generations.iter().any(ended) {
            return Ok(());
        }
        if let Some(due) = due {
            for generation in generations
                .iter_mut()
                .filter(|it| it.stage == Stage::Signing)
            {
                generation.retire(now);
            }
            generations[due].stage = Stage::Signing;
            generations[due].since = now;
        }
        generations.retain(|generation| !ended(generation));
        self.publish(&generations)?;
        self.save(&generations)
    }

    fn is_near_end(&self, now: SystemTime) -> bool {
        let generations = self.lock();
        signing(&generations).is_ok_and(|generation| {
            !generation.operator && now + signer::ROOT_LIFETIME / 5 >= generation.signer.not_after()
        })
    }

    fn check_domain(&self, id: &SpiffeId) -> Result<(), SignError> {
        if id.trust_domain() == self.config.trust_domain {
            return Ok(());
        }
        Err(SignError::OtherTrustDomain {
            id: id.to_string(),
            trust_domain: self.config.trust_domain.clone(),
        })
    }

    /// Keeps a bound of what was signed that is written some ten times per lifetime, not with every certificate.
    fn note_expiry(
        &self,
        generations: &mut [Generation],
        expiry: SystemTime,
    ) -> Result<(), AuthorityError> {
        let slack = self.config.lifetime / 10;
        let Some(generation) = generations.iter_mut().find(|it| it.stage == Stage::Signing) else {
            return Ok(());
        };
        if expiry <= generation.last_expiry {
            return Ok(());
        }
        let before = std::mem::replace(&mut generation.last_expiry, expiry + slack);
        let saved = self.save(generations);
        if saved.is_err()
            && let Some(generation) = generations.iter_mut().find(|it| it.stage == Stage::Signing)
        {
            generation.last_expiry = before;
        }
        saved
    }

    fn save(&self, generations: &[Generation]) -> Result<(), AuthorityError> {
        match &self.store {
            Some(store) => store.save(&self.config.trust_domain, generations),
            None => Ok(()),
        }
    }

    fn publish(&self, generations: &[Generation]) -> Result<(), AuthorityError> {
        let new = Arc::new(bundle(&self.config.trust_domain, generations)?);
        self.bundle.send_if_modified(|current| {
            let changed = *current != new;
            *current = new;
            changed
        });
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Generation>> {
        // Each change is one step that leaves whole generations.
        self.generations
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Generation {
    fn new(
        signer: Signer,
        stage: Stage,
        operator: bool,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        Ok(Self {
            signer,
            jwt: JwtKey::generate()?,
            stage,
            operator,
            since: now,
            last_expiry: now,
        })
    }

    fn retire(&mut self, now: SystemTime) {
        if self.stage != Stage::Retired {
            self.stage = Stage::Retired;
            self.since = now;
        }
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority")
            .field("trust_domain", &self.config.trust_domain)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for AuthorityConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthorityConfig")
            .field("trust_domain", &self.trust_domain)
            .field("lifetime", &self.lifetime)
            .field("propagation", &self.propagation)
            .finish_non_exhaustive()
    }
}

fn signing(generations: &[Generation]) -> Result<&Generation, AuthorityError> {
    generations
        .iter()
        .find(|generation| generation.stage == Stage::Signing)
        .ok_or_else(|| AuthorityError::Crypto("no root signs".into()))
}

/// The newest first: a peer that looks at one root only has the one that will stay.
fn roots(generations: &[Generation]) -> Vec<CertificateDer<'static>> {
    let mut roots: Vec<CertificateDer<'static>> = Vec::new();
    for generation in generations.iter().rev() {
        // An operator's intermediates may share a root.
        if !roots.contains(generation.signer.root()) {
            roots.push(generation.signer.root().clone());
        }
    }
    roots
}

fn bundle(trust_domain: &str, generations: &[Generation]) -> Result<TrustBundle, AuthorityError> {
    let keys = JwkSet {
        keys: generations
            .iter()
            .rev()
            .map(|it| it.jwt.public().clone())
            .collect(),
    };
    Ok(TrustBundle {
        trust_domain: trust_domain.to_owned(),
        roots: roots(generations),
        jwt_keys: serde_json::to_string(&keys).map_err(AuthorityError::crypto)?,
    })
}

#[cfg(test)]
mod tests;
