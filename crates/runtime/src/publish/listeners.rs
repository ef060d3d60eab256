//! The side of `heddle up`: listening sockets in the host's namespace, and telling the relay of them.
//!
//! A socket outlives the relays that serve it: while none runs, clients wait in its accept queue
//! instead of being refused.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use linux::{
    netns::Netns,
    seqpacket::{self, Stream},
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use thiserror::Error;
use tokio::sync::watch;

use super::{MAX_PORTS, Message, PublishedPort};

/// Connections that wait in a port's accept queue; past it the kernel lets clients try again.
const BACKLOG: i32 = 1024;

/// Why a port is not published. Others are not affected.
#[derive(Debug, Error)]
pub enum PortError {
    /// The host's port cannot be had. The next [`PublishListeners::set`] tries again.
    #[error(
        "cannot publish on {address}: {source}; {}",
        advice(source, address.port())
    )]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The same host port is asked for twice; the first one has it.
    #[error(
        "host port {host_port} is published twice: for {first} already, so not for {second}; give one of them another `publish` port"
    )]
    Twice {
        /// The port.
        host_port: u16,
        /// The target that it leads to.
        first: SocketAddr,
        /// The target that it does not lead to.
        second: SocketAddr,
    },
    /// More than [`MAX_PORTS`].
    #[error(
        "host port {host_port} is not published: at most {MAX_PORTS} ports can be; publish fewer"
    )]
    TooMany {
        /// The port.
        host_port: u16,
    },
}

impl PortError {
    /// The host port that is not published as asked.
    #[must_use]
    pub fn host_port(&self) -> u16 {
        match self {
            Self::Listen { address, .. } => address.port(),
            Self::Twice { host_port, .. } | Self::TooMany { host_port } => *host_port,
        }
    }
}

/// The published ports of a mesh. Dropping it closes them all.
#[derive(Debug)]
pub struct PublishListeners {
    host: Netns,
    ports: watch::Sender<Ports>,
}

impl PublishListeners {
    /// None yet. `host` is the namespace to listen in.
    #[must_use]
    pub fn new(host: Netns) -> Self {
        Self {
            host,
            ports: watch::Sender::default(),
        }
    }

    /// Makes `wanted` the published ports: opens, retargets and closes; a port that stays keeps its socket
    /// and the connections that wait in it. The relay learns of it in the background.
    ///
    /// The answer names the ports that could not be published.
    pub fn set(&mut self, wanted: &[PublishedPort]) -> Vec<PortError> {
        let mut errors = Vec::new();
        let targets = distinct(wanted, &mut errors);
        let mut ports = self.ports.borrow().clone();
        ports.retain(|host_port, published| {
            let stays = targets.contains_key(host_port);
            if !stays {
                published.close();
            }
            stays
        });
        for (host_port, target) in targets {
            match ports.get_mut(&host_port) {
                Some(published) => published.target = target,
                None => match self.listen(host_port) {
                    Ok(sockets) => {
                        ports.insert(host_port, Published { target, sockets });
                    }
                    Err(error) => errors.push(error),
                },
            }
        }
        self.ports.send_if_modified(|current| {
            let changed = *current != ports;
            *current = ports;
            changed
        });
        errors
    }

    /// Prepares for a new relay: the answer is the descriptor that its process inherits (see
    /// [`relay::run`](super::relay::run)). It is told of all ports, and of changes until it ends.
    /// The descriptor must not be kept in this process. Needs a tokio runtime.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new_relay(&self) -> Result<OwnedFd, seqpacket::Error> {
        let (ours, theirs) = seqpacket::pair()?;
        let relay = Stream::from_fd(ours)?;
        tokio::spawn(feed(relay, self.ports.subscribe()));
        Ok(theirs)
    }

    fn listen(&self, host_port: u16) -> Result<Arc<[TcpListener]>, PortError> {
        let ipv4 = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), host_port);
        let ipv6 = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), host_port);
        let failed = |address, source| PortError::Listen { address, source };
        self.host
            .run(|| {
                let mut sockets = vec![bind(ipv4).map_err(|source| failed(ipv4, source))?];
                match bind(ipv6) {
                    Ok(socket) => sockets.push(socket),
                    Err(source) if ipv6_is_missing(&source) => {}
                    Err(source) => return Err(failed(ipv6, source)),
                }
                Ok(sockets.into())
            })
            .unwrap_or_else(|source| Err(failed(ipv4, source)))
    }
}

impl Drop for PublishListeners {
    fn drop(&mut self) {
        for published in self.ports.borrow().values() {
            published.close();
        }
    }
}

type Ports = BTreeMap<u16, Published>;

#[derive(Debug, Clone)]
struct Published {
    target: SocketAddr,
    sockets: Arc<[TcpListener]>,
}

impl Published {
    /// Ends listening at once, even if a relay that hangs still holds the sockets.
    fn close(&self) {
        for socket in self.sockets.iter() {
            // A listening socket has no peer that could make this fail.
            let _ = SockRef::from(socket).shutdown(Shutdown::Both);
        }
    }
}

