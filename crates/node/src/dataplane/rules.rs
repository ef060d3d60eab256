//! Identities × policy sets → verdicts, compiled eagerly: a miss in the kernel is never "the first connection".
//!
//! A policy set's number stands for its content. A changed policy makes new sets with new verdicts, which are
//! complete before any workload is switched to them, with one write per workload. Only pairs with a new
//! identity or a new set are judged, and only what belongs to no pair any more is removed.
//!
//! Workloads of other nodes have sets too, as far as there is room: a connection that their policies forbid is refused
//! where it begins, with the policy's name. What is not refused here is decided by the server's node.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use kernel::{
    Action, KernelError, Reason, SOURCE_ANONYMOUS, SocketClass, Tables, VerdictEntry, VerdictKey,
    WorkloadEntry,
};
use sha2::{Digest, Sha256};
use xds::proto::security::Authorization;

use super::{ApplyError, Local};
use crate::{
    ids::Ids,
    names::NameBook,
    policy::{self, Client, Identity, Server},
    state::{MeshState, Workload},
};

/// What is in the tables: verdicts for every source with every set.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    sets: Sets,
    sources: Sources,
    /// Workloads of other nodes, by resource name.
    remote: HashMap<String, Remote>,
    /// Their sets, by what decides over them, where that is the same for every address.
    shared: HashMap<PoliciesKey, u32>,
    /// Pairs of source and set that did not find room for all their verdicts.
    incomplete: HashSet<(u32, u32)>,
}

type Sets = BTreeMap<u32, Arc<PolicySet>>;
type Sources = BTreeMap<u32, Client>;

/// Namespace and listed policies of a workload.
type PoliciesKey = (String, Vec<String>);

/// A workload of another node: what decides over its sets, and those that were found room for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Remote {
    namespace: String,
    policies: Vec<String>,
    addresses: Vec<IpAddr>,
    sets: [u32; 2],
}

#[derive(Debug)]
struct PolicySet {
    policies: Vec<(String, Arc<Authorization>)>,
    /// Ports that a policy names.
    ports: Vec<u16>,
    /// Set only where a policy looks at it.
    address: Option<IpAddr>,
}

impl Rules {
    /// The policy sets of another node's workload, by address family; 0 where its policies are not known here.
    pub(super) fn remote_sets(&self, name: &str) -> [u32; 2] {
        self.remote.get(name).map_or([0; 2], |remote| remote.sets)
    }

    /// Takes in what became of one resource, if it is or was a workload of another node. Returns whether rules must be
    /// compiled for it: they need not if others have the same policies, as other replicas do.
    pub(super) fn take_remote(
        &mut self,
        state: &MeshState,
        locals: &HashMap<String, Local>,
        name: &str,
    ) -> bool {
        let now = state.workloads.get(name);
        let Some(workload) = now.filter(|workload| !locals.contains_key(&workload.pod())) else {
            // Its sets may be others' too; the next compilation finds out.
            self.remote.remove(name);
            return false;
        };
        if self
            .remote
            .get(name)
            .is_some_and(|known| known.is_of(workload))
        {
            return false;
        }
        let mut remote = Remote::of(workload);
        let Some(shared) = self.shared.get(&remote.policies_key()) else {
            return true;
        };
        for family in [0, 1] {
            if remote.address(family).is_some() {
                remote.sets[family] = *shared;
            }
        }
        self.remote.insert(name.to_owned(), remote);
        false
    }

