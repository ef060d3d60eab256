//! PeerAuthentication, said in the terms of authorization, as istiod says it to ztunnel.
//!
//! STRICT is "deny who has no principal". A workload that is STRICT on every port lists one policy that is the same for
//! all; one that differs by port lists a policy made for its PeerAuthentication. PERMISSIVE and DISABLE
//! list nothing.
//!
//! Which mode applies is Istio's precedence: the workload's policy, else the namespace's, else the root
//! namespace's, UNSET meaning "ask the next". If no one says, it is STRICT here (Istio's own default is PERMISSIVE). Among equals
//! Istio takes the oldest; files have no age, so here it is the first by name.
//! <https://istio.io/latest/docs/reference/config/security/peer_authentication/>

use std::collections::{BTreeMap, BTreeSet};

use api::{
    mesh::MeshConfig,
    objects::{MtlsMode, PeerAuthentication},
    pod::PodSpec,
};
use prost::Message;
use xds::proto::security::{
    Action, Authorization, Clause, Match, Rule, Scope, StringMatch, string_match::MatchType,
};

use super::Resource;
use crate::selector::SelectorIndex;

/// Name that istiod gives to the policy "STRICT on every port". An underscore is in no object's name.
const STATIC_STRICT: &str = "istio_converted_static_strict";
/// Prefix that istiod gives to the names of policies that differ by port.
const CONVERTED_PREFIX: &str = "converted_peer_authentication_";

/// All PeerAuthentications, sorted by what they are for.
#[derive(Debug)]
pub(crate) struct PeerAuthentications<'a> {
    root_namespace: &'a str,
    mesh_strict: bool,
    /// By namespace: STRICT or not, for those that say.
    namespaces: BTreeMap<&'a str, bool>,
    /// With a selector, by namespace and name.
    workloads: BTreeMap<(&'a str, &'a str), &'a PeerAuthentication>,
}

impl<'a> PeerAuthentications<'a> {
    pub(crate) fn new(
        mesh: &'a MeshConfig,
        policies: impl Iterator<Item = &'a PeerAuthentication>,
    ) -> Self {
        let root_namespace = mesh.root_namespace.as_str();
        let mut wide: BTreeMap<&str, &PeerAuthentication> = BTreeMap::new();
        let mut workloads = BTreeMap::new();
        for policy in policies {
            let (namespace, name) = (
                policy.metadata.namespace.as_str(),
                policy.metadata.name.as_str(),
            );
            if policy.selector.is_empty() {
                let first = wide.entry(namespace).or_insert(policy);
                if name < first.metadata.name.as_str() {
                    *first = policy;
                }
            } else if namespace != root_namespace {
                // In the root namespace a selector has no meaning to Istio: such a policy applies to nothing.
                workloads.insert((namespace, name), policy);
            }
        }
        let said = |policy: &PeerAuthentication| is_strict(policy.mode);
        let mesh_strict = wide.remove(root_namespace).and_then(said).unwrap_or(true);
        Self {
            root_namespace,
            mesh_strict,
            namespaces: wide
                .into_iter()
                .filter_map(|(namespace, policy)| Some((namespace, said(policy)?)))
                .collect(),
            workloads,
        }
    }

    /// Finds the policies that select a workload.
    pub(crate) fn index(&self) -> SelectorIndex<'a, &'a PeerAuthentication> {
        SelectorIndex::new(
            self.workloads
                .iter()
                .map(|((namespace, _), policy)| (Some(*namespace), &policy.selector, *policy)),
        )
    }

    /// Names of the policies that a workload must list.
    pub(crate) fn policies_of(
        &self,
        index: &SelectorIndex<'a, &'a PeerAuthentication>,
        spec: &PodSpec,
    ) -> Option<String> {
        let selected = index
            .matching(&spec.namespace, &spec.labels)
            .min_by(|one, other| one.metadata.name.cmp(&other.metadata.name));
        match selected {
            Some(policy) if !self.exceptions(policy).is_empty() => Some(key_of(policy)),
            Some(policy) => self.is_strict(policy).then(|| self.static_strict_key()),
            None => self
                .namespace_is_strict(&spec.namespace)
                .then(|| self.static_strict_key()),
        }
    }

    /// The policies themselves, whether or not a workload lists them yet.
    pub(crate) fn resources(&self) -> Vec<Resource> {
        let static_strict = (
            self.static_strict_key(),
            deny(
                self.root_namespace,
                STATIC_STRICT,
                vec![without_principal()],
            ),
        );
        let converted = self.workloads.values().filter_map(|policy| {
            let exceptions = self.exceptions(policy);
            if exceptions.is_empty() {
                return None;
            }
            let ports = exceptions.into_iter().map(u32::from).collect();
            let ports = if self.is_strict(policy) {
                Match {
                    not_destination_ports: ports,
                    ..Match::default()
                }
            } else {
                Match {
                    destination_ports: ports,
                    ..Match::default()
                }
            };
            let clauses = vec![
                without_principal(),
                Clause {
                    matches: vec![ports],
                },
            ];
            let name = format!("{CONVERTED_PREFIX}{}", policy.metadata.name);
            Some((
                key_of(policy),
                deny(&policy.metadata.namespace, &name, clauses),
            ))
        });
        std::iter::once(static_strict)
            .chain(converted)
            .map(|(key, policy)| (key, policy.encode_to_vec().into()))
            .collect()
    }

    /// Ports whose mode differs from what the policy means for the others.
    fn exceptions(&self, policy: &PeerAuthentication) -> BTreeSet<u16> {
        let all_others = self.is_strict(policy);
        policy
            .port_modes
            .iter()
            .filter(|(_, mode)| is_strict(**mode).is_some_and(|strict| strict != all_others))
            .map(|(port, _)| *port)
            .collect()
    }

    fn is_strict(&self, policy: &PeerAuthentication) -> bool {
        is_strict(policy.mode)
            .unwrap_or_else(|| self.namespace_is_strict(&policy.metadata.namespace))
    }

    fn namespace_is_strict(&self, namespace: &str) -> bool {
        self.namespaces
            .get(namespace)
            .copied()
            .unwrap_or(self.mesh_strict)
    }

    fn static_strict_key(&self) -> String {
        format!("{}/{STATIC_STRICT}", self.root_namespace)
    }
}

/// Resource name of the policy made for a PeerAuthentication that differs by port.
pub(crate) fn converted_key(namespace: &str, name: &str) -> String {
    format!("{namespace}/{CONVERTED_PREFIX}{name}")
}

fn key_of(policy: &PeerAuthentication) -> String {
    converted_key(&policy.metadata.namespace, &policy.metadata.name)
}

/// `None` if the mode leaves it to the next wider policy.
fn is_strict(mode: MtlsMode) -> Option<bool> {
    match mode {
        MtlsMode::Unset => None,
        MtlsMode::Strict => Some(true),
        MtlsMode::Permissive | MtlsMode::Disable => Some(false),
    }
}

fn without_principal() -> Clause {
    let anyone = StringMatch {
        match_type: Some(MatchType::Presence(())),
    };
    Clause {
        matches: vec![Match {
            not_principals: vec![anyone],
            ..Match::default()
        }],
    }
}

fn deny(namespace: &str, name: &str, clauses: Vec<Clause>) -> Authorization {
    Authorization {
        name: name.to_owned(),
        namespace: namespace.to_owned(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        rules: vec![Rule { clauses }],
        dry_run: false,
    }
}

#[cfg(test)]
mod tests;
