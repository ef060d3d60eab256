//! What the agent's sockets and the programs agree on beside maps: the ports of a workload that are the agent's, and the
//! mark of what it delivers. The C side is in `bpf/types.h`; a test compares both.

/// TCP: captured connections of the workload's programs.
pub const OUTBOUND: u16 = 15001;
/// TCP: what is steered ([`crate::Kernel::steer`]).
pub const INBOUND: u16 = 15006;
/// TCP: HBONE from other nodes.
pub const HBONE: u16 = 15008;

/// SO_MARK of the agent's sockets that deliver to a program, beside the workload's number ([`delivery_mark`]): connecting with
/// it is what lets the connection in. In the workload's namespace packets with this mark ([`DELIVERY_MASK`]) need a route
/// that takes every address for a local one. The answers get the same mark by `net.ipv4.tcp_fwmark_accept` (for both IP
/// versions), and resets where nobody listens by `net.ipv4.fwmark_reflect` and `net.ipv6.fwmark_reflect`: without these the
/// agent would wait for its time-out, and the reset would leave the workload.
pub const DELIVERY_MARK: u32 = 0xc000_0000;
/// The bits of [`DELIVERY_MARK`].
pub const DELIVERY_MASK: u32 = 0xc000_0000;

/// The mark of a delivery to a workload of this node; `None` for a number that leaves no room for it, or that is nobody's.
#[must_use]
pub fn delivery_mark(workload: u32) -> Option<u32> {
    (workload != 0 && workload & DELIVERY_MASK == 0).then_some(DELIVERY_MARK | workload)
}
