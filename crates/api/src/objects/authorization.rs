//! `security.istio.io/v1` AuthorizationPolicy: its types, and what they need of whoever enforces them.
//!
//! <https://istio.io/latest/docs/reference/config/security/authorization-policy/>. All of Istio's fields are
//! read. Those that only an L7 proxy could compare bring a warning, and [`Rule::needs_l7`] says so to the
//! compiler. Reading is in `authorization/decode.rs`.

mod decode;

use std::collections::BTreeMap;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Metadata, ServiceAccountMatch, StringMatch, Values};

/// Who may, or may not, connect to the selected workloads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorizationPolicy {
    /// Name, namespace, labels.
    pub metadata: Metadata,
    /// Labels of the workloads it is for; empty: the namespace (the mesh, from the root namespace).
    pub selector: BTreeMap<String, String>,
    /// What a match means.
    pub action: Action,
    /// The policy matches if one of them does; with none it never matches (so that ALLOW allows nothing).
    pub rules: Vec<Rule>,
}

/// What it means that a policy matches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Action {
    /// Allowed, unless a DENY matches too. Once a workload has an ALLOW policy, what none allows is denied.
    #[default]
    Allow,
    /// Denied.
    Deny,
}

/// Matches if one of `from`, one of `to` and all of `when` match. An empty list matches anything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Who connects.
    pub from: Vec<Source>,
    /// To what.
    pub to: Vec<Operation>,
    /// Further conditions.
    pub when: Vec<Condition>,
}

/// Who connects: matches if every field does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Source {
    /// Peer identities without `spiffe://`: `TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`.
    pub principals: Values<StringMatch>,
    /// Peers' namespaces.
    pub namespaces: Values<StringMatch>,
    /// Peers' service accounts.
    pub service_accounts: Values<ServiceAccountMatch>,
    /// Peers' addresses.
    pub ip_blocks: Values<IpNet>,
    /// Addresses from X-Forwarded-For or PROXY protocol. L7.
    pub remote_ip_blocks: Values<IpNet>,
    /// Identities from a JWT. L7.
    pub request_principals: Values<StringMatch>,
}

/// What is connected to: matches if every field does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Operation {
    /// Ports of the workload.
    pub ports: Values<u16>,
    /// Hosts. L7.
    pub hosts: Values<StringMatch>,
    /// Methods. L7.
    pub methods: Values<StringMatch>,
    /// Paths. L7.
    pub paths: Values<StringMatch>,
}

/// A further condition. <https://istio.io/latest/docs/reference/config/security/conditions/>
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Condition {
    /// `source.ip`.
    SourceIp(Values<IpNet>),
    /// `source.namespace`.
    SourceNamespace(Values<StringMatch>),
    /// `source.principal`.
    SourcePrincipal(Values<StringMatch>),
    /// `source.serviceAccount`.
    SourceServiceAccount(Values<ServiceAccountMatch>),
    /// `destination.ip`.
    DestinationIp(Values<IpNet>),
    /// `destination.port`.
    DestinationPort(Values<u16>),
    /// Any key that needs L7.
    L7 {
        /// The key, such as `request.headers[x-user]`.
        key: String,
        /// The values, not yet looked at.
        values: Values<String>,
    },
}

impl Rule {
    /// Whether any part of it can only be compared by an L7 proxy. At L4, as in Istio's ambient mode, an
    /// ALLOW rule of which this is true never matches; a DENY rule matches without regard to those parts.
    #[must_use]
    pub fn needs_l7(&self) -> bool {
        self.from.iter().any(Source::needs_l7)
            || self.to.iter().any(Operation::needs_l7)
            || self.when.iter().any(Condition::needs_l7)
    }
}

impl Source {
    /// Whether any part of it can only be compared by an L7 proxy.
    #[must_use]
    pub fn needs_l7(&self) -> bool {
        !self.remote_ip_blocks.is_empty() || !self.request_principals.is_empty()
    }

    fn is_empty(&self) -> bool {
        self.principals.is_empty()
            && self.namespaces.is_empty()
            && self.service_accounts.is_empty()
            && self.ip_blocks.is_empty()
            && !self.needs_l7()
    }
}

impl Operation {
    /// Whether any part of it can only be compared by an L7 proxy.
    #[must_use]
    pub fn needs_l7(&self) -> bool {
        !(self.hosts.is_empty() && self.methods.is_empty() && self.paths.is_empty())
    }

    fn is_empty(&self) -> bool {
        self.ports.is_empty() && !self.needs_l7()
    }
}

impl Condition {
    /// Whether only an L7 proxy can compare it.
    #[must_use]
    pub fn needs_l7(&self) -> bool {
        matches!(self, Self::L7 { .. })
    }
}
