//! Certificates for enemies: in order, or wrong in one respect.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde::Deserialize;
use tempfile::TempDir;

use crate::harness::{Mesh, leftovers};

const HOUR: Duration = Duration::from_secs(3600);

/// Signs what is asked for: with the key of a mesh's own CA, or another's.
pub(super) struct Forger {
    issuer: Issuer<'static, KeyPair>,
    folder: TempDir,
}

/// What the control plane keeps of its CA.
#[derive(Deserialize)]
struct Kept {
    generations: Vec<Generation>,
}

#[derive(Deserialize)]
struct Generation {
    certificates: String,
    key: String,
}

impl Forger {
    /// With the key of the mesh's CA.
    pub(super) fn of(mesh: &Mesh) -> Self {
        let path = leftovers::run_dir(mesh.name()).join("ca/ca.json");
        let kept: Kept = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        let [root] = kept.generations.try_into().ok().unwrap();
        let key = KeyPair::from_pem(&root.key).unwrap();
        Self::with(Issuer::from_ca_cert_pem(&root.certificates, key).unwrap())
    }

    /// With a key of its own, under the same name.
    pub(super) fn stranger() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self::with(Issuer::new(params, KeyPair::generate().unwrap()))
    }

    fn with(issuer: Issuer<'static, KeyPair>) -> Self {
        Self {
            issuer,
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// A file with a certificate for a SPIFFE id, and its key.
    pub(super) fn sign(&self, id: &str) -> PathBuf {
        let now = SystemTime::now();
        self.sign_for(id, now - HOUR, now + HOUR)
    }

    /// As [`Forger::sign`], for a time that is over.
    pub(super) fn sign_expired(&self, id: &str) -> PathBuf {
        let now = SystemTime::now();
        self.sign_for(id, now - 2 * HOUR, now - HOUR)
    }

    fn sign_for(&self, id: &str, from: SystemTime, to: SystemTime) -> PathBuf {
        let mut params = CertificateParams::default();
        (params.not_before, params.not_after) = (from.into(), to.into());
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let text = certificate.pem() + &key.serialize_pem();
        self.write(&text)
    }

    fn write(&self, text: &str) -> PathBuf {
        let count = fs::read_dir(self.folder.path()).unwrap().count();
        let path = self.folder.path().join(format!("{count}.pem"));
        fs::write(&path, text).unwrap();
        path
    }
}

/// As an argument of the enemy's program.
pub(super) fn argument(path: &Path) -> &str {
    path.to_str().unwrap()
}