    /// Compiles rules for all local workloads that the control plane knows, and for as many others as there is room.
    /// Returns those of other nodes whose sets are other ones now.
    pub(super) fn apply(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        state: &MeshState,
        locals: &HashMap<String, Local>,
        names: &NameBook,
        failures: &mut Vec<ApplyError>,
    ) -> Vec<String> {
        let mut compiler = Compiler::new(state, ids, self);
        let mut entries = Vec::new();
        for local in locals.values() {
            match state.pod(&local.enrolled.uid) {
                Some(workload) if state.has_policies_of(workload) => {
                    match compiler.entry(local, workload) {
                        Ok(entry) => entries.push((local, entry)),
                        Err(error) => failures.push(error),
                    }
                }
                // Not known, or not all of its policies are: it keeps the rules it has, if any.
                _ => compiler.carry_over(tables, local),
            }
        }
        // Half the room at most: this node's own workloads come first.
        let (remote, shared) =
            compiler.remote(locals, tables.verdicts.capacity() as usize / 2, failures);
        let Compiler { sources, sets, .. } = compiler;
        let missing = self.missing(&sources, &sets);
        let numbers = policy_numbers(ids, names, &sets, &missing, failures);
        if let Err(error) = ids.save() {
            failures.push(ApplyError::at("numbers of this node")(error));
            return Vec::new();
        }

        self.incomplete.clear();
        for (set_id, of_set) in missing {
            let outcome = write_verdicts(tables, &sources, &of_set, set_id, &sets, &numbers);
            if let Err(source) = outcome {
                // The entry for all other ports is a pair's last.
                let lacks = |source: &u32| tables.verdicts.get(&key(*source, set_id, 0)).is_none();
                let without = of_set.into_iter().filter(lacks);
                self.incomplete
                    .extend(without.map(|source| (source, set_id)));
                failures.push(ApplyError::at("verdicts")(source));
            }
        }
        for (local, entry) in entries {
            let outcome = tables.workloads.set(local.id, entry);
            failures.extend(outcome.err().map(ApplyError::at(&local.enrolled.uid)));
        }
        let outcome = tables.verdicts.remove_all(self.stale(&sources, &sets));
        failures.extend(outcome.err().map(ApplyError::at("verdicts")));
        ids.forget_unused("source", &sources.keys().copied().collect());
        ids.forget_unused("set", &sets.keys().copied().collect());
        self.sources = sources;
        self.sets = sets;
        self.shared = shared;
        let before = std::mem::replace(&mut self.remote, remote);
        let sets_before = |name: &String| before.get(name).map(|remote| remote.sets);
        let changed = self
            .remote
            .iter()
            .filter(|(name, remote)| sets_before(name) != Some(remote.sets));
        changed.map(|(name, _)| name.clone()).collect()
    }

    pub(super) fn reconcile(&mut self, tables: &mut Tables) -> Result<(), KernelError> {
        tables.verdicts.retain(|key| {
            self.sources.contains_key(&key.source) && self.sets.contains_key(&key.policy_set)
        })
    }

    /// Sources without complete verdicts, by set.
    fn missing(&self, sources: &Sources, sets: &Sets) -> BTreeMap<u32, Vec<u32>> {
        let new: Vec<u32> = sources
            .keys()
            .filter(|source| !self.sources.contains_key(source))
            .copied()
            .collect();
        let mut missing: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for set in sets.keys() {
            let of_set = if self.sets.contains_key(set) {
                new.clone()
            } else {
                sources.keys().copied().collect()
            };
            if !of_set.is_empty() {
                missing.insert(*set, of_set);
            }
        }
        for (source, set) in &self.incomplete {
            if self.sets.contains_key(set) && sets.contains_key(set) && sources.contains_key(source)
            {
                missing.entry(*set).or_default().push(*source);
            }
        }
        missing
    }

    /// Keys of verdicts whose source or set is no longer used.
    fn stale(&self, sources: &Sources, sets: &Sets) -> Vec<VerdictKey> {
        let all: Vec<u32> = self.sources.keys().copied().collect();
        let gone: Vec<u32> = all
            .iter()
            .filter(|source| !sources.contains_key(source))
            .copied()
            .collect();
        let mut stale = Vec::new();
        for (id, set) in &self.sets {
            let of_set = if sets.contains_key(id) { &gone } else { &all };
            for source in of_set {
                let ports = set.ports.iter().chain(&[0]);
                stale.extend(ports.map(|port| key(*source, *id, *port)));
            }
        }
        stale
    }
}

impl Remote {
    fn of(workload: &Workload) -> Self {
        Self {
            namespace: workload.message.namespace.clone(),
            policies: workload.message.authorization_policies.clone(),
            addresses: workload.addresses.clone(),
            sets: [0; 2],
        }
    }

    fn policies_key(&self) -> PoliciesKey {
        (self.namespace.clone(), self.policies.clone())
    }

    fn is_of(&self, workload: &Workload) -> bool {
        self.namespace == workload.message.namespace
            && self.policies == workload.message.authorization_policies
            && self.addresses == workload.addresses
    }

    fn address(&self, family: usize) -> Option<IpAddr> {
        let mut addresses = self.addresses.iter().copied();
        addresses.find(|address| usize::from(address.is_ipv6()) == family)
    }
}

