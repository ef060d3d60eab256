//! A root process inside a workload that wants out, or past the mesh's policy.
//!
//! `mallory` is denied everything; `web` may be called by `alice` only. What the kernel's own containment tests
//! check in detail (crates/runtime) is checked here once more as users get it, through `heddle exec`.

use std::{io, net::TcpStream, time::Duration};

use nix::libc;

use crate::harness::{
    Mesh,
    objects::{PROBE_PATH, allow, client, namespace, policy, server, service},
};

const WEB: u16 = 8000;
/// Port of the listener that had been a client.
const TURNED: u16 = 7777;
const REFUSED: &str = "ECONNREFUSED";

#[test]
fn root_in_a_workload_stays_in_it() {
    let objects = [
        namespace("shop"),
        client("shop/alice", ""),
        client("shop/mallory", ""),
        server("shop/web", &[WEB], ""),
        service("shop/web", &[(80, WEB)]),
        policy("shop/web", "web", &allow(&["shop/alice"])),
        server("shop/open", &[WEB], ""),
        service("shop/open", &[(80, WEB)]),
        policy("shop/alice", "alice", &allow(&["shop/web"])),
        policy("shop/mallory", "mallory", "  action: ALLOW\n"),
    ]
    .concat();
    let mesh = Mesh::start("containment", &[("objects.yaml", &objects)]);
    policy_holds_for_every_process(&mesh);
    only_tcp_and_udp_sockets_exist(&mesh);
    nothing_is_sent_as_another(&mesh);
    datagrams_are_refused(&mesh);
    outside_is_unreachable_at_once(&mesh);
    a_client_that_turns_listener_admits_no_strangers(&mesh);
    the_machine_is_out_of_sight(&mesh);
    system_calls_that_lead_out_are_refused(&mesh);
}

fn policy_holds_for_every_process(mesh: &Mesh) {
    mesh.connect("mallory", "web", 80).failed(REFUSED);
    let web = mesh
        .addresses("shop/web-0")
        .map(|address| address.to_string());
    for address in &web {
        mesh.connect("mallory", address, WEB).failed(REFUSED);
    }
    let mapped = mesh.attempts("mallory", "mapped", &web[0], WEB, 1);
    mapped[0].failed(REFUSED);
    for address in &web {
        let error = mesh.error_of("mallory", "fast_open", &[address, &WEB.to_string()]);
        assert_eq!(error.as_deref(), Some(REFUSED), "{address}");
    }
    // On the link itself everybody has an address that no policy speaks of.
    let line = "awk '$4 == 20 && $6 == \"eth0\" {print $1}' /proc/net/if_inet6 | sed 's/..../&:/g; s/:$//'";
    let neighbour = mesh.shell("web", line).success().stdout;
    let neighbour = neighbour.trim();
    assert!(neighbour.starts_with("fe80:"), "{neighbour:?}");
    let error = mesh.error_of("mallory", "link_local", &[neighbour, &WEB.to_string()]);
    assert_eq!(error.as_deref(), Some("ENETUNREACH"), "{neighbour}");
    // A session of its own, an orphan, another user: all are the workload's.
    let probe = format!("python3 {PROBE_PATH} connect any {} {WEB}", web[0]);
    for line in [
        format!("setsid --wait {probe}"),
        format!(
            "(setsid sh -c '{probe} > /tmp/orphan' &); until test -s /tmp/orphan; do sleep 0.01; done; cat /tmp/orphan"
        ),
        format!("setpriv --reuid=65534 --regid=65534 --clear-groups {probe}"),
        format!("chroot / {probe}"),
    ] {
        let outcome = mesh.shell("mallory", &line).success();
        assert!(outcome.stdout.contains(REFUSED), "{line}: {outcome:#?}");
    }
    mesh.connect("alice", "web", 80).greeting();
}

