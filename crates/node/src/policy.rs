//! What an authorization policy says about one client, one server and one port.
//!
//! The meaning is Istio ambient's: rules are ORed, clauses ANDed, matches ORed, kinds inside a match ANDed, values
//! of a kind ORed. A DENY that matches wins; if any ALLOW policy applies, one must match. A client that nobody
//! vouches for has no principal, and its address cannot be judged in the kernel: where the answer depends on
//! that address, it is no.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use kernel::Reason;
use xds::proto::{
    address_from_bytes,
    security::{self, Authorization, Match, StringMatch, string_match::MatchType},
};

/// A client, as policies see it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Client {
    /// `None` for one that nobody vouches for.
    pub(crate) identity: Option<Identity>,
    /// `None` if it is not known here.
    pub(crate) address: Option<IpAddr>,
}

/// An attested identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Identity {
    pub(crate) trust_domain: String,
    pub(crate) namespace: String,
    pub(crate) service_account: String,
}

impl Identity {
    /// As policies write it: without `spiffe://`.
    pub(crate) fn principal(&self) -> String {
        format!(
            "{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

/// A server's address and port. Port `None` stands for every port that no policy names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Server {
    pub(crate) address: Option<IpAddr>,
    pub(crate) port: Option<u16>,
}

/// The answer, with the policy that gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Judgement {
    pub(crate) allowed: bool,
    pub(crate) reason: Reason,
    pub(crate) policy: Option<String>,
}

/// Policies that apply to a server, sorted by name.
pub(crate) type Policies = [(String, Arc<Authorization>)];

/// Judges by all policies that apply to the server, sorted by name.
pub(crate) fn judge(policies: &Policies, client: &Client, server: Server) -> Judgement {
    let by = |action| {
        policies
            .iter()
            .filter(move |(_, policy)| policy.action() == action)
    };
    for (name, policy) in by(security::Action::Deny) {
        match matches(policy, client, server) {
            Truth::No => {}
            Truth::Yes => return denied(deny_reason(policy), name),
            Truth::Unknown => return denied(Reason::NeedsAgent, name),
        }
    }
    let mut first_allow = None;
    let mut unknown = None;
    for (name, policy) in by(security::Action::Allow) {
        first_allow.get_or_insert(name);
        match matches(policy, client, server) {
            Truth::Yes => {
                return Judgement {
                    allowed: true,
                    reason: Reason::PolicyAllow,
                    policy: Some(name.clone()),
                };
            }
            Truth::Unknown => unknown = unknown.or(Some(name)),
            Truth::No => {}
        }
    }
    match (first_allow, unknown) {
        (_, Some(name)) => denied(Reason::NeedsAgent, name),
        (Some(name), None) => denied(Reason::NoAllowMatched, name),
        (None, None) => Judgement {
            allowed: true,
            reason: Reason::NoPolicy,
            policy: None,
        },
    }
}

/// Ports that any of the policies names: each needs a verdict of its own.
pub(crate) fn named_ports(policies: &Policies) -> Vec<u16> {
    let mut ports: Vec<u16> = policies
        .iter()
        .flat_map(|(_, policy)| all_matches(policy))
        .flat_map(|one| {
            one.destination_ports
                .iter()
                .chain(&one.not_destination_ports)
        })
        .filter_map(|port| u16::try_from(*port).ok())
        .filter(|port| *port != 0)
        .collect();
    ports.sort_unstable();
    ports.dedup();
    ports
}

/// Client networks that any of the policies names.
pub(crate) fn named_sources<'a>(
    policies: impl Iterator<Item = &'a Authorization>,
) -> impl Iterator<Item = IpNet> {
    policies
        .flat_map(all_matches)
        .flat_map(|one| one.source_ips.iter().chain(&one.not_source_ips))
        .filter_map(network)
}

/// Whether any of the policies looks at the server's address.
pub(crate) fn looks_at_destination(policies: &Policies) -> bool {
    policies
        .iter()
        .flat_map(|(_, policy)| all_matches(policy))
        .any(|one| !one.destination_ips.is_empty() || !one.not_destination_ips.is_empty())
}

/// Refuses what cannot be judged: a policy that was half understood would be a hole.
pub(crate) fn validate(policy: &Authorization) -> Result<(), String> {
    security::Action::try_from(policy.action)
        .map_err(|_| format!("unknown action {}", policy.action))?;
    security::Scope::try_from(policy.scope)
        .map_err(|_| format!("unknown scope {}", policy.scope))?;
    for one in all_matches(policy) {
        let networks = [
            &one.source_ips,
            &one.not_source_ips,
            &one.destination_ips,
            &one.not_destination_ips,
        ];
        for address in networks.into_iter().flatten() {
            network(address).ok_or("a network is not an address with a prefix length")?;
        }
        let strings = [
            &one.namespaces,
            &one.not_namespaces,
            &one.principals,
            &one.not_principals,
        ];
        if strings
            .into_iter()
            .flatten()
            .any(|string| string.match_type.is_none())
        {
            return Err("a string match has no value".into());
        }
        if one
            .destination_ports
            .iter()
            .chain(&one.not_destination_ports)
            .any(|port| *port > 65535)
        {
            return Err("a port is above 65535".into());
        }
    }
    Ok(())
}

