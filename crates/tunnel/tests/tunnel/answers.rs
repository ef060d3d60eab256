//! What a CONNECT is answered, to a client of another kind: rustls' own records, h2 alone.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderValue, Method, Request, StatusCode, Uri};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::sync::CancellationToken;
use tunnel::{Authority, ConnectError, relay};

use crate::{
    bench::{Bench, Setup, pair, within},
    certificates::id,
};

/// A TLS connection with the bench's client certificate.
pub async fn foreign(bench: &Bench) -> TlsStream<TcpStream> {
    let tcp = TcpStream::connect(bench.address).await.unwrap();
    let name = ServerName::IpAddress(bench.address.ip().into());
    let connector = TlsConnector::from(bench.client_tls.config());
    within(connector.connect(name, tcp)).await.unwrap()
}

async fn client(bench: &Bench) -> SendRequest<Bytes> {
    let (send, connection) = h2::client::handshake(foreign(bench).await).await.unwrap();
    tokio::spawn(connection);
    send
}

fn request(method: Method, authority: &str) -> Request<()> {
    let mut request = Request::new(());
    let uri = if method == Method::CONNECT {
        Uri::builder().authority(authority).build().unwrap()
    } else {
        format!("http://{authority}/").parse().unwrap()
    };
    *request.method_mut() = method;
    *request.uri_mut() = uri;
    request
}

async fn status(send: &SendRequest<Bytes>, request: Request<()>) -> StatusCode {
    let mut send = send.clone().ready().await.unwrap();
    let (response, _stream) = send.send_request(request, false).unwrap();
    within(response).await.unwrap().status()
}

#[tokio::test]
async fn a_stream_is_accepted_and_the_peer_is_known() {
    let bench = Bench::start().await;
    let mut send = client(&bench).await.ready().await.unwrap();
    let mut connect = request(Method::CONNECT, "[fd00::7]:8080");
    let headers = connect.headers_mut();
    headers.insert(
        "forwarded",
        HeaderValue::from_static("for=\"10.1.0.2:41234\";host=cart"),
    );
    headers.insert("baggage", HeaderValue::from_static("service.name=shop"));
    headers.insert("traceparent", HeaderValue::from_static("00-1-2-01"));
    let (response, mut stream) = send.send_request(connect, false).unwrap();
    let response = within(response).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let (mut application, _) = within(bench.application.accept()).await.unwrap();
    stream
        .send_data(Bytes::from_static(b"hello"), true)
        .unwrap();
    let mut text = String::new();
    within(application.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "hello");
    application.write_all(b"there").await.unwrap();
    drop(application);
    let mut body = response.into_body();
    assert_eq!(within(body.data()).await.unwrap().unwrap(), "there");
    // At most an empty frame comes with the end.
    while let Some(bytes) = within(body.data()).await {
        assert_eq!(bytes.unwrap(), "");
    }

    let requests = bench.server.handler().requests.lock().unwrap();
    let asked = &requests[0];
    assert_eq!(asked.peer.id, id("client"));
    assert_eq!(asked.peer.local_address, bench.address);
    assert_eq!(
        asked.authority,
        Authority::Address("[fd00::7]:8080".parse().unwrap())
    );
    assert_eq!(
        asked.headers.forwarded_for,
        Some("10.1.0.2:41234".parse().unwrap())
    );
    assert_eq!(asked.headers.forwarded_host.as_deref(), Some("cart"));
    assert_eq!(asked.headers.baggage.as_deref(), Some("service.name=shop"));
    assert_eq!(asked.headers.traceparent.as_deref(), Some("00-1-2-01"));
}

#[tokio::test]
async fn what_is_no_connect_is_400() {
    let bench = Bench::start().await;
    let send = client(&bench).await;
    for wrong in [
        request(Method::GET, "10.0.0.1:80"),
        request(Method::CONNECT, "10.0.0.1"),
        request(Method::CONNECT, "10.0.0.1:0"),
        request(Method::CONNECT, "user@host:80"),
        request(Method::CONNECT, "10.0.0.999:80"),
    ] {
        assert_eq!(status(&send, wrong).await, StatusCode::BAD_REQUEST);
    }
    let handler = bench.server.handler();
    assert_eq!(handler.requests.lock().unwrap().len(), 0);
    let refusals = handler.refusals.lock().unwrap();
    let authorities: Vec<&str> = refusals.iter().map(|(text, _)| text.as_str()).collect();
    assert_eq!(
        authorities,
        [
            "10.0.0.1:80",
            "10.0.0.1",
            "10.0.0.1:0",
            "user@host:80",
            "10.0.0.999:80"
        ]
    );
}

