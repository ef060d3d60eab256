//! Where metrics are registered, encoded for a scrape, and evicted.
//!
//! Names are given as users see them in queries, counters with their `_total`. How one metric keeps
//! its series is in [`crate::family`].

use std::{
    collections::HashSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry,
};
use thiserror::Error;

use crate::{
    family::{Evict, Family},
    labels::{Labels, Series},
};

/// The `Content-Type` of what [`Registry::encode`] returns (OpenMetrics 1.0).
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why a metric cannot be registered. All are mistakes in the program, not in its input.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TelemetryError {
    /// The name is taken.
    #[error("metric {name} is already registered; register it once and share the handle")]
    Duplicate {
        /// The name asked for.
        name: String,
    },
    /// Not `[a-zA-Z_:][a-zA-Z0-9_:]*`.
    #[error("metric name {name:?} has characters other than letters, digits, `_` and `:`")]
    InvalidName {
        /// The name asked for.
        name: String,
    },
    /// Counters are exposed as `..._total`.
    #[error("counter {name} must have a name that ends in _total")]
    CounterWithoutTotal {
        /// The name asked for.
        name: String,
    },
}

/// All metrics of a process. A clone is another handle on the same registry.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Mutex<Inner>>,
    overflowed: Counter,
}

impl Registry {
    /// An empty registry, but for `heddle_telemetry_series_overflow_total`: how often labels were
    /// asked for that their metric had no room for.
    #[must_use]
    pub fn new() -> Self {
        let new = Self {
            inner: Arc::default(),
            overflowed: Counter::default(),
        };
        new.lock().add(
            "heddle_telemetry_series_overflow",
            "Look-ups of label sets that did not fit their metric's bound and were folded into its overflow series",
            new.overflowed.clone(),
        );
        new
    }

    /// Registers a counter without labels.
    ///
    /// # Errors
    /// [`TelemetryError`]: the name is taken, malformed, or does not end in `_total`.
    pub fn counter(&self, name: &str, help: &str) -> Result<Counter, TelemetryError> {
        let counter = Counter::default();
        let mut inner = self.lock();
        let name = inner.claim_counter(name)?;
        inner.add(name, help, counter.clone());
        Ok(counter)
    }

    /// Registers a counter with labels `L`, of at most `max_series` series and one for overflow.
    ///
    /// # Errors
    /// [`TelemetryError`]: the name is taken, malformed, or does not end in `_total`.
    pub fn counter_family<L: Labels>(
        &self,
        name: &str,
        help: &str,
        max_series: usize,
    ) -> Result<Family<L, Counter>, TelemetryError> {
        let family = Family::new(max_series, self.overflowed.clone(), Counter::default);
        let mut inner = self.lock();
        let exposed = inner.claim_counter(name)?;
        inner.add_family(name, exposed, help, family.clone());
        Ok(family)
    }

    /// Registers a gauge with labels `L`, of at most `max_series` series and one for overflow.
    ///
    /// # Errors
    /// [`TelemetryError`]: the name is taken or malformed.
    pub fn gauge_family<L: Labels>(
        &self,
        name: &str,
        help: &str,
        max_series: usize,
    ) -> Result<Family<L, Gauge>, TelemetryError> {
        let family = Family::new(max_series, self.overflowed.clone(), Gauge::default);
        let mut inner = self.lock();
        inner.claim(name)?;
        inner.add_family(name, name, help, family.clone());
        Ok(family)
    }

    /// Registers a histogram with labels `L` and these upper bounds of buckets (`+Inf` is added), of at most
    /// `max_series` series and one for overflow.
    ///
    /// # Errors
    /// [`TelemetryError`]: the name is taken or malformed.
    pub fn histogram_family<L: Labels>(
        &self,
        name: &str,
        help: &str,
        max_series: usize,
        buckets: &'static [f64],
    ) -> Result<Family<L, Histogram>, TelemetryError> {
        let family = Family::new(max_series, self.overflowed.clone(), || {
            Histogram::new(buckets.iter().copied())
        });
        let mut inner = self.lock();
        inner.claim(name)?;
        inner.add_family(name, name, help, family.clone());
        Ok(family)
    }

