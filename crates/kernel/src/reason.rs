//! Why a connection was allowed or refused: one number in the kernel, one name for people.

macro_rules! reasons {
    ($($variant:ident = $value:literal, $c:literal, $name:literal, $text:literal;)*) => {
        /// Why a connection was allowed or refused. The numbers are those of `bpf/types.h`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u16)]
        pub enum Reason { $(#[doc = $text] $variant = $value,)* }

        impl Reason {
            /// Every reason, in the order of the kernel's counters.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            #[cfg(test)]
            pub(crate) const C_NAMES: &[(&str, u16)] = &[$(($c, $value),)*];

            /// The name used in flow records, metrics and JSON.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One sentence for people: what it means.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }

            /// The reason of a kernel number; `None` for one that this version does not know.
            #[must_use]
            pub fn from_number(number: u16) -> Option<Self> {
                match number { $($value => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

reasons! {
    None = 0, "REASON_NONE", "none", "No decision was needed.";
    PolicyAllow = 1, "REASON_POLICY_ALLOW", "policy-allow", "An ALLOW policy matched.";
    NoPolicy = 2, "REASON_NO_POLICY", "no-policy", "No policy applies to the destination.";
    PolicyDeny = 3, "REASON_POLICY_DENY", "policy-deny", "A DENY policy matched.";
    NoAllowMatched = 4, "REASON_NO_ALLOW_MATCHED", "no-allow-matched", "ALLOW policies apply to the destination, and none matched.";
    PeerNotAttested = 5, "REASON_PEER_NOT_ATTESTED", "peer-not-attested", "The destination is STRICT, and nobody vouches for the client's identity.";
    NoVerdict = 6, "REASON_NO_VERDICT", "no-verdict", "No verdict is loaded for these two identities, so the answer is no.";
    NoEndpoint = 7, "REASON_NO_ENDPOINT", "no-endpoint", "The service has no ready endpoint.";
    NoSuchPort = 8, "REASON_NO_SUCH_PORT", "no-such-port", "The service has no such port.";
    NoSuchAddress = 9, "REASON_NO_SUCH_ADDRESS", "no-such-address", "The endpoint's address belongs to no workload.";
    NoEgress = 10, "REASON_NO_EGRESS", "no-egress", "The address is outside the mesh, and the mesh has no egress.";
    NoTunnel = 11, "REASON_NO_TUNNEL", "no-tunnel", "The destination is on another node, and there is no tunnel to it.";
    NoIdentity = 12, "REASON_NO_IDENTITY", "no-identity", "The socket belongs to no enrolled workload.";
    NoCaptureTarget = 13, "REASON_NO_CAPTURE_TARGET", "no-capture-target", "Policy asks for a proxy, and none is listening in the workload.";
    UdpNotCarried = 14, "REASON_UDP_NOT_CARRIED", "udp-not-carried", "The destination is on another node, and datagrams are carried within a node only.";
    ProtocolNotCarried = 15, "REASON_PROTOCOL_NOT_CARRIED", "protocol-not-carried", "Only TCP and UDP sockets can be made in a workload.";
    StateFull = 16, "REASON_STATE_FULL", "state-full", "The kernel had no room for the socket's state.";
    HandshakesFull = 17, "REASON_HANDSHAKES_FULL", "handshakes-full", "Too many handshakes at once.";
    Spoofed = 18, "REASON_SPOOFED", "spoofed", "A packet with a source address that is not its workload's.";
    DeviceUnknown = 19, "REASON_DEVICE_UNKNOWN", "device-unknown", "A packet from a device that belongs to no workload.";
    EventLost = 20, "REASON_EVENT_LOST", "event-lost", "A flow record found no room in the ring buffer.";
    NeedsAgent = 21, "REASON_NEEDS_AGENT", "needs-agent", "Policy depends on the client's address, and no agent listener is there to look at it.";
    PeersFull = 22, "REASON_PEERS_FULL", "peers-full", "One datagram socket asked more peers within a minute than there is room for.";
    NotSpliced = 23, "REASON_NOT_SPLICED", "not-spliced", "A connection was to be spliced, and the kernel had no room for it: TCP carries it.";
    Delivered = 24, "REASON_DELIVERED", "delivered", "The agent delivers it for a client of another node, and has judged it.";
    ReservedPort = 25, "REASON_RESERVED_PORT", "reserved-port", "A program asked for one of the agent's ports in a workload.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_documented() {
        let page = include_str!("../../../docs/refusals.md");
        for reason in Reason::ALL {
            assert!(
                page.contains(&format!("| `{}` |", reason.name())),
                "{}",
                reason.name()
            );
        }
    }

    #[test]
    fn numbers_and_names_are_unique_and_come_back() {
        for (index, reason) in Reason::ALL.iter().enumerate() {
            assert_eq!(usize::from(*reason as u16), index);
            assert_eq!(Reason::from_number(*reason as u16), Some(*reason));
            assert!(
                Reason::ALL
                    .iter()
                    .filter(|other| other.name() == reason.name())
                    .count()
                    == 1
            );
        }
        assert_eq!(Reason::from_number(999), None);
    }
}
