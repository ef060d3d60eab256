//! The kernel's table of one service port: from slots to endpoints.
//!
//! Where all endpoints weigh the same, a slot is an endpoint, and a change is made in place: what a slot will lead to
//! is written before the slot, the slots before their number, and what is no longer led to is removed last. So
//! a connection finds a whole table at every moment, and so does an agent that takes over in the middle.
//! Where weights differ, every share moves with every change: a new table is written under the next
//! generation, and the service is switched to it with one write.

use std::collections::{HashMap, HashSet};

use kernel::{
    Address, EndpointEntry, KernelError, ServiceEntry, ServiceKey, SlotEntry, SlotKey, Tables,
};

use crate::{alias, ids::Ids};

/// Where an endpoint listens.
pub(super) type Target = (Address, u16);

/// The live table of one service port.
#[derive(Debug)]
pub(super) struct Table {
    entry: ServiceEntry,
    endpoints: HashMap<Target, Endpoint>,
    shape: Shape,
}

#[derive(Debug)]
struct Endpoint {
    id: u32,
    /// Slots that lead to it, in a uniform table: as a rule one.
    slots: Vec<u32>,
}

#[derive(Debug)]
enum Shape {
    /// Slot after slot, all of one weight.
    Uniform { weight: u32, slots: Vec<Target> },
    /// In order.
    Weighted(Vec<(Target, u32)>),
    /// An earlier agent's, or it did not find room.
    Unknown,
}

impl Table {
    /// The table of a new service port, which no entry leads to yet.
    pub(super) fn new(service: u32) -> Self {
        let entry = ServiceEntry {
            service,
            ..ServiceEntry::default()
        };
        Self {
            entry,
            endpoints: HashMap::new(),
            shape: Shape::Unknown,
        }
    }

    /// A table that an earlier agent left, with the endpoints of its service.
    pub(super) fn recovered(entry: ServiceEntry, endpoints: HashMap<Target, u32>) -> Self {
        let endpoints = endpoints.into_iter().map(|(target, id)| {
            let slots = Vec::new();
            (target, Endpoint { id, slots })
        });
        Self {
            entry,
            endpoints: endpoints.collect(),
            shape: Shape::Unknown,
        }
    }

    /// The service's number.
    pub(super) fn service(&self) -> u32 {
        self.entry.service
    }

    /// The live generation.
    pub(super) fn generation(&self) -> u32 {
        self.entry.generation
    }

    /// Numbers of the endpoints.
    pub(super) fn endpoint_ids(&self) -> impl Iterator<Item = u32> {
        self.endpoints.values().map(|endpoint| endpoint.id)
    }

    /// Whether endpoints of this weight can be put in by [`Table::change`].
    pub(super) fn takes(&self, other: u32) -> bool {
        match &self.shape {
            Shape::Uniform { weight, slots } => *weight == other || slots.is_empty(),
            _ => false,
        }
    }

    /// Whether endpoints can be taken out by [`Table::change`].
    pub(super) fn is_uniform(&self) -> bool {
        matches!(self.shape, Shape::Uniform { .. })
    }

    /// Makes the table lead to `wanted`, with weights.
    pub(super) fn bring_to(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        key: ServiceKey,
        affinity_seconds: u32,
        mut wanted: Vec<(Target, u32)>,
    ) -> Result<(), KernelError> {
        wanted.sort_unstable();
        let weight = uniform_weight(&wanted);
        match (&self.shape, weight) {
            (Shape::Uniform { slots, .. }, Some(weight))
                if wanted.is_empty() || self.takes(weight) =>
            {
                let (gone, added) = difference(slots, &wanted);
                self.entry.affinity_seconds = affinity_seconds;
                self.change(tables, ids, key, &gone, &added, Some(weight))
            }
            (Shape::Weighted(current), None)
                if *current == wanted && self.entry.affinity_seconds == affinity_seconds =>
            {
                Ok(())
            }
            _ => self.rebuild(tables, ids, key, affinity_seconds, wanted),
        }
    }

