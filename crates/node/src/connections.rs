//! The connections that are open on this node, read from the kernel's own socket tables when somebody asks.
//!
//! Two ask: `heddle flows` wants their figures ([`Connections::open`]), and a change of policy wants those that it
//! forbids ended ([`sweep`]). Whether one may stay is decided in [`judge`]; why one was ended is remembered in
//! [`ended`] until its last record comes.
//!
//! A dump covers one network namespace, so every local workload's is kept here. A connection shows twice, at its
//! client and at its server: it is reported by the side that would write its flow record.

mod ended;
mod judge;
mod sweep;

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use api::report::FlowRecord;
use kernel::{
    FlowEvent, Grant, KernelError, KernelView, ServiceKey, SocketClass, SocketState, SpliceState,
};
use linux::{
    netns::Netns,
    sock_diag::{Dumped, Family, Protocol, Request, SockDiag, Socket, State, States},
};
use tokio::sync::mpsc;

pub(crate) use self::{
    ended::{Cause, Ended},
    sweep::Scope,
};
use crate::flows::Scribe;

/// Open connections of one workload that are told at most; more are ended all the same, if they must be.
const MAX_TOLD: usize = 65_536;
/// States in which bytes may still go one way or the other.
const ALIVE: [State; 7] = [
    State::Established,
    State::SynSent,
    State::FinWait1,
    State::FinWait2,
    State::CloseWait,
    State::LastAck,
    State::Closing,
];
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
const IPPROTO_TCP: u8 = 6;
/// The path of connections to other nodes.
const TUNNEL: &str = "tunnel";
/// What is told as the state of datagrams between two sockets, until they seem to be over.
const ACTIVE: &str = "active";

/// The node's open connections.
pub(crate) struct Connections {
    view: Arc<KernelView>,
    scribe: Arc<Scribe>,
    /// By uid of the workload.
    places: Mutex<HashMap<String, Arc<Mutex<SockDiag>>>>,
    sweeps: sweep::Requests,
    tally: sweep::Tally,
}

/// One end of a connection of a workload.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) protocol: Protocol,
    pub(crate) socket: Socket,
    pub(crate) state: SocketState,
    /// Bytes of the client and of the server that went past TCP; `None` if the connection is not spliced, or if
    /// figures were not asked for.
    pub(crate) spliced: Option<[u64; 2]>,
}

impl Connections {
    pub(crate) fn new(view: Arc<KernelView>, scribe: Arc<Scribe>) -> Arc<Self> {
        Arc::new(Self {
            view,
            scribe,
            places: Mutex::default(),
            sweeps: sweep::Requests::default(),
            tally: sweep::Tally::default(),
        })
    }

    /// Keeps an eye on a workload's namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered, or the kernel cannot list its sockets.
    pub(crate) fn watch(&self, uid: &str, netns: &Netns) -> io::Result<()> {
        let diag = SockDiag::open(netns)?;
        lock(&self.places).insert(uid.to_owned(), Arc::new(Mutex::new(diag)));
        Ok(())
    }

    /// Lets go of a workload's namespace.
    pub(crate) fn forget(&self, uid: &str) {
        lock(&self.places).remove(uid);
    }

    /// Sends a record of every open connection, and of datagrams that went lately, until nobody listens. Blocks.
    pub(crate) fn open(&self, records: &mpsc::Sender<FlowRecord>) {
        match self.view.datagrams() {
            Ok(flows) => {
                for (tuple, flow) in &flows {
                    let record = self
                        .scribe
                        .open(FlowEvent::of_datagrams(tuple, flow), ACTIVE);
                    if records.blocking_send(record).is_err() {
                        return;
                    }
                }
            }
            Err(error) => tracing::warn!(%error, "what datagrams went cannot be listed"),
        }
        for (uid, place) in self.places() {
            let mut told = Vec::new();
            let mut more = 0_usize;
            // The kernel is not kept waiting for whoever reads the records.
            let outcome = self.dump(&place, Protocol::Tcp, true, |connection| {
                if connection.is_reporter() && told.len() < MAX_TOLD {
                    told.push(connection);
                } else {
                    more += usize::from(connection.is_reporter());
                }
            });
            if let Err(error) = outcome {
                tracing::warn!(%uid, %error, "the open connections of a workload cannot be listed");
            }
            if more > 0 {
                tracing::warn!(%uid, more, "a workload has more open connections than are told");
            }
            for connection in &told {
                let mut record = self.scribe.open(
                    connection.event(self.scribe.now_ns()),
                    connection.socket.state.name(),
                );
                if connection.is_tunnelled() {
                    record.path = TUNNEL.into();
                }
                if records.blocking_send(record).is_err() {
                    return;
                }
            }
        }
    }

    fn places(&self) -> Vec<(String, Arc<Mutex<SockDiag>>)> {
        lock(&self.places)
            .iter()
            .map(|(uid, place)| (uid.clone(), Arc::clone(place)))
            .collect()
    }

