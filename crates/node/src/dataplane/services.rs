//! Service address and port → table of endpoints, kept in step with what the control plane says.
//!
//! A change of a service is compiled as a whole; a change of a replica touches only the slots that were its own.
//! How a table changes in the kernel is in [`table`], which endpoints a service has in [`endpoints`].

mod endpoints;
mod table;

use std::collections::{HashMap, HashSet};

use api::pod::Protocol;
use kernel::{Address, KernelError, ServiceEntry, ServiceKey, Tables};

pub(crate) use self::endpoints::{SharedEndpoint, endpoints};
use self::{
    endpoints::{Balancing, target_of},
    table::{Table, Target},
};
use super::ApplyError;
use crate::{
    ids::Ids,
    names::NameBook,
    state::{MeshState, Service},
};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What is in the tables, by resource name of the service.
#[derive(Debug)]
pub(crate) struct Services {
    live: HashMap<String, LiveService>,
    recovered: HashMap<ServiceKey, Table>,
    /// Addresses marked as a service's, by resource name, and how many services share one.
    marked: HashMap<String, HashSet<Address>>,
    owners: HashMap<Address, u32>,
}

/// One service as the tables have it.
#[derive(Debug, Default)]
struct LiveService {
    ports: HashMap<ServiceKey, Table>,
    /// What each usable replica contributes.
    members: HashMap<String, Member>,
    /// Usable replicas of this node.
    here: usize,
    /// Something did not find its room: the next change compiles all of it.
    incomplete: bool,
}

