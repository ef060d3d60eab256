//! Bytes, ends and resets, both ways.

use std::{io, time::Duration};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tunnel::{End, Side};

use crate::bench::{Bench, is_reset, within};

/// Text that no two places of which are alike, so that order shows.
fn bytes(length: usize, seed: u64) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; length];
    random.fill(&mut bytes);
    bytes
}

#[tokio::test]
async fn bytes_arrive_as_they_were_sent_both_ways_at_once() {
    let mut bench = Bench::start().await;
    let (client, server, task) = bench.carried().await;
    let (up, down) = (bytes(40 << 20, 1), bytes(30 << 20, 2));
    let send = |tcp: TcpStream, mine: Vec<u8>| {
        let (mut read, mut write) = tcp.into_split();
        let writer = tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(mine.len() as u64);
            let mut rest = &mine[..];
            while !rest.is_empty() {
                let count = random.usize(1..=200_000).min(rest.len());
                write.write_all(&rest[..count]).await.unwrap();
                rest = &rest[count..];
            }
            write.shutdown().await.unwrap();
        });
        let reader = tokio::spawn(async move {
            let mut all = Vec::new();
            read.read_to_end(&mut all).await.unwrap();
            all
        });
        (writer, reader)
    };
    let (client_writer, client_reader) = send(client, up.clone());
    let (server_writer, server_reader) = send(server, down.clone());
    assert!(within(server_reader).await.unwrap() == up);
    assert!(within(client_reader).await.unwrap() == down);
    within(client_writer).await.unwrap();
    within(server_writer).await.unwrap();
    let outcome = within(task).await.unwrap();
    assert_eq!(outcome.end, End::Clean);
    assert_eq!(outcome.bytes_to_tunnel, up.len() as u64);
    assert_eq!(outcome.bytes_from_tunnel, down.len() as u64);
    let served = within(bench.finished.recv()).await.unwrap();
    assert_eq!(served.end, End::Clean);
    assert_eq!(served.bytes_from_tunnel, up.len() as u64);
    assert_eq!(served.bytes_to_tunnel, down.len() as u64);
}

#[tokio::test]
async fn an_end_of_one_direction_leaves_the_other_open() {
    for client_first in [true, false] {
        let mut bench = Bench::start().await;
        let (client, server, task) = bench.carried().await;
        let (mut first, mut second) = if client_first {
            (client, server)
        } else {
            (server, client)
        };
        first.write_all(b"question").await.unwrap();
        first.shutdown().await.unwrap();
        let mut text = String::new();
        within(second.read_to_string(&mut text)).await.unwrap();
        assert_eq!(text, "question");
        second.write_all(b"answer").await.unwrap();
        let mut answer = [0; 6];
        within(first.read_exact(&mut answer)).await.unwrap();
        assert_eq!(&answer, b"answer");
        second.shutdown().await.unwrap();
        assert_eq!(within(first.read(&mut answer)).await.unwrap(), 0);
        assert_eq!(within(task).await.unwrap().end, End::Clean);
        let served = within(bench.finished.recv()).await.unwrap();
        assert_eq!(served.end, End::Clean);
    }
}

#[tokio::test]
async fn a_reset_reaches_the_other_end() {
    for client_resets in [true, false] {
        let mut bench = Bench::start().await;
        let (client, server, task) = bench.carried().await;
        let (first, mut second) = if client_resets {
            (client, server)
        } else {
            (server, client)
        };
        SockRef::from(&first)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(first);
        let result = within(second.read(&mut [0])).await;
        assert!(is_reset(&result), "{result:?}");
        let near = within(task).await.unwrap().end;
        let far = within(bench.finished.recv()).await.unwrap().end;
        let (tcp, tunnel) = if client_resets {
            (near, far)
        } else {
            (far, near)
        };
        assert_eq!(tcp, End::Reset(Side::Tcp));
        assert_eq!(tunnel, End::Reset(Side::Tunnel));
    }
}

#[tokio::test]
async fn a_stream_whose_policy_ended_is_reset_on_both_sides() {
    let mut bench = Bench::start().await;
    let (mut client, mut server, task) = bench.carried().await;
    client.write_all(b"before").await.unwrap();
    within(server.read_exact(&mut [0; 6])).await.unwrap();
    bench.ended.cancel();
    let results: [io::Result<usize>; 2] = [
        within(client.read(&mut [0])).await,
        within(server.read(&mut [0])).await,
    ];
    assert!(results.iter().all(is_reset), "{results:?}");
    let served = within(bench.finished.recv()).await.unwrap();
    assert_eq!(served.end, End::Policy);
    assert_eq!(served.bytes_from_tunnel, 6);
    assert_eq!(within(task).await.unwrap().end, End::Reset(Side::Tunnel));
}
