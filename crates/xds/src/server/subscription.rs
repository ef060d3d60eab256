//! What one client wants and holds of one type, and so what it must be sent next. No I/O.
//!
//! Rules are those of the xDS protocol's incremental variant
//! (<https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#incremental-xds>).

use std::{
    collections::{HashMap, HashSet},
    mem,
    sync::Arc,
};

use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;

use super::clients::ClientTypeState;
use crate::cache::{Cache, Changes, Resource, Snapshot};

/// Names that one client may subscribe to in one type; more is an error of the client.
pub(crate) const MAX_NAMES: usize = 100_000;
/// Rejected names that are put on record.
const MAX_REJECTED_ON_RECORD: usize = 100;

/// One client's subscription to one type.
#[derive(Debug)]
pub(crate) struct Subscription {
    type_url: String,
    wildcard: bool,
    names: HashSet<String>,
    /// Names just subscribed to: answered whether or not they exist or changed.
    fresh: HashSet<String>,
    /// What the client was sent. No version: it rejected that.
    held: HashMap<Arc<str>, Option<Arc<str>>>,
    sequence: u64,
    generation: u64,
    /// An answer is due even if there is nothing to say: the client waits to know that it is complete.
    answer_due: bool,
    in_flight: Option<Response>,
    accepted_version: String,
    accepted_nonce: String,
    last_error: Option<String>,
}

/// What is to be sent, and what an acceptance of it means.
#[derive(Debug, Clone)]
pub(crate) struct Response {
    pub(crate) nonce: String,
    pub(crate) generation: u64,
    pub(crate) changed: Vec<Resource>,
    pub(crate) removed: Vec<Arc<str>>,
}

impl Subscription {
    /// From the first request of a type on a stream.
    pub(crate) fn new(first: &DeltaDiscoveryRequest) -> Self {
        Self {
            type_url: first.type_url.clone(),
            // A first request that names nothing is the old way to ask for everything.
            wildcard: first.resource_names_subscribe.is_empty(),
            names: HashSet::new(),
            fresh: HashSet::new(),
            held: first
                .initial_resource_versions
                .iter()
                .map(|(name, version)| {
                    (Arc::from(name.as_str()), Some(Arc::from(version.as_str())))
                })
                .collect(),
            sequence: 0,
            generation: 0,
            answer_due: true,
            in_flight: None,
            accepted_version: String::new(),
            accepted_nonce: String::new(),
            last_error: None,
        }
    }

