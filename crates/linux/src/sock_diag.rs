//! The kernel's sockets, listed and ended through `NETLINK_SOCK_DIAG` (sock_diag(7)).
//!
//! One dump covers one network namespace: the one that the netlink socket was made in. What the messages look
//! like byte by byte is in [`wire`]. IPv4 traffic of an IPv6 socket is listed under IPv6, with v4-mapped addresses.

mod wire;

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto,
        setsockopt, socket, sockopt,
    },
    time::TimeVal,
};

use self::wire::Message;
use crate::netns::Netns;

/// More than the kernel puts into one answer (32 KiB) unless one socket alone needs more.
const DUMP_BUFFER: usize = 128 * 1024;
/// An acknowledgement repeats the request, which is shorter than this.
const ANSWER_BUFFER: usize = 4096;
/// The kernel answers within the call; one that does not is not asked for ever.
const PATIENCE: Duration = Duration::from_secs(5);

/// IP version of a socket, which for IPv6 sockets says nothing of the traffic's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// `AF_INET`.
    V4,
    /// `AF_INET6`.
    V6,
}

/// What can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP. A connected socket is "established", any other "closed".
    Udp,
}

/// State of a socket, numbered as in the kernel (`include/net/tcp_states.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum State {
    /// Connected.
    Established = 1,
    /// `connect()` has sent its SYN.
    SynSent = 2,
    /// A SYN came; there may be no socket yet.
    SynReceived = 3,
    /// Our FIN is on its way.
    FinWait1 = 4,
    /// Our FIN was acknowledged; the peer may still send.
    FinWait2 = 5,
    /// Over; stragglers are waited for.
    TimeWait = 6,
    /// Not connected.
    Close = 7,
    /// The peer's FIN came; we may still send.
    CloseWait = 8,
    /// The peer's FIN came first, ours waits for its acknowledgement.
    LastAck = 9,
    /// Accepts connections.
    Listen = 10,
    /// Both FINs crossed.
    Closing = 11,
    /// As [`State::SynReceived`], as the kernel tells it inside.
    NewSynReceived = 12,
    /// Bound, and neither connected nor listening.
    BoundInactive = 13,
}

impl State {
    const ALL: [Self; 13] = [
        Self::Established,
        Self::SynSent,
        Self::SynReceived,
        Self::FinWait1,
        Self::FinWait2,
        Self::TimeWait,
        Self::Close,
        Self::CloseWait,
        Self::LastAck,
        Self::Listen,
        Self::Closing,
        Self::NewSynReceived,
        Self::BoundInactive,
    ];

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|state| *state as u8 == number)
    }

    /// As `ss` writes it, in small letters.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::SynSent => "syn-sent",
            Self::SynReceived | Self::NewSynReceived => "syn-received",
            Self::FinWait1 => "fin-wait-1",
            Self::FinWait2 => "fin-wait-2",
            Self::TimeWait => "time-wait",
            Self::Close | Self::BoundInactive => "close",
            Self::CloseWait => "close-wait",
            Self::LastAck => "last-ack",
            Self::Listen => "listen",
            Self::Closing => "closing",
        }
    }
}

/// A set of [`State`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct States(u32);

impl States {
    /// These states.
    #[must_use]
    pub fn of(states: &[State]) -> Self {
        Self(
            states
                .iter()
                .fold(0, |mask, state| mask | 1 << (*state as u8)),
        )
    }
}

/// What to list.
#[derive(Debug, Clone)]
pub struct Request<'a> {
    /// IP version of the sockets.
    pub family: Family,
    /// Their protocol.
    pub protocol: Protocol,
    /// Only sockets in these states.
    pub states: States,
    /// Whether TCP's figures are wanted, too: they cost a lock per socket.
    pub figures: bool,
    /// BPF socket storages (`BPF_MAP_TYPE_SK_STORAGE`) whose values are wanted.
    pub storages: Vec<BorrowedFd<'a>>,
}

/// One socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// IP version of the socket.
    pub family: Family,
    /// State when it was looked at.
    pub state: State,
    /// Own address; an IPv4 one in an IPv6 socket is v4-mapped.
    pub local: SocketAddr,
    /// The peer's address, unspecified if there is none.
    pub remote: SocketAddr,
    /// The number that no other socket of the machine ever has (`SO_COOKIE`).
    pub cookie: u64,
    /// The cgroup v2 that it was made in, if the kernel tells.
    pub cgroup: Option<u64>,
    /// `SO_MARK`; 0 if it has none or the kernel does not tell.
    pub mark: u32,
    /// TCP's figures, if they were asked for.
    pub figures: Option<Figures>,
    /// Values of the BPF storages that were asked for and that the socket has, by map id. The kernel tells only those of
    /// TCP sockets.
    pub storages: Vec<(u32, Vec<u8>)>,
    /// The kernel's own name of the socket, to be found again.
    id: wire::SocketId,
}

impl Socket {
    /// One that no kernel has, for tests of what is done with sockets.
    #[must_use]
    pub fn for_tests(family: Family, state: State, local: SocketAddr, remote: SocketAddr) -> Self {
        Self {
            family,
            state,
            local,
            remote,
            cookie: 0,
            cgroup: None,
            mark: 0,
            figures: None,
            storages: Vec::new(),
            id: [0; 48],
        }
    }

