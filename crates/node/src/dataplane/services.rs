//! Service address and port → weighted table of endpoints.
//!
//! A table is never changed in place: the new one is written under the next generation, the service's entry is
//! switched to it in one write, and the old one is removed.

use std::collections::{HashMap, HashSet};

use api::pod::Protocol;
use kernel::{
    Address, EndpointEntry, KernelError, ServiceEntry, ServiceKey, SlotEntry, SlotKey, Tables,
};
use xds::proto::workload::load_balancing;

use super::ApplyError;
use crate::{
    alias,
    ids::Ids,
    names::NameBook,
    state::{MeshState, Workload},
};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What is in the tables, by resource name of the service.
#[derive(Debug)]
pub(crate) struct Services {
    live: HashMap<String, HashMap<ServiceKey, LivePort>>,
    recovered: HashMap<ServiceKey, LivePort>,
    /// Addresses marked as a service's, by resource name, and how many services share one.
    marked: HashMap<String, HashSet<Address>>,
    owners: HashMap<Address, u32>,
}

/// The live table of one service port.
#[derive(Debug)]
struct LivePort {
    entry: ServiceEntry,
    endpoints: HashMap<Target, u32>,
    /// What the table was built from; `None` if an earlier agent built it.
    built_from: Option<Vec<(Target, u32)>>,
}

type Target = (Address, u16);

/// An endpoint that a service port may lead to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SharedEndpoint {
    /// `NAMESPACE/POD`.
    pub(crate) pod: String,
    pub(crate) address: std::net::IpAddr,
    pub(crate) port: u16,
    pub(crate) weight: u32,
}

impl Services {
    /// Finds the tables that an earlier agent left.
    pub(super) fn recover(tables: &Tables) -> Self {
        let mut endpoints: HashMap<u32, HashMap<Target, u32>> = HashMap::new();
        for (id, endpoint) in tables.endpoints.iter() {
            let of_service = endpoints.entry(endpoint.service).or_default();
            of_service.insert((endpoint.address, endpoint.port), *id);
        }
        let recovered =
            tables
                .services
                .iter()
                .filter(|(key, _)| key.port != 0)
                .map(|(key, entry)| {
                    let live = LivePort {
                        entry: *entry,
                        endpoints: endpoints.remove(&entry.service).unwrap_or_default(),
                        built_from: None,
                    };
                    (*key, live)
                });
        Self {
            live: HashMap::new(),
            recovered: recovered.collect(),
            marked: HashMap::new(),
            owners: HashMap::new(),
        }
    }

    /// Brings one service up to date.
    pub(super) fn apply(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        state: &MeshState,
        node: &str,
        name: &str,
        names: &NameBook,
    ) -> Result<(), ApplyError> {
        let wanted = wanted_ports(state, node, name);
        let mut live = self.live.remove(name).unwrap_or_default();
        let mut failure = None;
        for (key, (affinity, endpoints)) in &wanted {
            let known = live.remove(key).or_else(|| self.recovered.remove(key));
            let port = match known {
                Some(port) => port,
                None => LivePort::new(ids.fresh().map_err(ApplyError::at(name))?),
            };
            names.set_service(port.entry.service, display_name(state, name));
            let (port, outcome) = port.switch(tables, ids, *key, *affinity, endpoints);
            self.live
                .entry(name.to_owned())
                .or_default()
                .insert(*key, port);
            failure = failure.or(outcome.err());
        }
        for (key, port) in live {
            names.retire_service(port.entry.service);
            failure = failure.or(port.remove(tables, key).err());
        }
        failure = failure.or(self.mark_addresses(tables, name, &wanted).err());
        failure.map_or(Ok(()), |source| Err(ApplyError::at(name)(source)))
    }

    pub(super) fn reconcile(&mut self, tables: &mut Tables) -> Result<(), KernelError> {
        for (key, port) in std::mem::take(&mut self.recovered) {
            port.remove(tables, key)?;
        }
        let live: Vec<&LivePort> = self.live.values().flat_map(HashMap::values).collect();
        let generations: HashSet<(u32, u32)> = live
            .iter()
            .map(|port| (port.entry.service, port.entry.generation))
            .collect();
        let endpoints: HashSet<u32> = live
            .iter()
            .flat_map(|port| port.endpoints.values())
            .copied()
            .collect();
        let owners = &self.owners;
        tables
            .services
            .retain(|key| owners.contains_key(&key.address))?;
        tables
            .slots
            .retain(|key| generations.contains(&(key.service, key.generation)))?;
        tables.endpoints.retain(|id| endpoints.contains(id))
    }

