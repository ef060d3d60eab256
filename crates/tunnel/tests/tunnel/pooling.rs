//! How many connections there are, and who waits for whom.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use futures::future::join_all;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::Notify,
};
use tunnel::{Authority, ConnectError, ConnectHeaders, PoolFigures, PoolKey};

use crate::bench::{Bench, Setup, connect, until, within};

#[tokio::test]
async fn many_at_once_share_one_handshake() {
    let bench = Bench::start().await;
    let streams = join_all((0..100).map(|_| bench.connect())).await;
    assert!(streams.iter().all(Result::is_ok));
    assert_eq!(bench.accepted.load(SeqCst), 1);
    let figures = bench.pool.figures();
    assert_eq!(
        figures,
        PoolFigures {
            connections: 1,
            opening: 0,
            streams: 100
        }
    );
    drop(streams);
    assert_eq!(bench.pool.figures().streams, 0);
}

#[tokio::test]
async fn more_streams_than_one_connection_carries_take_several() {
    let bench = Bench::start().await;
    let mut carried = Vec::new();
    for _ in 0..250 {
        carried.push(bench.carried().await);
    }
    assert_eq!(bench.accepted.load(SeqCst), 3);
    for (number, (client, server, _)) in carried.iter_mut().enumerate() {
        let message = number.to_be_bytes();
        client.write_all(&message).await.unwrap();
        let mut read = [0; 8];
        within(server.read_exact(&mut read)).await.unwrap();
        assert_eq!(read, message);
    }
}

#[tokio::test]
async fn more_streams_at_once_than_one_connection_carries_take_several() {
    let at_once = Bench::start().await;
    let accept = async {
        let mut applications = Vec::new();
        while applications.len() < 250 {
            applications.push(within(at_once.application.accept()).await.unwrap());
        }
        applications
    };
    let connects = join_all((0..250).map(|_| at_once.connect()));
    let (streams, _applications) = tokio::join!(connects, accept);
    let error = streams.iter().find_map(|result| result.as_ref().err());
    assert!(error.is_none(), "{error:?}");
    assert_eq!(at_once.accepted.load(SeqCst), 3);
}

#[tokio::test]
async fn a_peer_that_allows_fewer_streams_is_obeyed() {
    let mut setup = Setup::default();
    setup.server_limits.streams = 10;
    let bench = setup.start().await;
    let streams = join_all((0..35).map(|_| bench.connect())).await;
    let error = streams.iter().find_map(|result| result.as_ref().err());
    assert!(error.is_none(), "{error:?}");
    assert_eq!(bench.accepted.load(SeqCst), 4);
}

#[tokio::test]
async fn keys_do_not_share_connections() {
    let bench = Bench::start().await;
    let other = PoolKey {
        source: 2,
        ..bench.key.clone()
    };
    let _one = bench.connect().await.unwrap();
    let _two = connect(&bench.pool, &other, &bench.client_tls)
        .await
        .unwrap();
    assert_eq!(bench.accepted.load(SeqCst), 2);
}

#[tokio::test]
async fn connections_are_bounded_and_idle_ones_make_room() {
    let mut setup = Setup::default();
    setup.client_limits.streams = 1;
    setup.client_limits.connections_per_key = 2;
    setup.client_limits.connections = 3;
    let bench = setup.start().await;
    let one = bench.connect().await.unwrap();
    let _two = bench.connect().await.unwrap();
    let error = bench.connect().await.map(drop);
    assert!(
        matches!(error, Err(ConnectError::Full { limit: 2 })),
        "{error:?}"
    );
    let other = |source| PoolKey {
        source,
        ..bench.key.clone()
    };
    let _three = connect(&bench.pool, &other(2), &bench.client_tls)
        .await
        .unwrap();
    until("all are in the pool", || {
        bench.pool.figures().connections == 3
    })
    .await;
    let error = connect(&bench.pool, &other(3), &bench.client_tls)
        .await
        .map(drop);
    assert!(
        matches!(error, Err(ConnectError::Full { limit: 3 })),
        "{error:?}"
    );
    // A connection without a stream gives way.
    drop(one);
    let _four = connect(&bench.pool, &other(3), &bench.client_tls)
        .await
        .unwrap();
    until("there are three again", || {
        bench.pool.figures()
            == PoolFigures {
                connections: 3,
                opening: 0,
                streams: 3,
            }
    })
    .await;
}

#[tokio::test]
async fn who_cannot_reach_the_peer_says_so_to_all_who_wait() {
    let bench = Bench::start().await;
    let dials = AtomicUsize::new(0);
    let (authority, headers) = (
        "10.0.0.1:80".parse::<Authority>().unwrap(),
        ConnectHeaders::default(),
    );
    let dial = || async {
        dials.fetch_add(1, SeqCst);
        tokio::task::yield_now().await;
        Err::<TcpStream, _>(io::Error::from(io::ErrorKind::HostUnreachable))
    };
    let connects = (0..20).map(|_| {
        bench
            .pool
            .connect(&bench.key, dial, &bench.client_tls, &authority, &headers)
    });
    for result in within(join_all(connects)).await {
        let error = result.map(drop);
        assert!(
            matches!(&error, Err(ConnectError::Unreachable(error)) if error.kind() == io::ErrorKind::HostUnreachable),
            "{error:?}"
        );
    }
    assert_eq!(dials.load(SeqCst), 1);
    assert_eq!(bench.pool.figures(), PoolFigures::default());
}

#[tokio::test]
async fn who_gives_up_leaves_the_connection_to_those_who_wait() {
    let bench = Bench::start().await;
    let started = Arc::new(Notify::new());
    let leader = tokio::spawn({
        let (pool, key, tls, started) = (
            bench.pool.clone(),
            bench.key.clone(),
            bench.client_tls.clone(),
            started.clone(),
        );
        async move {
            let dial = || async {
                started.notify_one();
                std::future::pending().await
            };
            let authority = "10.0.0.1:80".parse().unwrap();
            pool.connect(&key, dial, &tls, &authority, &ConnectHeaders::default())
                .await
                .map(drop)
        }
    });
    within(started.notified()).await;
    let waiting = tokio::spawn({
        let (pool, key, tls) = (
            bench.pool.clone(),
            bench.key.clone(),
            bench.client_tls.clone(),
        );
        async move { connect(&pool, &key, &tls).await.map(drop) }
    });
    tokio::task::yield_now().await;
    assert_eq!(bench.pool.figures().opening, 1);
    leader.abort();
    within(waiting).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_dial_that_never_ends_is_a_timeout() {
    let mut setup = Setup::default();
    setup.client_limits.handshake_timeout = Duration::from_millis(100);
    let bench = setup.start().await;
    let (authority, headers) = (
        "10.0.0.1:80".parse::<Authority>().unwrap(),
        ConnectHeaders::default(),
    );
    let dial = || std::future::pending::<io::Result<TcpStream>>();
    let result =
        within(
            bench
                .pool
                .connect(&bench.key, dial, &bench.client_tls, &authority, &headers),
        )
        .await;
    assert!(matches!(
        result.map(drop),
        Err(ConnectError::Timeout { .. })
    ));
}
