//! The sockets in a workload's network namespace at which its queries arrive.
//!
//! They outlive the agent in the store of who starts workloads (`api::enroll`), and are served by [`super::server`].

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use socket2::{Domain, Protocol, Socket, Type};

use super::{DNS_PORT, DnsError};

/// Connections that wait to be accepted; the workload's own further ones are refused.
const BACKLOG: i32 = 64;

/// For each of a workload's address families one UDP and one TCP socket.
#[derive(Debug, Default)]
pub struct DnsSockets {
    pub(super) udp: Vec<UdpSocket>,
    pub(super) tcp: Vec<TcpListener>,
}

impl DnsSockets {
    /// Opens the sockets on these addresses of a workload, at [`DNS_PORT`]. Call it inside the workload's
    /// network namespace.
    ///
    /// # Errors
    /// [`DnsError::Bind`] if an address is not there or the port is taken.
    pub fn open(addresses: &[IpAddr]) -> Result<Self, DnsError> {
        Self::open_at(addresses.iter().map(|ip| SocketAddr::new(*ip, DNS_PORT)))
    }

    /// As [`Self::open`], at these ports.
    pub(super) fn open_at(
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Self, DnsError> {
        let mut sockets = Self::default();
        for address in addresses {
            let failed = |source| DnsError::Bind { address, source };
            let udp = bound(address, Type::DGRAM, Protocol::UDP).map_err(failed)?;
            // The UDP socket decides the port, if any will do.
            let address = udp.local_addr().ok().and_then(|local| local.as_socket());
            let address = address.ok_or_else(|| DnsError::NotDns {
                reason: "the socket has no address".into(),
            })?;
            let failed = |source| DnsError::Bind { address, source };
            let tcp = bound(address, Type::STREAM, Protocol::TCP).map_err(failed)?;
            tcp.listen(BACKLOG).map_err(failed)?;
            sockets.udp.push(udp.into());
            sockets.tcp.push(tcp.into());
        }
        Ok(sockets)
    }

    /// The sockets that an earlier agent opened, from its stored descriptors in any order.
    ///
    /// # Errors
    /// [`DnsError::NotDns`] if a descriptor is something else.
    pub fn from_descriptors(
        descriptors: impl IntoIterator<Item = OwnedFd>,
    ) -> Result<Self, DnsError> {
        let mut sockets = Self::default();
        for descriptor in descriptors {
            let socket = Socket::from(descriptor);
            let not_dns = |reason: String| DnsError::NotDns { reason };
            let kind = socket
                .r#type()
                .map_err(|error| not_dns(error.to_string()))?;
            socket
                .set_nonblocking(true)
                .map_err(|error| not_dns(error.to_string()))?;
            if kind == Type::DGRAM {
                sockets.udp.push(socket.into());
            } else if kind == Type::STREAM && socket.is_listener().unwrap_or(false) {
                sockets.tcp.push(socket.into());
            } else {
                return Err(not_dns(format!(
                    "{kind:?} is neither UDP nor a TCP listener"
                )));
            }
        }
        Ok(sockets)
    }

    /// Every socket with a name to store it under, unique among these: `dns-udp4`, `dns-tcp6`, …
    pub fn descriptors(&self) -> impl Iterator<Item = (&'static str, BorrowedFd<'_>)> {
        let udp = self.udp.iter().map(|socket| {
            let name = by_family(socket.local_addr(), "dns-udp4", "dns-udp6");
            (name, socket.as_fd())
        });
        let tcp = self.tcp.iter().map(|socket| {
            let name = by_family(socket.local_addr(), "dns-tcp4", "dns-tcp6");
            (name, socket.as_fd())
        });
        udp.chain(tcp)
    }
}

fn bound(address: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // Connections of an earlier agent that are still closing must not keep the port.
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn by_family(address: io::Result<SocketAddr>, v4: &'static str, v6: &'static str) -> &'static str {
    match address {
        Ok(SocketAddr::V6(_)) => v6,
        _ => v4,
    }
}