    /// An address with any port of a service is a service's address: its other ports are refused, not sent out.
    fn mark_addresses(
        &mut self,
        tables: &mut Tables,
        name: &str,
        wanted: &Wanted,
    ) -> Result<(), KernelError> {
        let marker = |address| ServiceKey {
            address,
            ..ServiceKey::default()
        };
        let mine: HashSet<Address> = wanted.keys().map(|key| key.address).collect();
        let before = self.marked.remove(name).unwrap_or_default();
        for address in mine.difference(&before) {
            *self.owners.entry(*address).or_default() += 1;
            tables
                .services
                .set(marker(*address), ServiceEntry::default())?;
        }
        for address in before.difference(&mine) {
            let owners = self.owners.entry(*address).or_default();
            *owners = owners.saturating_sub(1);
            if *owners == 0 {
                self.owners.remove(address);
                tables.services.remove(&marker(*address))?;
            }
        }
        if !mine.is_empty() {
            self.marked.insert(name.to_owned(), mine);
        }
        Ok(())
    }
}

type Wanted = HashMap<ServiceKey, (u32, Vec<(Target, u32)>)>;

/// What the tables should say of a service: per key, affinity seconds and endpoints with weights.
fn wanted_ports(state: &MeshState, node: &str, name: &str) -> Wanted {
    let Some(service) = state.services.get(name) else {
        return HashMap::new();
    };
    let mut wanted = HashMap::new();
    for vip in &service.vips {
        for (number, protocol) in service.ports() {
            let key = ServiceKey {
                address: (*vip).into(),
                port: number,
                protocol: match protocol {
                    Protocol::Tcp => TCP,
                    Protocol::Udp => UDP,
                },
                padding: 0,
            };
            let endpoints = endpoints(state, node, name, (number, protocol), vip.is_ipv6());
            let targets = endpoints
                .into_iter()
                .map(|endpoint| ((endpoint.address.into(), endpoint.port), endpoint.weight))
                .collect();
            wanted.insert(key, (service.options.session_affinity_seconds, targets));
        }
    }
    wanted
}

/// The endpoints that new connections to a service's port are spread over, as this node sees it.
pub(crate) fn endpoints(
    state: &MeshState,
    node: &str,
    name: &str,
    (port, protocol): (u16, Protocol),
    ipv6: bool,
) -> Vec<SharedEndpoint> {
    let Some(service) = state.services.get(name) else {
        return Vec::new();
    };
    // Where TCP and UDP share a number, the n-th entry of that number is the n-th port's.
    let nth = service
        .ports()
        .filter(|(number, _)| *number == port)
        .position(|(_, other)| other == protocol);
    let Some(nth) = nth else {
        return Vec::new();
    };
    let balancing = service.message.load_balancing.clone().unwrap_or_default();
    let allow_all = balancing.health_policy() == load_balancing::HealthPolicy::AllowAll;
    let usable: Vec<&Workload> = state
        .members(name)
        .map(AsRef::as_ref)
        .filter(|workload| workload.ready || allow_all && !workload.options.draining)
        .filter(|workload| workload.weight() > 0)
        .collect();
    let here = |workload: &&Workload| workload.message.node == node;
    let prefers_node = balancing
        .routing_preference()
        .any(|scope| scope == load_balancing::Scope::Node);
    let only_here = prefers_node
        && (balancing.mode() == load_balancing::Mode::Strict || usable.iter().any(here));
    usable
        .into_iter()
        .filter(|workload| !only_here || here(workload))
        .filter_map(|workload| {
            Some(SharedEndpoint {
                pod: workload.pod(),
                address: *workload
                    .addresses
                    .iter()
                    .find(|address| address.is_ipv6() == ipv6)?,
                port: target_port(workload, name, port, nth)?,
                weight: workload.weight(),
            })
        })
        .collect()
}