    /// Takes endpoints out of a uniform table and puts others in, all of the same weight. One that is listed twice
    /// is meant twice. Without a `weight` none is put in. What finds no room is left out;
    /// [`Table::bring_to`] tries again.
    pub(super) fn change(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        key: ServiceKey,
        gone: &[Target],
        added: &[Target],
        weight: Option<u32>,
    ) -> Result<(), KernelError> {
        let outcome = self.edit(tables, ids, key, gone, added, weight);
        if outcome.is_ok() || added.is_empty() || !self.is_uniform() {
            return outcome;
        }
        // What is gone makes room; then come as many of the new ones as find some.
        self.edit(tables, ids, key, gone, &[], None)?;
        added.iter().try_for_each(|target| {
            let one = std::slice::from_ref(target);
            self.edit(tables, ids, key, &[], one, weight)
        })
    }

    /// Takes the service port out of the tables.
    pub(super) fn remove(self, tables: &mut Tables, key: ServiceKey) -> Result<(), KernelError> {
        tables.services.remove(&key)?;
        clear_slots(tables, self.entry)?;
        tables.endpoints.remove_all(self.endpoint_ids())
    }

    /// Without room for what is new, nothing changes.
    fn edit(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        key: ServiceKey,
        gone: &[Target],
        added: &[Target],
        new_weight: Option<u32>,
    ) -> Result<(), KernelError> {
        let Shape::Uniform { slots, .. } = &self.shape else {
            return Ok(());
        };
        let before = slots.len() as u32;
        let gone = self.present(gone);
        let made = self.make_endpoints(tables, ids, added)?;
        // Each new one takes the place of one that is gone, as long as there are such.
        let appended = added.get(gone.len()..).unwrap_or_default();
        let number = |target: &Target| {
            let known = self.endpoints.get(target).map(|endpoint| endpoint.id);
            known.or_else(|| made.get(target).copied()).unwrap_or(0)
        };
        let beyond = (before..).zip(appended.iter().map(number));
        if let Err(error) = tables.slots.set_all(straight(self.entry, beyond)) {
            let beyond = before..before + appended.len() as u32;
            tables
                .slots
                .remove_all(beyond.map(|slot| slot_key(self.entry, slot)))?;
            tables.endpoints.remove_all(made.into_values())?;
            return Err(error);
        }

        // From here on nothing needs room.
        for (target, id) in made {
            let slots = Vec::new();
            self.endpoints.insert(target, Endpoint { id, slots });
        }
        let touched = self.arrange(&gone, added, new_weight);
        let outcome = self.show(tables, key, &touched, before);
        if outcome.is_err() {
            self.shape = Shape::Unknown;
            self.entry.slots = 0;
            // The failure is told already; a service that cannot be closed either keeps a table that is whole.
            let _ = tables.services.set(key, self.entry);
        }
        outcome.and_then(|()| self.drop_unused(tables, &gone))
    }

    /// Those of `targets` that have slots, each as often as it has.
    fn present(&self, targets: &[Target]) -> Vec<Target> {
        let mut counts: HashMap<Target, usize> = HashMap::new();
        let mut present = Vec::new();
        for target in targets {
            let count = counts.entry(*target).or_default();
            *count += 1;
            let slots = self.endpoints.get(target).map_or(0, |it| it.slots.len());
            if *count <= slots {
                present.push(*target);
            }
        }
        present
    }

    /// Writes endpoints that are not there yet, and returns their numbers. On an error none of them stays.
    fn make_endpoints(
        &self,
        tables: &mut Tables,
        ids: &mut Ids,
        targets: &[Target],
    ) -> Result<HashMap<Target, u32>, KernelError> {
        let mut made = HashMap::new();
        for target in targets {
            if !self.endpoints.contains_key(target) && !made.contains_key(target) {
                let id = ids.fresh().map_err(|_| KernelError::Full {
                    table: "endpoint numbers",
                    capacity: u32::MAX,
                    setting: "endpoints",
                })?;
                made.insert(*target, id);
            }
        }
        let entries = made.iter().map(|(target, id)| {
            let entry = EndpointEntry {
                address: target.0,
                service: self.entry.service,
                port: target.1,
                padding: 0,
            };
            (*id, entry)
        });
        if let Err(error) = tables.endpoints.set_all(entries) {
            tables.endpoints.remove_all(made.into_values())?;
            return Err(error);
        }
        Ok(made)
    }

