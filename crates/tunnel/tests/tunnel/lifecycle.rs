//! How connections end: drained, idle, expired, forgotten, with the process.

use std::{
    sync::atomic::Ordering::SeqCst,
    time::{Duration, SystemTime},
};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;
use tunnel::{ConnectError, End, tls};

use crate::{
    bench::{Bench, Setup, is_reset, until, within},
    certificates::{Wanted, id},
};

#[tokio::test]
async fn a_server_that_drains_finishes_its_streams_and_takes_no_more() {
    let mut bench = Bench::start().await;
    let (mut client, mut server, task) = bench.carried().await;
    let drain = std::mem::replace(&mut *bench.drain.lock().unwrap(), CancellationToken::new());
    drain.cancel();
    // New streams find another connection once the GOAWAY has come.
    while bench.accepted.load(SeqCst) < 2 {
        bench.connect().await.unwrap();
    }
    assert!(bench.served.try_recv().is_err());
    client.write_all(b"in flight").await.unwrap();
    let mut read = [0; 9];
    within(server.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"in flight");
    drop(client);
    drop(server);
    assert_eq!(within(task).await.unwrap().end, End::Clean);
    let served = within(bench.served.recv()).await.unwrap();
    assert!(served.is_ok(), "{served:?}");
}

#[tokio::test]
async fn a_pool_that_drains_finishes_its_streams() {
    let mut bench = Bench::start().await;
    let (mut client, mut server, task) = bench.carried().await;
    bench.pool.drain();
    let result = bench.connect().await.map(drop);
    assert!(matches!(result, Err(ConnectError::Draining)), "{result:?}");
    client.write_all(b"on").await.unwrap();
    within(server.read_exact(&mut [0; 2])).await.unwrap();
    drop(client);
    drop(server);
    within(bench.pool.drained()).await;
    assert_eq!(within(task).await.unwrap().end, End::Clean);
    assert!(within(bench.served.recv()).await.unwrap().is_ok());
}

#[tokio::test]
async fn a_forgotten_source_gets_new_connections_and_keeps_its_streams() {
    let mut bench = Bench::start().await;
    let (mut client, mut server, _task) = bench.carried().await;
    until("it is in the pool", || {
        bench.pool.figures().connections == 1
    })
    .await;
    bench.pool.forget(bench.key.source);
    assert_eq!(bench.pool.figures().connections, 0);
    let _other = bench.connect().await.unwrap();
    assert_eq!(bench.accepted.load(SeqCst), 2);
    client.write_all(b"on").await.unwrap();
    within(server.read_exact(&mut [0; 2])).await.unwrap();
    drop(client);
    drop(server);
    assert!(within(bench.served.recv()).await.unwrap().is_ok());
}

#[tokio::test]
async fn a_connection_without_streams_is_closed_by_either_side() {
    for client_closes in [true, false] {
        let mut setup = Setup::default();
        let short = Duration::from_millis(200);
        if client_closes {
            setup.client_limits.idle_timeout = short;
        } else {
            setup.server_limits.idle_timeout = short;
        }
        let mut bench = setup.start().await;
        drop(bench.connect().await.unwrap());
        let served = within(bench.served.recv()).await.unwrap();
        assert!(served.is_ok(), "{served:?}");
        until("the pool is empty", || {
            bench.pool.figures().connections == 0
        })
        .await;
        bench.connect().await.unwrap();
    }
}

#[tokio::test]
async fn a_connection_ends_with_the_certificate_that_it_was_opened_with() {
    let mut bench = Bench::start().await;
    let svid = bench.authority.issue(&Wanted {
        not_after: SystemTime::now() + Duration::from_secs(2),
        ..Wanted::new(id("client").as_str())
    });
    let roots = &bench.authority.roots;
    bench.client_tls = tls::client_config(&svid, roots, bench.key.expected.clone()).unwrap();
    let (mut client, _server, task) = bench.carried().await;
    let result = within(client.read(&mut [0])).await;
    assert!(is_reset(&result), "{result:?}");
    assert!(SystemTime::now() >= svid.not_after);
    assert!(matches!(within(task).await.unwrap().end, End::Broken(_)));
    assert!(matches!(
        within(bench.finished.recv()).await.unwrap().end,
        End::Broken(_)
    ));
}

#[tokio::test]
async fn many_sessions_end_once_each_when_their_connection_dies() {
    let mut bench = Bench::start().await;
    let mut carried = Vec::new();
    for _ in 0..20 {
        carried.push(bench.carried().await);
    }
    for (_, _, task) in &carried {
        task.abort(); // As a process that dies has it: streams are reset.
    }
    for _ in 0..20 {
        within(bench.finished.recv()).await.unwrap();
    }
    bench.pool.drain();
    assert!(within(bench.served.recv()).await.unwrap().is_ok());
    assert!(bench.finished.try_recv().is_err());
}

#[test]
fn a_session_ends_with_the_runtime() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (mut bench, carried) = runtime.block_on(async {
        let bench = Bench::start().await;
        let mut carried = bench.carried().await;
        carried.0.write_all(b"seven!!").await.unwrap();
        within(carried.1.read_exact(&mut [0; 7])).await.unwrap();
        (bench, carried)
    });
    assert!(bench.finished.try_recv().is_err());
    runtime.shutdown_timeout(Duration::from_secs(10));
    let outcome = bench.finished.try_recv().unwrap();
    assert_eq!(outcome.bytes_from_tunnel, 7);
    assert!(bench.finished.try_recv().is_err());
    drop(carried);
}
