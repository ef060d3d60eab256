//! Identities × policy sets → verdicts, compiled eagerly: a miss in the kernel is never "the first connection".
//!
//! A policy set's number stands for its content. A changed policy makes new sets with new verdicts, which are
//! complete before any workload is switched to them, with one write per workload.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
    net::IpAddr,
    sync::Arc,
};

use ipnet::IpNet;
use kernel::{
    Action, KernelError, SOURCE_ANONYMOUS, SocketClass, Tables, VerdictEntry, VerdictKey,
    WorkloadEntry,
};
use prost::Message;
use sha2::{Digest, Sha256};
use xds::proto::security::Authorization;

use super::{ApplyError, Local};
use crate::{
    ids::Ids,
    names::NameBook,
    policy::{self, Client, Identity, Server},
    state::{MeshState, Workload},
};

/// What is in the tables.
#[derive(Debug, Default)]
pub(crate) struct Rules {
    /// Pairs of source and policy set whose verdicts are complete.
    compiled: HashSet<(u32, u32)>,
    sets: BTreeMap<u32, PolicySet>,
    sources: BTreeMap<u32, Client>,
}

#[derive(Debug, Clone)]
struct PolicySet {
    policies: Vec<(String, Arc<Authorization>)>,
    /// Set only where a policy looks at it.
    address: Option<IpAddr>,
}

impl Rules {
    /// Compiles rules for all local workloads that the control plane knows.
    pub(super) fn apply(
        &mut self,
        tables: &mut Tables,
        ids: &mut Ids,
        state: &MeshState,
        locals: &HashMap<String, Local>,
        names: &NameBook,
        failures: &mut Vec<ApplyError>,
    ) {
        let mut compiler = Compiler::new(state, ids);
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
                _ => self.carry_over(tables, local, &mut compiler),
            }
        }
        let Compiler { sources, sets, .. } = compiler;
        let mut policy_numbers = HashMap::new();
        for (name, _) in sets.values().flat_map(|set| &set.policies) {
            match ids.named(&format!("policy:{name}")) {
                Ok(id) => {
                    names.set_policy(id, name.clone());
                    policy_numbers.insert(name.clone(), id);
                }
                Err(error) => failures.push(ApplyError::at(name)(error)),
            }
        }
        if let Err(error) = ids.save() {
            failures.push(ApplyError::at("numbers of this node")(error));
            return;
        }

        let mut needed = HashSet::new();
        for (source_id, source) in &sources {
            for (set_id, set) in &sets {
                needed.insert((*source_id, *set_id));
                if self.compiled.contains(&(*source_id, *set_id)) {
                    continue;
                }
                match write_verdicts(tables, *source_id, source, *set_id, set, &policy_numbers) {
                    Ok(()) => drop(self.compiled.insert((*source_id, *set_id))),
                    Err(source) => failures.push(ApplyError::at("verdicts")(source)),
                }
            }
        }
        for (local, entry) in entries {
            let outcome = tables.workloads.set(local.id, entry);
            failures.extend(outcome.err().map(ApplyError::at(&local.enrolled.uid)));
        }
        let stale: HashSet<_> = self.compiled.difference(&needed).copied().collect();
        if !stale.is_empty() {
            let outcome = tables
                .verdicts
                .retain(|key| !stale.contains(&(key.source, key.policy_set)));
            failures.extend(outcome.err().map(ApplyError::at("verdicts")));
        }
        self.compiled.retain(|pair| needed.contains(pair));
        ids.forget_unused("source", &sources.keys().copied().collect());
        ids.forget_unused("set", &sets.keys().copied().collect());
        self.sources = sources;
        self.sets = sets;
    }

    fn carry_over(&self, tables: &Tables, local: &Local, compiler: &mut Compiler<'_>) {
        let Some(entry) = tables.workloads.get(&local.id) else {
            return;
        };
        for id in entry.source {
            compiler
                .sources
                .extend(self.sources.get(&id).map(|source| (id, source.clone())));
        }
        for id in entry.policy_set {
            compiler
                .sets
                .extend(self.sets.get(&id).map(|set| (id, set.clone())));
        }
    }

    pub(super) fn reconcile(&mut self, tables: &mut Tables) -> Result<(), KernelError> {
        let compiled = &self.compiled;
        tables
            .verdicts
            .retain(|key| compiled.contains(&(key.source, key.policy_set)))
    }
}

