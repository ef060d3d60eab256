//! A certificate authority for tests, and SVIDs that are right or wrong in one respect.

use std::time::{Duration, SystemTime};

use identity::{SpiffeId, Svid};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType,
};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

pub const TRUST_DOMAIN: &str = "cluster.local";

pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub roots: Vec<CertificateDer<'static>>,
}

/// What is asked of an SVID.
pub struct Wanted {
    pub uris: Vec<String>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Wanted {
    pub fn new(uri: &str) -> Self {
        Self {
            uris: vec![uri.to_owned()],
            not_before: SystemTime::now() - Duration::from_secs(60),
            not_after: SystemTime::now() + Duration::from_secs(3600),
            usages: vec![
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ],
        }
    }
}

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let roots = vec![params.self_signed(&key).unwrap().der().clone()];
        Self {
            issuer: Issuer::new(params, key),
            roots,
        }
    }

    pub fn svid(&self, account: &str) -> Svid {
        self.issue(&Wanted::new(id(account).as_str()))
    }

    pub fn issue(&self, wanted: &Wanted) -> Svid {
        let mut params = CertificateParams::default();
        params.subject_alt_names = wanted
            .uris
            .iter()
            .map(|uri| SanType::URI(uri.as_str().try_into().unwrap()))
            .collect();
        params.not_before = wanted.not_before.into();
        params.not_after = wanted.not_after.into();
        params.extended_key_usages = wanted.usages.clone();
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Svid {
            id: id("any"),
            chain: vec![certificate.der().clone()],
            key: PrivatePkcs8KeyDer::from(key.serialize_der()),
            not_before: wanted.not_before,
            not_after: wanted.not_after,
            serial: String::new(),
        }
    }
}

pub fn id(account: &str) -> SpiffeId {
    SpiffeId::of_account(TRUST_DOMAIN, "test", account).unwrap()
}
