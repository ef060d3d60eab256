//! One metric with all its label sets, of which there are never more than a bound.
//!
//! Families are made by [`crate::registry::Registry`]. A label set beyond the bound is folded into one
//! series whose label values all read `overflow`, so that memory stays bounded and sums stay right.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use prometheus_client::{
    encoding::{EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder, MetricEncoder},
    metrics::{MetricType, TypedMetric, counter::Counter},
};

use crate::labels::{Labels, Series};

/// Value of every label of the series that takes what the bound keeps out.
pub const OVERFLOW: &str = "overflow";

/// One metric with all its label sets. A clone is another handle on the same family.
pub struct Family<L, M> {
    inner: Arc<Inner<L, M>>,
}

impl<L: Labels, M: Clone> Family<L, M> {
    pub(crate) fn new(
        max_series: usize,
        overflowed: Counter,
        make: impl Fn() -> M + Send + Sync + 'static,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                series: RwLock::default(),
                max_series,
                overflowed,
                make: Box::new(make),
            }),
        }
    }

    /// The metric with these labels, made on first use. It is a cheap shared handle: resolve it once and keep it.
    ///
    /// At the bound this is the family's overflow series. A handle that outlives the eviction of its
    /// series still counts, but nobody sees it any more.
    #[must_use]
    pub fn get(&self, labels: &L) -> M {
        let known = {
            let table = self.inner.series.read();
            let table = table.unwrap_or_else(PoisonError::into_inner);
            table.by_labels.get(labels).cloned()
        };
        known.unwrap_or_else(|| self.inner.insert(labels))
    }

    /// Removes the series for which `gone` is true, and returns how many there were. The overflow series stays.
    pub fn evict(&self, gone: impl Fn(&L) -> bool) -> usize {
        self.inner.retain(|labels| !gone(labels))
    }
}

struct Inner<L, M> {
    series: RwLock<Table<L, M>>,
    max_series: usize,
    overflowed: Counter,
    make: Box<dyn Fn() -> M + Send + Sync>,
}

struct Table<L, M> {
    by_labels: HashMap<L, M>,
    /// The first label set that found the table full (for its label names), and the metric that all such share.
    overflow: Option<(L, M)>,
}

impl<L, M> Default for Table<L, M> {
    fn default() -> Self {
        Self {
            by_labels: HashMap::new(),
            overflow: None,
        }
    }
}

impl<L: Labels, M: Clone> Inner<L, M> {
    fn insert(&self, labels: &L) -> M {
        let mut table = self.series.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(metric) = table.by_labels.get(labels) {
            return metric.clone();
        }
        if table.by_labels.len() < self.max_series {
            let metric = (self.make)();
            table.by_labels.insert(labels.clone(), metric.clone());
            return metric;
        }
        self.overflowed.inc();
        let (_, metric) = table
            .overflow
            .get_or_insert_with(|| (labels.clone(), (self.make)()));
        metric.clone()
    }

    fn retain(&self, keep: impl Fn(&L) -> bool) -> usize {
        let mut table = self.series.write().unwrap_or_else(PoisonError::into_inner);
        let before = table.by_labels.len();
        table.by_labels.retain(|labels, _| keep(labels));
        before - table.by_labels.len()
    }
}