fn target_port(workload: &Workload, service: &str, port: u16, nth: usize) -> Option<u16> {
    let ports = &workload.message.services.get(service)?.ports;
    let found = ports
        .iter()
        .filter(|other| other.service_port == u32::from(port))
        .nth(nth)?;
    u16::try_from(found.target_port).ok()
}

fn display_name(state: &MeshState, name: &str) -> String {
    state.services.get(name).map_or_else(
        || name.to_owned(),
        |service| format!("{}/{}", service.message.namespace, service.message.name),
    )
}

impl LivePort {
    fn new(service: u32) -> Self {
        Self {
            entry: ServiceEntry {
                service,
                ..ServiceEntry::default()
            },
            endpoints: HashMap::new(),
            built_from: None,
        }
    }

    /// Writes a new table, if it differs, and switches to it. Without room for it the service has no endpoints.
    fn switch(
        mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        key: ServiceKey,
        affinity: u32,
        wanted: &[(Target, u32)],
    ) -> (Self, Result<(), KernelError>) {
        if self.built_from.as_deref() == Some(wanted) && self.entry.affinity_seconds == affinity {
            return (self, Ok(()));
        }
        let old = self.entry;
        let mut new = ServiceEntry {
            generation: old.generation.wrapping_add(1),
            affinity_seconds: affinity,
            ..old
        };
        let written = self.write_table(tables, ids, new, wanted);
        new.slots = *written.as_ref().unwrap_or(&0);
        let outcome = tables.services.set(key, new).map(drop);
        self.entry = new;
        self.built_from = Some(wanted.to_vec());
        let cleared = clear_slots(tables, old).and_then(|()| self.drop_endpoints(tables, wanted));
        (self, written.map(drop).and(outcome).and(cleared))
    }

    /// Returns the number of slots.
    fn write_table(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        new: ServiceEntry,
        wanted: &[(Target, u32)],
    ) -> Result<u32, KernelError> {
        for (target, _) in wanted {
            if self.endpoints.contains_key(target) {
                continue;
            }
            let id = ids.fresh().map_err(|_| KernelError::Full {
                table: "endpoint numbers",
                capacity: u32::MAX,
            })?;
            let entry = EndpointEntry {
                address: target.0,
                service: new.service,
                port: target.1,
                padding: 0,
            };
            tables.endpoints.set(id, entry)?;
            self.endpoints.insert(*target, id);
        }
        let weights: Vec<u32> = wanted.iter().map(|(_, weight)| *weight).collect();
        let columns = alias::columns(&weights);
        for (slot, column) in (0u32..).zip(&columns) {
            let key = SlotKey {
                service: new.service,
                generation: new.generation,
                slot,
            };
            let endpoint =
                |index: usize| self.endpoints.get(&wanted[index].0).copied().unwrap_or(0);
            let entry = SlotEntry {
                endpoint: endpoint(column.first),
                alias: endpoint(column.alias),
                threshold: column.threshold,
            };
            tables.slots.set(key, entry)?;
        }
        Ok(columns.len() as u32)
    }

    fn drop_endpoints(
        &mut self,
        tables: &mut Tables,
        wanted: &[(Target, u32)],
    ) -> Result<(), KernelError> {
        let keep: HashSet<Target> = wanted.iter().map(|(target, _)| *target).collect();
        let stale: Vec<Target> = self
            .endpoints
            .keys()
            .filter(|target| !keep.contains(*target))
            .copied()
            .collect();
        for target in stale {
            if let Some(id) = self.endpoints.remove(&target) {
                tables.endpoints.remove(&id)?;
            }
        }
        Ok(())
    }

    fn remove(mut self, tables: &mut Tables, key: ServiceKey) -> Result<(), KernelError> {
        tables.services.remove(&key)?;
        clear_slots(tables, self.entry)?;
        self.drop_endpoints(tables, &[])
    }
}

fn clear_slots(tables: &mut Tables, entry: ServiceEntry) -> Result<(), KernelError> {
    for slot in 0..entry.slots {
        let key = SlotKey {
            service: entry.service,
            generation: entry.generation,
            slot,
        };
        tables.slots.remove(&key)?;
    }
    Ok(())
}