    /// Removes every series, of whatever metric, for which `gone` is true; returns how many there were.
    ///
    /// For workloads that are gone: their series would otherwise be scraped, and use up bounds, for ever.
    pub fn evict(&self, gone: impl Fn(&Series<'_>) -> bool) -> usize {
        self.lock()
            .families
            .iter()
            .map(|(name, family)| family.evict_series(name, &gone))
            .sum()
    }

    /// All metrics as OpenMetrics text, which Prometheus reads too. Serve it as [`CONTENT_TYPE`].
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.lock().exposed)
            .expect("writing to a String cannot fail and no label set of ours returns an error");
        text
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Registry {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Registry").finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inner {
    exposed: registry::Registry,
    names: HashSet<String>,
    families: Vec<(String, Box<dyn Evict>)>,
}

impl Inner {
    /// Reserves a counter's name and returns it without the suffix that the encoder appends itself.
    fn claim_counter<'a>(&mut self, name: &'a str) -> Result<&'a str, TelemetryError> {
        let Some(exposed) = name.strip_suffix("_total") else {
            return Err(TelemetryError::CounterWithoutTotal { name: name.into() });
        };
        self.claim(exposed)?;
        Ok(exposed)
    }

    fn claim(&mut self, name: &str) -> Result<(), TelemetryError> {
        // https://prometheus.io/docs/concepts/data_model/#metric-names-and-labels
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':';
        if !name.bytes().all(valid) || !name.starts_with(|first: char| !first.is_ascii_digit()) {
            return Err(TelemetryError::InvalidName { name: name.into() });
        }
        if !self.names.insert(name.to_owned()) {
            return Err(TelemetryError::Duplicate { name: name.into() });
        }
        Ok(())
    }

    fn add_family<L: Labels, M: Clone + Send + Sync>(
        &mut self,
        name: &str,
        exposed: &str,
        help: &str,
        family: Family<L, M>,
    ) where
        Family<L, M>: registry::Metric,
    {
        self.families
            .push((name.to_owned(), Box::new(family.clone())));
        self.add(exposed, help, family);
    }

    fn add(&mut self, name: &str, help: &str, metric: impl registry::Metric) {
        // The encoder ends the text with a full stop of its own.
        self.exposed
            .register(name, help.trim_end_matches('.'), metric);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Workload = [(&'static str, String); 1];

    fn workload(name: &str) -> Workload {
        [("workload", name.to_owned())]
    }

    fn lines(registry: &Registry) -> Vec<String> {
        let text = registry.encode();
        assert!(text.ends_with("# EOF\n"), "{text}");
        text.lines().map(str::to_owned).collect()
    }

    fn has(registry: &Registry, line: &str) -> bool {
        lines(registry).iter().any(|found| found == line)
    }

    #[test]
    fn encodes_every_kind_under_the_name_given() {
        let registry = Registry::new();
        registry
            .counter("heddle_restarts_total", "Restarts.")
            .unwrap()
            .inc();
        registry
            .counter_family("heddle_hits_total", "Hits", 10)
            .unwrap()
            .get(&workload("a\"b"))
            .inc_by(3);
        registry
            .gauge_family("heddle_open", "Open", 10)
            .unwrap()
            .get(&workload("a"))
            .set(-2);
        registry
            .histogram_family("heddle_wait_seconds", "Wait", 10, &[0.1, 1.0])
            .unwrap()
            .get(&workload("a"))
            .observe(0.5);
        for line in [
            "# HELP heddle_restarts Restarts.",
            "# TYPE heddle_restarts counter",
            "heddle_restarts_total 1",
            r#"heddle_hits_total{workload="a\"b"} 3"#,
            r#"heddle_open{workload="a"} -2"#,
            r#"heddle_wait_seconds_bucket{le="0.1",workload="a"} 0"#,
            r#"heddle_wait_seconds_bucket{le="1.0",workload="a"} 1"#,
            r#"heddle_wait_seconds_bucket{le="+Inf",workload="a"} 1"#,
            "heddle_telemetry_series_overflow_total 0",
        ] {
            assert!(has(&registry, line), "{line} in {:#?}", lines(&registry));
        }
    }

    #[test]
    fn overflow_is_one_series_and_counted() {
        let registry = Registry::new();
        let family = registry.counter_family("hits_total", "Hits", 1).unwrap();
        for name in ["a", "b", "c"] {
            family.get(&workload(name)).inc();
        }
        assert!(has(&registry, r#"hits_total{workload="a"} 1"#));
        assert!(has(&registry, r#"hits_total{workload="overflow"} 2"#));
        assert!(has(&registry, "heddle_telemetry_series_overflow_total 2"));
    }

    #[test]
    fn evicts_over_all_metrics_by_label() {
        let registry = Registry::new();
        let hits = registry.counter_family("hits_total", "Hits", 9).unwrap();
        let open = registry.gauge_family("open", "Open", 9).unwrap();
        for name in ["stays", "goes"] {
            hits.get(&workload(name)).inc();
            open.get(&workload(name)).set(1);
        }
        assert_eq!(registry.evict(|series| series.label("pod").is_some()), 0);
        let goes = |series: &Series<'_>| series.label("workload") == Some("goes");
        assert_eq!(
            registry.evict(|series| series.metric == "open" && goes(series)),
            1
        );
        assert!(has(&registry, r#"hits_total{workload="goes"} 1"#));
        assert_eq!(registry.evict(goes), 1);
        assert!(!registry.encode().contains("goes"));
        assert!(has(&registry, r#"open{workload="stays"} 1"#));
    }

    #[test]
    fn refuses_bad_names() {
        let registry = Registry::new();
        registry.counter("hits_total", "Hits").unwrap();
        assert_eq!(
            registry.gauge_family::<Workload>("hits", "Hits", 1).err(),
            Some(TelemetryError::Duplicate {
                name: "hits".into()
            })
        );
        assert!(matches!(
            registry.counter("hits", "Hits"),
            Err(TelemetryError::CounterWithoutTotal { .. })
        ));
        for name in ["", "1st", "a-b", "a b"] {
            assert!(matches!(
                registry.gauge_family::<Workload>(name, "", 1),
                Err(TelemetryError::InvalidName { .. })
            ));
        }
    }
}
