//! Real sockets in a namespace of their own: listed, measured and ended.
#![allow(clippy::unwrap_used)] // A failed test is what a panic is for.

use std::{
    io::{self, Read, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};

use linux::{
    netns::Netns,
    sock_diag::{Family, Protocol, Request, SockDiag, Socket, State, States},
};

const PATIENCE: Duration = Duration::from_secs(5);
const LOOPBACKS: [&str; 2] = ["127.0.0.1", "::1"];

/// A namespace whose loopback works.
fn namespace() -> Netns {
    let netns = Netns::create().unwrap();
    let status = netns
        .run(|| {
            Command::new("ip")
                .args(["link", "set", "lo", "up"])
                .status()
        })
        .unwrap()
        .unwrap();
    assert!(status.success());
    netns
}

fn connected(netns: &Netns, host: &str) -> (TcpStream, TcpStream) {
    netns
        .run(|| {
            let listener = TcpListener::bind((host, 0)).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (server, _) = listener.accept().unwrap();
            for stream in [&client, &server] {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
            }
            (client, server)
        })
        .unwrap()
}

fn request(family: Family, protocol: Protocol) -> Request<'static> {
    Request {
        family,
        protocol,
        states: States::of(&[
            State::Established,
            State::CloseWait,
            State::FinWait1,
            State::FinWait2,
        ]),
        figures: true,
        storages: Vec::new(),
    }
}

fn list(diag: &mut SockDiag, family: Family, protocol: Protocol) -> Vec<Socket> {
    let mut sockets = Vec::new();
    let dumped = diag
        .dump(&request(family, protocol), |socket| sockets.push(socket))
        .unwrap();
    assert_eq!(dumped.sockets, sockets.len());
    assert!(!dumped.interrupted);
    sockets
}

fn find(sockets: &[Socket], local: SocketAddr) -> Socket {
    let found = sockets
        .iter()
        .find(|socket| socket.local_canonical() == local);
    found
        .unwrap_or_else(|| panic!("{local} is not among {sockets:#?}"))
        .clone()
}

fn family_of(host: &str) -> Family {
    if host.contains(':') {
        Family::V6
    } else {
        Family::V4
    }
}

#[test]
fn a_dump_tells_the_sockets_of_one_namespace_with_their_figures() {
    let netns = namespace();
    let mut diag = SockDiag::open(&netns).unwrap();
    let elsewhere = namespace();
    let _stranger = connected(&elsewhere, LOOPBACKS[0]);
    for host in LOOPBACKS {
        let (mut client, mut server) = connected(&netns, host);
        client.write_all(&[7; 1000]).unwrap();
        server.read_exact(&mut [0; 1000]).unwrap();
        server.write_all(&[7; 70]).unwrap();
        client.read_exact(&mut [0; 70]).unwrap();

        let sockets = list(&mut diag, family_of(host), Protocol::Tcp);
        assert_eq!(sockets.len(), 2, "{sockets:#?}");
        let [own, peer] = [client.local_addr(), client.peer_addr()].map(Result::unwrap);
        let ours = find(&sockets, own);
        assert_eq!(ours.remote, peer);
        assert_eq!(ours.state, State::Established);
        assert_ne!(ours.cookie, 0);
        assert!(ours.cgroup.is_some_and(|cgroup| cgroup > 0));
        let figures = ours.figures.unwrap();
        assert_eq!(figures.bytes_acked, 1001, "with the SYN"); // RFC 9293, 3.4
        assert_eq!(figures.bytes_received, 70);
        assert!(figures.rtt_us > 0);
        let theirs = find(&sockets, peer).figures.unwrap();
        assert_eq!((theirs.bytes_acked, theirs.bytes_received), (70, 1000));

        client.shutdown(std::net::Shutdown::Write).unwrap();
        let half_closed = list(&mut diag, family_of(host), Protocol::Tcp);
        // The FIN may not have been acknowledged yet.
        let closing = [State::FinWait1, State::FinWait2];
        assert!(closing.contains(&find(&half_closed, own).state));
        assert_eq!(find(&half_closed, peer).state, State::CloseWait);
    }
}

