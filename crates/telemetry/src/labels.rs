//! What a label set is, and how one is looked at without knowing its type.
//!
//! [`crate::family`] stores label sets; [`crate::registry`] shows them to eviction predicates as [`Series`].

use std::{fmt::Debug, hash::Hash, sync::Arc};

/// The labels of one series. Implementations name the same labels in the same order every time.
pub trait Labels: Clone + Eq + Hash + Debug + Send + Sync + 'static {
    /// Calls `label` with the name and the value of each label, in the order they are written out.
    fn visit<'a>(&'a self, label: &mut dyn FnMut(&'static str, &'a str));
}

/// A few labels that need no type of their own.
impl<const N: usize> Labels for [(&'static str, String); N] {
    fn visit<'a>(&'a self, label: &mut dyn FnMut(&'static str, &'a str)) {
        for (name, value) in self {
            label(name, value);
        }
    }
}

/// Shared labels: several families keep one copy of a large label set.
impl<L: Labels> Labels for Arc<L> {
    fn visit<'a>(&'a self, label: &mut dyn FnMut(&'static str, &'a str)) {
        L::visit(self, label);
    }
}

/// One series as an eviction predicate sees it.
#[derive(Debug)]
pub struct Series<'a> {
    /// Name of the metric, as registered.
    pub metric: &'a str,
    labels: Vec<(&'static str, &'a str)>,
}

impl<'a> Series<'a> {
    pub(crate) fn new(metric: &'a str, labels: &'a impl Labels) -> Self {
        let mut pairs = Vec::new();
        labels.visit(&mut |name, value| pairs.push((name, value)));
        Self {
            metric,
            labels: pairs,
        }
    }

    /// The value of a label, `None` if the metric has no such label.
    #[must_use]
    pub fn label(&self, name: &str) -> Option<&'a str> {
        self.labels
            .iter()
            .find(|(label, _)| *label == name)
            .map(|(_, value)| *value)
    }
}
