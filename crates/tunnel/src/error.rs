//! What goes wrong in the tunnel: whose fault it is, and whether trying again can help.

use std::{io, sync::Arc};

use rustls::{AlertDescription, CertificateError};

/// TLS settings cannot be made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsError {
    /// There is no root certificate, or one cannot be read.
    #[error("the trust bundle is of no use: {0}")]
    Roots(String),
    /// The SVID's certificate or key cannot be used.
    #[error("the SVID of {id} is of no use: {reason}")]
    Svid {
        /// Whose it is.
        id: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// How a TLS handshake or connection failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsFailure {
    /// The peer said so with an alert (RFC 8446, section 6).
    #[error("the peer ended TLS with alert {} ({description})", u8::from(*alert))]
    Alert {
        /// The alert.
        alert: AlertDescription,
        /// Its name.
        description: String,
    },
    /// The peer showed no certificate.
    #[error("the peer has no certificate")]
    NoCertificate,
    /// The peer's certificate is not one that is accepted here: other authority, expired, wrong identity.
    #[error("the peer's certificate is refused: {0}")]
    Certificate(String),
    /// Another protocol, version or suite is spoken.
    #[error("the peer speaks no TLS that is spoken here: {0}")]
    Protocol(String),
}

impl TlsFailure {
    pub(crate) fn of(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::AlertReceived(alert) => Self::Alert {
                alert: *alert,
                description: format!("{alert:?}"),
            },
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::InvalidCertificate(CertificateError::Other(other)) => {
                Self::Certificate(other.0.to_string())
            }
            rustls::Error::InvalidCertificate(error) => Self::Certificate(error.to_string()),
            other => Self::Protocol(other.to_string()),
        }
    }

    /// The TLS failure inside an I/O error, if that is what it is.
    pub(crate) fn inside(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().map(Self::of)
    }
}

/// A tunnel connection that was accepted ended badly. Streams have their own [`crate::Outcome`].
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It was the oldest of as many handshakes as are allowed, and made room.
    #[error("the TLS handshake made room: {limit} that began later are in progress")]
    TooManyHandshakes {
        /// The bound.
        limit: usize,
    },
    /// As many connections as are allowed are open.
    #[error("{limit} tunnel connections are open already")]
    TooManyConnections {
        /// The bound.
        limit: usize,
    },
    /// The handshake took too long.
    #[error("the TLS handshake did not end in time")]
    HandshakeTimeout,
    /// The handshake failed.
    #[error(transparent)]
    Tls(#[from] TlsFailure),
    /// The peer does not answer any more.
    #[error("the peer does not answer PINGs any more")]
    PingTimeout,
    /// The peer broke the protocol, or is one that floods.
    #[error("HTTP/2: {0}")]
    Protocol(String),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
}

impl ServeError {
    /// An error of a connection that is up.
    pub(crate) fn of(error: h2::Error) -> Self {
        let text = error.to_string();
        error.into_io().map_or(Self::Protocol(text), Self::Io)
    }

    pub(crate) fn of_io(error: io::Error) -> Self {
        TlsFailure::inside(&error).map_or_else(|| Self::Io(error), Self::Tls)
    }
}

/// Why there is no stream. Cheap to copy: all who wait for one connection get the same.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// There is no TCP connection to the peer. Trying again may help.
    #[error("no connection to the tunnel's other end: {0} (is port 15008 blocked?)")]
    Unreachable(Arc<io::Error>),
    /// TLS failed. Trying again helps only if a certificate changes.
    #[error(transparent)]
    Tls(#[from] TlsFailure),
    /// The peer answered with a status other than 200; 401 is policy, 503 an application that is not there.
    #[error("the tunnel's other end answered with status {status}")]
    Refused {
        /// The status.
        status: u16,
    },
    /// The peer reset the stream instead of an answer.
    #[error("the tunnel's other end refused the stream: {0}")]
    Reset(String),
    /// The connection broke before there was an answer.
    #[error("the tunnel broke: {0}")]
    Broken(String),
    /// Each connection that was tried was about to close.
    #[error("the tunnel's other end is draining")]
    Draining,
    /// It took too long.
    #[error("{what} took longer than {seconds} s")]
    Timeout {
        /// What did.
        what: &'static str,
        /// The bound.
        seconds: u64,
    },
    /// As many connections as are allowed are in use.
    #[error("{limit} tunnel connections are in use already")]
    Full {
        /// The bound that was reached.
        limit: usize,
    },
    /// A header's value cannot be sent.
    #[error("`{0}` cannot be the value of a header")]
    Header(String),
}

impl ConnectError {
    /// Did the peer's policy refuse it?
    #[must_use]
    pub fn is_policy(&self) -> bool {
        matches!(self, Self::Refused { status: 401 })
    }
}
