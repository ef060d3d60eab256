//! The statuses of all pods, for whoever watches.

use std::collections::BTreeMap;

use api::pod::{PodPhase, PodSpec, PodStatus};
use tokio::sync::watch;

/// A watcher sees the newest state; states in between may be skipped, so that a slow one holds up nobody.
#[derive(Debug, Default)]
pub(super) struct Statuses {
    all: watch::Sender<BTreeMap<String, PodStatus>>,
}

impl Statuses {
    pub(super) fn watch(&self) -> watch::Receiver<BTreeMap<String, PodStatus>> {
        self.all.subscribe()
    }

    pub(super) fn phase(&self, uid: &str) -> PodPhase {
        self.all
            .borrow()
            .get(uid)
            .map_or(PodPhase::Pending, |status| status.phase)
    }

    pub(super) fn begin(&self, spec: &PodSpec) {
        let status = PodStatus {
            uid: spec.uid.clone(),
            node: spec.node.clone(),
            addresses: Vec::new(),
            phase: PodPhase::Pending,
            ready: false,
            restarts: 0,
            message: None,
        };
        self.all.send_modify(|all| {
            all.insert(spec.uid.clone(), status);
        });
    }

    /// Watchers hear of it only if something did change.
    pub(super) fn change(&self, uid: &str, change: impl FnOnce(&mut PodStatus)) {
        self.all.send_if_modified(|all| {
            let Some(status) = all.get_mut(uid) else {
                return false;
            };
            let before = status.clone();
            change(status);
            *status != before
        });
    }

    pub(super) fn remove(&self, uid: &str) {
        self.all.send_if_modified(|all| all.remove(uid).is_some());
    }
}