/// Numbers of the policies in the sets that are to be judged.
fn policy_numbers(
    ids: &mut Ids,
    names: &NameBook,
    sets: &Sets,
    missing: &BTreeMap<u32, Vec<u32>>,
    failures: &mut Vec<ApplyError>,
) -> HashMap<String, u32> {
    let mut numbers = HashMap::new();
    let judged = missing.keys().filter_map(|set| sets.get(set));
    for (name, _) in judged.flat_map(|set| &set.policies) {
        if numbers.contains_key(name) {
            continue;
        }
        match ids.named(&format!("policy:{name}")) {
            Ok(id) => {
                names.set_policy(id, name.clone());
                numbers.insert(name.clone(), id);
            }
            Err(error) => failures.push(ApplyError::at(name)(error)),
        }
    }
    numbers
}

/// One pass over the local workloads.
struct Compiler<'a> {
    state: &'a MeshState,
    ids: &'a mut Ids,
    known: &'a Rules,
    /// Networks that any policy tells clients apart by.
    networks: Vec<IpNet>,
    sources: Sources,
    sets: Sets,
}

impl<'a> Compiler<'a> {
    fn new(state: &'a MeshState, ids: &'a mut Ids, known: &'a Rules) -> Self {
        let anonymous = Client {
            identity: None,
            address: None,
        };
        Self {
            state,
            ids,
            known,
            networks: state.networks(),
            sources: BTreeMap::from([(SOURCE_ANONYMOUS, anonymous)]),
            sets: BTreeMap::new(),
        }
    }

    fn entry(&mut self, local: &Local, workload: &Workload) -> Result<WorkloadEntry, ApplyError> {
        let identity = workload.identity();
        let policies = self.state.policies_of(workload);
        let content = content_name(self.state, &policies);
        let mut entry = WorkloadEntry {
            netns: local.netns,
            v4: local.address(0).map(Into::into).unwrap_or_default(),
            v6: local.address(1).map(Into::into).unwrap_or_default(),
            flags: if workload.options.splice {
                WorkloadEntry::SPLICE
            } else {
                0
            },
            ..WorkloadEntry::default()
        };
        for family in [0, 1] {
            let address = local.address(family);
            entry.source[family] = self
                .source(&identity, address)
                .map_err(ApplyError::at(&local.enrolled.uid))?;
            entry.policy_set[family] = self
                .set(&policies, &content, address)
                .map_err(ApplyError::at(&local.enrolled.uid))?;
        }
        Ok(entry)
    }

    /// Sets for workloads of other nodes, while `room` verdicts last. Those that share policies share sets.
    fn remote(
        &mut self,
        locals: &HashMap<String, Local>,
        mut room: usize,
        failures: &mut Vec<ApplyError>,
    ) -> (HashMap<String, Remote>, HashMap<PoliciesKey, u32>) {
        let mut contents: HashMap<PoliciesKey, Content> = HashMap::new();
        let mut all = HashMap::new();
        for (name, workload) in &self.state.workloads {
            if locals.contains_key(&workload.pod()) {
                continue;
            }
            let mut remote = Remote::of(workload);
            if self.state.has_policies_of(workload) {
                let content = contents
                    .entry(remote.policies_key())
                    .or_insert_with(|| Content::of(self.state, workload));
                for family in [0, 1] {
                    let Some(address) = remote.address(family) else {
                        continue;
                    };
                    match self.remote_set(content, address, &mut room) {
                        Ok(set) => remote.sets[family] = set,
                        Err(error) => failures.push(ApplyError::at(name)(error)),
                    }
                }
            }
            all.insert(name.clone(), remote);
        }
        let shared = contents.into_iter().filter_map(|(key, content)| {
            Some((key, content.set.filter(|_| !content.looks_at_destination)?))
        });
        (all, shared.collect())
    }

    /// 0 if there is no room, or nothing to refuse.
    fn remote_set(
        &mut self,
        content: &mut Content,
        address: IpAddr,
        room: &mut usize,
    ) -> std::io::Result<u32> {
        let cost = content.verdicts * self.sources.len();
        if content.policies.is_empty() || cost > *room {
            content.set = Some(0);
            return Ok(0);
        }
        let before = self.sets.len();
        let set = self.set(&content.policies, &content.name, Some(address))?;
        content.set = Some(set);
        if self.sets.len() > before {
            *room -= cost;
        }
        Ok(set)
    }

    fn carry_over(&mut self, tables: &Tables, local: &Local) {
        let Some(entry) = tables.workloads.get(&local.id) else {
            return;
        };
        for id in entry.source {
            let source = self.known.sources.get(&id);
            self.sources
                .extend(source.map(|source| (id, source.clone())));
        }
        for id in entry.policy_set {
            let set = self.known.sets.get(&id);
            self.sets.extend(set.map(|set| (id, Arc::clone(set))));
        }
    }

