//! `heddle explain`: what the kernel would do with a connection, from the same tables that it reads.

use std::net::IpAddr;

use api::{
    node_config::NodeConfig,
    pod::Protocol,
    report::{ExplainedEndpoint, Explanation, FlowEnd, Verdict},
};
use kernel::{Action, Reason, SocketClass, VerdictEntry, VerdictKey, WorkloadEntry};

use crate::{
    dataplane::{DataPlane, SharedEndpoint, endpoints},
    policy::{self, Client, Server},
    state::{MeshState, Workload},
};

/// Who wants to go where.
#[derive(Debug, Clone)]
pub(crate) struct Question {
    /// `NAMESPACE/POD`, of this node.
    pub(crate) source: String,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) protocol: Protocol,
}

/// Answers for a connection, or for datagrams.
pub(crate) fn explain(
    state: &MeshState,
    dataplane: &DataPlane,
    config: &NodeConfig,
    question: &Question,
) -> Result<Explanation, String> {
    let source = state
        .pod(&question.source)
        .ok_or_else(|| format!("{} is no workload of this mesh", question.source))?;
    if dataplane.local(&question.source).is_none() {
        return Err(format!(
            "{} does not run on node {}",
            question.source, config.node
        ));
    }
    let target = resolve(state, config, &source.message.namespace, &question.host)?;
    let mut answer = Explanation {
        source: end(source, config, None, 0),
        asked: match question.protocol {
            Protocol::Tcp => format!("{}:{}", question.host, question.port),
            Protocol::Udp => format!("{}:{}/udp", question.host, question.port),
        },
        service: None,
        path: "refused".into(),
        verdict: Verdict::Denied,
        reason: String::new(),
        text: String::new(),
        outcome: String::new(),
        endpoints: Vec::new(),
    };
    let outcome = match target {
        Target::Service(name) => {
            let service = &state.services[&name];
            let port = (question.port, question.protocol);
            answer.service = Some(format!(
                "{}/{}",
                service.message.namespace, service.message.name
            ));
            if service.ports().any(|other| other == port) {
                let candidates = service_endpoints(state, config, &name, port);
                judge_all(
                    state,
                    dataplane,
                    config,
                    question.protocol,
                    source,
                    candidates,
                    &mut answer.endpoints,
                )
            } else {
                Reason::NoSuchPort
            }
        }
        Target::Address(address) => match state.owner(address) {
            Some(owner) => {
                let only = SharedEndpoint {
                    pod: owner.pod(),
                    address,
                    port: question.port,
                    weight: 1,
                };
                judge_all(
                    state,
                    dataplane,
                    config,
                    question.protocol,
                    source,
                    vec![only],
                    &mut answer.endpoints,
                )
            }
            None => Reason::NoEgress,
        },
    };
    let allowed = answer
        .endpoints
        .iter()
        .any(|endpoint| endpoint.verdict == Verdict::Allowed);
    if allowed {
        let nodes = answer.endpoints.iter();
        let mut nodes = nodes
            .filter(|endpoint| endpoint.verdict == Verdict::Allowed)
            .map(|endpoint| endpoint.node == config.node);
        answer.path = match (nodes.clone().any(|here| here), nodes.any(|here| !here)) {
            (true, true) => "direct or tunnel",
            (false, true) => "tunnel",
            _ => "direct",
        }
        .into();
        answer.verdict = Verdict::Allowed;
    }
    answer.reason = outcome.name().into();
    answer.text = outcome.text().into();
    answer.outcome = match outcome {
        _ if allowed => "connected",
        Reason::NoEgress => "ENETUNREACH",
        Reason::NoIdentity | Reason::NoCaptureTarget => "EACCES",
        _ => "ECONNREFUSED",
    }
    .into();
    Ok(answer)
}

enum Target {
    /// Resource name of a service.
    Service(String),
    Address(IpAddr),
}

/// The name as the workload's own resolver would read it.
fn resolve(
    state: &MeshState,
    config: &NodeConfig,
    namespace: &str,
    host: &str,
) -> Result<Target, String> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(match state.service_at(address) {
            Some(service) => Target::Service(format!(
                "{}/{}",
                service.message.namespace, service.message.hostname
            )),
            None => Target::Address(address),
        });
    }
    let domain = &config.mesh.cluster_domain;
    let host = host.trim_end_matches('.').to_lowercase();
    let short = host.strip_suffix(&format!(".{domain}")).unwrap_or(&host);
    let short = short.strip_suffix(".svc").unwrap_or(short);
    let (name, of) = short.split_once('.').unwrap_or((short, namespace));
    let resource = format!("{of}/{name}.{of}.svc.{domain}");
    if state.services.contains_key(&resource) {
        return Ok(Target::Service(resource));
    }
    // A replica's own name, or one below a headless service.
    let pod = format!("{}/{name}", of.rsplit('.').next().unwrap_or(of));
    match state
        .pod(&pod)
        .and_then(|workload| workload.addresses.first().copied())
    {
        Some(address) => Ok(Target::Address(address)),
        None => Err(format!(
            "{host} is neither a service nor a replica of this mesh (looked for {resource} and {pod})"
        )),
    }
}