/// A family of any type, as the registry keeps it.
pub(crate) trait Evict: Send + Sync {
    fn evict_series(&self, metric: &str, gone: &dyn Fn(&Series<'_>) -> bool) -> usize;
}

impl<L: Labels, M: Clone + Send + Sync> Evict for Family<L, M> {
    fn evict_series(&self, metric: &str, gone: &dyn Fn(&Series<'_>) -> bool) -> usize {
        self.evict(|labels| gone(&Series::new(metric, labels)))
    }
}

impl<L: Labels, M: EncodeMetric + TypedMetric + Clone> EncodeMetric for Family<L, M> {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let table = self.inner.series.read();
        let table = table.unwrap_or_else(PoisonError::into_inner);
        for (labels, metric) in &table.by_labels {
            encode_series(&mut encoder, &Known(labels), metric)?;
        }
        if let Some((labels, metric)) = &table.overflow {
            encode_series(&mut encoder, &Overflow(labels), metric)?;
        }
        Ok(())
    }

    fn metric_type(&self) -> MetricType {
        M::TYPE
    }

    fn is_empty(&self) -> bool {
        let table = self.inner.series.read();
        let table = table.unwrap_or_else(PoisonError::into_inner);
        table.by_labels.is_empty() && table.overflow.is_none()
    }
}

fn encode_series(
    encoder: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    metric: &impl EncodeMetric,
) -> fmt::Result {
    metric.encode(encoder.encode_family(labels)?)
}

struct Known<'a, L>(&'a L);

impl<L: Labels> EncodeLabelSet for Known<'_, L> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        encode_labels(self.0, encoder, |value| value)
    }
}

struct Overflow<'a, L>(&'a L);

impl<L: Labels> EncodeLabelSet for Overflow<'_, L> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> fmt::Result {
        encode_labels(self.0, encoder, |_| OVERFLOW)
    }
}

fn encode_labels(
    labels: &impl Labels,
    encoder: &mut LabelSetEncoder<'_>,
    value: impl Fn(&str) -> &str,
) -> fmt::Result {
    let mut result = Ok(());
    labels.visit(&mut |name, written| {
        if result.is_ok() {
            result = (name, value(written)).encode(encoder.encode_label());
        }
    });
    result
}

impl<L, M> Clone for Family<L, M> {
    fn clone(&self) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
        }
    }
}

impl<L, M> fmt::Debug for Family<L, M> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Family")
            .field("max_series", &self.inner.max_series)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Labelled = [(&'static str, String); 1];

    fn named(name: &str) -> Labelled {
        [("name", name.to_owned())]
    }

    fn family(max_series: usize) -> (Family<Labelled, Counter>, Counter) {
        let overflowed = Counter::default();
        (
            Family::new(max_series, overflowed.clone(), Counter::default),
            overflowed,
        )
    }

    #[test]
    fn same_labels_share_one_counter() {
        let (family, _) = family(2);
        family.get(&named("a")).inc();
        family.clone().get(&named("a")).inc();
        assert_eq!(family.get(&named("a")).get(), 2);
        assert_eq!(family.get(&named("b")).get(), 0);
    }

    #[test]
    fn series_beyond_the_bound_share_the_overflow_series() {
        let (family, overflowed) = family(1);
        family.get(&named("a")).inc();
        family.get(&named("b")).inc_by(2);
        family.get(&named("c")).inc_by(3);
        assert_eq!(family.get(&named("a")).get(), 1);
        assert_eq!(family.get(&named("d")).get(), 5);
        assert_eq!(overflowed.get(), 3);
    }

    #[test]
    fn eviction_makes_room() {
        let (family, overflowed) = family(1);
        family.get(&named("a")).inc();
        assert_eq!(family.evict(|[(_, name)]| name == "a"), 1);
        assert_eq!(family.evict(|[(_, name)]| name == "a"), 0);
        assert_eq!(family.get(&named("b")).get(), 0);
        assert_eq!(overflowed.get(), 0);
    }

    #[test]
    fn threads_agree_on_the_bound() {
        let (family, overflowed) = family(100);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for index in 0..200 {
                        family.get(&named(&index.to_string())).inc();
                    }
                });
            }
        });
        let table = family.inner.series.read().expect("no thread panicked");
        assert_eq!(table.by_labels.len(), 100);
        let counted: u64 = table.by_labels.values().map(Counter::get).sum();
        let (_, overflow) = table.overflow.as_ref().expect("100 did not fit");
        assert_eq!(counted + overflow.get(), 800);
        assert_eq!(overflowed.get(), overflow.get());
    }
}
