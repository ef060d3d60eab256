//! What a socket's state and a flow event tell, behind the bits that they are laid out in.
#![allow(unsafe_code)] // States come as bytes.

use super::{
    CgroupEntry, DatagramFlow, FlowEvent, FlowKind, Grant, SocketClass, SocketState, Tuple,
};

impl SocketState {
    pub(super) const ADMITTED: u32 = 1;
    pub(super) const LOCAL: u32 = 2;
    pub(super) const CLIENT: u32 = 4;
    pub(super) const ESTABLISHED: u32 = 8;
    pub(super) const FIN_ACKED: u32 = 32;
    pub(super) const FIN_RECEIVED: u32 = 64;

    pub(super) const REPLIES: u32 = 128;
    pub(super) const CAPTURED: u32 = 512;
    pub(super) const MARK_REPLIES: u32 = 0x8000_0000;

    /// What the connect hook keeps of a connected datagram socket, as far as the socket's mark tells it.
    #[must_use]
    pub fn of_datagrams(
        owner: CgroupEntry,
        stays_local: bool,
        mark: u32,
        mut grant: Grant,
    ) -> Self {
        let mut flags = Self::ADMITTED | Self::CLIENT;
        if stays_local {
            flags |= Self::LOCAL;
        }
        if mark == Self::MARK_REPLIES {
            flags |= Self::REPLIES;
        } else {
            grant.service = mark;
        }
        Self {
            workload: owner.workload,
            socket_class: owner.socket_class,
            flags,
            grant,
            ..Self::default()
        }
    }

    /// It is a datagram server's, connected to a client that may ask it.
    #[must_use]
    pub fn is_reply(&self) -> bool {
        self.flags & Self::REPLIES != 0
    }

    /// Reads a value of the sockets' storage; `None` if it is not of this shape.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was checked, the struct is plain data, and read_unaligned asks for no
        // alignment.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }

    /// A decision has let it in or out.
    #[must_use]
    pub fn is_admitted(&self) -> bool {
        self.flags & Self::ADMITTED != 0
    }

    /// Its connection stays within one workload.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.flags & Self::LOCAL != 0
    }

    /// A program's, led to the agent, which judges it, records it and ends it.
    #[must_use]
    pub fn is_captured(&self) -> bool {
        self.flags & Self::CAPTURED != 0
    }

    /// It connected; the other side of a connection was accepted.
    #[must_use]
    pub fn is_client(&self) -> bool {
        self.flags & Self::CLIENT != 0
    }

    /// The handshake has completed.
    #[must_use]
    pub fn is_established(&self) -> bool {
        self.flags & Self::ESTABLISHED != 0
    }

    /// Payload bytes sent and received, from TCP's counters: these take a SYN and a FIN for one byte each.
    #[must_use]
    pub fn payload(&self, acked: u64, received: u64) -> (u64, u64) {
        let without =
            |bytes: u64, flag: u32| bytes.saturating_sub(u64::from(self.flags & flag != 0));
        let sent = without(without(acked, Self::CLIENT), Self::FIN_ACKED);
        (sent, without(received, Self::FIN_RECEIVED))
    }
}

impl FlowEvent {
    pub(super) const CLOSED: u8 = 1;
    /// In [`FlowEvent::flags`]: bytes went past the TCP stack.
    pub const SPLICED: u8 = 2;
    pub(super) const ESTABLISHED: u8 = 8;
    pub(super) const UDP: u8 = 17;

    /// Reads one ring buffer record; `None` if it is not of this shape.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was checked, the struct is plain data, and read_unaligned asks for no
        // alignment.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }

    /// A record of datagrams as if it were a connection's: with its figures up to now, and as closed.
    #[must_use]
    pub fn of_datagrams(tuple: &Tuple, flow: &DatagramFlow) -> Self {
        Self {
            time_ns: flow.last_ns,
            duration_ns: flow.last_ns.saturating_sub(flow.start_ns),
            cookie: flow.start_ns,
            bytes_sent: flow.bytes_sent,
            bytes_received: flow.bytes_received,
            source: tuple.source,
            destination: tuple.destination,
            original: flow.original,
            source_workload: flow.source_workload,
            source_identity: flow.source_identity,
            destination_workload: flow.destination_workload,
            policy: flow.policy,
            service: flow.service,
            srtt_us: 0,
            retransmits: 0,
            source_port: tuple.source_port,
            destination_port: tuple.destination_port,
            original_port: flow.original_port,
            reason: flow.reason,
            kind: Self::CLOSED,
            protocol: Self::UDP,
            socket_class: SocketClass::App as u8,
            flags: Self::ESTABLISHED,
        }
    }

    /// Whether it tells of datagrams.
    #[must_use]
    pub fn is_datagram(&self) -> bool {
        self.protocol == Self::UDP
    }

    /// What happened, or `None` for a kind this version does not know.
    #[must_use]
    pub fn kind(&self) -> Option<FlowKind> {
        match self.kind {
            Self::CLOSED => Some(FlowKind::Closed),
            2 => Some(FlowKind::RefusedConnect),
            3 => Some(FlowKind::RefusedIngress),
            4 => Some(FlowKind::Opened),
            _ => None,
        }
    }

    /// Whether bytes went, or (where the connection has just been opened) may go, past the TCP stack.
    #[must_use]
    pub fn spliced(&self) -> bool {
        self.flags & Self::SPLICED != 0
    }

    /// Whether the handshake had completed.
    #[must_use]
    pub fn established(&self) -> bool {
        self.flags & Self::ESTABLISHED != 0
    }
}
