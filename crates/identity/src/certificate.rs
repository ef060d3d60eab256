//! Reading certificates: into an [`Svid`], to and from PEM, and up to a root.

use std::time::{Duration, SystemTime};

use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivatePkcs8KeyDer, UnixTime, pem::PemObject as _},
};
use webpki::{EndEntityCert, KeyUsage, anchor_from_trusted_cert};
use x509_parser::prelude::{ASN1Time, FromDer as _, X509Certificate};

use crate::{SpiffeId, Svid, spiffe::SpiffeError};

/// Why a certificate is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// There is none.
    #[error("there is no certificate")]
    Missing,
    /// It cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Unreadable(String),
    /// It names nobody that the mesh knows.
    #[error(transparent)]
    Name(#[from] SpiffeError),
    /// It does not lead to a root.
    #[error("the certificate is not to be trusted: {0}")]
    Untrusted(String),
}

impl Svid {
    /// Reads identity, times and serial number from the first certificate of `chain`.
    ///
    /// # Errors
    /// There is none, it cannot be read, or it is no X.509-SVID.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivatePkcs8KeyDer<'static>,
    ) -> Result<Self, CertificateError> {
        let leaf = chain.first().ok_or(CertificateError::Missing)?;
        let id = SpiffeId::of_certificate(leaf)?;
        let parsed = parse(leaf)?;
        let (not_before, not_after) = validity(&parsed);
        let serial = serial(&parsed);
        Ok(Self {
            id,
            not_before,
            not_after,
            serial,
            key,
            chain,
        })
    }
}

/// Checks that a chain (the certificate first) leads to one of `roots` and is valid at `at`, as a server's or client's.
///
/// # Errors
/// It does not.
pub fn verify(
    chain: &[CertificateDer<'_>],
    roots: &[CertificateDer<'_>],
    at: SystemTime,
) -> Result<(), CertificateError> {
    let untrusted = |error: webpki::Error| CertificateError::Untrusted(error.to_string());
    let (leaf, intermediates) = chain.split_first().ok_or(CertificateError::Missing)?;
    let anchors = roots
        .iter()
        .map(anchor_from_trusted_cert)
        .collect::<Result<Vec<_>, _>>()
        .map_err(untrusted)?;
    let leaf = EndEntityCert::try_from(leaf).map_err(untrusted)?;
    let at = UnixTime::since_unix_epoch(
        at.duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default(),
    );
    let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        leaf.verify_for_usage(
            algorithms.all,
            &anchors,
            intermediates,
            at,
            usage,
            None,
            None,
        )
        .map_err(untrusted)?;
    }
    Ok(())
}

/// When a certificate (DER) ends.
///
/// # Errors
/// It cannot be read.
pub fn not_after(certificate: &[u8]) -> Result<SystemTime, CertificateError> {
    Ok(validity(&parse(certificate)?).1)
}

/// Certificates as PEM, one after the other.
#[must_use]
pub fn to_pem<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> String {
    certificates
        .into_iter()
        .map(|certificate| encode("CERTIFICATE", certificate))
        .collect()
}

/// All certificates in a PEM text.
///
/// # Errors
/// It is no PEM. A text without certificates is no error.
pub fn from_pem(text: &str) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    CertificateDer::pem_slice_iter(text.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|error| CertificateError::Unreadable(error.to_string()))
}

/// One PEM section.
pub(crate) fn encode(label: &str, content: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, content), config)
}

pub(crate) fn parse(certificate: &[u8]) -> Result<X509Certificate<'_>, CertificateError> {
    match X509Certificate::from_der(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) => Err(CertificateError::Unreadable("bytes follow it".into())),
        Err(error) => Err(CertificateError::Unreadable(error.to_string())),
    }
}

pub(crate) fn validity(certificate: &X509Certificate<'_>) -> (SystemTime, SystemTime) {
    let validity = certificate.validity();
    (time(validity.not_before), time(validity.not_after))
}

fn time(time: ASN1Time) -> SystemTime {
    // Before 1970 there are no valid certificates: the epoch will do for all of them.
    let seconds = u64::try_from(time.timestamp()).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn serial(certificate: &X509Certificate<'_>) -> String {
    let bytes = certificate.raw_serial();
    // A leading zero only says that the number is positive.
    let bytes = match bytes {
        [0, rest @ ..] if !rest.is_empty() => rest,
        bytes => bytes,
    };
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
