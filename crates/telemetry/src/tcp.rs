//! The metrics of TCP connections, under the names and labels that Istio's users know.
//!
//! See <https://istio.io/latest/docs/reference/config/metrics/>. Who opens, closes or denies
//! connections calls in here; nothing here looks at a connection.

use std::sync::Arc;

use prometheus_client::metrics::counter::Counter;

use crate::{
    family::Family,
    labels::Labels,
    registry::{Registry, TelemetryError},
};

/// Who is who in a connection. Both ends may be reported, each by its own node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct TcpLabels {
    /// Which end reports.
    pub reporter: Reporter,
    /// `Workload` object of the client; `unknown` outside the mesh.
    pub source_workload: String,
    /// Its namespace.
    pub source_workload_namespace: String,
    /// Its SPIFFE id.
    pub source_principal: String,
    /// `Workload` object of the server; `unknown` outside the mesh.
    pub destination_workload: String,
    /// Its namespace.
    pub destination_workload_namespace: String,
    /// Its SPIFFE id.
    pub destination_principal: String,
    /// Host name of the service that was asked for; `unknown` if none was.
    pub destination_service: String,
    /// Name of the service.
    pub destination_service_name: String,
    /// Namespace of the service.
    pub destination_service_namespace: String,
    /// How the connection is authenticated.
    pub connection_security_policy: SecurityPolicy,
    /// Envoy's response flags; `-` if there are none.
    pub response_flags: String,
}

/// Which end of a connection reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The client's node.
    #[default]
    Source,
    /// The server's node.
    Destination,
}

/// How a connection is authenticated, Istio's `connection_security_policy`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum SecurityPolicy {
    /// Not known at this end.
    #[default]
    Unknown,
    /// Not authenticated.
    None,
    /// Both identities are known: by TLS, or because the kernel attests them on one node.
    MutualTls,
}

/// A connection that was refused, or that was ended because it is no longer allowed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct DeniedLabels {
    /// Which end refused it.
    pub reporter: Reporter,
    /// Why, one of a fixed set of words: `policy`, `no-endpoint`, …
    pub reason: String,
    /// `NAMESPACE/NAME` of the policy that refused it; `-` if none did.
    pub policy: String,
    /// `Workload` object of the client; `unknown` outside the mesh.
    pub source_workload: String,
    /// Its namespace.
    pub source_workload_namespace: String,
    /// `Workload` object of the server; `unknown` outside the mesh.
    pub destination_workload: String,
    /// Its namespace.
    pub destination_workload_namespace: String,
}

/// Counts connections. A clone is another handle on the same metrics.
#[derive(Debug, Clone)]
pub struct TcpMetrics {
    opened: Family<Arc<TcpLabels>, Counter>,
    closed: Family<Arc<TcpLabels>, Counter>,
    sent: Family<Arc<TcpLabels>, Counter>,
    received: Family<Arc<TcpLabels>, Counter>,
    denied: Family<DeniedLabels, Counter>,
    ended: Family<DeniedLabels, Counter>,
}

impl TcpMetrics {
    /// Registers the metrics, each with at most `max_series` series.
    ///
    /// # Errors
    /// [`TelemetryError::Duplicate`] if the registry has them already.
    pub fn register(registry: &Registry, max_series: usize) -> Result<Self, TelemetryError> {
        let tcp = |name, help| registry.counter_family(name, help, max_series);
        Ok(Self {
            opened: tcp(
                "istio_tcp_connections_opened_total",
                "TCP connections opened",
            )?,
            closed: tcp(
                "istio_tcp_connections_closed_total",
                "TCP connections closed",
            )?,
            sent: tcp(
                "istio_tcp_sent_bytes_total",
                "Bytes sent to the client in TCP connections (responses)",
            )?,
            received: tcp(
                "istio_tcp_received_bytes_total",
                "Bytes received from the client in TCP connections (requests)",
            )?,
            denied: registry.counter_family(
                "heddle_connections_denied_total",
                "Connections refused, by reason and policy",
                max_series,
            )?,
            ended: registry.counter_family(
                "heddle_connections_ended_total",
                "Established connections ended because they are no longer allowed, by reason and policy",
                max_series,
            )?,
        })
    }