#[test]
fn a_destroyed_tcp_connection_ends_at_once_on_both_sides() {
    let netns = namespace();
    let mut diag = SockDiag::open(&netns).unwrap();
    for host in LOOPBACKS {
        let (mut client, mut server) = connected(&netns, host);
        let (mut other, mut other_server) = connected(&netns, host);
        let sockets = list(&mut diag, family_of(host), Protocol::Tcp);
        let ours = find(&sockets, client.local_addr().unwrap());
        assert!(diag.destroy(Protocol::Tcp, &ours).unwrap());

        let owner = client.read(&mut [0]).unwrap_err();
        assert_eq!(owner.kind(), io::ErrorKind::ConnectionAborted);
        let peer = server.read(&mut [0]).unwrap_err();
        assert_eq!(peer.kind(), io::ErrorKind::ConnectionReset);
        assert!(!diag.destroy(Protocol::Tcp, &ours).unwrap(), "it is gone");

        other.write_all(b"x").unwrap();
        other_server.read_exact(&mut [0]).unwrap();
    }
}

/// A socket of `::` carries IPv4 under v4-mapped addresses.
#[test]
fn mapped_sockets_are_listed_under_ipv6_and_can_be_destroyed() {
    let netns = namespace();
    let mut diag = SockDiag::open(&netns).unwrap();
    let (mut client, server) = netns
        .run(|| {
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
            let port = listener.local_addr().unwrap().port();
            let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
            (client, listener.accept().unwrap().0)
        })
        .unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let sockets = list(&mut diag, Family::V6, Protocol::Tcp);
    let mapped = find(&sockets, client.peer_addr().unwrap());
    assert_eq!(mapped.local, server.local_addr().unwrap());
    assert!(matches!(mapped.local.ip(), IpAddr::V6(address) if address.to_ipv4_mapped().is_some()));
    assert!(diag.destroy(Protocol::Tcp, &mapped).unwrap());
    let peer = client.read(&mut [0]).unwrap_err();
    assert_eq!(peer.kind(), io::ErrorKind::ConnectionReset);
}

#[test]
fn a_destroyed_connected_datagram_socket_says_so_to_its_owner() {
    let netns = namespace();
    let mut diag = SockDiag::open(&netns).unwrap();
    for host in LOOPBACKS {
        let [client, server] = netns
            .run(|| [(); 2].map(|()| UdpSocket::bind((host, 0)).unwrap()))
            .unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        let sockets = list(&mut diag, family_of(host), Protocol::Udp);
        assert_eq!(
            sockets.len(),
            1,
            "the server is not connected: {sockets:#?}"
        );
        assert_eq!(sockets[0].remote, server.local_addr().unwrap());
        assert!(diag.destroy(Protocol::Udp, &sockets[0]).unwrap());
        let owner = client.recv(&mut [0]).unwrap_err();
        assert_eq!(owner.kind(), io::ErrorKind::ConnectionAborted);
        assert!(list(&mut diag, family_of(host), Protocol::Udp).is_empty());
    }
}

/// More sockets than fit into one answer of the kernel's.
#[test]
fn long_lists_are_whole() {
    const CONNECTIONS: usize = 400;
    let netns = namespace();
    let mut diag = SockDiag::open(&netns).unwrap();
    let held: Vec<_> = (0..CONNECTIONS)
        .map(|_| connected(&netns, LOOPBACKS[0]))
        .collect();
    let listed = list(&mut diag, Family::V4, Protocol::Tcp);
    assert_eq!(listed.len(), 2 * CONNECTIONS);
    for (client, server) in &held {
        for stream in [client, server] {
            let ends = [stream.local_addr(), stream.peer_addr()].map(Result::unwrap);
            let found = listed
                .iter()
                .filter(|socket| [socket.local, socket.remote] == ends);
            assert_eq!(found.count(), 1, "{ends:?}");
        }
    }
}

/// A namespace with a table of its own is listed without a walk through the machine's.
#[test]
fn a_small_table_of_its_own_makes_a_dump_quick() {
    let parent = Netns::create().unwrap();
    let child = parent
        .run(|| {
            std::fs::write("/proc/sys/net/ipv4/tcp_child_ehash_entries", "16384").unwrap();
            Netns::create()
        })
        .unwrap()
        .unwrap();
    let quickest = |netns: &Netns| {
        let mut diag = SockDiag::open(netns).unwrap();
        let times = (0..20).map(|_| {
            let start = Instant::now();
            list(&mut diag, Family::V4, Protocol::Tcp);
            start.elapsed()
        });
        times.min().unwrap()
    };
    let (shared, own) = (quickest(&parent), quickest(&child));
    println!("a dump of an empty namespace: {shared:?} in the machine's table, {own:?} in its own");
    assert!(own < Duration::from_millis(1), "{own:?}");
}
