//! What the micro proxy counts beside the connections themselves: what did not come about, and why.

use telemetry::{Counter, Family, Registry, TelemetryError};
use tunnel::{ConnectError, ServeError, TlsFailure};

/// More than there are kinds of failure.
const MAX_SERIES: usize = 64;

/// A clone is another handle on the same counters.
#[derive(Debug, Clone)]
pub(crate) struct TunnelMetrics {
    refused: Family<[(&'static str, String); 1], Counter>,
    failures: Family<[(&'static str, String); 2], Counter>,
}

impl TunnelMetrics {
    /// Registers `heddle_tunnel_refused_total` and `heddle_tunnel_failures_total`.
    pub(crate) fn register(registry: &Registry) -> Result<Self, TelemetryError> {
        Ok(Self {
            refused: registry.counter_family(
                "heddle_tunnel_refused_total",
                "Streams of other nodes that were refused, by status",
                MAX_SERIES,
            )?,
            failures: registry.counter_family(
                "heddle_tunnel_failures_total",
                "Tunnels that failed, by side and kind of failure",
                MAX_SERIES,
            )?,
        })
    }

    /// A stream was refused at the server's side.
    pub(crate) fn refused(&self, status: u16) {
        self.refused.get(&[("status", status.to_string())]).inc();
    }

    /// A tunnel from another node failed.
    pub(crate) fn failed_inbound(&self, kind: &'static str) {
        self.failed("inbound", kind);
    }

    /// A tunnel to another node failed.
    pub(crate) fn failed_outbound(&self, kind: &'static str) {
        self.failed("outbound", kind);
    }

    fn failed(&self, side: &'static str, kind: &'static str) {
        let labels = [("side", side.to_owned()), ("kind", kind.to_owned())];
        self.failures.get(&labels).inc();
    }
}

/// One word of a fixed set.
pub(crate) fn kind_of_serve(error: &ServeError) -> &'static str {
    match error {
        ServeError::TooManyHandshakes { .. } => "too-many-handshakes",
        ServeError::TooManyConnections { .. } => "too-many-connections",
        ServeError::HandshakeTimeout => "handshake-timeout",
        ServeError::Tls(failure) => kind_of_tls(failure),
        ServeError::PingTimeout => "ping-timeout",
        ServeError::Protocol(_) => "protocol",
        ServeError::Io(_) => "broken",
    }
}

/// One word of a fixed set.
pub(crate) fn kind_of_connect(error: &ConnectError) -> &'static str {
    match error {
        ConnectError::Unreachable(_) => "unreachable",
        ConnectError::Tls(failure) => kind_of_tls(failure),
        ConnectError::Refused { status: 401 } => "refused-by-policy",
        ConnectError::Refused { status: 503 } => "no-application",
        ConnectError::Refused { .. } => "refused",
        ConnectError::Reset(_) => "reset",
        ConnectError::Broken(_) => "broken",
        ConnectError::Draining => "draining",
        ConnectError::Timeout { .. } => "timeout",
        ConnectError::Full { .. } => "full",
        ConnectError::Header(_) => "header",
    }
}

fn kind_of_tls(failure: &TlsFailure) -> &'static str {
    match failure {
        TlsFailure::Alert { .. } => "tls-alert",
        TlsFailure::NoCertificate => "tls-no-certificate",
        TlsFailure::Certificate(_) => "tls-certificate",
        TlsFailure::Protocol(_) => "tls-protocol",
    }
}