    /// Visits the connections in one namespace that a decision was made about.
    fn dump(
        &self,
        place: &Mutex<SockDiag>,
        protocol: Protocol,
        figures: bool,
        mut visit: impl FnMut(Connection),
    ) -> io::Result<Dumped> {
        let mut all = Dumped {
            sockets: 0,
            interrupted: false,
        };
        for family in FAMILIES {
            let request = Request {
                family,
                protocol,
                states: match protocol {
                    Protocol::Tcp => States::of(&ALIVE),
                    // So the kernel calls a connected one.
                    Protocol::Udp => States::of(&[State::Established]),
                },
                figures,
                storages: match protocol {
                    Protocol::Tcp if figures => vec![self.view.sockets(), self.view.splices()],
                    Protocol::Tcp => vec![self.view.sockets()],
                    // The kernel does not tell them.
                    Protocol::Udp => Vec::new(),
                },
            };
            let mut failure = None;
            let dumped = lock(place).dump(&request, |socket| {
                let state = match protocol {
                    Protocol::Tcp => Ok(socket
                        .storage(self.view.sockets_id())
                        .and_then(SocketState::from_bytes)),
                    Protocol::Udp => self.state_of_datagrams(&socket),
                };
                let spliced = self.spliced(&socket);
                match (state, spliced) {
                    (Ok(Some(state)), Ok(spliced)) => visit(Connection {
                        protocol,
                        socket,
                        state,
                        spliced,
                    }),
                    (Ok(None), _) => {}
                    (Err(error), _) | (_, Err(error)) => failure = Some(error),
                }
            })?;
            if let Some(error) = failure {
                return Err(io::Error::other(error));
            }
            all.sockets += dumped.sockets;
            all.interrupted |= dumped.interrupted;
        }
        Ok(all)
    }

    /// What went past TCP, of a socket whose splice state was asked for.
    fn spliced(&self, socket: &Socket) -> Result<Option<[u64; 2]>, KernelError> {
        let state = socket.storage(self.view.splices_id());
        match state.and_then(SpliceState::from_bytes) {
            Some(state) => self.view.spliced(&state.connection),
            None => Ok(None),
        }
    }

    /// What the connect hook keeps in a datagram socket, put together from what the kernel does tell: the cgroup, the
    /// addresses, and the socket's mark (`mark_datagrams` in `bpf/connect.h`).
    fn state_of_datagrams(&self, socket: &Socket) -> Result<Option<SocketState>, KernelError> {
        let owner = match socket.cgroup {
            Some(cgroup) => self.view.cgroup(cgroup)?,
            None => None,
        };
        let Some(owner) = owner else {
            return Ok(None);
        };
        let (local, remote) = (
            socket.local_canonical().ip(),
            socket.remote_canonical().ip(),
        );
        let peer = self.view.address(remote.into())?;
        let peer = peer.map_or(0, |entry| entry.workload);
        let stays_local = remote.is_loopback() || remote == local || peer == owner.workload;
        let grant = Grant {
            source_workload: owner.workload,
            destination_workload: peer,
            ..Grant::default()
        };
        Ok(Some(SocketState::of_datagrams(
            owner,
            stays_local,
            socket.mark,
            grant,
        )))
    }
}

impl Connection {
    /// It leaves its workload under a decision of the kernel's.
    fn is_under_policy(&self) -> bool {
        self.state.is_admitted()
            && !self.state.is_local()
            && self.state.socket_class != SocketClass::Agent as u32
            && self.state.socket_class != 0
    }

    /// The side that its flow record comes from: the client's, or the server's if the client is a stranger.
    fn is_reporter(&self) -> bool {
        let reports = self.is_tunnelled()
            || self.is_under_policy()
                && (self.state.is_client() || self.state.grant.source_workload == 0);
        reports && self.state.is_established()
    }

    /// A client's connection to another node: the program's own leg of it, which ends at the agent.
    fn is_tunnelled(&self) -> bool {
        self.state.is_captured() && self.state.is_client()
    }

    /// Client and server.
    fn ends(&self) -> (SocketAddr, SocketAddr) {
        let ends = (
            self.socket.local_canonical(),
            self.socket.remote_canonical(),
        );
        if self.is_tunnelled() {
            let grant = &self.state.grant;
            let target = SocketAddr::new(grant.target.into(), grant.target_port);
            (ends.0, target)
        } else if self.state.is_client() {
            ends
        } else {
            (ends.1, ends.0)
        }
    }

    /// The record that the kernel would write of it at this moment.
    fn event(&self, now_ns: u64) -> FlowEvent {
        let (source, destination) = self.ends();
        let grant = &self.state.grant;
        let figures = self.socket.figures.unwrap_or_default();
        let (sent, received) = self
            .state
            .payload(figures.bytes_acked, figures.bytes_received);
        let (bytes_sent, bytes_received) = if self.state.is_client() {
            (sent, received)
        } else {
            (received, sent)
        };
        let [from_client, from_server] = self.spliced.unwrap_or_default();
        let spliced = if self.spliced.is_some() {
            FlowEvent::SPLICED
        } else {
            0
        };
        FlowEvent {
            time_ns: now_ns,
            duration_ns: match grant.start_ns {
                0 => 0,
                start => now_ns.saturating_sub(start),
            },
            cookie: self.socket.cookie,
            bytes_sent: bytes_sent + from_client,
            bytes_received: bytes_received + from_server,
            source: source.ip().into(),
            destination: destination.ip().into(),
            original: grant.original,
            source_workload: grant.source_workload,
            source_identity: grant.source_identity,
            destination_workload: grant.destination_workload,
            policy: grant.policy,
            service: grant.service,
            srtt_us: figures.rtt_us,
            retransmits: figures.retransmits,
            source_port: source.port(),
            destination_port: destination.port(),
            original_port: grant.original_port,
            reason: grant.reason,
            kind: 0,
            protocol: match self.protocol {
                Protocol::Tcp => IPPROTO_TCP,
                Protocol::Udp => ServiceKey::UDP,
            },
            // Both fit: see bpf/types.h.
            socket_class: self.state.socket_class as u8,
            flags: self.state.flags as u8 | spliced,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind our locks is valid whatever happened to another holder.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
