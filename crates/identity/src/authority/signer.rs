//! One CA certificate with its chain and key: made here or brought by the operator, and what it signs with them.

use std::{
    net::IpAddr,
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384,
    PKCS_RSA_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};

use super::{AuthorityError, SignError};
use crate::{
    SpiffeId,
    certificate::{self, parse, validity},
};

/// A root that is made here lives so long; it is rotated long before.
pub(super) const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86400);
/// Clocks of nodes may be behind by so much; but a certificate is never backdated by more than a tenth of its lifetime, or
/// half of it would be over too soon.
pub(super) const BACKDATE: Duration = Duration::from_secs(60);
/// Certificates between a CA certificate and its root, both included.
const MAX_CHAIN: usize = 8;

/// What signs.
#[derive(Debug)]
pub(super) struct Signer {
    /// The signing certificate first, its root last; one certificate if they are the same.
    chain: Vec<CertificateDer<'static>>,
    /// Not there for an operator's that is not in use any more.
    key: Option<KeyPair>,
    /// While all of the chain is valid.
    not_before: SystemTime,
    not_after: SystemTime,
}

/// The times and names of a certificate to sign.
pub(super) struct Leaf<'a> {
    pub(super) id: &'a SpiffeId,
    pub(super) dns: &'a [&'a str],
    pub(super) addresses: &'a [IpAddr],
    pub(super) now: SystemTime,
    pub(super) lifetime: Duration,
}

impl Signer {
    /// A new self-signed root.
    pub(super) fn generate(trust_domain: &str, now: SystemTime) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::crypto)?;
        let mut params = CertificateParams::default();
        let (not_before, not_after) = (now - BACKDATE, now + ROOT_LIFETIME);
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        params.serial_number = Some(random_serial()?);
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::OrganizationName, trust_domain);
        params
            .distinguished_name
            .push(DnType::CommonName, "Heddle root CA");
        // X.509-SVID, section 3.1: a signing certificate may carry the trust domain's own id.
        let name = format!("spiffe://{trust_domain}")
            .try_into()
            .map_err(AuthorityError::crypto)?;
        params.subject_alt_names = vec![SanType::URI(name)];
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let root = params.self_signed(&key).map_err(AuthorityError::crypto)?;
        Self::new(vec![root.into()], Some(key))
    }

    /// Certificate with chain, and key, as an operator gives them or as they were kept.
    pub(super) fn from_pem(certificates: &str, key: Option<&str>) -> Result<Self, AuthorityError> {
        let chain = certificate::from_pem(certificates)
            .map_err(|error| unreadable("CA certificate", error))?;
        if chain.is_empty() {
            return Err(unreadable("CA certificate", "it holds no PEM certificate"));
        }
        let key = key.map(read_key).transpose()?;
        Self::new(chain, key)
    }

    fn new(
        chain: Vec<CertificateDer<'static>>,
        key: Option<KeyPair>,
    ) -> Result<Self, AuthorityError> {
        let (mut not_before, mut not_after) = (SystemTime::UNIX_EPOCH, None);
        for certificate in &chain {
            let parsed = parse(certificate).map_err(|error| unreadable("CA certificate", error))?;
            let (from, to) = validity(&parsed);
            not_before = not_before.max(from);
            not_after = Some(not_after.map_or(to, |earliest: SystemTime| earliest.min(to)));
        }
        Ok(Self {
            chain,
            key,
            not_before,
            not_after: not_after.unwrap_or(not_before),
        })
    }

    /// Everything that a CA must be to sign now.
    pub(super) fn check(&self, now: SystemTime) -> Result<(), AuthorityError> {
        let unreadable = |error| unreadable("CA certificate", error);
        if self.chain.len() > MAX_CHAIN {
            let reason = format!("its chain has more than {MAX_CHAIN} certificates");
            return Err(AuthorityError::Unreadable {
                what: "CA certificate",
                reason,
            });
        }
        let chain = self
            .chain
            .iter()
            .map(|certificate| parse(certificate))
            .collect::<Result<Vec<_>, _>>()
            .map_err(unreadable)?;
        for (index, certificate) in chain.iter().enumerate() {
            let subject = certificate.subject().to_string();
            let (from, to) = validity(certificate);
            if now >= to {
                let at = certificate.validity().not_after.to_string();
                return Err(AuthorityError::Expired { subject, at });
            }
            if now < from {
                let at = certificate.validity().not_before.to_string();
                return Err(AuthorityError::NotYetValid { subject, at });
            }
            let constraints = certificate
                .basic_constraints()
                .map_err(|error| AuthorityError::Unreadable {
                    what: "CA certificate",
                    reason: error.to_string(),
                })?
                .filter(|constraints| constraints.value.ca);
            let Some(constraints) = constraints else {
                let reason = "its basicConstraints do not say CA:TRUE";
                return Err(AuthorityError::NotCa { subject, reason });
            };
            let may_sign = certificate
                .key_usage()
                .is_ok_and(|usage| usage.is_none_or(|usage| usage.value.key_cert_sign()));
            if !may_sign {
                let reason = "its keyUsage lacks keyCertSign";
                return Err(AuthorityError::NotCa { subject, reason });
            }
            if let Some(allowed) = constraints.value.path_len_constraint
                && (allowed as usize) < index
            {
                return Err(AuthorityError::PathLength {
                    subject,
                    allowed,
                    found: index,
                });
            }
            let issuer = chain.get(index + 1);
            let signed = certificate
                .verify_signature(issuer.map(|issuer| issuer.public_key()))
                .is_ok();
            match issuer {
                Some(issuer) if !signed || certificate.issuer() != issuer.subject() => {
                    return Err(AuthorityError::BrokenChain {
                        subject,
                        issuer: issuer.subject().to_string(),
                    });
                }
                None if !signed || certificate.issuer() != certificate.subject() => {
                    return Err(AuthorityError::NoRoot { subject });
                }
                _ => {}
            }
        }
        self.check_key(&chain[0])
    }

    fn check_key(
        &self,
        certificate: &x509_parser::certificate::X509Certificate<'_>,
    ) -> Result<(), AuthorityError> {
        let key = self.key()?;
        if certificate.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(AuthorityError::KeyMismatch {
                subject: certificate.subject().to_string(),
            });
        }
        Ok(())
    }

    /// Signs a certificate; the answer is it and those that lead to the root, without the root.
    pub(super) fn sign(
        &self,
        leaf: &Leaf<'_>,
        key: &impl PublicKeyData,
    ) -> Result<Vec<CertificateDer<'static>>, SignError> {
        if leaf.now < self.not_before || leaf.now >= self.not_after {
            return Err(SignError::AuthorityExpired);
        }
        let backdate = BACKDATE.min(leaf.lifetime / 10);
        let mut params = CertificateParams::default();
        params.not_before = (leaf.now - backdate).max(self.not_before).into();
        params.not_after = (leaf.now + leaf.lifetime).min(self.not_after).into();
        params.serial_number = Some(random_serial()?);
        params.distinguished_name = DistinguishedName::new();
        let name = |text: &str| text.try_into().map_err(AuthorityError::crypto);
        params.subject_alt_names = vec![SanType::URI(name(leaf.id.as_str())?)];
        for dns in leaf.dns {
            params.subject_alt_names.push(SanType::DnsName(name(dns)?));
        }
        let addresses = leaf.addresses.iter().copied().map(SanType::IpAddress);
        params.subject_alt_names.extend(addresses);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_der(&self.chain[0], self.key()?)
            .map_err(AuthorityError::crypto)?;
        let certificate = params
            .signed_by(key, &issuer)
            .map_err(AuthorityError::crypto)?;
        let mut chain = vec![certificate.into()];
        chain.extend_from_slice(&self.chain[..self.chain.len() - 1]);
        Ok(chain)
    }

    /// The certificate that others trust.
    pub(super) fn root(&self) -> &CertificateDer<'static> {
        &self.chain[self.chain.len() - 1]
    }

    pub(super) fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    pub(super) fn not_after(&self) -> SystemTime {
        self.not_after
    }

    pub(super) fn key_pem(&self) -> Option<String> {
        self.key.as_ref().map(KeyPair::serialize_pem)
    }

    fn key(&self) -> Result<&KeyPair, AuthorityError> {
        self.key
            .as_ref()
            .ok_or_else(|| AuthorityError::Crypto("the CA's key is not there".into()))
    }
}

