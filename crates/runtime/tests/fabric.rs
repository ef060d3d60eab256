//! The fabric on a real kernel: pods on two nodes reach each other, quickly made, nothing left behind.
#![allow(clippy::unwrap_used)] // A failed test is what a panic is for.

use std::{
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

use api::mesh::MeshConfig;
use linux::netns::Netns;
use runtime::fabric::{Fabric, PodNetwork};

const PATIENCE: Duration = Duration::from_secs(5);

/// A TCP connection from one pod to another carries bytes, and shows the client's own address.
fn reaches(client: &PodNetwork, server: &PodNetwork, address: IpAddr, own: IpAddr) {
    let listener = server
        .netns
        .run(|| TcpListener::bind(SocketAddr::new(address, 80)))
        .unwrap()
        .unwrap();
    let mut stream = client
        .netns
        .run(|| TcpStream::connect_timeout(&SocketAddr::new(address, 80), PATIENCE))
        .unwrap()
        .unwrap();
    let (mut accepted, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), own);
    stream.write_all(b"ping").unwrap();
    let mut bytes = [0; 4];
    accepted.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"ping");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_of_two_nodes_reach_each_other() {
    let mesh = MeshConfig::default();
    let fabric = Fabric::create(&mesh, &["one".into(), "two".into()])
        .await
        .unwrap();
    let mut pods = Vec::new();
    for node in fabric.nodes() {
        for _ in 0..3 {
            pods.push(node.attach().await.unwrap());
        }
    }
    assert_eq!(pods[0].addresses[0].to_string(), "10.244.0.2");
    assert_eq!(pods[5].addresses[0].to_string(), "10.244.1.4");
    assert_eq!(pods[5].addresses[1].to_string(), "fd10:244:0:1::4");
    thread::scope(|scope| {
        scope.spawn(|| {
            for client in &pods {
                for server in &pods {
                    for family in [0, 1] {
                        reaches(
                            client,
                            server,
                            server.addresses[family],
                            client.addresses[family],
                        );
                    }
                }
            }
        });
    });

    // Elsewhere there is no way, and it is said at once.
    let start = Instant::now();
    let outside: SocketAddr = "192.0.2.1:80".parse().unwrap();
    pods[0]
        .netns
        .run(|| TcpStream::connect_timeout(&outside, PATIENCE))
        .unwrap()
        .unwrap_err();
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );

    // An address is given again only after its release, and its interface is gone then.
    let node = fabric.node("two").unwrap();
    let pod = pods.pop().unwrap();
    let index = pod.host_ifindex;
    node.release(pod).await;
    let exists = node
        .netns()
        .run(|| {
            std::fs::read_to_string("/proc/thread-self/net/dev")
                .unwrap()
                .contains(&format!("w{index}:"))
        })
        .unwrap();
    assert!(!exists);
}

/// Where the kernel can (Linux 6.1), and without the limits that it derives from a table's size.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_have_socket_tables_of_their_own_and_the_nodes_limits() {
    let fabric = Fabric::create(&MeshConfig::default(), &["one".into()])
        .await
        .unwrap();
    let node = fabric.node("one").unwrap();
    let pod = node.attach().await.unwrap();
    let read = |netns: &Netns, name: &str| {
        let path = format!("/proc/sys/net/ipv4/{name}");
        netns.run(|| std::fs::read_to_string(path)).unwrap()
    };
    // The kernel tells the number of slots; a negative one means the machine's table.
    let slots = |netns: &Netns| {
        let text = read(netns, "tcp_ehash_entries").ok()?;
        Some(text.trim().parse::<i64>().unwrap())
    };
    if let (Some(of_node), Some(of_pod)) = (slots(node.netns()), slots(&pod.netns)) {
        assert!(of_node < 0, "{of_node}");
        assert_eq!(of_pod, 16384);
    }
    for limit in ["tcp_max_tw_buckets", "tcp_max_syn_backlog"] {
        let [of_node, of_pod] = [node.netns(), &pod.netns].map(|netns| read(netns, limit).unwrap());
        assert_eq!(of_node, of_pod, "{limit}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_pods_are_quickly_made() {
    let mesh = MeshConfig::default();
    let fabric = Fabric::create(&mesh, &["one".into()]).await.unwrap();
    let node = fabric.node("one").unwrap();
    let start = Instant::now();
    let mut pods = Vec::new();
    for _ in 0..50 {
        pods.push(node.attach().await.unwrap());
    }
    let took = start.elapsed();
    println!("50 pods in {took:?}");
    // Some 100 ms on an idle machine; the bound leaves room for a loaded one.
    assert!(took < Duration::from_secs(2), "{took:?}");
}