/// One pass over the local workloads.
struct Compiler<'a> {
    state: &'a MeshState,
    ids: &'a mut Ids,
    /// Networks that any policy tells clients apart by.
    networks: Vec<IpNet>,
    sources: BTreeMap<u32, Client>,
    sets: BTreeMap<u32, PolicySet>,
}

impl<'a> Compiler<'a> {
    fn new(state: &'a MeshState, ids: &'a mut Ids) -> Self {
        let mut networks: Vec<IpNet> =
            policy::named_sources(state.policies.values().map(AsRef::as_ref)).collect();
        networks.sort();
        networks.dedup();
        let anonymous = Client {
            identity: None,
            address: None,
        };
        Self {
            state,
            ids,
            networks,
            sources: BTreeMap::from([(SOURCE_ANONYMOUS, anonymous)]),
            sets: BTreeMap::new(),
        }
    }

    fn entry(&mut self, local: &Local, workload: &Workload) -> Result<WorkloadEntry, ApplyError> {
        let identity = Identity {
            trust_domain: workload.trust_domain().to_owned(),
            namespace: workload.message.namespace.clone(),
            service_account: workload.service_account().to_owned(),
        };
        let policies: Vec<(String, Arc<Authorization>)> = self
            .state
            .policies_of(workload)
            .into_iter()
            .map(|(name, policy)| (name.clone(), Arc::clone(policy)))
            .collect();
        let mut entry = WorkloadEntry {
            netns: local.netns,
            v4: local.address(0).map(Into::into).unwrap_or_default(),
            v6: local.address(1).map(Into::into).unwrap_or_default(),
            ..WorkloadEntry::default()
        };
        for family in [0, 1] {
            let address = local.address(family);
            entry.source[family] = self
                .source(&identity, address)
                .map_err(ApplyError::at(&local.enrolled.uid))?;
            entry.policy_set[family] = self
                .set(&policies, address)
                .map_err(ApplyError::at(&local.enrolled.uid))?;
        }
        Ok(entry)
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
        address: Option<IpAddr>,
    ) -> std::io::Result<u32> {
        let address = address.filter(|_| policy::looks_at_destination(policies));
        let mut digest = Sha256::new();
        for (name, policy) in policies {
            digest.update((name.len() as u64).to_be_bytes());
            digest.update(name);
            let bytes = policy.encode_to_vec();
            digest.update((bytes.len() as u64).to_be_bytes());
            digest.update(bytes);
        }
        let mut name = String::from("set:");
        for byte in digest.finalize() {
            let _ = write!(name, "{byte:02x}");
        }
        if let Some(address) = address {
            let _ = write!(name, "@{address}");
        }
        let id = self.ids.named(&name)?;
        self.sets.entry(id).or_insert_with(|| PolicySet {
            policies: policies.to_vec(),
            address,
        });
        Ok(id)
    }
}

fn write_verdicts(
    tables: &mut Tables,
    source_id: u32,
    source: &Client,
    set_id: u32,
    set: &PolicySet,
    policy_numbers: &HashMap<String, u32>,
) -> Result<(), KernelError> {
    let verdict = |port| {
        let server = Server {
            address: set.address,
            port,
        };
        let judgement = policy::judge(&set.policies, source, server);
        let policy = judgement
            .policy
            .and_then(|name| policy_numbers.get(&name).copied());
        VerdictEntry {
            policy: policy.unwrap_or(0),
            reason: judgement.reason as u16,
            action: if judgement.allowed {
                Action::Direct
            } else {
                Action::Deny
            } as u8,
            padding: 0,
        }
    };
    let key = |port| VerdictKey {
        source: source_id,
        policy_set: set_id,
        port,
        socket_class: SocketClass::App as u8,
        padding: 0,
    };
    let others = verdict(None);
    tables.verdicts.set(key(0), others)?;
    for port in policy::named_ports(&set.policies) {
        let verdict = verdict(Some(port));
        if verdict == others {
            tables.verdicts.remove(&key(port))?;
        } else {
            tables.verdicts.set(key(port), verdict)?;
        }
    }
    Ok(())
}
