//! Which service accounts run on which node: an index that the engine keeps and the authority asks.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{PoisonError, RwLock},
};

use api::pod::PodSpec;

/// What is placed where.
pub trait Placements: Send + Sync + 'static {
    /// Whether a workload of this account is placed on the node.
    fn runs(&self, node: &str, namespace: &str, account: &str) -> bool;

    /// Accounts on the node as `NAMESPACE/ACCOUNT`, sorted; no more than `most`.
    fn accounts(&self, node: &str, most: usize) -> Vec<String>;
}

/// The engine's index.
#[derive(Debug, Default)]
pub(crate) struct Placed {
    index: RwLock<Index>,
}

#[derive(Debug, Default)]
struct Index {
    /// By replica: where it is, and where it still is.
    replicas: HashMap<String, Replica>,
    /// By node: accounts, and how many replicas have them.
    nodes: HashMap<String, BTreeMap<(String, String), usize>>,
}

#[derive(Debug, PartialEq, Eq)]
struct Replica {
    account: (String, String),
    nodes: Vec<String>,
}

impl Placed {
    /// A replica is placed on its node, and may still run on `old`.
    pub(crate) fn set(&self, spec: &PodSpec, old: Option<&str>) {
        let mut nodes = vec![spec.node.clone()];
        nodes.extend(old.filter(|old| *old != spec.node).map(str::to_owned));
        let replica = Replica {
            account: (spec.namespace.clone(), spec.service_account.clone()),
            nodes,
        };
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        if index.replicas.get(&spec.uid) != Some(&replica) {
            index.remove(&spec.uid);
            index.add(&spec.uid, replica);
        }
    }

    /// A replica is gone.
    pub(crate) fn remove(&self, uid: &str) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        index.remove(uid);
    }

    /// Replicas that are not among these are gone.
    pub(crate) fn retain(&self, is_there: impl Fn(&str) -> bool) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<String> = index
            .replicas
            .keys()
            .filter(|uid| !is_there(uid))
            .cloned()
            .collect();
        for uid in gone {
            index.remove(&uid);
        }
    }
}

impl Placements for Placed {
    fn runs(&self, node: &str, namespace: &str, account: &str) -> bool {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let key = (namespace.to_owned(), account.to_owned());
        index
            .nodes
            .get(node)
            .is_some_and(|accounts| accounts.contains_key(&key))
    }

    fn accounts(&self, node: &str, most: usize) -> Vec<String> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let accounts = index.nodes.get(node).into_iter().flat_map(BTreeMap::keys);
        accounts
            .take(most)
            .map(|(namespace, account)| format!("{namespace}/{account}"))
            .collect()
    }
}

impl Index {
    fn add(&mut self, uid: &str, replica: Replica) {
        for node in &replica.nodes {
            let accounts = self.nodes.entry(node.clone()).or_default();
            *accounts.entry(replica.account.clone()).or_default() += 1;
        }
        self.replicas.insert(uid.to_owned(), replica);
    }

    fn remove(&mut self, uid: &str) {
        let Some(replica) = self.replicas.remove(uid) else {
            return;
        };
        for node in &replica.nodes {
            let Some(accounts) = self.nodes.get_mut(node) else {
                continue;
            };
            if let Some(count) = accounts.get_mut(&replica.account) {
                *count -= 1;
                if *count == 0 {
                    accounts.remove(&replica.account);
                }
            }
            if accounts.is_empty() {
                self.nodes.remove(node);
            }
        }
    }
}