/// Bytes that nobody can guess.
pub(super) fn random<const N: usize>() -> Result<[u8; N], AuthorityError> {
    let mut bytes = [0; N];
    aws_lc_rs::default_provider()
        .secure_random
        .fill(&mut bytes)
        .map_err(|_| AuthorityError::Crypto("the system gives no randomness".into()))?;
    Ok(bytes)
}

fn random_serial() -> Result<SerialNumber, AuthorityError> {
    let mut bytes = random::<16>()?;
    // Always 16 bytes long, so never zero.
    bytes[0] |= 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}

fn read_key(text: &str) -> Result<KeyPair, AuthorityError> {
    let key = PrivateKeyDer::from_pem_slice(text.as_bytes()).map_err(|error| {
        unreadable(
            "CA key",
            format!("{error}; it must be a PEM without a password"),
        )
    })?;
    let key = KeyPair::try_from(&key).map_err(|error| AuthorityError::KeyType {
        found: format!("of a kind that is not supported ({error})"),
    })?;
    let algorithm = key.algorithm();
    let supported = [
        &PKCS_ECDSA_P256_SHA256,
        &PKCS_ECDSA_P384_SHA384,
        &PKCS_RSA_SHA256,
    ];
    if !supported.contains(&algorithm) {
        return Err(AuthorityError::KeyType {
            found: format!("{algorithm:?}"),
        });
    }
    Ok(key)
}

fn unreadable(what: &'static str, error: impl ToString) -> AuthorityError {
    AuthorityError::Unreadable {
        what,
        reason: error.to_string(),
    }
}
