//! What one SDS stream wants and has, in both variants of the protocol (Envoy, xDS protocol). No I/O.
//!
//! At most one response is unanswered; while it is, changes wait and the next response carries the newest. A secret
//! that the client has rejected is not sent again until there is another one.

use std::collections::BTreeMap;

use envoy_types::pb::{
    envoy::service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        Resource,
    },
    google::rpc,
};
use tonic::Status;

use super::{Encoded, SECRET_TYPE, Subscription, version};
use crate::{socket::cut, watch::Seen};

/// A variant of the protocol.
pub(super) trait Session: Send + 'static {
    type Request: Send + 'static;
    type Response: Send + 'static;

    fn new(subscription: Subscription) -> Self;

    /// Takes a request. An error ends the stream.
    fn on_request(&mut self, request: Self::Request) -> Result<(), Status>;

    /// What is to be sent now, if anything.
    fn due(&mut self, seen: &Seen) -> Option<Self::Response>;
}

/// Numbers responses, and knows whether the last one is unanswered.
#[derive(Debug, Default)]
struct Nonces {
    last: u64,
    in_flight: bool,
}

impl Nonces {
    fn next(&mut self) -> String {
        self.last += 1;
        self.in_flight = true;
        self.last.to_string()
    }

    /// Whether the request answers the last response; an older one that it answers is of no interest any more.
    fn answered(&mut self, nonce: &str) -> bool {
        let answered = self.in_flight && nonce == self.last.to_string();
        self.in_flight &= !answered;
        answered
    }
}

/// All that is asked for, in each response.
#[derive(Debug)]
pub(super) struct StateOfTheWorld {
    subscription: Subscription,
    nonces: Nonces,
    asked: bool,
    /// Version of the last response.
    sent: Option<String>,
}

impl StateOfTheWorld {
    /// The response with all that is asked for, once all of it is there.
    pub(super) fn whole(&mut self, seen: &Seen) -> Option<DiscoveryResponse> {
        let secrets = self.subscription.secrets(seen);
        let whole = secrets.len() == self.subscription.names.len();
        whole.then(|| response(secrets, self.nonces.next()))
    }
}

impl Session for StateOfTheWorld {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn new(subscription: Subscription) -> Self {
        Self {
            subscription,
            nonces: Nonces::default(),
            asked: false,
            sent: None,
        }
    }

    fn on_request(&mut self, request: DiscoveryRequest) -> Result<(), Status> {
        check_type(&request.type_url)?;
        let first = !self.asked;
        self.asked = true;
        let answered = self.nonces.answered(&request.response_nonce);
        if answered {
            note_rejection(&self.subscription, request.error_detail.as_ref());
        }
        let stale = !request.response_nonce.is_empty() && !answered && self.nonces.in_flight;
        if stale && !first {
            return Ok(());
        }
        let before = std::mem::take(&mut self.subscription.names);
        for name in &request.resource_names {
            self.subscription.add(name)?;
        }
        if first && request.resource_names.is_empty() {
            self.subscription.add_all();
        }
        // A name that was not asked for before is answered even if its secret has been sent under another.
        if self.subscription.names != before {
            self.sent = None;
        }
        Ok(())
    }

    fn due(&mut self, seen: &Seen) -> Option<DiscoveryResponse> {
        if self.nonces.in_flight {
            return None;
        }
        let secrets = self.subscription.secrets(seen);
        let version = version_of_all(&secrets);
        if secrets.is_empty() || self.sent.as_ref() == Some(&version) {
            return None;
        }
        self.sent = Some(version);
        Some(response(secrets, self.nonces.next()))
    }
}

fn response(secrets: Vec<Encoded>, nonce: String) -> DiscoveryResponse {
    DiscoveryResponse {
        version_info: version_of_all(&secrets),
        resources: secrets.into_iter().map(|secret| secret.body).collect(),
        type_url: SECRET_TYPE.into(),
        nonce,
        ..DiscoveryResponse::default()
    }
}

fn version_of_all(secrets: &[Encoded]) -> String {
    let versions: Vec<&str> = secrets
        .iter()
        .map(|secret| secret.version.as_str())
        .collect();
    version(versions.concat().as_bytes())
}

/// What has changed, in each response.
#[derive(Debug)]
pub(super) struct Incremental {
    subscription: Subscription,
    nonces: Nonces,
    asked: bool,
    /// Versions that the client has, by name.
    sent: BTreeMap<String, String>,
}

impl Session for Incremental {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn new(subscription: Subscription) -> Self {
        Self {
            subscription,
            nonces: Nonces::default(),
            asked: false,
            sent: BTreeMap::new(),
        }
    }

    fn on_request(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        check_type(&request.type_url)?;
        if self.nonces.answered(&request.response_nonce) {
            note_rejection(&self.subscription, request.error_detail.as_ref());
        }
        let first = !self.asked;
        self.asked = true;
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                self.subscription.names.clear();
            }
            self.subscription.names.remove(name);
        }
        for name in &request.resource_names_subscribe {
            if name == "*" {
                self.subscription.add_all();
            } else {
                self.subscription.add(name)?;
            }
            // Who asks again has it no more.
            self.sent.remove(name);
        }
        if first {
            if request.resource_names_subscribe.is_empty() {
                self.subscription.add_all();
            }
            self.sent.extend(request.initial_resource_versions);
        }
        let names = &self.subscription.names;
        self.sent.retain(|name, _| names.contains_key(name));
        Ok(())
    }

    fn due(&mut self, seen: &Seen) -> Option<DeltaDiscoveryResponse> {
        if self.nonces.in_flight {
            return None;
        }
        let mut changed = self.subscription.secrets(seen);
        changed.retain(|secret| self.sent.get(&secret.name) != Some(&secret.version));
        if changed.is_empty() {
            return None;
        }
        let system_version_info = version_of_all(&changed);
        let resources = changed
            .into_iter()
            .map(|secret| {
                self.sent
                    .insert(secret.name.clone(), secret.version.clone());
                Resource {
                    name: secret.name,
                    version: secret.version,
                    resource: Some(secret.body),
                    ..Resource::default()
                }
            })
            .collect();
        Some(DeltaDiscoveryResponse {
            system_version_info,
            resources,
            type_url: SECRET_TYPE.into(),
            nonce: self.nonces.next(),
            ..DeltaDiscoveryResponse::default()
        })
    }
}

fn check_type(type_url: &str) -> Result<(), Status> {
    if type_url.is_empty() || type_url == SECRET_TYPE {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "this is the secret discovery service: it has no {}",
        cut(type_url)
    )))
}

fn note_rejection(subscription: &Subscription, error: Option<&rpc::Status>) {
    if let Some(error) = error
        && subscription.hooks.may_log()
    {
        tracing::warn!(
            workload = %subscription.caller.uid, error = %cut(&error.message),
            "a workload's proxy rejected its secrets",
        );
    }
}

#[cfg(test)]
mod tests;
