//! The Rust twins of `bpf/types.h`: same names, same layout (a test compares them).
//!
//! Addresses are 16 bytes in network order, IPv4 as `::ffff:a.b.c.d`; ports are in host order. What the states and events
//! of sockets tell is in `told`.
#![allow(unsafe_code)] // `aya::Pod` is an unsafe trait; see the one macro below.

mod told;

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// An IPv4 or IPv6 address as the maps have it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Address([u32; 4]);

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let v6 = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        let octets = v6.octets();
        Self(std::array::from_fn(|i| {
            u32::from_ne_bytes([
                octets[4 * i],
                octets[4 * i + 1],
                octets[4 * i + 2],
                octets[4 * i + 3],
            ])
        }))
    }
}

impl From<Ipv4Addr> for Address {
    fn from(address: Ipv4Addr) -> Self {
        IpAddr::V4(address).into()
    }
}

impl From<Ipv6Addr> for Address {
    fn from(address: Ipv6Addr) -> Self {
        IpAddr::V6(address).into()
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(address.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        Self::V6(Ipv6Addr::from(octets)).to_canonical()
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

/// Who made a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum SocketClass {
    /// A workload's own program.
    App = 1,
    /// An L7 proxy.
    L7 = 2,
    /// The node agent.
    Agent = 3,
}

/// What a verdict tells the kernel to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Action {
    /// Refuse.
    Deny = 0,
    /// Let the kernel carry it.
    Direct = 1,
    /// Through the L7 proxy.
    L7 = 2,
    /// Through the node agent.
    Agent = 3,
}

/// Which of a workload's in-pod listeners a capture target names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum CaptureKind {
    /// The DNS server.
    Dns = 1,
    /// The agent's outbound listener.
    Agent = 2,
    /// The L7 proxy's outbound listener.
    L7 = 3,
}

/// What a [`FlowEvent`] tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FlowKind {
    /// The connection ended; bytes and round-trip time are final.
    Closed,
    /// Refused in the client's `connect()`.
    RefusedConnect,
    /// Refused where it arrived.
    RefusedIngress,
    /// The connection was established.
    Opened,
}

