//! Finds the selectors that match a set of labels without trying them all.
//!
//! A selector is filed under the rarest of its label pairs; only those filed under a pair that the labels have
//! are tried. Thousands of services and workloads thus cost about one try each.

use std::collections::{BTreeMap, HashMap};

/// Labels of a workload, or pairs that a selector asks for.
pub(crate) type Labels = BTreeMap<String, String>;

/// Selectors with what they belong to. `T` is cheap to copy: an index or a reference.
#[derive(Debug)]
pub(crate) struct SelectorIndex<'a, T> {
    by_pair: HashMap<(&'a str, &'a str), Vec<Filed<'a, T>>>,
}

#[derive(Debug)]
struct Filed<'a, T> {
    /// `None` matches in every namespace.
    namespace: Option<&'a str>,
    selector: &'a Labels,
    item: T,
}

impl<'a, T: Copy> SelectorIndex<'a, T> {
    /// Files selectors with the namespace that they are for (`None`: all). An empty selector matches nothing here:
    /// what it means differs by kind and is the caller's to decide.
    pub(crate) fn new(
        selectors: impl Iterator<Item = (Option<&'a str>, &'a Labels, T)> + Clone,
    ) -> Self {
        let mut frequency: HashMap<(&str, &str), usize> = HashMap::new();
        for (_, selector, _) in selectors.clone() {
            for (key, value) in selector {
                *frequency.entry((key, value)).or_default() += 1;
            }
        }
        let mut by_pair: HashMap<_, Vec<_>> = HashMap::new();
        for (namespace, selector, item) in selectors {
            let pairs = selector
                .iter()
                .map(|(key, value)| (key.as_str(), value.as_str()));
            if let Some(rarest) = pairs.min_by_key(|pair| frequency.get(pair)) {
                by_pair.entry(rarest).or_default().push(Filed {
                    namespace,
                    selector,
                    item,
                });
            }
        }
        Self { by_pair }
    }

    /// What matches these labels in this namespace, in no order.
    pub(crate) fn matching<'s>(
        &'s self,
        namespace: &'s str,
        labels: &'s Labels,
    ) -> impl Iterator<Item = T> + use<'s, 'a, T> {
        let by_pair: &HashMap<(&'s str, &'s str), Vec<Filed<'s, T>>> = &self.by_pair;
        labels
            .iter()
            .filter_map(|(key, value)| by_pair.get(&(key.as_str(), value.as_str())))
            .flatten()
            .filter(move |filed| filed.namespace.is_none_or(|wanted| wanted == namespace))
            .filter(|filed| matches(filed.selector, labels))
            .map(|filed| filed.item)
    }
}

/// Whether the labels have every pair of the selector.
fn matches(selector: &Labels, labels: &Labels) -> bool {
    selector
        .iter()
        .all(|(key, value)| labels.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(key, value)| (key.to_string(), value.to_string()))
            .collect()
    }

    #[test]
    fn every_pair_must_match_in_the_right_namespace() {
        let selectors = [
            (Some("a"), labels(&[("app", "x")]), 1),
            (Some("a"), labels(&[("app", "x"), ("tier", "web")]), 2),
            (Some("b"), labels(&[("app", "x")]), 3),
            (None, labels(&[("tier", "web")]), 4),
            (Some("a"), labels(&[]), 5),
        ];
        let index = SelectorIndex::new(
            selectors
                .iter()
                .map(|(ns, labels, item)| (*ns, labels, *item)),
        );
        let find = |namespace, pairs: &[(&str, &str)]| {
            let labels = labels(pairs);
            let mut found: Vec<i32> = index.matching(namespace, &labels).collect();
            found.sort_unstable();
            found
        };
        assert_eq!(find("a", &[("app", "x")]), [1]);
        assert_eq!(
            find("a", &[("app", "x"), ("tier", "web"), ("v", "1")]),
            [1, 2, 4]
        );
        assert_eq!(find("b", &[("app", "x"), ("tier", "db")]), [3]);
        assert_eq!(find("c", &[("tier", "web")]), [4]);
        assert!(find("a", &[]).is_empty());
    }
}