    /// Changes which slot leads where, here only. Returns the slots, of those that stay, that lead elsewhere now.
    fn arrange(&mut self, gone: &[Target], added: &[Target], new_weight: Option<u32>) -> Vec<u32> {
        let Shape::Uniform { weight, slots } = &mut self.shape else {
            return Vec::new();
        };
        *weight = new_weight.unwrap_or(*weight);
        let endpoints = &mut self.endpoints;
        let mut touched = Vec::new();
        let mut added = added.iter().copied();
        for target in gone {
            let free = endpoints.get_mut(target).and_then(|it| it.slots.pop());
            let Some(slot) = free else { continue };
            let next = match added.next() {
                Some(new) => Some(new),
                None => {
                    // The last slot's endpoint moves into the hole.
                    let last = slots.pop().filter(|_| slot as usize != slots.len());
                    let end = slots.len() as u32;
                    if let Some(moved) = last.and_then(|last| endpoints.get_mut(&last)) {
                        moved.slots.retain(|slot| *slot != end);
                    }
                    last
                }
            };
            if let Some(next) = next {
                slots[slot as usize] = next;
                touched.push(slot);
                own(endpoints, next, slot);
            }
        }
        for new in added {
            own(endpoints, new, slots.len() as u32);
            slots.push(new);
        }
        touched.retain(|slot| (*slot as usize) < slots.len());
        touched
    }

    /// Writes slots that lead elsewhere now, then their number, and removes those beyond it.
    fn show(
        &mut self,
        tables: &mut Tables,
        key: ServiceKey,
        touched: &[u32],
        before: u32,
    ) -> Result<(), KernelError> {
        let Shape::Uniform { slots, .. } = &self.shape else {
            return Ok(());
        };
        let writes = touched.iter().filter_map(|slot| {
            let endpoint = self.endpoints.get(slots.get(*slot as usize)?)?;
            Some((*slot, endpoint.id))
        });
        tables.slots.set_all(straight(self.entry, writes))?;
        self.entry.slots = slots.len() as u32;
        tables.services.set(key, self.entry)?;
        let beyond = self.entry.slots..before;
        tables
            .slots
            .remove_all(beyond.map(|slot| slot_key(self.entry, slot)))
    }

    /// Removes those of `targets` that no slot leads to.
    fn drop_unused(&mut self, tables: &mut Tables, targets: &[Target]) -> Result<(), KernelError> {
        let mut unused = Vec::new();
        for target in targets {
            let endpoint = self.endpoints.get(target);
            if endpoint.is_some_and(|endpoint| endpoint.slots.is_empty()) {
                unused.extend(self.endpoints.remove(target).map(|endpoint| endpoint.id));
            }
        }
        tables.endpoints.remove_all(unused)
    }

    /// Writes a new table and switches to it. Without room for it the service has no endpoints.
    fn rebuild(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        key: ServiceKey,
        affinity_seconds: u32,
        wanted: Vec<(Target, u32)>,
    ) -> Result<(), KernelError> {
        let old = self.entry;
        self.entry = ServiceEntry {
            generation: old.generation.wrapping_add(1),
            affinity_seconds,
            slots: 0,
            ..old
        };
        let written = self.write_table(tables, ids, &wanted);
        if written.is_ok() {
            self.entry.slots = wanted.len() as u32;
        }
        let outcome = written.and(tables.services.set(key, self.entry).map(drop));
        let keep: HashSet<Target> = wanted.iter().map(|(target, _)| *target).collect();
        self.shape = match (&outcome, uniform_weight(&wanted)) {
            (Err(_), _) => Shape::Unknown,
            (Ok(()), None) => Shape::Weighted(wanted),
            (Ok(()), Some(weight)) => {
                let slots: Vec<Target> = wanted.into_iter().map(|(target, _)| target).collect();
                for (slot, target) in (0..).zip(&slots) {
                    own(&mut self.endpoints, *target, slot);
                }
                Shape::Uniform { weight, slots }
            }
        };
        let stale = self
            .endpoints
            .extract_if(|target, _| !keep.contains(target));
        let stale: Vec<u32> = stale.map(|(_, endpoint)| endpoint.id).collect();
        let cleared = clear_slots(tables, old).and_then(|()| tables.endpoints.remove_all(stale));
        outcome.and(cleared)
    }