/// Defines C-compatible plain structs that may be map keys or values.
macro_rules! plain {
    ($($(#[$doc:meta])* pub struct $name:ident { $($(#[$field_doc:meta])* pub $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[repr(C)]
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
            pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

            // SAFETY: repr(C), made of integers and arrays of integers only, and padded
            // explicitly (the layout test compares every offset), so that every byte is initialised.
            unsafe impl aya::Pod for $name {}
        )*
    };
}

// SAFETY: an array of integers behind a repr(C) struct: no padding, every bit pattern valid.
unsafe impl aya::Pod for Address {}

plain! {
    /// Who lives in a cgroup.
    pub struct CgroupEntry {
        /// Workload id; 0 for the agent.
        pub workload: u32,
        /// [`SocketClass`].
        pub socket_class: u32,
    }

    /// A workload of this node. One write switches it to new rules.
    pub struct WorkloadEntry {
        /// Network namespace cookie.
        pub netns: u64,
        /// Identity id, for IPv4 and for IPv6: the source half of a verdict's key.
        pub source: [u32; 2],
        /// Policy set id, for IPv4 and for IPv6: the destination half.
        pub policy_set: [u32; 2],
        /// IPv4 address, zero if none.
        pub v4: Address,
        /// IPv6 address, zero if none.
        pub v6: Address,
        /// [`WorkloadEntry::SPLICE`].
        pub flags: u32,
        /// Zero.
        pub padding: u32,
    }

    /// Whose address it is.
    pub struct AddressEntry {
        /// Workload id.
        pub workload: u32,
        /// [`AddressEntry::LOCAL`] for workloads of this node.
        pub flags: u32,
        /// For workloads of other nodes: the destination half of verdicts that refuse at once. 0 leaves all to that node.
        pub policy_set: u32,
    }

    /// A service's address and port.
    pub struct ServiceKey {
        /// Virtual address.
        pub address: Address,
        /// Port; 0 (with protocol 0) says that the address is a service's.
        pub port: u16,
        /// IP protocol number.
        pub protocol: u8,
        /// Zero.
        pub padding: u8,
    }

    /// Which table of slots is live for a service's port.
    pub struct ServiceEntry {
        /// Service id: one per (service, address family, port).
        pub service: u32,
        /// Part of [`SlotKey`]; changes with every new table.
        pub generation: u32,
        /// Length of the table; 0 refuses.
        pub slots: u32,
        /// Session affinity in seconds; 0 for none.
        pub affinity_seconds: u32,
    }

    /// A place in a service's table.
    pub struct SlotKey {
        /// Service id.
        pub service: u32,
        /// Generation.
        pub generation: u32,
        /// 0 to slots - 1.
        pub slot: u32,
    }

    /// One column of an alias table.
    pub struct SlotEntry {
        /// Endpoint id taken if a random u32 is at most `threshold`.
        pub endpoint: u32,
        /// Endpoint id taken otherwise.
        pub alias: u32,
        /// See `endpoint`.
        pub threshold: u32,
    }

    /// Where an endpoint listens. Ids are never used twice.
    pub struct EndpointEntry {
        /// Address.
        pub address: Address,
        /// Service id.
        pub service: u32,
        /// Port.
        pub port: u16,
        /// Zero.
        pub padding: u16,
    }

    /// Who asks for what.
    pub struct VerdictKey {
        /// Identity id of the client.
        pub source: u32,
        /// Policy set id of the server.
        pub policy_set: u32,
        /// Port of the server; 0 for every port without an entry of its own.
        pub port: u16,
        /// [`SocketClass`] of the client's socket.
        pub socket_class: u8,
        /// Zero.
        pub padding: u8,
    }

    /// The answer.
    pub struct VerdictEntry {
        /// Policy id, 0 for none.
        pub policy: u32,
        /// [`crate::Reason`].
        pub reason: u16,
        /// [`Action`].
        pub action: u8,
        /// Zero.
        pub padding: u8,
    }

    /// Whose in-pod listener, and which.
    pub struct CaptureKey {
        /// Workload id.
        pub workload: u32,
        /// [`CaptureKind`].
        pub kind: u32,
    }

    /// The only source addresses that a veth may send from.
    pub struct DeviceEntry {
        /// IPv4 address.
        pub v4: Address,
        /// IPv6 address.
        pub v6: Address,
        /// Hardware address.
        pub mac: [u8; 6],
        /// Zero.
        pub padding: u16,
    }

    /// A connection as its client sees it.
    pub struct Tuple {
        /// Client address.
        pub source: Address,
        /// Server address after service resolution.
        pub destination: Address,
        /// Client port.
        pub source_port: u16,
        /// Server port.
        pub destination_port: u16,
    }

    /// What the client's connect hook decided.
    pub struct Grant {
        /// CLOCK_MONOTONIC of the decision, nanoseconds.
        pub start_ns: u64,
        /// Address that the client asked for.
        pub original: Address,
        /// Workload id of the client, 0 for an anonymous one.
        pub source_workload: u32,
        /// Identity id of the client at that time.
        pub source_identity: u32,
        /// Workload id of the server, 0 if unknown.
        pub destination_workload: u32,
        /// Policy id that decided, 0 for none.
        pub policy: u32,
        /// Service id, 0 if an address was dialled.
        pub service: u32,
        /// Port that the client asked for.
        pub original_port: u16,
        /// [`crate::Reason`].
        pub reason: u16,
        /// Of a captured connection: the endpoint that was chosen for it, or the address that was dialled.
        pub target: Address,
        /// Its port.
        pub target_port: u16,
        /// Zero.
        pub padding: [u16; 3],
    }

    /// What is kept in a socket.
    pub struct SocketState {
        /// Network namespace cookie.
        pub netns: u64,
        /// Workload id of the owner, 0 for the agent.
        pub workload: u32,
        /// [`SocketClass`].
        pub socket_class: u32,
        /// See the questions of [`SocketState`].
        pub flags: u32,
        /// When a refused datagram was last recorded, in units of 2^20 nanoseconds.
        pub refused_at: u32,
        /// The decision about the connection that it carries.
        pub grant: Grant,
    }

    /// What went between a client's and a server's datagram socket so far.
    pub struct DatagramFlow {
        /// CLOCK_MONOTONIC of the first datagram, nanoseconds.
        pub start_ns: u64,
        /// Of the last one.
        pub last_ns: u64,
        /// Payload bytes that reached the server.
        pub bytes_sent: u64,
        /// Payload bytes that reached the client.
        pub bytes_received: u64,
        /// Address that the client asked for.
        pub original: Address,
        /// Workload id of the client, 0 if unknown.
        pub source_workload: u32,
        /// Identity id of the client.
        pub source_identity: u32,
        /// Workload id of the server.
        pub destination_workload: u32,
        /// Policy id that decided, 0 for none.
        pub policy: u32,
        /// Service id, 0 if an address was dialled.
        pub service: u32,
        /// Datagrams that reached the server.
        pub packets_sent: u32,
        /// Datagrams that reached the client.
        pub packets_received: u32,
        /// Port that the client asked for.
        pub original_port: u16,
        /// [`crate::Reason`].
        pub reason: u16,
    }

    /// A spliced connection, which a later one between the same ports is not.
    pub struct SpliceConnection {
        /// The connection as its client sees it.
        pub tuple: Tuple,
        /// The client's next sequence number when the connection was established.
        pub client_sequence: u32,
        /// The server's.
        pub server_sequence: u32,
    }

    /// What is kept in a spliced socket (map `splices`): TCP counts none of these bytes.
    pub struct SpliceState {
        /// The connection.
        pub connection: SpliceConnection,
        /// 0 in the client's socket, 1 in the server's.
        pub side: u32,
        /// Bytes that this end has spliced.
        pub sent: u64,
        /// Not 0: what this end sends goes over TCP, for good.
        pub over_tcp: u32,
        /// Zero.
        pub padding: u32,
    }

    /// What both ends of a spliced connection share (map `splice_pairs`); 0 is the client's direction, 1 the server's.
    pub struct SplicePair {
        /// Bytes spliced.
        pub sent: [u64; 2],
        /// How many of them count as read.
        pub read: [u64; 2],
        /// Not 0: the server's side has ended.
        pub ended: u32,
        /// Zero.
        pub padding: u32,
    }

    /// One flow record, as the kernel wrote it.
    pub struct FlowEvent {
        /// CLOCK_MONOTONIC, nanoseconds.
        pub time_ns: u64,
        /// Since the decision in `connect()`, nanoseconds.
        pub duration_ns: u64,
        /// Identifies the connection on its node: the reporting side's socket cookie, or (far above any) the
        /// time of the first datagram.
        pub cookie: u64,
        /// Bytes sent by the client and acknowledged.
        pub bytes_sent: u64,
        /// Bytes received by the client.
        pub bytes_received: u64,
        /// Client address; zero if refused before it had one.
        pub source: Address,
        /// Server address after service resolution.
        pub destination: Address,
        /// Address that the client asked for.
        pub original: Address,
        /// Workload id of the client, 0 if unknown.
        pub source_workload: u32,
        /// Identity id of the client.
        pub source_identity: u32,
        /// Workload id of the server, 0 if unknown.
        pub destination_workload: u32,
        /// Policy id that decided, 0 for none.
        pub policy: u32,
        /// Service id, 0 if an address was dialled.
        pub service: u32,
        /// Smoothed round-trip time in microseconds.
        pub srtt_us: u32,
        /// Retransmitted segments.
        pub retransmits: u32,
        /// Client port.
        pub source_port: u16,
        /// Server port.
        pub destination_port: u16,
        /// Port that the client asked for.
        pub original_port: u16,
        /// [`crate::Reason`].
        pub reason: u16,
        /// See [`FlowEvent::kind`].
        pub kind: u8,
        /// IP protocol number.
        pub protocol: u8,
        /// [`SocketClass`] of the reporting socket.
        pub socket_class: u8,
        /// Socket flags of `bpf/types.h`.
        pub flags: u8,
    }
}

impl SpliceState {
    /// Reads a value of the storage; `None` if it is not of this shape.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        if bytes.len() != size_of::<Self>() {
            return None;
        }
        // SAFETY: the length was checked, the struct is plain data, and read_unaligned asks for no
        // alignment.
        Some(unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

impl WorkloadEntry {
    /// Connections with other workloads that have it may skip the TCP stack.
    pub const SPLICE: u32 = 1;
}

impl AddressEntry {
    /// The workload runs on this node.
    pub const LOCAL: u32 = 1;
}

impl ServiceKey {
    /// [`ServiceKey::protocol`] of datagrams.
    pub const UDP: u8 = 17;
}

#[cfg(test)]
mod tests;
