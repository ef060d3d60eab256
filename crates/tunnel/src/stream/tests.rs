//! Against rustls itself on the other side: bytes, ends, new keys.
#![allow(clippy::unwrap_used)] // A test ends at the first thing that fails.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream as RustlsStream};

use super::*;
use crate::tls;

#[path = "../../tests/tunnel/certificates.rs"]
#[allow(dead_code, unreachable_pub)] // Shared with the tests of the whole.
mod certificates;

/// A connection between rustls and us.
async fn pair() -> (RustlsStream<TcpStream>, TlsStream) {
    let authority = certificates::Authority::new();
    let domain = certificates::TRUST_DOMAIN;
    let server = tls::server_config(&authority.svid("server"), &authority.roots, domain).unwrap();
    let expected = Arc::new([certificates::id("server")]);
    let client = tls::client_config(&authority.svid("client"), &authority.roots, expected).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connect = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        let name = ServerName::IpAddress(address.ip().into());
        let connector = TlsConnector::from(client.config());
        connector.connect(name, tcp).await.unwrap()
    };
    let accept = async {
        let (tcp, _) = listener.accept().await.unwrap();
        accept(tcp, &server).await.unwrap()
    };
    let (client, server) = tokio::join!(connect, accept);
    (client, server.stream)
}

async fn exchange(theirs: &mut RustlsStream<TcpStream>, ours: &mut TlsStream, length: usize) {
    let bytes: Vec<u8> = (0..length).map(|at| (at * 7 + at / 251) as u8).collect();
    let mut read = vec![0; length];
    let send = async {
        theirs.write_all(&bytes).await.unwrap();
        theirs.flush().await.unwrap();
    };
    let ((), result) = tokio::join!(send, ours.read_exact(&mut read));
    result.unwrap();
    assert!(read == bytes);
    let send = async {
        ours.write_all(&bytes).await.unwrap();
        ours.flush().await.unwrap();
    };
    let ((), result) = tokio::join!(send, theirs.read_exact(&mut read));
    result.unwrap();
    assert!(read == bytes);
}

#[tokio::test]
async fn bytes_of_all_lengths_pass() {
    let (mut theirs, mut ours) = pair().await;
    for length in [1, 2, 255, 16_383, 16_384, 16_385, 300_000, 3_000_000] {
        exchange(&mut theirs, &mut ours, length).await;
    }
    assert!(
        ours.inbox.is_none() && ours.outbox.is_none(),
        "an idle connection holds a buffer"
    );
}

#[tokio::test]
async fn pieces_are_gathered_into_whole_records() {
    let (mut theirs, mut ours) = pair().await;
    let pieces: [&[u8]; 4] = [&[1; 9], &[2; 20_000], &[], &[3; 5]];
    let all = pieces.concat();
    let mut sent = 0;
    while sent < all.len() {
        // What is left of the pieces, as HTTP/2 gives it again after a part was taken.
        let mut skip = sent;
        let slices: Vec<IoSlice<'_>> = pieces
            .iter()
            .map(|piece| {
                let skipped = skip.min(piece.len());
                skip -= skipped;
                IoSlice::new(&piece[skipped..])
            })
            .collect();
        sent += ours.write_vectored(&slices).await.unwrap();
    }
    ours.flush().await.unwrap();
    let mut read = vec![0; all.len()];
    theirs.read_exact(&mut read).await.unwrap();
    assert!(read == all);
}

#[tokio::test]
async fn keys_are_changed_when_the_peer_asks_and_when_they_are_worn() {
    let (mut theirs, mut ours) = pair().await;
    exchange(&mut theirs, &mut ours, 1000).await;
    theirs.get_mut().1.refresh_traffic_keys().unwrap();
    exchange(&mut theirs, &mut ours, 1000).await;

    // Ours change before the next record, and rustls follows.
    ours.update_sealer().unwrap();
    exchange(&mut theirs, &mut ours, 100_000).await;
    ours.sealer.wear_out();
    assert!(ours.sealer.is_worn());
    let mut ignored = Context::from_waker(std::task::Waker::noop());
    assert!(ours.poll_room(&mut ignored).is_ready());
    assert!(!ours.sealer.is_worn());
}

#[tokio::test]
async fn an_orderly_end_is_told_from_one_that_is_cut_off() {
    let (mut theirs, mut ours) = pair().await;
    theirs.shutdown().await.unwrap();
    assert_eq!(ours.read(&mut [0]).await.unwrap(), 0);
    ours.shutdown().await.unwrap();
    assert_eq!(theirs.read(&mut [0]).await.unwrap(), 0);

    let (theirs, mut ours) = pair().await;
    drop(theirs.into_inner());
    let error = ours.read(&mut [0]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[tokio::test]
async fn what_is_no_record_is_told_with_an_alert() {
    for (bytes, expected) in [
        (
            &[22_u8, 3, 3, 0, 20][..],
            AlertDescription::UnexpectedMessage,
        ),
        (&[23, 3, 3, 0xff, 0xff], AlertDescription::RecordOverflow),
        (
            &[23, 3, 3, 0, 5, 1, 2, 3, 4, 5],
            AlertDescription::BadRecordMac,
        ),
    ] {
        let (mut theirs, mut ours) = pair().await;
        theirs.get_mut().0.write_all(bytes).await.unwrap();
        assert!(ours.read(&mut [0]).await.is_err());
        assert!(ours.failure.get().is_some());
        let error = theirs.read(&mut [0]).await.unwrap_err();
        let alert = error.get_ref().unwrap().downcast_ref();
        assert_eq!(alert, Some(&RustlsError::AlertReceived(expected)));
    }
}

#[tokio::test]
async fn key_updates_without_end_are_no_way_to_keep_us_busy() {
    let (mut theirs, mut ours) = pair().await;
    for _ in 0..=MAX_WITHOUT_DATA {
        theirs.get_mut().1.refresh_traffic_keys().unwrap();
    }
    theirs.flush().await.unwrap();
    assert!(ours.read(&mut [0]).await.is_err());
}
