//! TLS settings of both sides, and whom they let in: TLS 1.3 only, mutual certificates, ALPN exactly `h2`.
//!
//! Both sides check that the other's certificate leads to a root of the bundle, is in its time, may be used for its
//! side, and names exactly one SPIFFE id: of the trust domain at the server; one of those expected at the client. No
//! name is sent or checked otherwise (SNI, DNS).
//!
//! Sessions are not resumed. A resumed session would vouch for an identity whose certificate was not shown again,
//! past its expiry and past a change of roots; and tickets cost CPU and memory on every connection, while pooled
//! connections make full handshakes rare.

use std::{fmt, sync::Arc, time::SystemTime};

use identity::{SpiffeId, Svid};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, OtherError,
    RootCertStore, ServerConfig, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor,
    },
    crypto::{
        CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls12_signature,
        verify_tls13_signature,
    },
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::{
        NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
};

use crate::TlsError;

/// The protocol's name in the handshake (RFC 9113, section 3.1).
const ALPN: &[u8] = b"h2";

/// Settings of an accepting side: one workload's. Cheap to clone; the caller swaps it when a certificate is rotated.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
}

/// Settings of an opening side: one workload's towards one set of peers. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ClientTls {
    pub(crate) config: Arc<ClientConfig>,
    /// When the certificate ends that connections are opened with, and they with it.
    pub(crate) not_after: SystemTime,
}

impl ServerTls {
    /// As rustls has it.
    #[must_use]
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

impl ClientTls {
    /// As rustls has it.
    #[must_use]
    pub fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }
}

/// Settings to accept tunnels for the SVID's workload from any identity of the trust domain.
///
/// # Errors
/// The SVID or the roots cannot be used.
pub fn server_config(
    svid: &Svid,
    roots: &[CertificateDer<'_>],
    trust_domain: &str,
) -> Result<ServerTls, TlsError> {
    let provider = provider();
    let chain = WebPkiClientVerifier::builder_with_provider(
        Arc::new(root_store(roots)?),
        Arc::clone(&provider),
    )
    // The names of the authorities would only make the handshake longer: there is one trust domain.
    .clear_root_hint_subjects()
    .build()
    .map_err(|error| TlsError::Roots(error.to_string()))?;
    let verifier = ClientVerifier {
        chain,
        trust_domain: trust_domain.to_owned(),
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| svid_error(svid, &error))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_single_cert(svid.chain.clone(), key(svid))
        .map_err(|error| svid_error(svid, &error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.enable_secret_extraction = true; // For our own record layer.
    Ok(ServerTls {
        config: Arc::new(config),
    })
}

/// Settings to open tunnels as the SVID's workload to a peer that must be one of `expected`.
///
/// # Errors
/// The SVID or the roots cannot be used.
pub fn client_config(
    svid: &Svid,
    roots: &[CertificateDer<'_>],
    expected: Arc<[SpiffeId]>,
) -> Result<ClientTls, TlsError> {
    let provider = provider();
    let verifier = ServerVerifier {
        roots: root_store(roots)?,
        algorithms: provider.signature_verification_algorithms,
        expected,
    };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| svid_error(svid, &error))?
        .dangerous() // Because names are SPIFFE ids, which the ready-made verifier does not know.
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_auth_cert(svid.chain.clone(), key(svid))
        .map_err(|error| svid_error(svid, &error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_secret_extraction = true; // For our own record layer.
    Ok(ClientTls {
        config: Arc::new(config),
        not_after: svid.not_after,
    })
}

/// aws-lc-rs with the AES-GCM suites alone, the cheaper one first.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
    ];
    Arc::new(provider)
}

fn root_store(roots: &[CertificateDer<'_>]) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store
            .add(root.clone().into_owned())
            .map_err(|error| TlsError::Roots(error.to_string()))?;
    }
    if store.is_empty() {
        return Err(TlsError::Roots("it has no root certificate".into()));
    }
    Ok(store)
}

fn key(svid: &Svid) -> PrivateKeyDer<'static> {
    PrivateKeyDer::Pkcs8(svid.key.clone_key())
}

fn svid_error(svid: &Svid, error: &rustls::Error) -> TlsError {
    TlsError::Svid {
        id: svid.id.to_string(),
        reason: error.to_string(),
    }
}

/// An identity that is not accepted although its certificate is in order.
#[derive(Debug, thiserror::Error)]
enum IdentityError {
    #[error("its trust domain is `{found}`, not `{expected}`")]
    TrustDomain { found: String, expected: String },
    #[error("it is {found}, not {expected}")]
    Unexpected { found: SpiffeId, expected: String },
    #[error(transparent)]
    Spiffe(#[from] identity::spiffe::SpiffeError),
}

impl From<IdentityError> for rustls::Error {
    fn from(error: IdentityError) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
    }
}

/// Lets in any identity of a trust domain.
#[derive(Debug)]
struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    trust_domain: String,
}

impl ClientCertVerifier for ClientVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        let id = SpiffeId::of_certificate(end_entity).map_err(IdentityError::from)?;
        if id.trust_domain() != self.trust_domain {
            return Err(IdentityError::TrustDomain {
                found: id.trust_domain().to_owned(),
                expected: self.trust_domain.clone(),
            }
            .into());
        }
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Accepts the identities that are expected of a peer.
struct ServerVerifier {
    roots: RootCertStore,
    algorithms: WebPkiSupportedAlgorithms,
    expected: Arc<[SpiffeId]>,
}

impl fmt::Debug for ServerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerVerifier")
            .field("expected", &self.expected)
            .finish_non_exhaustive()
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        let found = SpiffeId::of_certificate(end_entity).map_err(IdentityError::from)?;
        if !self.expected.contains(&found) {
            let expected: Vec<&str> = self.expected.iter().map(SpiffeId::as_str).collect();
            return Err(IdentityError::Unexpected {
                found,
                expected: expected.join(" or "),
            }
            .into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