    /// Writes all slots of the new generation. On an error none of them stays.
    fn write_table(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        wanted: &[(Target, u32)],
    ) -> Result<(), KernelError> {
        let targets: Vec<Target> = wanted.iter().map(|(target, _)| *target).collect();
        let made = self.make_endpoints(tables, ids, &targets)?;
        for endpoint in self.endpoints.values_mut() {
            endpoint.slots.clear();
        }
        for (target, id) in made {
            let slots = Vec::new();
            self.endpoints.insert(target, Endpoint { id, slots });
        }
        let weights: Vec<u32> = wanted.iter().map(|(_, weight)| *weight).collect();
        let columns = alias::columns(&weights);
        let number = |index: usize| self.endpoints.get(&targets[index]).map_or(0, |it| it.id);
        let entries = (0u32..).zip(&columns).map(|(slot, column)| {
            let entry = SlotEntry {
                endpoint: number(column.first),
                alias: number(column.alias),
                threshold: column.threshold,
            };
            (slot_key(self.entry, slot), entry)
        });
        let outcome = tables.slots.set_all(entries);
        if outcome.is_err() {
            let all = 0..columns.len() as u32;
            tables
                .slots
                .remove_all(all.map(|slot| slot_key(self.entry, slot)))?;
        }
        outcome
    }
}

fn own(endpoints: &mut HashMap<Target, Endpoint>, target: Target, slot: u32) {
    if let Some(endpoint) = endpoints.get_mut(&target) {
        endpoint.slots.push(slot);
    }
}

/// The one weight of all, 0 if there are none; `None` if they differ.
fn uniform_weight(wanted: &[(Target, u32)]) -> Option<u32> {
    let first = wanted.first().map_or(0, |(_, weight)| *weight);
    let same = wanted.iter().all(|(_, weight)| *weight == first);
    same.then_some(first)
}

/// What must go from `slots` and what must be added to make them `wanted`.
fn difference(slots: &[Target], wanted: &[(Target, u32)]) -> (Vec<Target>, Vec<Target>) {
    let mut left: HashMap<Target, usize> = HashMap::with_capacity(slots.len());
    for target in slots {
        *left.entry(*target).or_default() += 1;
    }
    let mut added = Vec::new();
    for (target, _) in wanted {
        match left.get_mut(target) {
            Some(count) if *count > 0 => *count -= 1,
            _ => added.push(*target),
        }
    }
    let gone = left
        .into_iter()
        .flat_map(|(target, count)| std::iter::repeat_n(target, count));
    (gone.collect(), added)
}

fn slot_key(entry: ServiceEntry, slot: u32) -> SlotKey {
    SlotKey {
        service: entry.service,
        generation: entry.generation,
        slot,
    }
}

/// Slots that lead to one endpoint each.
fn straight(
    entry: ServiceEntry,
    slots: impl Iterator<Item = (u32, u32)>,
) -> impl Iterator<Item = (SlotKey, SlotEntry)> {
    slots.map(move |(slot, endpoint)| {
        let column = SlotEntry {
            endpoint,
            alias: endpoint,
            threshold: u32::MAX,
        };
        (slot_key(entry, slot), column)
    })
}

fn clear_slots(tables: &mut Tables, entry: ServiceEntry) -> Result<(), KernelError> {
    let slots = 0..entry.slots;
    tables
        .slots
        .remove_all(slots.map(|slot| slot_key(entry, slot)))
}