/// Yes, no, or not to be known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Truth {
    No,
    Unknown,
    Yes,
}

impl Truth {
    fn and(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, _) | (_, Self::No) => Self::No,
            (Self::Yes, Self::Yes) => Self::Yes,
            _ => Self::Unknown,
        }
    }

    fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::Yes, _) | (_, Self::Yes) => Self::Yes,
            (Self::No, Self::No) => Self::No,
            _ => Self::Unknown,
        }
    }

    fn not(self) -> Self {
        match self {
            Self::Yes => Self::No,
            Self::No => Self::Yes,
            Self::Unknown => Self::Unknown,
        }
    }
}

impl From<bool> for Truth {
    fn from(value: bool) -> Self {
        if value { Self::Yes } else { Self::No }
    }
}

fn denied(reason: Reason, policy: &str) -> Judgement {
    Judgement {
        allowed: false,
        reason,
        policy: Some(policy.to_owned()),
    }
}

/// PeerAuthentication arrives as DENY policies under the names that istiod gives them.
fn deny_reason(policy: &Authorization) -> Reason {
    let converted = policy.name == "istio_converted_static_strict"
        || policy.name.starts_with("converted_peer_authentication_");
    if converted {
        Reason::PeerNotAttested
    } else {
        Reason::PolicyDeny
    }
}

fn all_matches(policy: &Authorization) -> impl Iterator<Item = &Match> {
    policy
        .rules
        .iter()
        .flat_map(|rule| &rule.clauses)
        .flat_map(|clause| &clause.matches)
}

fn matches(policy: &Authorization, client: &Client, server: Server) -> Truth {
    policy.rules.iter().fold(Truth::No, |any, rule| {
        any.or(rule.clauses.iter().fold(Truth::Yes, |all, clause| {
            let one = clause
                .matches
                .iter()
                .fold(Truth::No, |any, one| any.or(match_one(one, client, server)));
            all.and(if clause.matches.is_empty() {
                Truth::Yes
            } else {
                one
            })
        }))
    })
}

fn match_one(one: &Match, client: &Client, server: Server) -> Truth {
    let identity = client.identity.as_ref();
    let principal = identity.map(Identity::principal);
    let strings = |wanted: &[StringMatch], value: Option<&str>| {
        wanted
            .iter()
            .any(|wanted| matches_string(wanted, value))
            .into()
    };
    let namespace = identity.map(|identity| identity.namespace.as_str());
    let accounts = |wanted: &[security::ServiceAccountMatch]| {
        wanted
            .iter()
            .any(|wanted| {
                identity.is_some_and(|identity| {
                    wanted.namespace == identity.namespace
                        && wanted.service_account == identity.service_account
                })
            })
            .into()
    };
    let port = |wanted: &[u32]| {
        server
            .port
            .is_some_and(|port| wanted.contains(&u32::from(port)))
            .into()
    };
    kind(&one.namespaces, &one.not_namespaces, |wanted| {
        strings(wanted, namespace)
    })
    .and(kind(&one.principals, &one.not_principals, |wanted| {
        strings(wanted, principal.as_deref())
    }))
    .and(kind(
        &one.service_accounts,
        &one.not_service_accounts,
        accounts,
    ))
    .and(kind(&one.source_ips, &one.not_source_ips, |nets| {
        in_networks(nets, client.address)
    }))
    .and(kind(
        &one.destination_ips,
        &one.not_destination_ips,
        |nets| in_networks(nets, server.address),
    ))
    .and(kind(
        &one.destination_ports,
        &one.not_destination_ports,
        port,
    ))
}

/// One kind of condition: empty lists ask for nothing.
fn kind<T>(wanted: &[T], unwanted: &[T], holds: impl Fn(&[T]) -> Truth) -> Truth {
    let positive = if wanted.is_empty() {
        Truth::Yes
    } else {
        holds(wanted)
    };
    let negative = if unwanted.is_empty() {
        Truth::Yes
    } else {
        holds(unwanted).not()
    };
    positive.and(negative)
}

fn matches_string(wanted: &StringMatch, value: Option<&str>) -> bool {
    let Some(value) = value else {
        return false;
    };
    match &wanted.match_type {
        Some(MatchType::Exact(exact)) => exact == value,
        Some(MatchType::Prefix(prefix)) => value.starts_with(prefix.as_str()),
        Some(MatchType::Suffix(suffix)) => value.ends_with(suffix.as_str()),
        Some(MatchType::Presence(())) => !value.is_empty(),
        None => false,
    }
}

fn in_networks(networks: &[security::Address], address: Option<IpAddr>) -> Truth {
    let Some(address) = address else {
        return Truth::Unknown;
    };
    networks
        .iter()
        .filter_map(network)
        .any(|network| network.contains(&address))
        .into()
}

fn network(address: &security::Address) -> Option<IpNet> {
    let prefix = u8::try_from(address.length).ok()?;
    IpNet::new(address_from_bytes(&address.address)?, prefix).ok()
}

#[cfg(test)]
mod tests;