fn service_endpoints(
    state: &MeshState,
    config: &NodeConfig,
    name: &str,
    port: (u16, Protocol),
) -> Vec<SharedEndpoint> {
    let v4 = endpoints(state, &config.node, name, port, false);
    if v4.is_empty() {
        endpoints(state, &config.node, name, port, true)
    } else {
        v4
    }
}

/// Fills in every endpoint and returns the reason that sums them up.
fn judge_all(
    state: &MeshState,
    dataplane: &DataPlane,
    config: &NodeConfig,
    protocol: Protocol,
    source: &Workload,
    candidates: Vec<SharedEndpoint>,
    explained: &mut Vec<ExplainedEndpoint>,
) -> Reason {
    let total: u32 = candidates.iter().map(|candidate| candidate.weight).sum();
    let mut summary = Reason::NoEndpoint;
    let mut any_allowed = false;
    for candidate in candidates {
        let Some(workload) = state.pod(&candidate.pod) else {
            continue;
        };
        let (allowed, reason, policy) =
            verdict(state, dataplane, protocol, source, workload, &candidate);
        if allowed || !any_allowed {
            summary = reason;
        }
        any_allowed |= allowed;
        explained.push(ExplainedEndpoint {
            destination: end(workload, config, Some(candidate.address), candidate.port),
            node: workload.message.node.clone(),
            share: candidate.weight * 1000 / total.max(1),
            verdict: if allowed {
                Verdict::Allowed
            } else {
                Verdict::Denied
            },
            reason: reason.name().into(),
            policy,
            policies: state
                .policies_of(workload)
                .into_iter()
                .map(|(name, _)| name)
                .collect(),
            spliced: allowed
                && protocol == Protocol::Tcp
                && may_splice(dataplane, source, workload),
        });
    }
    summary
}

/// Reads the verdict from the kernel's own table.
fn verdict(
    state: &MeshState,
    dataplane: &DataPlane,
    protocol: Protocol,
    source: &Workload,
    destination: &Workload,
    endpoint: &SharedEndpoint,
) -> (bool, Reason, Option<String>) {
    let tables = &dataplane.kernel.tables;
    let (Some(from), Some(to)) = (
        dataplane.local(&source.pod()),
        dataplane.local(&destination.pod()),
    ) else {
        return match protocol {
            Protocol::Tcp => judge_remote(state, source, destination, endpoint),
            Protocol::Udp => (false, Reason::UdpNotCarried, None),
        };
    };
    if from.id == to.id {
        return (true, Reason::None, None);
    }
    let (Some(from), Some(to)) = (
        tables.workloads.read(&from.id),
        tables.workloads.read(&to.id),
    ) else {
        return (false, Reason::NoVerdict, None);
    };
    let family = usize::from(endpoint.address.is_ipv6());
    let find = |port| {
        tables.verdicts.read(&VerdictKey {
            source: from.source[family],
            policy_set: to.policy_set[family],
            port,
            socket_class: SocketClass::App as u8,
            padding: 0,
        })
    };
    let Some(VerdictEntry {
        policy,
        reason,
        action,
        ..
    }) = find(endpoint.port).or_else(|| find(0))
    else {
        return (false, Reason::NoVerdict, None);
    };
    let reason = Reason::from_number(reason).unwrap_or(Reason::NoVerdict);
    (
        action == Action::Direct as u8,
        reason,
        dataplane.names.policy(policy),
    )
}

/// What the server's node will say.
fn judge_remote(
    state: &MeshState,
    source: &Workload,
    destination: &Workload,
    endpoint: &SharedEndpoint,
) -> (bool, Reason, Option<String>) {
    let policies = state.policies_of(destination);
    let family = endpoint.address.is_ipv6();
    let mut addresses = source.addresses.iter().copied();
    let client = Client {
        identity: Some(source.identity()),
        address: addresses.find(|address| address.is_ipv6() == family),
    };
    let server = Server {
        address: Some(endpoint.address),
        port: Some(endpoint.port),
    };
    let judgement = policy::judge(&policies, &client, server);
    (judgement.allowed, judgement.reason, judgement.policy)
}

/// Whether both ask for spliced connections, as the kernel has it. Within one workload nothing is spliced.
fn may_splice(dataplane: &DataPlane, source: &Workload, destination: &Workload) -> bool {
    let asks = |workload: &Workload| {
        let local = dataplane.local(&workload.pod())?;
        let entry = dataplane.kernel.tables.workloads.read(&local.id)?;
        (entry.flags & WorkloadEntry::SPLICE != 0).then_some(local.id)
    };
    match (asks(source), asks(destination)) {
        (Some(from), Some(to)) => from != to,
        _ => false,
    }
}

fn end(workload: &Workload, config: &NodeConfig, address: Option<IpAddr>, port: u16) -> FlowEnd {
    FlowEnd {
        namespace: workload.message.namespace.clone(),
        workload: workload.object().to_owned(),
        pod: workload.message.name.clone(),
        identity: config
            .mesh
            .spiffe_id(&workload.message.namespace, workload.service_account()),
        address: address.or_else(|| workload.addresses.first().copied()),
        port,
    }
}
