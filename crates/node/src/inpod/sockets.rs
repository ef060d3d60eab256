//! The listening sockets in a workload's namespace: one per port and worker, all workers' under the same port, so that
//! the kernel spreads connections over them and no worker hands one to another.

use std::{
    collections::HashMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use kernel::ports;
use socket2::{Domain, Protocol, Socket, Type};

/// Connections that wait to be accepted, per socket. What comes beyond is not answered, so that clients try again.
const BACKLOG: i32 = 1024;

/// What arrives at a port of the agent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Port {
    /// Tunnels from other nodes.
    Hbone,
    /// The workload's own connections to other nodes.
    Outbound,
    /// Connections from outside that the kernel cannot judge.
    Inbound,
}

impl Port {
    pub(crate) const ALL: [Self; 3] = [Self::Hbone, Self::Outbound, Self::Inbound];

    /// Its number.
    pub(crate) fn number(self) -> u16 {
        match self {
            Self::Hbone => ports::HBONE,
            Self::Outbound => ports::OUTBOUND,
            Self::Inbound => ports::INBOUND,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Hbone => "hbone",
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// Whether a port is the agent's: no program serves there.
pub(crate) fn is_reserved(port: u16) -> bool {
    Port::ALL.iter().any(|reserved| reserved.number() == port)
}

/// A workload's sockets: for each port as many as there are workers.
#[derive(Debug)]
pub(crate) struct InPodSockets {
    listeners: HashMap<Port, Vec<TcpListener>>,
}

impl InPodSockets {
    /// Opens `shards` sockets per port. Call it inside the workload's network namespace.
    pub(crate) fn open(shards: usize, with_v6: bool) -> io::Result<Self> {
        let mut listeners = HashMap::new();
        for port in Port::ALL {
            let opened = (0..shards).map(|_| listen(port.number(), with_v6));
            let opened: io::Result<Vec<TcpListener>> = opened.collect();
            listeners.insert(port, opened?);
        }
        Ok(Self { listeners })
    }

    /// Those that an earlier agent opened, by the names it stored them under; `None` if one is missing.
    pub(crate) fn restore(mut stored: HashMap<String, OwnedFd>) -> io::Result<Option<Self>> {
        let mut listeners: HashMap<Port, Vec<TcpListener>> = HashMap::new();
        for port in Port::ALL {
            let of_port = listeners.entry(port).or_default();
            while let Some(fd) = stored.remove(&name(port, of_port.len())) {
                let socket = Socket::from(fd);
                if !socket.is_listener()? {
                    return Err(io::Error::other("a stored descriptor is no listener"));
                }
                socket.set_nonblocking(true)?;
                of_port.push(socket.into());
            }
        }
        let complete = listeners.values().all(|of_port| !of_port.is_empty()) && stored.is_empty();
        Ok(complete.then_some(Self { listeners }))
    }

    /// Whether a descriptor of this name is one of these.
    pub(crate) fn is_name(stored: &str) -> bool {
        let kind = stored.split_once('.').map_or(stored, |(kind, _)| kind);
        Port::ALL.iter().any(|port| port.name() == kind)
    }

    /// Every socket with the name to store it under, unique among these.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = (String, BorrowedFd<'_>)> {
        self.listeners.iter().flat_map(|(port, of_port)| {
            let numbered = of_port.iter().enumerate();
            numbered.map(|(shard, socket)| (name(*port, shard), socket.as_fd()))
        })
    }

    /// One of a port's sockets: enough to name the whole group to the kernel.
    pub(crate) fn any(&self, port: Port) -> Option<BorrowedFd<'_>> {
        Some(self.listeners.get(&port)?.first()?.as_fd())
    }

    /// Handles of their own on a port's sockets.
    pub(crate) fn listeners(&self, port: Port) -> io::Result<Vec<TcpListener>> {
        let of_port = self.listeners.get(&port).into_iter().flatten();
        of_port.map(TcpListener::try_clone).collect()
    }
}

fn name(port: Port, shard: usize) -> String {
    format!("{}.{shard}", port.name())
}

fn listen(port: u16, with_v6: bool) -> io::Result<TcpListener> {
    let (domain, address): (_, SocketAddr) = if with_v6 {
        (Domain::IPV6, (Ipv6Addr::UNSPECIFIED, port).into())
    } else {
        (Domain::IPV4, (Ipv4Addr::UNSPECIFIED, port).into())
    };
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    if with_v6 {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // Accepted sockets inherit it.
    socket.set_tcp_nodelay(true)?;
    if port == ports::INBOUND {
        // Its connections are to ports and addresses that are not its own.
        socket.set_ip_transparent_v4(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use linux::netns::Netns;

    use super::*;

    fn stored(sockets: &InPodSockets) -> HashMap<String, OwnedFd> {
        let copies = sockets
            .descriptors()
            .map(|(name, fd)| (name, fd.try_clone_to_owned().unwrap()));
        copies.collect()
    }

    #[test]
    fn sockets_come_back_as_they_were_stored() {
        let netns = Netns::create().unwrap();
        let opened = netns.run(|| InPodSockets::open(2, true)).unwrap().unwrap();
        let all = stored(&opened);
        assert_eq!(all.len(), 6);
        let restored = InPodSockets::restore(all).unwrap().unwrap();
        for port in Port::ALL {
            for listener in restored.listeners(port).unwrap() {
                assert_eq!(listener.local_addr().unwrap().port(), port.number());
            }
            assert_eq!(restored.listeners(port).unwrap().len(), 2);
        }
    }

    #[test]
    fn half_a_store_is_no_store() {
        let netns = Netns::create().unwrap();
        let opened = netns.run(|| InPodSockets::open(1, false)).unwrap().unwrap();
        let mut some = stored(&opened);
        some.remove("inbound.0");
        assert!(InPodSockets::restore(some).unwrap().is_none());
        let mut strange = stored(&opened);
        let (reader, _) = io::pipe().unwrap();
        strange.insert("hbone.0".into(), reader.into());
        assert!(InPodSockets::restore(strange).is_err());
    }
}