impl PartialEq for Published {
    fn eq(&self, other: &Self) -> bool {
        self.target == other.target && Arc::ptr_eq(&self.sockets, &other.sockets)
    }
}

fn distinct(wanted: &[PublishedPort], errors: &mut Vec<PortError>) -> BTreeMap<u16, SocketAddr> {
    let mut targets = BTreeMap::new();
    for &PublishedPort { host_port, target } in wanted {
        match targets.get(&host_port) {
            Some(&first) if first != target => errors.push(PortError::Twice {
                host_port,
                first,
                second: target,
            }),
            Some(_) => {}
            None if targets.len() == MAX_PORTS => errors.push(PortError::TooMany { host_port }),
            None => {
                targets.insert(host_port, target);
            }
        }
    }
    targets
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM.nonblocking(),
        Some(Protocol::TCP),
    )?;
    // Without it a port is not to be had for a minute after its last connection.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn ipv6_is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL)
    )
}

fn advice(error: &io::Error, port: u16) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => format!(
            "another program listens there (`ss -ltnp 'sport = :{port}'` shows it): end it, or choose another `publish` port"
        ),
        io::ErrorKind::PermissionDenied => "run as root, or choose a port from 1024 on".into(),
        _ => "choose another `publish` port".into(),
    }
}

/// Tells one relay of all ports, then of changes, until it or the listeners are gone.
async fn feed(relay: Stream, mut ports: watch::Receiver<Ports>) {
    let mut told = Ports::new();
    loop {
        let now = ports.borrow_and_update().clone();
        if let Err(error) = tell(&relay, &told, &now).await {
            tracing::debug!(%error, "the publish relay takes no more ports");
            return;
        }
        told = now;
        tokio::select! {
            changed = ports.changed() => if changed.is_err() { return },
            // The relay says nothing: whatever comes is its end.
            _ = relay.recv::<()>() => return,
        }
    }
}

async fn tell(relay: &Stream, told: &Ports, now: &Ports) -> Result<(), seqpacket::Error> {
    for &host_port in told.keys().filter(|port| !now.contains_key(port)) {
        relay.send(&Message::Remove { host_port }, &[]).await?;
    }
    for (&host_port, published) in now {
        if told.get(&host_port) == Some(published) {
            continue;
        }
        let target = published.target;
        let sockets: Vec<_> = published.sockets.iter().map(AsFd::as_fd).collect();
        relay
            .send(&Message::Add { host_port, target }, &sockets)
            .await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;
    use crate::publish::tests::in_own_namespace;

    fn port(host_port: u16, target: &str) -> PublishedPort {
        PublishedPort {
            host_port,
            target: target.parse().unwrap(),
        }
    }

    #[test]
    fn ports_open_and_close_at_once_and_errors_are_per_port() {
        in_own_namespace(|| async {
            let (taken_port, free_port) = (8080, 8081);
            let _taken = TcpListener::bind(("127.0.0.1", taken_port)).unwrap();
            let mut listeners = PublishListeners::new(Netns::current().unwrap());

            let errors = listeners.set(&[
                port(taken_port, "10.0.0.1:80"),
                port(free_port, "10.0.0.1:81"),
                port(free_port, "10.0.0.1:82"),
            ]);
            assert_eq!(errors.len(), 2);
            assert_eq!(errors[0].host_port(), free_port);
            assert!(errors[0].to_string().contains("published twice"));
            assert_eq!(errors[1].host_port(), taken_port);
            assert!(errors[1].to_string().contains("another program listens"));
            TcpStream::connect(("127.0.0.1", free_port)).unwrap();
            TcpStream::connect(("::1", free_port)).unwrap();

            // A relay that hangs holds the sockets of the port, yet it closes, and can be opened again.
            let held = listeners.ports.borrow().clone();
            assert!(listeners.set(&[]).is_empty());
            let error = TcpStream::connect(("127.0.0.1", free_port)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
            assert!(listeners.set(&[port(free_port, "10.0.0.1:81")]).is_empty());
            TcpStream::connect(("127.0.0.1", free_port)).unwrap();
            drop((held, listeners));
            TcpStream::connect(("127.0.0.1", free_port)).unwrap_err();
        });
    }

    #[test]
    fn the_number_of_ports_is_bounded() {
        let many: Vec<_> = (1..=MAX_PORTS + 2)
            .map(|number| port(u16::try_from(number).unwrap(), "10.0.0.1:80"))
            .collect();
        let mut errors = Vec::new();
        assert_eq!(distinct(&many, &mut errors).len(), MAX_PORTS);
        assert!(matches!(
            errors[..],
            [PortError::TooMany { .. }, PortError::TooMany { .. }]
        ));
    }

    #[test]
    fn a_host_without_ipv6_publishes_on_ipv4() {
        assert!(ipv6_is_missing(&io::Error::from_raw_os_error(
            libc::EADDRNOTAVAIL
        )));
        assert!(!ipv6_is_missing(&io::Error::from_raw_os_error(
            libc::EADDRINUSE
        )));
    }
}