fn only_tcp_and_udp_sockets_exist(mesh: &Mesh) {
    const UDP_LITE: i32 = 136;
    const ANY_PACKET: i32 = 3 << 8; // ETH_P_ALL in network order
    for (family, kind, protocol) in [
        (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
        (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP),
        (libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW),
        (libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6),
        (libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP),
        (libc::AF_PACKET, libc::SOCK_RAW, ANY_PACKET),
        (libc::AF_PACKET, libc::SOCK_DGRAM, ANY_PACKET),
        (libc::AF_VSOCK, libc::SOCK_STREAM, 0),
        (libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP),
        (libc::AF_INET, libc::SOCK_SEQPACKET, libc::IPPROTO_SCTP),
        (libc::AF_INET, libc::SOCK_DGRAM, UDP_LITE),
        (libc::AF_INET, libc::SOCK_DCCP, libc::IPPROTO_DCCP),
        (libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
        (libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
    ] {
        let error = make_socket(mesh, family, kind, protocol);
        assert!(
            error.is_some(),
            "a socket was made: {family} {kind} {protocol}"
        );
    }
    for (family, kind, protocol) in [
        (libc::AF_INET, libc::SOCK_STREAM, 0),
        (libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP),
        (libc::AF_INET, libc::SOCK_DGRAM, 0),
        (libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP),
        (libc::AF_UNIX, libc::SOCK_STREAM, 0),
    ] {
        let error = make_socket(mesh, family, kind, protocol);
        assert_eq!(error, None, "{family} {kind} {protocol}");
    }
}

/// The errno of socket(2) in the workload.
fn make_socket(mesh: &Mesh, family: i32, kind: i32, protocol: i32) -> Option<String> {
    let numbers = [family, kind, protocol].map(|number| number.to_string());
    mesh.error_of(
        "mallory",
        "make_socket",
        &numbers.each_ref().map(String::as_str),
    )
}

/// Binding to alice's address is refused, or what is sent from it goes nowhere and is counted.
fn nothing_is_sent_as_another(mesh: &Mesh) {
    let alice = mesh
        .addresses("shop/alice-0")
        .map(|address| address.to_string());
    let web = mesh
        .addresses("shop/web-0")
        .map(|address| address.to_string());
    let open = mesh
        .addresses("shop/open-0")
        .map(|address| address.to_string());
    let before = mesh.count("node-1", "spoofed");
    for family in 0..2 {
        // To where mallory may not go, and to where it may.
        for target in [&web[family], &open[family]] {
            let attempt = mesh.spoof("mallory", &alice[family], target, WEB);
            assert!(attempt.error.is_some(), "{attempt:?}");
        }
    }
    // IPv4 refuses such a source by itself; over IPv6 it takes the check on the veth.
    assert!(mesh.count("node-1", "spoofed") > before);
    mesh.connect("mallory", "open", 80).greeting();
}

fn datagrams_are_refused(mesh: &Mesh) {
    let before = mesh.count("node-1", "no-allow-matched");
    let web = mesh
        .addresses("shop/web-0")
        .map(|address| address.to_string());
    for (count, address) in (1..).zip(&web) {
        // Port 53 is no way through either: a workload's address is not a name server's.
        let port = if count == 1 { "53" } else { "8000" };
        let error = mesh.error_of("mallory", "datagram", &[address, port]);
        assert_eq!(error.as_deref(), Some(REFUSED), "{address}");
        assert_eq!(mesh.count("node-1", "no-allow-matched"), before + count);
    }
}

fn outside_is_unreachable_at_once(mesh: &Mesh) {
    // RFC 5737's and RFC 3849's ranges for examples; and the machine's own addresses on the fabric.
    for address in ["192.0.2.1", "2001:db8::1", "172.30.0.1", "10.244.0.1"] {
        mesh.connect("alice", address, 80).failed("ENETUNREACH");
        let answer = mesh.explain("alice", &format!("[{address}]:80"));
        assert_eq!(
            (answer.reason.as_str(), answer.outcome.as_str()),
            ("no-egress", "ENETUNREACH")
        );
    }
}

/// The verdict of a socket's connection must not outlive the connection: `web` connects, dissolves the connection, and
/// listens with the same socket.
fn a_client_that_turns_listener_admits_no_strangers(mesh: &Mesh) {
    let arguments = ["open", "80", &TURNED.to_string()];
    let mut listener = mesh.talk("web", "relisten", &arguments);
    assert_eq!(listener.hear::<String>(), "listening");
    let addresses = mesh.addresses("shop/web-0");
    mesh.connect("mallory", &addresses[0].to_string(), TURNED)
        .failed(REFUSED);
    for address in addresses {
        let silence = Duration::from_millis(700);
        let stranger = || TcpStream::connect_timeout(&(address, TURNED).into(), silence);
        let error = mesh
            .namespace_of_node("node-1")
            .run(stranger)
            .unwrap()
            .expect_err("a stranger got in");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{address}: {error}");
    }
    // The listener works: who may call is let in.
    mesh.connect("alice", &addresses[0].to_string(), TURNED)
        .greeting();
    let accepted: Vec<String> = listener.finish();
    assert_eq!(accepted, [mesh.addresses("shop/alice-0")[0].to_string()]);
}

fn the_machine_is_out_of_sight(mesh: &Mesh) {
    let host = mesh.status().pid;
    for (line, expected) in [
        ("ls -d /run/heddle 2> /dev/null; echo end", "end\n"),
        ("grep -c -E 'cgroup|bpf' /proc/mounts", "0\n"),
        ("find /sys/fs/cgroup -mindepth 1; echo end", "end\n"),
        ("grep ^0: /proc/self/cgroup", "0::/\n"),
        (
            "find / -xdev -name '*.sock' -type s 2> /dev/null; echo end",
            "end\n",
        ),
    ] {
        let outcome = mesh.shell("mallory", line);
        assert_eq!(outcome.stdout, expected, "{line}: {outcome:#?}");
    }
    let processes = mesh
        .shell("mallory", "ls /proc | grep -c '^[0-9]'")
        .success()
        .stdout;
    assert!(processes.trim().parse::<u32>().unwrap() < 10, "{processes}");
    let line = format!("test -e /proc/{host}; kill -9 {host}");
    let outcome = mesh.shell("mallory", &line);
    assert!(
        outcome.code != 0 && outcome.stderr.contains("No such process"),
        "{outcome:#?}"
    );
}

fn system_calls_that_lead_out_are_refused(mesh: &Mesh) {
    for line in [
        "mkdir /tmp/c && mount -t cgroup2 none /tmp/c",
        "mount -t tmpfs none /mnt",
        "mount -t proc none /mnt",
        "mount -o remount,rw /proc/sys",
        "umount /proc",
        "echo 0 > /proc/sys/net/ipv4/ip_forward",
        "unshare --net true",
        "unshare --user true",
        "unshare --mount true",
        "nsenter --target 1 --net true",
        "ip link add x type dummy",
        "ip address add 10.244.0.77/24 dev eth0",
    ] {
        let outcome = mesh.shell("mallory", line);
        assert!(outcome.code != 0, "possible: {line}: {outcome:#?}");
    }
    for (call, arguments) in [
        ("unshare", vec![i64::from(libc::CLONE_NEWNET)]),
        ("unshare", vec![i64::from(libc::CLONE_NEWUSER)]),
        ("setns", vec![0, i64::from(libc::CLONE_NEWNET)]),
        ("ptrace", vec![i64::from(libc::PTRACE_ATTACH), 1, 0, 0]),
        ("syscall", vec![libc::SYS_bpf, 0, 0, 0]),
        ("syscall", vec![libc::SYS_io_uring_setup, 1, 0]),
    ] {
        let numbers: Vec<String> = arguments.iter().map(i64::to_string).collect();
        let mut all = vec![call];
        all.extend(numbers.iter().map(String::as_str));
        let error = mesh.error_of("mallory", "call", &all);
        assert_eq!(error.as_deref(), Some("EPERM"), "{call} {numbers:?}");
    }
    // All that was tried has changed nothing.
    mesh.connect("mallory", "web", 80).failed(REFUSED);
    mesh.connect("alice", "web", 80).greeting();
}
