//! Whether an open connection may stay, by the rules that the kernel has at this moment: those that would decide it if
//! it were made anew.
//!
//! - Forbidden is what the verdict for the two workloads and the port does not carry directly.
//! - A verdict that is missing, read again and still missing, forbids: that is what a new connection would meet.
//! - A TCP connection does not mind that its endpoint left the service: it drains. A connected datagram socket would
//!   go on sending to nobody, so it does.
//! - A peer that is no workload any more forbids datagrams. TCP's peers tell each other when they go; a server whose
//!   client vanished without a word is told by us.

use std::{
    collections::{HashMap, hash_map::Entry},
    net::IpAddr,
};

use kernel::{
    Action, KernelError, KernelView, Reason, SOURCE_ANONYMOUS, ServiceKey, Targets, VerdictEntry,
    WorkloadEntry,
};
use linux::sock_diag::{Protocol, State};

use super::{Connection, ended::Cause};

/// The endpoint is not one of the service's any more. The kernel has no word for it: there a new one is picked.
pub(super) const ENDPOINT_GONE: &str = "endpoint-gone";
/// How often rules that are switched while they are read are read again.
const ATTEMPTS: usize = 3;

/// The kernel's rules.
pub(super) trait Rules {
    fn workload(&self, id: u32) -> Result<Option<WorkloadEntry>, KernelError>;
    fn verdict(
        &self,
        source: u32,
        policy_set: u32,
        port: u16,
    ) -> Result<Option<VerdictEntry>, KernelError>;
    fn datagram_services(&self) -> Result<HashMap<u32, ServiceKey>, KernelError>;
    fn targets(&self, key: &ServiceKey) -> Result<Targets, KernelError>;
}

impl Rules for KernelView {
    fn workload(&self, id: u32) -> Result<Option<WorkloadEntry>, KernelError> {
        Self::workload(self, id)
    }

    fn verdict(
        &self,
        source: u32,
        policy_set: u32,
        port: u16,
    ) -> Result<Option<VerdictEntry>, KernelError> {
        Self::verdict(self, source, policy_set, port)
    }

    fn datagram_services(&self) -> Result<HashMap<u32, ServiceKey>, KernelError> {
        Self::datagram_services(self)
    }

    fn targets(&self, key: &ServiceKey) -> Result<Targets, KernelError> {
        Self::targets(self, key)
    }
}

/// What is to be done with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Judgement {
    Stays,
    Ends(Cause),
    /// The rules changed whenever they were looked at: to be asked again.
    Unsure,
}

/// Who asks whom, and on which port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Pair {
    /// Workload id; 0 for a stranger.
    client: u32,
    server: u32,
    family: usize,
    port: u16,
}

/// Answers for one pass over the connections; the same question is put to the kernel once.
pub(super) struct Judge<'a, R> {
    rules: &'a R,
    pairs: HashMap<Pair, Access>,
    keys: HashMap<u32, ServiceKey>,
    services: HashMap<u32, Targets>,
}

/// What the rules say of a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Open,
    Closed(Cause),
    NoClient,
    NoServer,
}

impl<'a, R: Rules> Judge<'a, R> {
    pub(super) fn new(rules: &'a R) -> Self {
        Self {
            rules,
            pairs: HashMap::new(),
            keys: HashMap::new(),
            services: HashMap::new(),
        }
    }

    /// # Errors
    /// Fails if the kernel refuses a read.
    pub(super) fn judge(&mut self, connection: &Connection) -> Result<Judgement, KernelError> {
        if !connection.is_under_policy() {
            return Ok(Judgement::Stays);
        }
        match connection.protocol {
            Protocol::Tcp => self.judge_stream(connection),
            Protocol::Udp => self.judge_datagrams(connection),
        }
    }

    fn judge_stream(&mut self, connection: &Connection) -> Result<Judgement, KernelError> {
        let vanished = connection.socket.state == State::Established;
        Ok(match self.access(pair_of(connection))? {
            Access::Open => Judgement::Stays,
            Access::Closed(cause) => Judgement::Ends(cause),
            // A client that went as it should has sent its FIN: the server may read on what it left behind.
            Access::NoClient if vanished => ends(Reason::NoIdentity),
            Access::NoClient | Access::NoServer => Judgement::Stays,
        })
    }