    /// Own address, IPv4 as such.
    #[must_use]
    pub fn local_canonical(&self) -> SocketAddr {
        SocketAddr::new(self.local.ip().to_canonical(), self.local.port())
    }

    /// The peer's address, IPv4 as such.
    #[must_use]
    pub fn remote_canonical(&self) -> SocketAddr {
        SocketAddr::new(self.remote.ip().to_canonical(), self.remote.port())
    }

    /// The value of one BPF storage.
    #[must_use]
    pub fn storage(&self, map: u32) -> Option<&[u8]> {
        self.storages
            .iter()
            .find(|(id, _)| *id == map)
            .map(|(_, value)| value.as_slice())
    }
}

/// What TCP knows of a connection (`struct tcp_info`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Bytes sent and acknowledged; a SYN sent and a FIN count as one each.
    pub bytes_acked: u64,
    /// Bytes received; a FIN counts as one.
    pub bytes_received: u64,
    /// Smoothed round-trip time, microseconds.
    pub rtt_us: u32,
    /// Retransmitted segments since the connection began.
    pub retransmits: u32,
}

/// How a dump ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dumped {
    /// Sockets that were seen.
    pub sockets: usize,
    /// The kernel says that its tables changed meanwhile: the list may lack some.
    pub interrupted: bool,
}

/// A conversation with the kernel about the sockets of one network namespace.
#[derive(Debug)]
pub struct SockDiag {
    socket: OwnedFd,
    sequence: u32,
}

impl SockDiag {
    /// For the namespace of the calling thread; it stays there whichever thread uses it.
    ///
    /// # Errors
    /// The kernel has no `NETLINK_SOCK_DIAG`, or the process is out of descriptors.
    pub fn open_here() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkSockDiag,
        )?;
        let patience = TimeVal::new(PATIENCE.as_secs() as i64, 0);
        setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// For another namespace.
    ///
    /// # Errors
    /// As [`SockDiag::open_here`], and those of entering the namespace.
    pub fn open(netns: &Netns) -> io::Result<Self> {
        netns.run(Self::open_here)?
    }

    /// Lists sockets, one by one. Each was as told at one moment between call and return; one that changes places
    /// in the kernel's tables meanwhile may be missed or come twice.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN` (for storages, `CAP_BPF`); `ENOENT` if the kernel cannot list this protocol;
    /// `ENOBUFS` if it ran out of memory; `InvalidData` if its answer cannot be read.
    pub fn dump(
        &mut self,
        request: &Request<'_>,
        mut visit: impl FnMut(Socket),
    ) -> io::Result<Dumped> {
        let sequence = self.send(|sequence| wire::dump_request(request, sequence))?;
        let mut dumped = Dumped {
            sockets: 0,
            interrupted: false,
        };
        // Not kept: there are as many of us as namespaces, and rarely two at work.
        let mut buffer = vec![0; DUMP_BUFFER];
        loop {
            let length = self.receive(&mut buffer)?;
            for message in wire::messages(&buffer[..length]) {
                let message = message?;
                // What is left of a dump that was given up.
                if message.sequence != sequence {
                    continue;
                }
                dumped.interrupted |= message.interrupted;
                match message.content {
                    Message::Socket(socket) => {
                        dumped.sockets += 1;
                        visit(*socket);
                    }
                    Message::Done(0) => return Ok(dumped),
                    Message::Done(error) | Message::Error(error) => {
                        return Err(io::Error::from_raw_os_error(error));
                    }
                    Message::Other => {}
                }
            }
        }
    }

    /// Ends a connection as `ss --kill` does: the owner's calls fail with `ECONNABORTED`, a TCP peer gets a reset.
    /// Returns whether the socket was still there.
    ///
    /// # Errors
    /// `EPERM` without `CAP_NET_ADMIN`; `EOPNOTSUPP` if the kernel lacks `CONFIG_INET_DIAG_DESTROY`.
    pub fn destroy(&mut self, protocol: Protocol, socket: &Socket) -> io::Result<bool> {
        let sequence = self.send(|sequence| {
            wire::destroy_request(socket.family, protocol, &socket.id, sequence)
        })?;
        let mut buffer = [0; ANSWER_BUFFER];
        loop {
            let length = self.receive(&mut buffer)?;
            for message in wire::messages(&buffer[..length]) {
                let message = message?;
                if message.sequence != sequence {
                    continue;
                }
                return match message.content {
                    Message::Error(0) => Ok(true),
                    // Closed meanwhile, or its addresses are another socket's by now.
                    Message::Error(libc::ENOENT | libc::ESTALE) => Ok(false),
                    Message::Error(error) => Err(io::Error::from_raw_os_error(error)),
                    _ => continue,
                };
            }
        }
    }

    fn send(&mut self, request: impl FnOnce(u32) -> Vec<u8>) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        let kernel = NetlinkAddr::new(0, 0);
        let bytes = request(self.sequence);
        sendto(self.socket.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
        Ok(self.sequence)
    }

    /// One datagram of the kernel's; `EAGAIN` after [`PATIENCE`].
    fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // With MSG_TRUNC the kernel tells the whole length, however much it could write.
        let length = recv(self.socket.as_raw_fd(), buffer, MsgFlags::MSG_TRUNC)?;
        if length > buffer.len() {
            return Err(wire::unreadable("a message is longer than the buffer"));
        }
        if length == 0 {
            return Err(wire::unreadable("an empty datagram"));
        }
        Ok(length)
    }
}

impl AsFd for SockDiag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
