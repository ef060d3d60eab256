//! Peers that break the rules, and peers that are gone.

use std::{
    sync::Arc,
    sync::atomic::{AtomicBool, Ordering::SeqCst},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy, sink},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tunnel::{End, PoolKey, ServeError};

use crate::{
    answers::foreign,
    bench::{Bench, Setup, connect, is_reset, until, within},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const END_HEADERS: u8 = 4;

/// A frame as RFC 9113, section 4.1, has it.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn connect_frame(stream: u32) -> Vec<u8> {
    // HPACK, literals that are not indexed: `:method` is entry 2, `:authority` 1.
    let block = [b"\x02\x07CONNECT".as_slice(), b"\x01\x0b10.0.0.1:80"].concat();
    frame(HEADERS, END_HEADERS, stream, &block)
}

fn hello() -> Vec<u8> {
    [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat()
}

#[tokio::test]
async fn a_flood_of_streams_is_refused_beyond_the_limit() {
    let setup = Setup {
        hang: true,
        ..Setup::default()
    };
    let bench = setup.start().await;
    let mut tls = foreign(&bench).await;
    let mut flood = hello();
    for number in 0..300 {
        flood.extend(connect_frame(2 * number + 1));
    }
    tls.write_all(&flood).await.unwrap();
    let mut refused = 0;
    while refused < 100 {
        let mut head = [0; 9];
        within(tls.read_exact(&mut head)).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        within(tls.read_exact(&mut payload)).await.unwrap();
        if head[3] == RST_STREAM {
            assert_eq!(payload, [0, 0, 0, 7]); // REFUSED_STREAM
            refused += 1;
        }
    }
    until("all others are asked about", || {
        bench.server.handler().asked.load(SeqCst) == 200
    })
    .await;
}

#[tokio::test]
async fn streams_that_are_opened_and_reset_over_and_over_end_the_connection() {
    let setup = Setup {
        hang: true,
        ..Setup::default()
    };
    let mut bench = setup.start().await;
    let mut tls = foreign(&bench).await;
    let mut flood = hello();
    for number in 0..2000 {
        let stream = 2 * number + 1;
        flood.extend(connect_frame(stream));
        flood.extend(frame(RST_STREAM, 0, stream, &[0, 0, 0, 8]));
    }
    // The server may hang up in the middle of it.
    let _ = tls.write_all(&flood).await;
    let end = within(bench.served.recv()).await.unwrap();
    assert!(
        matches!(&end, Err(ServeError::Protocol(text)) if text.contains("excessive load")),
        "{end:?}"
    );
}

#[tokio::test]
async fn what_is_no_http_2_ends_the_connection_alone() {
    let mut bench = Bench::start().await;
    let (mut client, mut server, _task) = bench.carried().await;
    let mut tls = foreign(&bench).await;
    tls.write_all(&[b'x'; 100]).await.unwrap();
    let end = within(bench.served.recv()).await.unwrap();
    assert!(matches!(end, Err(ServeError::Protocol(_))), "{end:?}");
    client.write_all(b"still").await.unwrap();
    within(server.read_exact(&mut [0; 5])).await.unwrap();
}

#[tokio::test]
async fn a_stalled_reader_stops_the_writer_and_nobody_else() {
    let bench = Bench::start().await;
    let (mut client, server, _task) = bench.carried().await;
    let chunk = vec![5; 64 << 10];
    let mut written = 0;
    // It is stopped when nothing is taken for a second.
    while let Ok(count) = timeout(Duration::from_secs(1), client.write(&chunk)).await {
        written += count.unwrap();
        assert!(written < 64 << 20, "a stalled reader stops nobody");
    }
    // The window and the sockets' own buffers are full.
    assert!(written > 4 << 20, "{written}");

    // Another stream of the same connection goes on.
    let (mut other, mut far, _other_task) = bench.carried().await;
    for _ in 0..20 {
        other.write_all(&chunk).await.unwrap();
        within(far.read_exact(&mut vec![0; chunk.len()]))
            .await
            .unwrap();
    }
    assert_eq!(bench.server.connections(), 1);

    // And when it is read again, nothing is missing.
    let mut server = server.take(written as u64);
    let count = within(copy(&mut server, &mut sink())).await.unwrap();
    assert_eq!(count, written as u64);
}

/// Passes bytes on until it is told to swallow them.
async fn black_hole(target: std::net::SocketAddr) -> (std::net::SocketAddr, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let closed = Arc::new(AtomicBool::new(false));
    let shared = closed.clone();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(target).await.unwrap();
            let (near_read, near_write) = near.into_split();
            let (far_read, far_write) = far.into_split();
            for (mut read, mut write) in [(near_read, far_write), (far_read, near_write)] {
                let closed = shared.clone();
                tokio::spawn(async move {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(count @ 1..) = read.read(&mut buffer).await {
                        if !closed.load(SeqCst) && write.write_all(&buffer[..count]).await.is_err()
                        {
                            break;
                        }
                    }
                    // A black hole does not tell either side that the other has gone.
                    if closed.load(SeqCst) {
                        std::future::pending::<()>().await;
                    }
                });
            }
        }
    });
    (address, closed)
}