    fn judge_datagrams(&mut self, connection: &Connection) -> Result<Judgement, KernelError> {
        let mut pair = pair_of(connection);
        let is_reply = connection.state.is_reply();
        if pair.server == 0 {
            return Ok(ends(Reason::NoSuchAddress));
        }
        if is_reply {
            // What counts is whether the other one may ask.
            pair = Pair {
                client: pair.server,
                server: pair.client,
                port: connection.socket.local.port(),
                ..pair
            };
        }
        match self.access(pair)? {
            Access::Open if is_reply => Ok(Judgement::Stays),
            Access::Open => self.judge_endpoint(connection),
            Access::Closed(cause) => Ok(Judgement::Ends(cause)),
            Access::NoClient | Access::NoServer => Ok(ends(Reason::NoSuchAddress)),
        }
    }

    fn judge_endpoint(&mut self, connection: &Connection) -> Result<Judgement, KernelError> {
        let grant = &connection.state.grant;
        if grant.service == 0 {
            return Ok(Judgement::Stays);
        }
        let remote = connection.socket.remote_canonical();
        let target = (remote.ip().into(), remote.port());
        Ok(match self.service(grant.service)? {
            Targets::Known(known) if known.targets.contains(&target) => Judgement::Stays,
            Targets::Known(_) | Targets::NoService => Judgement::Ends(Cause {
                reason: ENDPOINT_GONE,
                policy: 0,
            }),
            Targets::Changing => Judgement::Unsure,
        })
    }

    fn service(&mut self, service: u32) -> Result<&Targets, KernelError> {
        for _ in 0..ATTEMPTS {
            if self.keys.contains_key(&service) || self.services.contains_key(&service) {
                break;
            }
            // One that was just switched to another table may have been missed.
            self.keys.extend(self.rules.datagram_services()?);
        }
        Ok(match self.services.entry(service) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(match self.keys.get(&service) {
                Some(key) => self.rules.targets(key)?,
                None => Targets::NoService,
            }),
        })
    }

    fn access(&mut self, pair: Pair) -> Result<Access, KernelError> {
        if let Some(access) = self.pairs.get(&pair) {
            return Ok(*access);
        }
        let mut access = self.look(pair)?;
        for _ in 1..ATTEMPTS {
            if access != no_verdict() {
                break;
            }
            // Maybe the workload was switched to new rules after we had read which its rules are.
            access = self.look(pair)?;
        }
        self.pairs.insert(pair, access);
        Ok(access)
    }

    fn look(&self, pair: Pair) -> Result<Access, KernelError> {
        let source = match pair.client {
            0 => SOURCE_ANONYMOUS,
            id => match self.rules.workload(id)? {
                Some(client) => client.source[pair.family],
                None => return Ok(Access::NoClient),
            },
        };
        let Some(server) = self.rules.workload(pair.server)? else {
            return Ok(Access::NoServer);
        };
        let policy_set = server.policy_set[pair.family];
        Ok(match self.rules.verdict(source, policy_set, pair.port)? {
            Some(verdict) if verdict.action == Action::Direct as u8 => Access::Open,
            Some(verdict) => {
                let reason = Reason::from_number(verdict.reason).unwrap_or(Reason::NoVerdict);
                Access::Closed(cause(reason, verdict.policy))
            }
            None => no_verdict(),
        })
    }
}

fn no_verdict() -> Access {
    Access::Closed(cause(Reason::NoVerdict, 0))
}

fn pair_of(connection: &Connection) -> Pair {
    let grant = &connection.state.grant;
    let (client, server) = if connection.state.is_client() {
        (connection.state.workload, grant.destination_workload)
    } else {
        (grant.source_workload, connection.state.workload)
    };
    let (_, destination) = connection.ends();
    Pair {
        client,
        server,
        family: family_of(destination.ip()),
        port: destination.port(),
    }
}

/// As the kernel numbers them: FAMILY_V4 and FAMILY_V6 of `bpf/types.h`.
fn family_of(address: IpAddr) -> usize {
    usize::from(address.is_ipv6())
}

fn cause(reason: Reason, policy: u32) -> Cause {
    Cause {
        reason: reason.name(),
        policy,
    }
}

fn ends(reason: Reason) -> Judgement {
    Judgement::Ends(cause(reason, 0))
}

#[cfg(test)]
mod tests;
