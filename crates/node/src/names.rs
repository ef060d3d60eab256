//! The names behind the kernel's numbers, for flow records. Names outlive what they name for a while: the last
//! record of a connection arrives when its workload is already gone.

use std::{
    collections::{HashMap, VecDeque},
    sync::{PoisonError, RwLock},
};

/// Numbers that are gone but still have a name.
const MAX_GONE: usize = 8192;

/// A workload's names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct WorkloadNames {
    pub(crate) namespace: String,
    /// Name of the `Workload` object.
    pub(crate) workload: String,
    pub(crate) pod: String,
    /// SPIFFE id.
    pub(crate) identity: String,
}

/// Shared by the agent, which writes, and the flow reader.
#[derive(Debug, Default)]
pub(crate) struct NameBook {
    inner: RwLock<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    workloads: HashMap<u32, WorkloadNames>,
    policies: HashMap<u32, String>,
    services: HashMap<u32, String>,
    gone_workloads: VecDeque<u32>,
    gone_services: VecDeque<u32>,
}

impl NameBook {
    pub(crate) fn set_workload(&self, id: u32, names: WorkloadNames) {
        self.write(|inner| drop(inner.workloads.insert(id, names)));
    }

    pub(crate) fn retire_workload(&self, id: u32) {
        self.write(|inner| {
            inner.gone_workloads.push_back(id);
            if inner.gone_workloads.len() > MAX_GONE
                && let Some(oldest) = inner.gone_workloads.pop_front()
            {
                inner.workloads.remove(&oldest);
            }
        });
    }

    pub(crate) fn set_service(&self, id: u32, name: String) {
        self.write(|inner| drop(inner.services.insert(id, name)));
    }

    pub(crate) fn retire_service(&self, id: u32) {
        self.write(|inner| {
            inner.gone_services.push_back(id);
            if inner.gone_services.len() > MAX_GONE
                && let Some(oldest) = inner.gone_services.pop_front()
            {
                inner.services.remove(&oldest);
            }
        });
    }

    /// Policies are as many as were ever loaded at once, and few: they stay.
    pub(crate) fn set_policy(&self, id: u32, name: String) {
        self.write(|inner| drop(inner.policies.insert(id, name)));
    }

    pub(crate) fn workload(&self, id: u32) -> Option<WorkloadNames> {
        self.read(|inner| inner.workloads.get(&id).cloned())
    }

    pub(crate) fn policy(&self, id: u32) -> Option<String> {
        self.read(|inner| inner.policies.get(&id).cloned())
    }

    pub(crate) fn service(&self, id: u32) -> Option<String> {
        self.read(|inner| inner.services.get(&id).cloned())
    }

    fn read<T>(&self, look: impl FnOnce(&Inner) -> T) -> T {
        look(&self.inner.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, change: impl FnOnce(&mut Inner)) {
        change(&mut self.inner.write().unwrap_or_else(PoisonError::into_inner));
    }
}
