//! Identities of a test: an authority in memory that signs and rotates at the test's word.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use identity::{IdentitySource, JwtError, SpiffeId, Svid, TrustBundle};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode, get_current_timestamp, jwk::Jwk};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber,
};
use serde_json::json;
use tokio::sync::watch;

pub(crate) const DOMAIN: &str = "cluster.local";

type Newest = watch::Sender<Option<Arc<Svid>>>;

pub(crate) struct Source {
    authority: CertifiedIssuer<'static, KeyPair>,
    jwt_key: EncodingKey,
    svids: Mutex<HashMap<SpiffeId, Newest>>,
    bundle: watch::Sender<Arc<TrustBundle>>,
    serial: AtomicU64,
}

impl Source {
    pub(crate) fn new() -> Self {
        let authority = authority();
        let jwt_key = EncodingKey::from_ec_der(&KeyPair::generate().unwrap().serialize_der());
        let jwk = Jwk::from_encoding_key(&jwt_key, Algorithm::ES256).unwrap();
        let mut jwk = serde_json::to_value(jwk).unwrap();
        jwk["kid"] = json!("k1");
        jwk["use"] = json!("jwt-svid");
        let bundle = TrustBundle {
            trust_domain: DOMAIN.into(),
            roots: vec![authority.der().clone()],
            jwt_keys: json!({ "keys": [jwk] }).to_string(),
        };
        Self {
            authority,
            jwt_key,
            svids: Mutex::default(),
            bundle: watch::Sender::new(Arc::new(bundle)),
            serial: AtomicU64::new(1000),
        }
    }

    /// Signs a new certificate; says its serial number, in decimal.
    pub(crate) fn rotate(&self, id: &SpiffeId) -> String {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let uri = id.as_str().try_into().unwrap();
        params.subject_alt_names = vec![SanType::URI(uri)];
        params.serial_number = Some(SerialNumber::from(serial));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // The Python client insists on the extension, even to say that it is none.
        params.is_ca = IsCa::ExplicitNoCa;
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        let now = SystemTime::now();
        self.newest(id).send_replace(Some(Arc::new(Svid {
            id: id.clone(),
            chain: vec![certificate.der().clone()],
            key: key.serialize_der().into(),
            not_before: now,
            not_after: now + Duration::from_secs(3600),
            serial: format!("{serial:x}"),
        })));
        serial.to_string()
    }

    /// Trusts a second root besides the first.
    pub(crate) fn add_root(&self) {
        self.bundle.send_modify(|bundle| {
            let bundle = Arc::make_mut(bundle);
            bundle.roots.push(authority().der().clone());
        });
    }

    fn newest(&self, id: &SpiffeId) -> Newest {
        let mut svids = self.svids.lock().unwrap();
        svids.entry(id.clone()).or_default().clone()
    }
}

impl IdentitySource for Source {
    fn svid(&self, id: &SpiffeId) -> watch::Receiver<Option<Arc<Svid>>> {
        self.newest(id).subscribe()
    }

    fn bundle(&self) -> watch::Receiver<Arc<TrustBundle>> {
        self.bundle.subscribe()
    }

    async fn jwt(&self, id: &SpiffeId, audience: &[String]) -> Result<String, JwtError> {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some("k1".into());
        let now = get_current_timestamp();
        let claims = json!({"sub": id.as_str(), "aud": audience, "exp": now + 300, "iat": now});
        encode(&header, &claims, &self.jwt_key)
            .map_err(|error| JwtError::Unavailable(error.to_string()))
    }
}

fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let uri = format!("spiffe://{DOMAIN}").as_str().try_into().unwrap();
    params.subject_alt_names = vec![SanType::URI(uri)];
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}
