//! AuthorizationPolicy to `istio.security.Authorization`, as istiod does it for ztunnel.
//!
//! `from` and `to` become one clause each whose matches are ORed, every `when` a clause of its own. What only
//! L7 could compare is left out: an ALLOW rule with it never matches and is dropped, a DENY rule keeps its L4
//! part. An ALLOW policy whose rules are all dropped still exists, and so denies.
//! <https://istio.io/latest/docs/ambient/usage/l4-policy/>

use std::net::IpAddr;

use api::{
    mesh::MeshConfig,
    objects::{
        Action, AuthorizationPolicy, Condition, Operation, Rule, RuleSource, ServiceAccountMatch,
        StringMatch, Values,
    },
};
use ipnet::IpNet;
use xds::proto::{
    address_to_bytes,
    security::{self, Authorization, Clause, Match, Scope, string_match::MatchType},
};

/// Name of the policy's resource: `NAMESPACE/NAME`.
pub(crate) fn key(policy: &AuthorizationPolicy) -> String {
    format!("{}/{}", policy.metadata.namespace, policy.metadata.name)
}

/// Compiles one policy.
pub(crate) fn compile(mesh: &MeshConfig, policy: &AuthorizationPolicy) -> Authorization {
    let namespace = &policy.metadata.namespace;
    let scope = if !policy.selector.is_empty() {
        Scope::WorkloadSelector
    } else if *namespace == mesh.root_namespace {
        Scope::Global
    } else {
        Scope::Namespace
    };
    let action = match policy.action {
        Action::Allow => security::Action::Allow,
        Action::Deny => security::Action::Deny,
    };
    Authorization {
        name: policy.metadata.name.clone(),
        namespace: namespace.clone(),
        scope: scope.into(),
        action: action.into(),
        rules: policy
            .rules
            .iter()
            .filter(|rule| policy.action == Action::Deny || !rule.needs_l7())
            .map(compile_rule)
            .collect(),
        dry_run: false,
    }
}

fn compile_rule(rule: &Rule) -> security::Rule {
    let clause = |matches: Vec<Match>| (!matches.is_empty()).then_some(Clause { matches });
    let to = clause(rule.to.iter().map(compile_operation).collect());
    let from = clause(rule.from.iter().map(compile_source).collect());
    let when = rule.when.iter().map(|condition| Clause {
        matches: vec![compile_condition(condition)],
    });
    security::Rule {
        clauses: to.into_iter().chain(from).chain(when).collect(),
    }
}

fn compile_operation(operation: &Operation) -> Match {
    let (destination_ports, not_destination_ports) = both(&operation.ports, port);
    Match {
        destination_ports,
        not_destination_ports,
        ..Match::default()
    }
}

fn compile_source(source: &RuleSource) -> Match {
    let (principals, not_principals) = both(&source.principals, string);
    let (namespaces, not_namespaces) = both(&source.namespaces, string);
    let (service_accounts, not_service_accounts) = both(&source.service_accounts, account);
    let (source_ips, not_source_ips) = both(&source.ip_blocks, network);
    Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        source_ips,
        not_source_ips,
        service_accounts,
        not_service_accounts,
        ..Match::default()
    }
}

fn compile_condition(condition: &Condition) -> Match {
    let mut compiled = Match::default();
    match condition {
        Condition::SourceIp(values) => {
            (compiled.source_ips, compiled.not_source_ips) = both(values, network);
        }
        Condition::SourceNamespace(values) => {
            (compiled.namespaces, compiled.not_namespaces) = both(values, string);
        }
        Condition::SourcePrincipal(values) => {
            (compiled.principals, compiled.not_principals) = both(values, string);
        }
        Condition::SourceServiceAccount(values) => {
            (compiled.service_accounts, compiled.not_service_accounts) = both(values, account);
        }
        Condition::DestinationIp(values) => {
            (compiled.destination_ips, compiled.not_destination_ips) = both(values, network);
        }
        Condition::DestinationPort(values) => {
            (compiled.destination_ports, compiled.not_destination_ports) = both(values, port);
        }
        // Only a DENY rule comes here with it, and matches whatever it asks.
        Condition::L7 { .. } => {}
    }
    compiled
}

fn both<T, U>(values: &Values<T>, compile: fn(&T) -> U) -> (Vec<U>, Vec<U>) {
    (
        values.any_of.iter().map(compile).collect(),
        values.none_of.iter().map(compile).collect(),
    )
}

fn string(pattern: &StringMatch) -> security::StringMatch {
    security::StringMatch {
        match_type: Some(match pattern {
            StringMatch::Exact(exact) => MatchType::Exact(exact.clone()),
            StringMatch::Prefix(prefix) => MatchType::Prefix(prefix.clone()),
            StringMatch::Suffix(suffix) => MatchType::Suffix(suffix.clone()),
            StringMatch::Present => MatchType::Presence(()),
        }),
    }
}

fn account(account: &ServiceAccountMatch) -> security::ServiceAccountMatch {
    security::ServiceAccountMatch {
        namespace: account.namespace.clone(),
        service_account: account.name.clone(),
    }
}

fn network(network: &IpNet) -> security::Address {
    let address: IpAddr = network.network();
    security::Address {
        address: address_to_bytes(address),
        length: network.prefix_len().into(),
    }
}

fn port(port: &u16) -> u32 {
    u32::from(*port)
}

#[cfg(test)]
mod tests;