    /// The counters of connections with these labels. Keep it where many such connections are counted:
    /// looking labels up costs more than counting.
    #[must_use]
    pub fn series(&self, labels: &TcpLabels) -> TcpSeries {
        let labels = Arc::new(labels.clone());
        TcpSeries {
            opened: self.opened.get(&labels),
            closed: self.closed.get(&labels),
            sent: self.sent.get(&labels),
            received: self.received.get(&labels),
        }
    }

    /// Counts a connection that was established.
    pub fn opened(&self, labels: &TcpLabels) {
        self.series(labels).opened();
    }

    /// Counts the end of a connection over which the server sent and received this many bytes.
    pub fn closed(&self, labels: &TcpLabels, sent: u64, received: u64) {
        self.series(labels).closed(sent, received);
    }

    /// Counts a connection that was refused.
    pub fn denied(&self, labels: &DeniedLabels) {
        self.denied.get(labels).inc();
    }

    /// Counts an established connection that was ended because it is no longer allowed.
    pub fn ended(&self, labels: &DeniedLabels) {
        self.ended.get(labels).inc();
    }

    /// Removes the series of a workload that is gone, at whichever end of a connection it was.
    /// Returns how many there were.
    pub fn evict_workload(&self, namespace: &str, workload: &str) -> usize {
        let is = |of_namespace: &str, name: &str| of_namespace == namespace && name == workload;
        let tcp = |labels: &Arc<TcpLabels>| {
            is(&labels.source_workload_namespace, &labels.source_workload)
                || is(
                    &labels.destination_workload_namespace,
                    &labels.destination_workload,
                )
        };
        let denied = |labels: &DeniedLabels| {
            is(&labels.source_workload_namespace, &labels.source_workload)
                || is(
                    &labels.destination_workload_namespace,
                    &labels.destination_workload,
                )
        };
        [&self.opened, &self.closed, &self.sent, &self.received]
            .into_iter()
            .map(|family| family.evict(tcp))
            .sum::<usize>()
            + self.denied.evict(denied)
            + self.ended.evict(denied)
    }
}

/// The counters of one set of [`TcpLabels`], resolved.
#[derive(Debug, Clone)]
pub struct TcpSeries {
    opened: Counter,
    closed: Counter,
    sent: Counter,
    received: Counter,
}

impl TcpSeries {
    /// Counts a connection that was established.
    pub fn opened(&self) {
        self.opened.inc();
    }

    /// Counts the end of a connection over which the server sent and received this many bytes.
    pub fn closed(&self, sent: u64, received: u64) {
        self.closed.inc();
        self.bytes(sent, received);
    }

    /// Counts bytes of a connection that lives on; count only what [`Self::closed`] will not count again.
    pub fn bytes(&self, sent: u64, received: u64) {
        self.sent.inc_by(sent);
        self.received.inc_by(received);
    }
}

impl Labels for TcpLabels {
    fn visit<'a>(&'a self, label: &mut dyn FnMut(&'static str, &'a str)) {
        label("reporter", self.reporter.as_str());
        label("source_workload", &self.source_workload);
        label("source_workload_namespace", &self.source_workload_namespace);
        label("source_principal", &self.source_principal);
        label("destination_workload", &self.destination_workload);
        label(
            "destination_workload_namespace",
            &self.destination_workload_namespace,
        );
        label("destination_principal", &self.destination_principal);
        label("destination_service", &self.destination_service);
        label("destination_service_name", &self.destination_service_name);
        label(
            "destination_service_namespace",
            &self.destination_service_namespace,
        );
        label(
            "connection_security_policy",
            self.connection_security_policy.as_str(),
        );
        label("response_flags", &self.response_flags);
    }
}

impl Labels for DeniedLabels {
    fn visit<'a>(&'a self, label: &mut dyn FnMut(&'static str, &'a str)) {
        label("reporter", self.reporter.as_str());
        label("reason", &self.reason);
        label("policy", &self.policy);
        label("source_workload", &self.source_workload);
        label("source_workload_namespace", &self.source_workload_namespace);
        label("destination_workload", &self.destination_workload);
        label(
            "destination_workload_namespace",
            &self.destination_workload_namespace,
        );
    }
}

impl Reporter {
    fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }
}

