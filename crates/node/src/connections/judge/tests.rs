//! Connections against rules that are written down here.

use std::{
    cell::Cell,
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

use kernel::{Grant, ServiceTargets, SocketClass, SocketState};
use linux::sock_diag::{Family, Socket};

use super::*;

const CLIENT: u32 = 11;
const SERVER: u32 = 12;
const POLICY: u32 = 99;
const SERVICE: u32 = 40;
const ADMITTED: u32 = 1;
const LOCAL: u32 = 2;
const IS_CLIENT: u32 = 4;
const ESTABLISHED: u32 = 8;
const REPLIES: u32 = 128;

/// Every workload's source and policy set are its own number; IPv6 has numbers of its own.
#[derive(Default)]
struct Written {
    workloads: HashSet<u32>,
    verdicts: HashMap<(u32, u32, u16), VerdictEntry>,
    services: HashMap<ServiceKey, Targets>,
    /// Reads of verdicts that find nothing before the rest find what is written.
    missing: Cell<usize>,
}

impl Rules for Written {
    fn workload(&self, id: u32) -> Result<Option<WorkloadEntry>, KernelError> {
        Ok(self.workloads.contains(&id).then(|| WorkloadEntry {
            source: [id, id + 1000],
            policy_set: [id, id + 1000],
            ..WorkloadEntry::default()
        }))
    }

    fn verdict(
        &self,
        source: u32,
        policy_set: u32,
        port: u16,
    ) -> Result<Option<VerdictEntry>, KernelError> {
        if self.missing.get() > 0 {
            self.missing.set(self.missing.get() - 1);
            return Ok(None);
        }
        Ok(self.verdicts.get(&(source, policy_set, port)).copied())
    }

    fn datagram_services(&self) -> Result<HashMap<u32, ServiceKey>, KernelError> {
        Ok(self.services.keys().map(|key| (SERVICE, *key)).collect())
    }

    fn targets(&self, key: &ServiceKey) -> Result<Targets, KernelError> {
        Ok(self
            .services
            .get(key)
            .cloned()
            .unwrap_or(Targets::NoService))
    }
}

impl Written {
    fn new() -> Self {
        Self {
            workloads: HashSet::from([CLIENT, SERVER]),
            ..Self::default()
        }
    }

    fn with(mut self, source: u32, policy_set: u32, port: u16, reason: Reason) -> Self {
        let allowed = [Reason::PolicyAllow, Reason::NoPolicy].contains(&reason);
        let action = if allowed {
            Action::Direct
        } else {
            Action::Deny
        };
        let verdict = VerdictEntry {
            policy: POLICY,
            reason: reason as u16,
            action: action as u8,
            padding: 0,
        };
        self.verdicts.insert((source, policy_set, port), verdict);
        self
    }

    fn without(mut self, workload: u32) -> Self {
        self.workloads.remove(&workload);
        self
    }

    fn service(mut self, targets: Targets) -> Self {
        self.services.insert(service_key(), targets);
        self
    }

    fn judge(&self, connection: &Connection) -> Judgement {
        Judge::new(self).judge(connection).unwrap()
    }
}

fn service_key() -> ServiceKey {
    ServiceKey {
        address: asked().ip().into(),
        port: asked().port(),
        protocol: ServiceKey::UDP,
        padding: 0,
    }
}

fn asked() -> SocketAddr {
    "10.96.0.1:80".parse().unwrap()
}

fn known(targets: &[&str]) -> Targets {
    let targets = targets.iter().map(|target| {
        let target: SocketAddr = target.parse().unwrap();
        (target.ip().into(), target.port())
    });
    Targets::Known(ServiceTargets {
        service: SERVICE,
        targets: targets.collect(),
    })
}

/// CLIENT's 10.0.0.1:40000 talks to SERVER's 10.0.0.2:8000 (or the same in IPv6).
fn connection(protocol: Protocol, v6: bool, is_client: bool) -> Connection {
    let (client, server) = if v6 {
        ("[fd00::1]:40000", "[fd00::2]:8000")
    } else {
        ("10.0.0.1:40000", "10.0.0.2:8000")
    };
    let [client, server]: [SocketAddr; 2] = [client, server].map(|text| text.parse().unwrap());
    let (local, remote) = if is_client {
        (client, server)
    } else {
        (server, client)
    };
    Connection {
        protocol,
        socket: Socket::for_tests(
            if v6 { Family::V6 } else { Family::V4 },
            State::Established,
            local,
            remote,
        ),
        spliced: None,
        state: SocketState {
            workload: if is_client { CLIENT } else { SERVER },
            socket_class: SocketClass::App as u32,
            flags: ADMITTED | ESTABLISHED | if is_client { IS_CLIENT } else { 0 },
            grant: Grant {
                source_workload: CLIENT,
                destination_workload: SERVER,
                original: asked().ip().into(),
                original_port: asked().port(),
                ..Grant::default()
            },
            ..SocketState::default()
        },
    }
}

fn by(reason: &'static str, policy: u32) -> Judgement {
    Judgement::Ends(Cause { reason, policy })
}

#[test]
fn both_ends_are_judged_by_the_same_verdict() {
    let allowed = Written::new().with(CLIENT, SERVER, 8000, Reason::PolicyAllow);
    let denied = Written::new().with(CLIENT, SERVER, 8000, Reason::PolicyDeny);
    for is_client in [true, false] {
        let v4 = connection(Protocol::Tcp, false, is_client);
        assert_eq!(allowed.judge(&v4), Judgement::Stays);
        assert_eq!(denied.judge(&v4), by("policy-deny", POLICY));
        // The other family has rules of its own.
        let v6 = connection(Protocol::Tcp, true, is_client);
        assert_eq!(allowed.judge(&v6), by("no-verdict", 0));
        let rules = Written::new().with(CLIENT + 1000, SERVER + 1000, 8000, Reason::NoPolicy);
        assert_eq!(rules.judge(&v6), Judgement::Stays);
    }
}

#[test]
fn what_never_left_its_workload_is_let_be() {
    let denied = Written::new();
    for flags in [ADMITTED | LOCAL | IS_CLIENT, 0, ESTABLISHED] {
        let mut connection = connection(Protocol::Tcp, false, true);
        connection.state.flags = flags;
        assert_eq!(denied.judge(&connection), Judgement::Stays, "{flags}");
    }
    let mut agents = connection(Protocol::Tcp, false, true);
    agents.state.socket_class = SocketClass::Agent as u32;
    assert_eq!(denied.judge(&agents), Judgement::Stays);
}

#[test]
fn rules_that_are_switched_meanwhile_are_read_again() {
    let rules = Written::new().with(CLIENT, SERVER, 8000, Reason::PolicyAllow);
    rules.missing.set(ATTEMPTS - 1);
    let connection = connection(Protocol::Tcp, false, true);
    assert_eq!(rules.judge(&connection), Judgement::Stays);
    rules.missing.set(ATTEMPTS);
    assert_eq!(rules.judge(&connection), by("no-verdict", 0));
}

#[test]
fn a_server_is_told_that_its_client_vanished() {
    let rules = Written::new()
        .with(CLIENT, SERVER, 8000, Reason::PolicyAllow)
        .without(CLIENT);
    let mut at_server = connection(Protocol::Tcp, false, false);
    assert_eq!(rules.judge(&at_server), by("no-identity", 0));
    // It said good-bye: what it sent may still be read.
    at_server.socket.state = State::CloseWait;
    assert_eq!(rules.judge(&at_server), Judgement::Stays);
}

#[test]
fn a_client_hears_from_its_server_that_it_went() {
    let rules = Written::new()
        .with(CLIENT, SERVER, 8000, Reason::PolicyAllow)
        .without(SERVER);
    let at_client = connection(Protocol::Tcp, false, true);
    assert_eq!(rules.judge(&at_client), Judgement::Stays);
    let asks = connection(Protocol::Udp, false, true);
    assert_eq!(rules.judge(&asks), by("no-such-address", 0));
}

#[test]
fn strangers_are_judged_as_such() {
    let mut stranger = connection(Protocol::Tcp, false, false);
    stranger.state.grant = Grant {
        destination_workload: SERVER,
        ..Grant::default()
    };
    let strict = Written::new().with(SOURCE_ANONYMOUS, SERVER, 8000, Reason::PeerNotAttested);
    assert_eq!(strict.judge(&stranger), by("peer-not-attested", POLICY));
    let lax = Written::new().with(SOURCE_ANONYMOUS, SERVER, 8000, Reason::NoPolicy);
    assert_eq!(lax.judge(&stranger), Judgement::Stays);
}

#[test]
fn datagrams_need_their_endpoint_and_streams_drain() {
    let rules = || Written::new().with(CLIENT, SERVER, 8000, Reason::PolicyAllow);
    let mut asks = connection(Protocol::Udp, false, true);
    assert_eq!(rules().judge(&asks), Judgement::Stays, "no service");
    asks.state.grant.service = SERVICE;
    let gone = by(ENDPOINT_GONE, 0);
    assert_eq!(rules().judge(&asks), gone, "the service is gone");
    for (targets, judgement) in [
        (known(&["10.0.0.2:8000", "10.0.0.3:8000"]), Judgement::Stays),
        (known(&["10.0.0.3:8000", "10.0.0.2:8001"]), gone),
        (known(&[]), gone),
        (Targets::Changing, Judgement::Unsure),
    ] {
        assert_eq!(rules().service(targets).judge(&asks), judgement);
    }
    let mut stream = connection(Protocol::Tcp, false, true);
    stream.state.grant.service = SERVICE;
    assert_eq!(rules().judge(&stream), Judgement::Stays);
}

#[test]
fn a_datagram_server_may_answer_who_may_ask() {
    // SERVER's socket at port 8000 is connected to CLIENT, which may ask it, but may not be asked.
    let mut answers = connection(Protocol::Udp, false, false);
    answers.state.flags = ADMITTED | IS_CLIENT | REPLIES;
    answers.state.grant.source_workload = SERVER;
    answers.state.grant.destination_workload = CLIENT;
    let rules = |reason| {
        Written::new().with(CLIENT, SERVER, 8000, reason).with(
            SERVER,
            CLIENT,
            40_000,
            Reason::PolicyDeny,
        )
    };
    let asked = rules(Reason::PolicyAllow);
    assert_eq!(asked.judge(&answers), Judgement::Stays);
    let denied = rules(Reason::NoAllowMatched);
    assert_eq!(denied.judge(&answers), by("no-allow-matched", POLICY));
    // It asks of its own accord: that its own clients may ask it is no permission to ask them.
    let mut asks = connection(Protocol::Udp, false, false);
    asks.state = SocketState {
        flags: ADMITTED | IS_CLIENT,
        ..answers.state
    };
    assert_eq!(asked.judge(&asks), by("policy-deny", POLICY));

    let gone = by("no-such-address", 0);
    answers.state.grant.destination_workload = 0;
    assert_eq!(asked.judge(&answers), gone);
    answers.state.grant.destination_workload = CLIENT;
    assert_eq!(asked.without(CLIENT).judge(&answers), gone);
}