#[tokio::test]
async fn the_handlers_refusal_is_the_answer() {
    let bench = Bench::start().await;
    for code in [
        StatusCode::BAD_REQUEST,
        StatusCode::UNAUTHORIZED,
        StatusCode::SERVICE_UNAVAILABLE,
    ] {
        *bench.server.handler().refuse.lock().unwrap() = Some(code);
        let error = bench.connect().await.map(drop).unwrap_err();
        assert!(
            matches!(error, ConnectError::Refused { status } if status == code.as_u16()),
            "{error}"
        );
        assert_eq!(error.is_policy(), code == StatusCode::UNAUTHORIZED);
    }
    // The connection is as good as before.
    *bench.server.handler().refuse.lock().unwrap() = None;
    bench.connect().await.unwrap();
    assert_eq!(bench.server.connections(), 1);
}

#[tokio::test]
async fn an_application_that_is_not_there_is_503() {
    let nobody: SocketAddr = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    };
    let setup = Setup {
        upstream: Some(nobody),
        ..Setup::default()
    };
    let error = setup.start().await.connect().await.map(drop);
    assert!(
        matches!(error, Err(ConnectError::Refused { status: 503 })),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_handler_that_does_not_answer_is_503() {
    let mut setup = Setup {
        hang: true,
        ..Setup::default()
    };
    setup.server_limits.connect_timeout = Duration::from_millis(100);
    let error = setup.start().await.connect().await.map(drop);
    assert!(
        matches!(error, Err(ConnectError::Refused { status: 503 })),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_server_that_does_not_answer_is_a_timeout() {
    let mut setup = Setup {
        hang: true,
        ..Setup::default()
    };
    setup.client_limits.connect_timeout = Duration::from_millis(100);
    let error = setup.start().await.connect().await.map(drop);
    assert!(
        matches!(error, Err(ConnectError::Timeout { .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn headers_that_are_too_long_are_431_and_harm_nobody() {
    let bench = Bench::start().await;
    let send = client(&bench).await;
    let mut long = request(Method::CONNECT, "10.0.0.1:80");
    let value = HeaderValue::from_bytes(&[b'x'; 20_000]).unwrap();
    long.headers_mut().insert("baggage", value);
    let mut ready = send.clone().ready().await.unwrap();
    let (response, _stream) = ready.send_request(long, false).unwrap();
    let status = within(response).await.unwrap().status();
    assert_eq!(status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    assert_eq!(
        self::status(&send, request(Method::CONNECT, "10.0.0.1:80")).await,
        StatusCode::OK
    );
    assert_eq!(bench.server.handler().requests.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn our_client_and_a_server_of_another_kind() {
    let bench = Bench::start().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(bench.server_tls.config());
    tokio::spawn(async move {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut connection = h2::server::handshake(acceptor.accept(tcp).await.unwrap())
            .await
            .unwrap();
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            tokio::spawn(async move {
                let mut body = request.into_body();
                let mut send = respond
                    .send_response(http::Response::new(()), false)
                    .unwrap();
                while let Some(Ok(bytes)) = body.data().await {
                    body.flow_control().release_capacity(bytes.len()).unwrap();
                    send.send_data(bytes, false).unwrap();
                }
                send.send_data(Bytes::new(), true).unwrap();
            });
        }
    });
    let key = tunnel::PoolKey {
        address,
        ..bench.key.clone()
    };
    let stream = crate::bench::connect(&bench.pool, &key, &bench.client_tls)
        .await
        .unwrap();
    let (mut client, proxied) = pair().await;
    let task = tokio::spawn(relay(proxied, stream, CancellationToken::new()));
    let message = vec![9; 3 << 20];
    let (mut read, mut write) = client.split();
    let send = async {
        write.write_all(&message).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let mut back = Vec::new();
    let ((), result) = within(async { tokio::join!(send, read.read_to_end(&mut back)) }).await;
    result.unwrap();
    assert!(back == message);
    assert_eq!(within(task).await.unwrap().end, tunnel::End::Clean);
}