/// What one replica contributes: to each of the service's ports, as a rule, one target.
#[derive(Debug, Clone)]
struct Member {
    here: bool,
    weight: u32,
    targets: Vec<(ServiceKey, Target)>,
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
                    let of_service = endpoints.remove(&entry.service).unwrap_or_default();
                    (*key, Table::recovered(*entry, of_service))
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
        let mut before = self.live.remove(name).unwrap_or_default();
        let mut failure = None;
        let mut keys = HashSet::new();
        if let Some(service) = state.services.get(name) {
            let mut live = LiveService::of(state, node, name, service);
            let mut wanted = live.wanted(Balancing::of(service));
            for (key, ..) in ports(service) {
                keys.insert(key);
                let known = before.ports.remove(&key);
                let mut table = match known.or_else(|| self.recovered.remove(&key)) {
                    Some(table) => table,
                    None => Table::new(ids.fresh().map_err(ApplyError::at(name))?),
                };
                names.set_service(table.service(), display_name(service));
                let endpoints = wanted.remove(&key).unwrap_or_default();
                let affinity = service.options.session_affinity_seconds;
                let outcome = table.bring_to(tables, ids, key, affinity, endpoints);
                live.incomplete |= outcome.is_err();
                failure = failure.or(outcome.err());
                live.ports.insert(key, table);
            }
            self.live.insert(name.to_owned(), live);
        }
        for (key, table) in before.ports {
            names.retire_service(table.service());
            failure = failure.or(table.remove(tables, key).err());
        }
        failure = failure.or(self.mark_addresses(tables, name, &keys).err());
        failure.map_or(Ok(()), |source| Err(ApplyError::at(name)(source)))
    }

    /// Brings one service up to date of which only these replicas (resource names) joined, left or changed.
    #[allow(clippy::too_many_arguments)] // One call site; a struct would only rename the same list.
    pub(super) fn apply_members(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        state: &MeshState,
        node: &str,
        name: &str,
        changed: &HashSet<String>,
        names: &NameBook,
    ) -> Result<(), ApplyError> {
        let (Some(service), Some(live)) = (state.services.get(name), self.live.get_mut(name))
        else {
            return self.apply(tables, ids, state, node, name, names);
        };
        let balancing = Balancing::of(service);
        let only_here = balancing.only_here(live.here);
        let difference = live.exchange(state, node, name, service, changed);
        if live.incomplete || balancing.only_here(live.here) != only_here {
            return self.apply(tables, ids, state, node, name, names);
        }
        let mut failure = None;
        for (key, change) in difference.by_port(only_here) {
            let outcome = live.change_port(tables, ids, service, key, &change, only_here);
            live.incomplete |= outcome.is_err();
            failure = failure.or(outcome.err());
        }
        failure.map_or(Ok(()), |source| Err(ApplyError::at(name)(source)))
    }

    pub(super) fn reconcile(&mut self, tables: &mut Tables) -> Result<(), KernelError> {
        for (key, table) in std::mem::take(&mut self.recovered) {
            table.remove(tables, key)?;
        }
        let live = || self.live.values().flat_map(|live| live.ports.values());
        let generations: HashSet<(u32, u32)> = live()
            .map(|table| (table.service(), table.generation()))
            .collect();
        let endpoints: HashSet<u32> = live().flat_map(Table::endpoint_ids).collect();
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
        keys: &HashSet<ServiceKey>,
    ) -> Result<(), KernelError> {
        let marker = |address| ServiceKey {
            address,
            ..ServiceKey::default()
        };
        let mine: HashSet<Address> = keys.iter().map(|key| key.address).collect();
        let before = self.marked.remove(name).unwrap_or_default();
        let mut failure = None;
        let mut marked: HashSet<Address> = mine.intersection(&before).copied().collect();
        for address in mine.difference(&before) {
            match tables
                .services
                .set(marker(*address), ServiceEntry::default())
            {
                Ok(_) => {
                    *self.owners.entry(*address).or_default() += 1;
                    marked.insert(*address);
                }
                // Tried again; until then the address is no one's, and what is sent there is refused all the same.
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        for address in before.difference(&mine) {
            let owners = self.owners.entry(*address).or_default();
            *owners = owners.saturating_sub(1);
            if *owners == 0 {
                self.owners.remove(address);
                tables.services.remove(&marker(*address))?;
            }
        }
        if !marked.is_empty() {
            self.marked.insert(name.to_owned(), marked);
        }
        failure.map_or(Ok(()), Err)
    }
}

/// Changes of a service's replicas.
#[derive(Debug, Default)]
struct Difference {
    gone: Vec<Member>,
    added: Vec<Member>,
}

/// What they mean to one port.
#[derive(Debug, Default)]
struct PortChange {
    gone: Vec<Target>,
    added: Vec<Target>,
    /// Of all that are added; `None` if they differ.
    weight: Option<u32>,
}

impl LiveService {
    /// All usable replicas, without any table yet.
    fn of(state: &MeshState, node: &str, name: &str, service: &Service) -> Self {
        let mut live = Self::default();
        let members = state.member_names(name).cloned().collect();
        live.exchange(state, node, name, service, &members);
        live
    }

    /// Takes over what `changed` replicas contribute now. Returns how that differs.
    fn exchange(
        &mut self,
        state: &MeshState,
        node: &str,
        name: &str,
        service: &Service,
        changed: &HashSet<String>,
    ) -> Difference {
        let balancing = Balancing::of(service);
        let ports = ports(service);
        let mut difference = Difference::default();
        for workload in changed {
            if let Some(old) = self.members.remove(workload) {
                self.here -= usize::from(old.here);
                difference.gone.push(old);
            }
            let member = state.member(name, workload).filter(|it| balancing.uses(it));
            let Some(member) = member else { continue };
            let new = Member {
                here: member.message.node == node,
                weight: member.weight(),
                targets: ports
                    .iter()
                    .filter_map(|(key, nth, ipv6)| {
                        let (address, port) = target_of(member, name, (key.port, *nth), *ipv6)?;
                        Some((*key, (address.into(), port)))
                    })
                    .collect(),
            };
            self.here += usize::from(new.here);
            self.members.insert(workload.clone(), new.clone());
            difference.added.push(new);
        }
        difference
    }

    /// Endpoints with weights, by port.
    fn wanted(&self, balancing: Balancing) -> HashMap<ServiceKey, Vec<(Target, u32)>> {
        let only_here = balancing.only_here(self.here);
        let mut wanted: HashMap<ServiceKey, Vec<(Target, u32)>> = HashMap::new();
        for member in self.members.values() {
            if member.here || !only_here {
                for (key, target) in &member.targets {
                    let of_port = wanted.entry(*key).or_default();
                    of_port.push((*target, member.weight));
                }
            }
        }
        wanted
    }

    fn change_port(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        service: &Service,
        key: ServiceKey,
        change: &PortChange,
        only_here: bool,
    ) -> Result<(), KernelError> {
        let Some(table) = self.ports.get_mut(&key) else {
            return Ok(());
        };
        let PortChange {
            gone,
            added,
            weight,
        } = change;
        let in_place = match weight {
            Some(weight) if !added.is_empty() => table.takes(*weight),
            _ => added.is_empty() && table.is_uniform(),
        };
        if in_place {
            return table.change(tables, ids, key, gone, added, *weight);
        }
        let all = self.members.values();
        let all = all
            .filter(|member| member.here || !only_here)
            .flat_map(|member| {
                let targets = member.targets.iter().filter(|(other, _)| *other == key);
                targets.map(|(_, target)| (*target, member.weight))
            })
            .collect();
        let affinity = service.options.session_affinity_seconds;
        table.bring_to(tables, ids, key, affinity, all)
    }
}

impl Difference {
    /// By port. What is the same before and after is on both lists.
    fn by_port(self, only_here: bool) -> HashMap<ServiceKey, PortChange> {
        let counts = |member: &&Member| member.here || !only_here;
        let mut changes: HashMap<ServiceKey, PortChange> = HashMap::new();
        for member in self.added.iter().filter(counts) {
            for (key, target) in &member.targets {
                let change = changes.entry(*key).or_default();
                change.weight = match change.weight {
                    _ if change.added.is_empty() => Some(member.weight),
                    Some(weight) if weight == member.weight => Some(weight),
                    _ => None,
                };
                change.added.push(*target);
            }
        }
        for member in self.gone.iter().filter(counts) {
            for (key, target) in &member.targets {
                changes.entry(*key).or_default().gone.push(*target);
            }
        }
        changes
    }
}

/// The service's keys, each with its place among the ports of its number, and whether it is IPv6.
fn ports(service: &Service) -> Vec<(ServiceKey, usize, bool)> {
    let mut ports: Vec<(ServiceKey, usize, bool)> = Vec::new();
    for (number, protocol) in service.ports() {
        let nth = endpoints::place_of(service, number, protocol).unwrap_or(0);
        for vip in &service.vips {
            let key = ServiceKey {
                address: (*vip).into(),
                port: number,
                protocol: match protocol {
                    Protocol::Tcp => TCP,
                    Protocol::Udp => UDP,
                },
                padding: 0,
            };
            // Two ports of one number and transport are one.
            if !ports.iter().any(|(other, ..)| *other == key) {
                ports.push((key, nth, vip.is_ipv6()));
            }
        }
    }
    ports
}

fn display_name(service: &Service) -> String {
    format!("{}/{}", service.message.namespace, service.message.name)
}