impl SecurityPolicy {
    fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::None => "none",
            Self::MutualTls => "mutual_tls",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(source: &str, destination: &str) -> TcpLabels {
        TcpLabels {
            source_workload: source.into(),
            source_workload_namespace: "shop".into(),
            source_principal: format!("spiffe://cluster.local/ns/shop/sa/{source}"),
            destination_workload: destination.into(),
            destination_workload_namespace: "shop".into(),
            destination_principal: format!("spiffe://cluster.local/ns/shop/sa/{destination}"),
            destination_service: format!("{destination}.shop.svc.cluster.local"),
            destination_service_name: destination.into(),
            destination_service_namespace: "shop".into(),
            connection_security_policy: SecurityPolicy::MutualTls,
            response_flags: "-".into(),
            ..TcpLabels::default()
        }
    }

    #[test]
    fn counts_a_connection_from_open_to_close() {
        let registry = Registry::new();
        let metrics = TcpMetrics::register(&registry, 100).unwrap();
        let connection = labels("frontend", "api");
        metrics.opened(&connection);
        metrics.opened(&connection);
        metrics.closed(&connection, 1000, 20);
        metrics.series(&connection).bytes(1, 2);
        let text = registry.encode();
        let all = concat!(
            r#"{reporter="source",source_workload="frontend",source_workload_namespace="shop","#,
            r#"source_principal="spiffe://cluster.local/ns/shop/sa/frontend",destination_workload="api","#,
            r#"destination_workload_namespace="shop",destination_principal="spiffe://cluster.local/ns/shop/sa/api","#,
            r#"destination_service="api.shop.svc.cluster.local",destination_service_name="api","#,
            r#"destination_service_namespace="shop",connection_security_policy="mutual_tls",response_flags="-"}"#,
        );
        for (name, value) in [
            ("istio_tcp_connections_opened_total", 2),
            ("istio_tcp_connections_closed_total", 1),
            ("istio_tcp_sent_bytes_total", 1001),
            ("istio_tcp_received_bytes_total", 22),
        ] {
            assert!(text.contains(&format!("\n{name}{all} {value}\n")), "{text}");
        }
    }

    #[test]
    fn counts_denied_connections_by_reason() {
        let registry = Registry::new();
        let metrics = TcpMetrics::register(&registry, 100).unwrap();
        metrics.denied(&DeniedLabels {
            reason: "policy".into(),
            policy: "shop/only-api".into(),
            source_workload: "worker".into(),
            source_workload_namespace: "shop".into(),
            ..DeniedLabels::default()
        });
        assert!(registry.encode().contains(concat!(
            r#"heddle_connections_denied_total{reporter="source",reason="policy",policy="shop/only-api","#,
            r#"source_workload="worker",source_workload_namespace="shop""#,
        )));
    }

    #[test]
    fn forgets_a_workload_at_either_end() {
        let registry = Registry::new();
        let metrics = TcpMetrics::register(&registry, 100).unwrap();
        metrics.opened(&labels("frontend", "api"));
        metrics.opened(&labels("api", "redis"));
        metrics.opened(&labels("frontend", "redis"));
        let refused = DeniedLabels {
            destination_workload: "api".into(),
            destination_workload_namespace: "shop".into(),
            ..DeniedLabels::default()
        };
        metrics.denied(&refused);
        metrics.ended(&refused);
        assert!(
            registry
                .encode()
                .contains("\nheddle_connections_ended_total{")
        );
        assert_eq!(metrics.evict_workload("other", "api"), 0);
        assert_eq!(metrics.evict_workload("shop", "api"), 2 * 4 + 2);
        let text = registry.encode();
        assert!(!text.contains("\"api\""), "{text}");
        assert!(text.contains(r#"source_workload="frontend""#), "{text}");
    }

    #[test]
    fn many_workloads_stay_bounded() {
        let registry = Registry::new();
        let metrics = TcpMetrics::register(&registry, 10).unwrap();
        for index in 0..100 {
            metrics.opened(&labels(&format!("client-{index}"), "api"));
        }
        let text = registry.encode();
        let series = text
            .lines()
            .filter(|line| line.starts_with("istio_tcp_connections_opened_total{"));
        assert_eq!(series.clone().count(), 11);
        assert!(
            series.into_iter().any(|line| line.ends_with("} 90")),
            "{text}"
        );
    }
}
