//! Address → workload, for every workload of the mesh.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use api::mesh::MeshConfig;
use kernel::{Address, AddressEntry, KernelError, Tables};

use super::{ApplyError, Local};
use crate::{
    ids::Ids,
    names::{NameBook, WorkloadNames},
    state::{MeshState, Workload},
};

/// What is in the table, by resource name.
#[derive(Debug)]
pub(super) struct Addresses {
    written: HashMap<String, Written>,
    /// Numbers of other nodes' workloads that an earlier agent gave out.
    recovered: HashMap<Address, u32>,
}

#[derive(Debug)]
struct Written {
    id: u32,
    local: bool,
    addresses: Vec<IpAddr>,
}

impl Addresses {
    pub(super) fn recover(tables: &Tables) -> Self {
        let remote = tables
            .addresses
            .iter()
            .filter(|(_, entry)| entry.flags & AddressEntry::LOCAL == 0);
        Self {
            written: HashMap::new(),
            recovered: remote
                .map(|(address, entry)| (*address, entry.workload))
                .collect(),
        }
    }

    /// Whether the resource was a workload of this node when it was last applied.
    pub(super) fn is_local(&self, name: &str) -> bool {
        self.written.get(name).is_some_and(|written| written.local)
    }

    #[allow(clippy::too_many_arguments)] // One call site; a struct would only rename the same list.
    pub(super) fn apply(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        state: &MeshState,
        locals: &HashMap<String, Local>,
        node: &str,
        name: &str,
        names: &NameBook,
        mesh: &MeshConfig,
        policy_sets: [u32; 2],
    ) -> Result<(), ApplyError> {
        let previous = self.written.remove(name);
        let wanted = match state.workloads.get(name) {
            Some(workload) => self.number(workload, previous.as_ref(), ids, locals, node, name)?,
            None => None,
        };
        if let (Some(written), Some(workload)) = (&wanted, state.workloads.get(name))
            && !written.local
        {
            names.set_workload(written.id, names_of(workload, mesh));
        }
        let mut failure = None;
        for address in wanted.iter().flat_map(|wanted| &wanted.addresses) {
            let entry = wanted.as_ref().map(|wanted| AddressEntry {
                workload: wanted.id,
                flags: if wanted.local { AddressEntry::LOCAL } else { 0 },
                policy_set: policy_sets[usize::from(address.is_ipv6())],
            });
            let outcome = entry.map(|entry| tables.addresses.set((*address).into(), entry));
            failure = failure.or(outcome.and_then(Result::err));
        }
        let keep: &[IpAddr] = wanted.as_ref().map_or(&[], |wanted| &wanted.addresses);
        for address in previous.iter().flat_map(|previous| &previous.addresses) {
            let taken_over = tables
                .addresses
                .get(&(*address).into())
                .is_some_and(|entry| {
                    previous
                        .as_ref()
                        .is_some_and(|previous| previous.id != entry.workload)
                });
            if !keep.contains(address) && !taken_over {
                let outcome = tables.addresses.remove(&(*address).into());
                failure = failure.or(outcome.err());
            }
        }
        if wanted.is_none()
            && let Some(previous) = &previous
            && !previous.local
        {
            names.retire_workload(previous.id);
        }
        if let Some(wanted) = wanted {
            self.written.insert(name.to_owned(), wanted);
        }
        failure.map_or(Ok(()), |source| Err(ApplyError::at(name)(source)))
    }

    pub(super) fn reconcile(&mut self, tables: &mut Tables) -> Result<(), KernelError> {
        self.recovered.clear();
        let current: HashSet<Address> = self
            .written
            .values()
            .flat_map(|written| &written.addresses)
            .map(|address| (*address).into())
            .collect();
        tables.addresses.retain(|address| current.contains(address))
    }

    /// Whose number the workload's addresses lead to; `None` for one of this node that is not enrolled.
    fn number(
        &self,
        workload: &Workload,
        previous: Option<&Written>,
        ids: &mut Ids,
        locals: &HashMap<String, Local>,
        node: &str,
        name: &str,
    ) -> Result<Option<Written>, ApplyError> {
        let addresses = workload.addresses.clone();
        if let Some(local) = locals.get(&workload.pod()) {
            return Ok(Some(Written {
                id: local.id,
                local: true,
                addresses,
            }));
        }
        if workload.message.node == node {
            return Ok(None);
        }
        let known = previous
            .filter(|previous| !previous.local)
            .map(|previous| previous.id)
            .or_else(|| {
                let mut recovered = addresses
                    .iter()
                    .filter_map(|address| self.recovered.get(&(*address).into()));
                recovered.next().copied()
            });
        let id = match known {
            Some(id) => id,
            None => ids.fresh().map_err(ApplyError::at(name))?,
        };
        Ok(Some(Written {
            id,
            local: false,
            addresses,
        }))
    }
}

fn names_of(workload: &Workload, mesh: &MeshConfig) -> WorkloadNames {
    let message = &workload.message;
    WorkloadNames {
        namespace: message.namespace.clone(),
        workload: workload.object().to_owned(),
        pod: message.name.clone(),
        identity: mesh.spiffe_id(&message.namespace, workload.service_account()),
    }
}