    /// Takes in what a request says: the answer to a response, and changes of interest.
    pub(crate) fn on_request(&mut self, request: &DeltaDiscoveryRequest) {
        self.take_answer(request);
        for name in &request.resource_names_subscribe {
            if name == "*" {
                if !self.wildcard {
                    self.wildcard = true;
                    self.sequence = 0;
                }
                self.answer_due = true;
            } else {
                self.names.insert(name.clone());
                self.fresh.insert(name.clone());
            }
        }
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                self.wildcard = false;
                let names = &self.names;
                self.held.retain(|held, _| names.contains(&**held));
            } else {
                self.names.remove(name);
                self.fresh.remove(name);
                if !self.wildcard {
                    self.held.remove(name.as_str());
                }
            }
        }
    }

    /// Whether the client subscribes to more names than it may.
    pub(crate) fn is_too_large(&self) -> bool {
        self.names.len() > MAX_NAMES || self.held.len() > MAX_NAMES && !self.wildcard
    }

    /// Whether a response waits for its answer.
    pub(crate) fn in_flight(&self) -> bool {
        self.in_flight.is_some()
    }

    /// The next response, if one is due and none is in flight.
    pub(crate) fn next(
        &mut self,
        cache: &Cache,
        nonce: impl FnOnce() -> String,
    ) -> Option<Response> {
        if self.in_flight.is_some() {
            return None;
        }
        let Snapshot {
            changes,
            sequence,
            generation,
        } = cache.changes_since(&self.type_url, self.sequence);
        let (mut changed, mut removed) = self.of_interest(changes);
        self.add_fresh(cache, &mut changed, &mut removed);
        self.sequence = sequence;
        if changed.is_empty() && removed.is_empty() && !self.answer_due {
            self.generation = generation;
            return None;
        }
        self.answer_due = false;
        let response = Response {
            nonce: nonce(),
            generation,
            changed,
            removed,
        };
        self.in_flight = Some(response.clone());
        Some(response)
    }

    /// For the record.
    pub(crate) fn state(&self) -> ClientTypeState {
        let mut rejected: Vec<String> = self
            .held
            .iter()
            .filter(|(_, version)| version.is_none())
            .map(|(name, _)| name.to_string())
            .collect();
        rejected.sort_unstable();
        rejected.truncate(MAX_REJECTED_ON_RECORD);
        ClientTypeState {
            type_url: self.type_url.clone(),
            generation: self.generation,
            accepted_version: self.accepted_version.clone(),
            accepted_nonce: self.accepted_nonce.clone(),
            held: self.held.len() - rejected.len(),
            rejected,
            last_error: self.last_error.clone(),
            in_flight: self.in_flight(),
        }
    }

    fn take_answer(&mut self, request: &DeltaDiscoveryRequest) {
        // An answer to an older response says nothing of the one in flight.
        if self
            .in_flight
            .as_ref()
            .is_none_or(|response| response.nonce != request.response_nonce)
        {
            return;
        }
        let Some(response) = self.in_flight.take() else {
            return;
        };
        self.generation = response.generation;
        if let Some(error) = &request.error_detail {
            self.last_error = Some(error.message.clone());
            // Not held: a comparison of everything sends it again, and so does its next change.
            for resource in response.changed {
                if self.is_wanted(&resource.name) {
                    self.held.insert(resource.name, None);
                }
            }
            return;
        }
        self.last_error = None;
        self.accepted_version = response.generation.to_string();
        self.accepted_nonce = response.nonce;
        for resource in response.changed {
            if self.is_wanted(&resource.name) {
                self.held.insert(resource.name, Some(resource.version));
            }
        }
        for name in response.removed {
            self.held.remove(&name);
        }
    }

    fn of_interest(&self, changes: Changes) -> (Vec<Resource>, Vec<Arc<str>>) {
        match changes {
            Changes::Some { changed, removed } => (
                changed
                    .into_iter()
                    .filter(|resource| self.is_wanted(&resource.name) && !self.holds(resource))
                    .collect(),
                removed
                    .into_iter()
                    .filter(|name| self.held.contains_key(name))
                    .collect(),
            ),
            Changes::Everything(all) => {
                let existing: HashSet<&str> = all.iter().map(|resource| &*resource.name).collect();
                let removed = self
                    .held
                    .keys()
                    .filter(|name| !existing.contains(&***name))
                    .cloned()
                    .collect();
                let changed = all
                    .iter()
                    .filter(|resource| self.is_wanted(&resource.name) && !self.holds(resource))
                    .cloned()
                    .collect();
                (changed, removed)
            }
        }
    }

    fn add_fresh(
        &mut self,
        cache: &Cache,
        changed: &mut Vec<Resource>,
        removed: &mut Vec<Arc<str>>,
    ) {
        for name in mem::take(&mut self.fresh) {
            match cache.get(&self.type_url, &name) {
                Some(resource) => {
                    if !changed.iter().any(|other| other.name == resource.name)
                        && !self.holds(&resource)
                    {
                        changed.push(resource);
                    }
                }
                None => {
                    if !removed.iter().any(|other| **other == *name) {
                        removed.push(Arc::from(name));
                    }
                }
            }
            self.answer_due = true;
        }
    }

    fn is_wanted(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    fn holds(&self, resource: &Resource) -> bool {
        matches!(self.held.get(&resource.name), Some(Some(version)) if *version == resource.version)
    }
}
