//! Who is at the other end of a connection.
//!
//! A client certificate that is of no use (expired, another CA's) does not end the handshake: its holder learns why in the
//! answer to its call, and can join anew. It counts as none, except that the reason is told.

use std::{net::SocketAddr, sync::Arc, time::SystemTime};

use identity::{SpiffeId, certificate};
use rustls::{
    DigitallySignedStruct, DistinguishedName, Error, SignatureScheme,
    client::danger::HandshakeSignatureValid,
    crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

/// The other end.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    pub(super) address: SocketAddr,
    pub(super) identity: PeerIdentity,
}

/// What it has proved.
#[derive(Debug, Clone)]
pub(super) enum PeerIdentity {
    /// Nothing: it has shown no certificate.
    Stranger,
    /// It holds the key of a certificate, which is of no use for this reason.
    Untrusted(String),
    /// It is this one, until then.
    Known {
        /// Whose certificate it is.
        id: SpiffeId,
        /// When the certificate ends.
        until: SystemTime,
    },
}

impl PeerIdentity {
    /// Judges a chain whose key the peer has proved to hold.
    pub(super) fn of(
        chain: Option<&[CertificateDer<'static>]>,
        roots: &[CertificateDer<'static>],
        now: SystemTime,
    ) -> Self {
        let Some(chain) = chain.filter(|chain| !chain.is_empty()) else {
            return Self::Stranger;
        };
        let judged = certificate::verify(chain, roots, now).and_then(|()| {
            Ok(Self::Known {
                id: SpiffeId::of_certificate(&chain[0])?,
                until: certificate::not_after(&chain[0])?,
            })
        });
        judged.unwrap_or_else(|error| Self::Untrusted(error.to_string()))
    }
}

/// Asks for a certificate, and checks no more than that the peer holds its key: see the module's text.
#[derive(Debug)]
pub(super) struct AnyHolder {
    provider: Arc<CryptoProvider>,
}

impl AnyHolder {
    pub(super) fn new(provider: Arc<CryptoProvider>) -> Self {
        Self { provider }
    }
}

impl ClientCertVerifier for AnyHolder {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        // Judged by `PeerIdentity::of` once the handshake has proved that the peer holds the key.
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
