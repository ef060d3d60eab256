//! Connections from the agent to a workload's own program, made in the client's name: the program sees the client's
//! address as its peer, as it would without a mesh.
//!
//! The socket is made inside the workload's namespace, may have an address that is not local there, and carries a mark
//! by which its answers find back (`inpod::routes`) and the kernel knows whom it is for (`kernel/bpf/tcp.h`).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    time::Duration,
};

use linux::netns::Netns;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};

use super::local::LocalWorkload;

/// Sockets that are made at a time: entering a namespace costs as much as making some of them.
const BATCH: usize = 16;
/// The program is on this machine: if it does not answer by then, its queue is full.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sockets made ahead, by address family.
#[derive(Debug, Default)]
pub(crate) struct Spare {
    v4: Vec<Socket>,
    v6: Vec<Socket>,
}

/// Ports that are taken where the client's own cannot be. Outside of what systems give to clients (IANA: from 49152, Linux:
/// from 32768): the client's own connection to the same port of the same program must not be taken for this one.
const PORTS: RangeInclusive<u16> = 1024..=32767;
/// Ports that are tried. Each is in use only if the same client has as many connections to the same program.
const TRIES: u32 = 8;

/// Connects to a workload's program as `client`; with port 0, from any port of the client's address.
///
/// # Errors
/// `ConnectionRefused` if nobody listens, `TimedOut` if nobody accepts.
pub(crate) async fn connect(
    workload: &LocalWorkload,
    home: &Netns,
    worker: usize,
    client: SocketAddr,
    server: SocketAddr,
) -> io::Result<TcpStream> {
    let mut from = client;
    for _ in 0..TRIES {
        if from.port() == 0 {
            from.set_port(fastrand::u16(PORTS));
        }
        match connect_from(workload, home, worker, from, server).await {
            // The client has used its port again while its last connection still closes here. The address is what counts.
            Err(error) if is_in_use(&error) => from.set_port(0),
            connected => return connected,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

async fn connect_from(
    workload: &LocalWorkload,
    home: &Netns,
    worker: usize,
    from: SocketAddr,
    server: SocketAddr,
) -> io::Result<TcpStream> {
    let socket = take(workload, home, worker, server)?;
    socket.bind(&from.into())?;
    let socket = TcpSocket::from_std_stream(socket.into());
    timeout(PATIENCE, socket.connect(server)).await?
}

/// By `bind()`; or by `connect()`, if the same two ends have a connection already.
fn is_in_use(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
    )
}

fn take(
    workload: &LocalWorkload,
    home: &Netns,
    worker: usize,
    server: SocketAddr,
) -> io::Result<Socket> {
    workload.with_spare(worker, |spare| {
        let of_family = if server.is_ipv4() {
            &mut spare.v4
        } else {
            &mut spare.v6
        };
        if let Some(socket) = of_family.pop() {
            return Ok(socket);
        }
        let mark = kernel::delivery_mark(workload.id)
            .ok_or_else(|| io::Error::other("the workload's number is too large for a mark"))?;
        let domain = Domain::for_address(server);
        let made = workload.netns.visit(home, || {
            let made = (0..BATCH).map(|_| marked(domain, mark));
            made.collect::<io::Result<Vec<Socket>>>()
        })??;
        of_family.extend(made);
        of_family
            .pop()
            .ok_or_else(|| io::Error::other("no socket was made"))
    })
}

fn marked(domain: Domain, mark: u32) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    // Of IPv6 sockets too: both families have one flag.
    socket.set_ip_transparent_v4(true)?;
    socket.set_mark(mark)?;
    socket.set_reuse_address(true)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// A socket for a tunnel to another node, made inside the client's namespace, so that its address is the client's.
pub(crate) async fn dial(
    workload: &LocalWorkload,
    home: &Netns,
    to: SocketAddr,
) -> io::Result<TcpStream> {
    let own = workload
        .addresses
        .iter()
        .copied()
        .find(|address| address.is_ipv4() == to.is_ipv4());
    let own = own.unwrap_or(match to {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    });
    let socket = workload.netns.visit(home, || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        socket.bind(&SocketAddr::new(own, 0).into())?;
        Ok::<_, io::Error>(socket)
    })??;
    TcpSocket::from_std_stream(socket.into()).connect(to).await
}
