//! Names for this node's workloads: opens (or takes back) their DNS sockets, keeps the zone in step with the
//! mesh's state, and serves.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use api::{
    enroll::{EnrolledWorkload, FromAgent},
    mesh::MeshConfig,
};
use arc_swap::ArcSwap;
use linux::{netns::Netns, seqpacket::Stream};
use nix::sched::{CloneFlags, setns};
use telemetry::Registry;

use crate::{
    NodeError,
    dns::{
        DnsEndpoint, DnsHandle, DnsMembership, DnsMetrics, DnsPort, DnsServer, DnsService,
        DnsSockets, Nameserver, Upstream, UpstreamConfig, WorkloadDns, Zone,
    },
    state::{Changes, MeshState, Service, Workload},
};

const RESOLV_CONF: &str = "/etc/resolv.conf";

/// The DNS of this node's workloads.
pub(crate) struct LocalDns {
    zone: Arc<ArcSwap<Zone>>,
    server: DnsServer,
    serving: HashMap<String, Serving>,
    stored: HashMap<String, OwnedFd>,
    /// Whether the zone is complete. Until then questions wait in the sockets: an answer from half a zone would be wrong.
    open: bool,
}

struct Serving {
    instance: String,
    stored_names: Vec<String>,
    answers: Answers,
}

/// A workload's service, and what it takes to begin it.
enum Answers {
    Waiting(WorkloadDns, DnsSockets),
    Given { _handle: DnsHandle },
    Ended,
}

impl LocalDns {
    /// `outside` is the namespace from which the machine's resolver is reachable.
    pub(crate) fn start(
        mesh: &MeshConfig,
        upstream: &[String],
        outside: Netns,
        registry: &Registry,
    ) -> Result<Self, NodeError> {
        let config = if upstream.is_empty() {
            let text = std::fs::read_to_string(RESOLV_CONF).unwrap_or_else(|error| {
                tracing::warn!(%error, "no {RESOLV_CONF}: names outside the mesh will not resolve");
                String::new()
            });
            UpstreamConfig::from_resolv_conf(&text)
        } else {
            let servers = upstream.iter().map(|server| server.parse::<Nameserver>());
            UpstreamConfig::new(servers.collect::<Result<_, _>>().map_err(|error| {
                NodeError::Config {
                    path: "dns_upstream".into(),
                    message: error.to_string(),
                }
            })?)
        };
        let enter = move || setns(outside, CloneFlags::CLONE_NEWNET).map_err(io::Error::from);
        let zone = Arc::new(ArcSwap::from_pointee(Zone::new(mesh)?));
        let server = DnsServer::new(
            Arc::clone(&zone),
            Upstream::start(config, enter)?,
            DnsMetrics::register(registry)?,
        );
        Ok(Self {
            zone,
            server,
            serving: HashMap::new(),
            stored: HashMap::new(),
            open: false,
        })
    }

    /// The zone is complete: answers are given from now on.
    pub(crate) fn open(&mut self) -> Result<(), NodeError> {
        self.open = true;
        for serving in self.serving.values_mut() {
            let before = std::mem::replace(&mut serving.answers, Answers::Ended);
            serving.answers = match before {
                Answers::Waiting(identity, sockets) => Answers::Given {
                    _handle: self.server.serve(&identity, sockets)?,
                },
                other => other,
            };
        }
        Ok(())
    }

    /// Takes back a socket that an earlier agent stored.
    pub(crate) fn restore(&mut self, name: String, fd: OwnedFd) {
        self.stored.insert(name, fd);
    }

