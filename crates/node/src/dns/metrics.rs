//! What the DNS server counts, resolved once so that counting is one addition.

use hickory_proto::op::ResponseCode;
use telemetry::{Counter, Family, Labels, Registry, TelemetryError};

use super::server::WorkloadDns;

/// Workloads per node that have drop counters of their own.
const MAX_SERIES: usize = 1000;

/// The DNS server's metrics. A clone is another handle on the same ones.
#[derive(Debug, Clone)]
pub struct DnsMetrics {
    pub(super) answered: Counter,
    pub(super) unknown: Counter,
    pub(super) refused: Counter,
    pub(super) malformed: Counter,
    pub(super) forwarded: Counter,
    pub(super) forward_failed: Counter,
    dropped: Family<DropLabels, Counter>,
}

impl DnsMetrics {
    /// Registers `heddle_dns_queries_total` and `heddle_dns_dropped_total`.
    ///
    /// # Errors
    /// [`TelemetryError::Duplicate`] if the registry has them already.
    pub fn register(registry: &Registry) -> Result<Self, TelemetryError> {
        let queries = registry.counter_family(
            "heddle_dns_queries_total",
            "DNS queries of workloads, by what became of them",
            16,
        )?;
        let outcome = |outcome: &str| queries.get(&[("outcome", outcome.to_owned())]);
        Ok(Self {
            answered: outcome("answered"),
            unknown: outcome("unknown_name"),
            refused: outcome("refused"),
            malformed: outcome("malformed"),
            forwarded: outcome("forwarded"),
            forward_failed: outcome("forward_failed"),
            dropped: registry.counter_family(
                "heddle_dns_dropped_total",
                "DNS queries and connections of a workload that were dropped because it had too many",
                MAX_SERIES,
            )?,
        })
    }

    pub(super) fn replied(&self, code: ResponseCode) {
        match code {
            ResponseCode::NoError => self.answered.inc(),
            ResponseCode::NXDomain => self.unknown.inc(),
            ResponseCode::FormErr => self.malformed.inc(),
            _ => self.refused.inc(),
        };
    }

    pub(super) fn dropped(&self, workload: &WorkloadDns, what: &'static str) -> Counter {
        self.dropped.get(&DropLabels {
            what,
            workload: workload.workload.clone(),
            namespace: workload.namespace.clone(),
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct DropLabels {
    what: &'static str,
    workload: String,
    namespace: String,
}

impl Labels for DropLabels {
    fn visit<'a>(&'a self, label: &mut dyn FnMut(&'static str, &'a str)) {
        label("what", self.what);
        label("source_workload", &self.workload);
        label("source_workload_namespace", &self.namespace);
    }
}