#[tokio::test]
async fn a_peer_that_is_gone_is_noticed_on_both_sides() {
    let mut setup = Setup::default();
    for limits in [
        (
            &mut setup.client_limits.ping_interval,
            &mut setup.client_limits.ping_timeout,
        ),
        (
            &mut setup.server_limits.ping_interval,
            &mut setup.server_limits.ping_timeout,
        ),
    ] {
        *limits.0 = Duration::from_millis(100);
        *limits.1 = Duration::from_millis(300);
    }
    let mut bench = setup.start().await;
    let (address, closed) = black_hole(bench.address).await;
    bench.key = PoolKey {
        address,
        ..bench.key
    };
    let (mut client, mut server, task) = bench.carried().await;
    client.write_all(b"there").await.unwrap();
    within(server.read_exact(&mut [0; 5])).await.unwrap();
    // It stays while PINGs are answered.
    assert!(
        timeout(Duration::from_secs(1), client.read(&mut [0]))
            .await
            .is_err()
    );

    closed.store(true, SeqCst);
    let result = within(client.read(&mut [0])).await;
    assert!(is_reset(&result), "{result:?}");
    let result = within(server.read(&mut [0])).await;
    assert!(is_reset(&result), "{result:?}");
    assert!(matches!(within(task).await.unwrap().end, End::Broken(_)));
    let served = within(bench.served.recv()).await.unwrap();
    assert!(matches!(served, Err(ServeError::PingTimeout)), "{served:?}");
    assert!(matches!(
        within(bench.finished.recv()).await.unwrap().end,
        End::Broken(_)
    ));
    assert_eq!(bench.pool.figures().connections, 0);
    // The next goes over a new connection.
    closed.store(false, SeqCst);
    connect(&bench.pool, &bench.key, &bench.client_tls)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_record_that_was_changed_on_its_way_ends_the_connection() {
    let mut bench = Bench::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let target = bench.address;
    let spoil = Arc::new(AtomicBool::new(false));
    let spoiling = spoil.clone();
    tokio::spawn(async move {
        let (near, _) = listener.accept().await.unwrap();
        let far = TcpStream::connect(target).await.unwrap();
        let (mut near_read, mut near_write) = near.into_split();
        let (mut far_read, mut far_write) = far.into_split();
        tokio::spawn(async move { copy(&mut far_read, &mut near_write).await });
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = near_read.read(&mut buffer).await {
            if spoiling.load(SeqCst) {
                buffer[count - 1] ^= 1;
            }
            far_write.write_all(&buffer[..count]).await.unwrap();
        }
    });
    bench.key = PoolKey {
        address,
        ..bench.key
    };
    let (mut client, mut server, task) = bench.carried().await;
    spoil.store(true, SeqCst);
    client.write_all(b"spoilt").await.unwrap();
    let result = within(server.read(&mut [0; 6])).await;
    assert!(is_reset(&result), "{result:?}");
    assert!(matches!(within(task).await.unwrap().end, End::Broken(_)));
    let served = within(bench.served.recv()).await.unwrap();
    assert!(matches!(served, Err(ServeError::Tls(_))), "{served:?}");
}