    /// One number per identity, and per side of every network that a policy tells clients apart by.
    fn source(&mut self, identity: &Identity, address: Option<IpAddr>) -> std::io::Result<u32> {
        let mut name = format!("source:{}", identity.principal());
        let mut judged = None;
        if !self.networks.is_empty() {
            judged = address;
            for network in self
                .networks
                .iter()
                .filter(|net| address.is_some_and(|a| net.contains(&a)))
            {
                // Writing to a String cannot fail.
                let _ = write!(name, "|{network}");
            }
        }
        let id = self.ids.named(&name)?;
        self.sources.entry(id).or_insert_with(|| Client {
            identity: Some(identity.clone()),
            address: judged,
        });
        Ok(id)
    }

    fn set(
        &mut self,
        policies: &[(String, Arc<Authorization>)],
        content: &str,
        address: Option<IpAddr>,
    ) -> std::io::Result<u32> {
        let address = address.filter(|_| policy::looks_at_destination(policies));
        let id = match address {
            Some(address) => self.ids.named(&format!("{content}@{address}"))?,
            None => self.ids.named(content)?,
        };
        let known = self.known;
        self.sets.entry(id).or_insert_with(|| {
            known.sets.get(&id).cloned().unwrap_or_else(|| {
                Arc::new(PolicySet {
                    policies: policies.to_vec(),
                    ports: policy::named_ports(policies),
                    address,
                })
            })
        });
        Ok(id)
    }
}

/// The policies of workloads that have the same ones.
struct Content {
    policies: Vec<(String, Arc<Authorization>)>,
    name: String,
    looks_at_destination: bool,
    /// How many verdicts each source takes.
    verdicts: usize,
    set: Option<u32>,
}

impl Content {
    fn of(state: &MeshState, workload: &Workload) -> Self {
        let policies = state.policies_of(workload);
        Self {
            name: content_name(state, &policies),
            looks_at_destination: policy::looks_at_destination(&policies),
            verdicts: policy::named_ports(&policies).len() + 1,
            set: None,
            policies,
        }
    }
}

/// A name that two lists of policies share only if they say the same.
fn content_name(state: &MeshState, policies: &[(String, Arc<Authorization>)]) -> String {
    let mut digest = Sha256::new();
    for (name, _) in policies {
        digest.update((name.len() as u64).to_be_bytes());
        digest.update(name);
        digest.update(state.policy_digest(name));
    }
    let mut name = String::from("set:");
    for byte in digest.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name
}

/// Writes the verdicts of some sources with one set. A port's own verdict comes before the one for all other
/// ports: if room ends in between, a port that is to be refused must not fall under the others' permission.
fn write_verdicts(
    tables: &mut Tables,
    sources: &Sources,
    of_set: &[u32],
    set_id: u32,
    sets: &Sets,
    numbers: &HashMap<String, u32>,
) -> Result<(), KernelError> {
    let Some(set) = sets.get(&set_id) else {
        return Ok(());
    };
    let (mut entries, mut same) = (Vec::new(), Vec::new());
    for source_id in of_set {
        let Some(source) = sources.get(source_id) else {
            continue;
        };
        let others = verdict(set, source, None, numbers);
        for port in &set.ports {
            let verdict = verdict(set, source, Some(*port), numbers);
            if verdict == others {
                same.push(key(*source_id, set_id, *port));
            } else {
                entries.push((key(*source_id, set_id, *port), verdict));
            }
        }
        entries.push((key(*source_id, set_id, 0), others));
    }
    tables.verdicts.set_all(entries)?;
    // What an earlier agent wrote of the same set, if it judged otherwise.
    tables.verdicts.remove_all(same)
}

fn verdict(
    set: &PolicySet,
    source: &Client,
    port: Option<u16>,
    numbers: &HashMap<String, u32>,
) -> VerdictEntry {
    let server = Server {
        address: set.address,
        port,
    };
    let judgement = policy::judge(&set.policies, source, server);
    let policy = judgement
        .policy
        .and_then(|name| numbers.get(&name).copied());
    VerdictEntry {
        policy: policy.unwrap_or(0),
        reason: judgement.reason as u16,
        action: match judgement.reason {
            _ if judgement.allowed => Action::Direct,
            // A stranger's address is known where the agent accepts its connection.
            Reason::NeedsAgent if source.identity.is_none() => Action::Agent,
            _ => Action::Deny,
        } as u8,
        padding: 0,
    }
}

fn key(source: u32, policy_set: u32, port: u16) -> VerdictKey {
    VerdictKey {
        source,
        policy_set,
        port,
        socket_class: SocketClass::App as u8,
        padding: 0,
    }
}