    /// Serves a workload; its sockets go into the starter's store, so that they outlive this agent.
    pub(crate) async fn serve(
        &mut self,
        workload: &EnrolledWorkload,
        netns: &Netns,
        starter: &Stream,
    ) -> Result<(), NodeError> {
        if self
            .serving
            .get(&workload.uid)
            .is_some_and(|old| old.instance == workload.instance)
        {
            return Ok(());
        }
        self.stop(&workload.uid, starter).await?;
        let suffix = format!("/{}@{}", workload.uid, workload.instance);
        let names: Vec<String> = self
            .stored
            .keys()
            .filter(|name| name.ends_with(&suffix))
            .cloned()
            .collect();
        let sockets = if names.len() == workload.addresses.len() * 2 {
            DnsSockets::from_descriptors(names.iter().filter_map(|name| self.stored.remove(name)))?
        } else {
            netns
                .run(|| DnsSockets::open(&workload.addresses))
                .map_err(NodeError::io(format!(
                    "enter the namespace of {}",
                    workload.uid
                )))??
        };
        let mut stored_names = Vec::new();
        for (kind, fd) in sockets.descriptors() {
            let name = format!("{kind}{suffix}");
            let message = FromAgent::StoreFd { name: name.clone() };
            starter.send(&message, &[fd.as_fd()]).await?;
            stored_names.push(name);
        }
        let identity = WorkloadDns {
            namespace: workload.namespace.clone(),
            workload: workload.workload.clone(),
        };
        let answers = if self.open {
            Answers::Given {
                _handle: self.server.serve(&identity, sockets)?,
            }
        } else {
            Answers::Waiting(identity, sockets)
        };
        let serving = Serving {
            instance: workload.instance.clone(),
            stored_names,
            answers,
        };
        self.serving.insert(workload.uid.clone(), serving);
        Ok(())
    }

    /// Ends a workload's service.
    pub(crate) async fn stop(&mut self, uid: &str, starter: &Stream) -> Result<(), NodeError> {
        if let Some(old) = self.serving.remove(uid) {
            for name in old.stored_names {
                starter.send(&FromAgent::DropFd { name }, &[]).await?;
            }
        }
        Ok(())
    }

    /// Stored sockets that nobody asked for belong to workloads that are gone.
    pub(crate) async fn forget_unclaimed(&mut self, starter: &Stream) -> Result<(), NodeError> {
        for (name, fd) in std::mem::take(&mut self.stored) {
            drop(fd);
            starter.send(&FromAgent::DropFd { name }, &[]).await?;
        }
        Ok(())
    }

    /// Brings the zone up to date.
    pub(crate) fn update(&self, state: &MeshState, changes: &Changes) {
        if changes.services.is_empty() && changes.workloads.is_empty() {
            return;
        }
        let mut zone = Zone::clone(&self.zone.load());
        for name in &changes.services {
            match state.services.get(name) {
                Some(service) => zone.upsert_service(dns_service(service)),
                None => {
                    if let Some((namespace, service)) = split_name(name) {
                        zone.remove_service(namespace, service);
                    }
                }
            }
        }
        for name in &changes.workloads {
            match state.workloads.get(name) {
                Some(workload) => zone.upsert_endpoint(dns_endpoint(name, workload)),
                None => zone.remove_endpoint(name),
            }
        }
        self.zone.store(Arc::new(zone));
    }
}

/// `NAMESPACE/NAME.NAMESPACE.svc.DOMAIN` as namespace and name.
fn split_name(resource: &str) -> Option<(&str, &str)> {
    let (namespace, hostname) = resource.split_once('/')?;
    Some((namespace, hostname.split('.').next()?))
}

fn dns_service(service: &Service) -> DnsService {
    let options = &service.options;
    let ports = service.ports().map(|(port, protocol)| {
        let named = options
            .port_names
            .iter()
            .find(|other| other.service_port == u32::from(port));
        DnsPort {
            name: named.map(|named| named.name.clone()),
            port,
            protocol,
        }
    });
    DnsService {
        namespace: service.message.namespace.clone(),
        name: service.message.name.clone(),
        hostname: service.message.hostname.clone(),
        vips: service.vips.clone(),
        headless: options.headless,
        ports: ports.collect(),
        publish_not_ready: options.publish_not_ready_addresses,
    }
}

fn dns_endpoint(name: &str, workload: &Workload) -> DnsEndpoint {
    let services = workload
        .message
        .services
        .iter()
        .filter_map(|(service, ports)| {
            let (namespace, service) = split_name(service)?;
            let target_ports = ports.ports.iter().filter_map(|port| {
                Some((
                    u16::try_from(port.service_port).ok()?,
                    u16::try_from(port.target_port).ok()?,
                ))
            });
            Some(DnsMembership {
                namespace: namespace.to_owned(),
                service: service.to_owned(),
                target_ports: target_ports.collect(),
            })
        });
    DnsEndpoint {
        uid: name.to_owned(),
        namespace: workload.message.namespace.clone(),
        hostname: workload.message.hostname.clone(),
        addresses: workload.addresses.clone(),
        ready: workload.ready,
        services: services.collect(),
    }
}
