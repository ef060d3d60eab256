//! What could not be put into the kernel, and why: told by `heddle status` while it is so, and tried again.

use std::collections::BTreeMap;

use crate::state::Changes;

/// A part of the mesh's state that is applied, or fails, as a whole.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// Policies and what they say of this node's workloads.
    Policies,
    /// A workload's addresses, by resource name.
    Workload(String),
    /// A service, by resource name.
    Service(String),
}

/// Parts that are not in effect. Bounded by what the control plane sends: there is one entry per resource.
#[derive(Debug, Default)]
pub(crate) struct Unapplied {
    parts: BTreeMap<Part, String>,
    newest: Option<String>,
}

impl Unapplied {
    /// Notes how a part went. Returns whether this is a new problem.
    pub(super) fn note(&mut self, part: Part, failure: Option<String>) -> bool {
        let Some(failure) = failure else {
            if self.parts.remove(&part).is_some() {
                tracing::info!(?part, "in effect now");
            }
            return false;
        };
        if self.parts.get(&part) == Some(&failure) {
            return false;
        }
        tracing::error!(problem = %failure, "not in effect");
        self.newest = Some(failure.clone());
        self.parts.insert(part, failure);
        true
    }

    /// What to try again.
    pub(crate) fn changes(&self) -> Changes {
        let mut changes = Changes::default();
        for part in self.parts.keys() {
            match part {
                Part::Policies => changes.policies = true,
                Part::Workload(name) => drop(changes.workloads.insert(name.clone())),
                Part::Service(name) => drop(changes.services.insert(name.clone())),
            }
        }
        changes
    }

    /// Whether everything is in effect.
    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// What is wrong, one line per part.
    pub(crate) fn problems(&self) -> impl Iterator<Item = &String> {
        self.parts.values()
    }

    /// The problem that came last, should it still be one.
    pub(crate) fn newest(&self) -> Option<&String> {
        let newest = self.newest.as_ref()?;
        self.parts.values().find(|problem| *problem == newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_stays_until_its_part_is_in_effect() {
        let mut unapplied = Unapplied::default();
        let service = || Part::Service("shop/web".into());
        assert!(unapplied.note(service(), Some("full".into())));
        assert!(!unapplied.note(service(), Some("full".into())), "the same");
        assert!(unapplied.note(Part::Policies, Some("full, too".into())));
        assert_eq!(unapplied.newest().map(String::as_str), Some("full, too"));
        let again = unapplied.changes();
        assert!(again.policies && again.services.contains("shop/web"));
        assert!(again.workloads.is_empty());
        assert!(!unapplied.note(service(), None));
        assert!(!unapplied.note(Part::Policies, None));
        assert!(unapplied.is_empty() && unapplied.newest().is_none());
    }
}
