//! Who is let in, and which alert the others get.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::ExtendedKeyUsagePurpose;
use rustls::{
    AlertDescription, ClientConfig, RootCertStore, client::WebPkiServerVerifier,
    crypto::aws_lc_rs::default_provider,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tunnel::{ConnectError, ServeError, TlsFailure, tls};

use crate::{
    bench::{Bench, Setup, connect, within},
    certificates::{Authority, TRUST_DOMAIN, Wanted, id},
};

/// Connects with a client certificate that is wrong in one respect, of another authority or the bench's own; what the
/// server says of it.
async fn refused_by(other: Option<&Authority>, wanted: &Wanted) -> String {
    let mut bench = Bench::start().await;
    let svid = other.unwrap_or(&bench.authority).issue(wanted);
    let roots = &bench.authority.roots;
    let tls = tls::client_config(&svid, roots, bench.key.expected.clone()).unwrap();
    let result = connect(&bench.pool, &bench.key, &tls).await.map(drop);
    assert!(
        matches!(result, Err(ConnectError::Tls(TlsFailure::Alert { .. }))),
        "{result:?}"
    );
    match within(bench.served.recv()).await.unwrap() {
        Err(ServeError::Tls(TlsFailure::Certificate(reason))) => reason,
        other => panic!("{other:?}"),
    }
}

async fn refused(wanted: &Wanted) -> String {
    refused_by(None, wanted).await
}

#[tokio::test]
async fn a_client_of_another_authority_is_refused() {
    let reason = refused_by(Some(&Authority::new()), &Wanted::new(id("client").as_str())).await;
    // The other authority has the same name.
    assert!(reason.contains("BadSignature"), "{reason}");
}

#[tokio::test]
async fn a_client_of_another_trust_domain_is_refused() {
    let reason = refused(&Wanted::new("spiffe://elsewhere/ns/test/sa/client")).await;
    assert_eq!(
        reason,
        "its trust domain is `elsewhere`, not `cluster.local`"
    );
}

#[tokio::test]
async fn a_client_outside_of_its_time_is_refused() {
    let now = SystemTime::now();
    let day = Duration::from_secs(86_400);
    let expired = Wanted {
        not_before: now - 2 * day,
        not_after: now - day,
        ..Wanted::new(id("client").as_str())
    };
    let reason = refused(&expired).await;
    assert!(reason.contains("expired"), "{reason}");
    let early = Wanted {
        not_before: now + day,
        not_after: now + 2 * day,
        ..Wanted::new(id("client").as_str())
    };
    let reason = refused(&early).await;
    assert!(reason.contains("not valid yet"), "{reason}");
}

#[tokio::test]
async fn a_client_without_exactly_one_identity_is_refused() {
    let two = Wanted {
        uris: vec![id("client").to_string(), id("other").to_string()],
        ..Wanted::new("")
    };
    assert!(refused(&two).await.contains("2 URI names"));
    let none = Wanted {
        uris: Vec::new(),
        ..Wanted::new("")
    };
    assert!(refused(&none).await.contains("0 URI names"));
    let http = Wanted::new("https://cluster.local/ns/test/sa/client");
    assert!(refused(&http).await.contains("no SPIFFE id"));
}

#[tokio::test]
async fn a_certificate_for_servers_alone_is_no_clients() {
    let server = Wanted {
        usages: vec![ExtendedKeyUsagePurpose::ServerAuth],
        ..Wanted::new(id("client").as_str())
    };
    let reason = refused(&server).await;
    assert!(
        reason.contains("purpose") || reason.contains("usage"),
        "{reason}"
    );
}

#[tokio::test]
async fn a_certificate_without_usages_is_anyones() {
    let bench = Bench::start().await;
    let svid = bench.authority.issue(&Wanted {
        usages: Vec::new(),
        ..Wanted::new(id("client").as_str())
    });
    let tls = tls::client_config(&svid, &bench.authority.roots, bench.key.expected.clone());
    connect(&bench.pool, &bench.key, &tls.unwrap())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_server_that_is_not_the_expected_one_is_refused() {
    let mut bench = Bench::start().await;
    let expected: Arc<[_]> = Arc::new([id("cart"), id("checkout")]);
    let client = bench.authority.svid("client");
    let tls = tls::client_config(&client, &bench.authority.roots, expected).unwrap();
    let error = connect(&bench.pool, &bench.key, &tls).await.map(drop);
    let Err(ConnectError::Tls(TlsFailure::Certificate(reason))) = error else {
        panic!("{error:?}")
    };
    assert_eq!(
        reason,
        "it is spiffe://cluster.local/ns/test/sa/server, not spiffe://cluster.local/ns/test/sa/cart or \
         spiffe://cluster.local/ns/test/sa/checkout"
    );
    let served = within(bench.served.recv()).await.unwrap();
    assert!(
        matches!(served, Err(ServeError::Tls(TlsFailure::Alert { .. }))),
        "{served:?}"
    );
}

#[tokio::test]
async fn a_server_of_another_authority_is_refused() {
    let bench = Bench::start().await;
    let client = bench.authority.svid("client");
    let roots = Authority::new().roots;
    let tls = tls::client_config(&client, &roots, bench.key.expected.clone()).unwrap();
    let error = connect(&bench.pool, &bench.key, &tls).await.map(drop);
    assert!(
        matches!(error, Err(ConnectError::Tls(TlsFailure::Certificate(_)))),
        "{error:?}"
    );
}

/// A client of another kind: no certificate, and these protocols.
async fn foreign(bench: &Bench, protocols: &[&[u8]]) -> AlertDescription {
    let mut roots = RootCertStore::empty();
    roots.add(bench.authority.roots[0].clone()).unwrap();
    let provider = Arc::new(default_provider());
    let inner =
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyName(inner.unwrap())))
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    let tcp = TcpStream::connect(bench.address).await.unwrap();
    let name = "localhost".try_into().unwrap();
    let connecting = TlsConnector::from(Arc::new(config)).connect(name, tcp);
    let error = match within(connecting).await {
        Ok(mut stream) => within(stream.read(&mut [0])).await.unwrap_err(),
        Err(error) => error,
    };
    match error.get_ref().and_then(|error| error.downcast_ref()) {
        Some(rustls::Error::AlertReceived(alert)) => *alert,
        _ => panic!("{error}"),
    }
}

#[tokio::test]
async fn no_certificate_is_alert_116() {
    let mut bench = Bench::start().await;
    assert_eq!(u8::from(foreign(&bench, &[b"h2"]).await), 116);
    let served = within(bench.served.recv()).await.unwrap();
    assert!(
        matches!(served, Err(ServeError::Tls(TlsFailure::NoCertificate))),
        "{served:?}"
    );
}

#[tokio::test]
async fn another_protocol_is_alert_120() {
    let mut bench = Bench::start().await;
    assert_eq!(u8::from(foreign(&bench, &[b"http/1.1"]).await), 120);
    let served = within(bench.served.recv()).await.unwrap();
    assert!(
        matches!(served, Err(ServeError::Tls(TlsFailure::Protocol(_)))),
        "{served:?}"
    );
}

#[tokio::test]
async fn tls_1_2_is_alert_70() {
    let mut bench = Bench::start().await;
    let mut tcp = TcpStream::connect(bench.address).await.unwrap();
    // RFC 5246, section 7.4.1.2, with one suite (ECDHE-ECDSA-AES128-GCM-SHA256), one group and one scheme.
    let extensions = [
        0, 10, 0, 4, 0, 2, 0, 23, // supported_groups: secp256r1
        0, 13, 0, 4, 0, 2, 4, 3, // signature_algorithms: ecdsa_secp256r1_sha256
    ];
    let mut hello = vec![3, 3];
    hello.extend([7; 32]); // Random.
    hello.extend([0, 0, 2, 0xc0, 0x2b, 1, 0, 0, extensions.len() as u8]);
    hello.extend(extensions);
    let mut record = vec![
        22,
        3,
        1,
        0,
        hello.len() as u8 + 4,
        1,
        0,
        0,
        hello.len() as u8,
    ];
    record.extend(hello);
    tcp.write_all(&record).await.unwrap();
    let mut answer = [0; 7];
    within(tcp.read_exact(&mut answer)).await.unwrap();
    assert_eq!(answer, [21, 3, 3, 0, 2, 2, 70]);
    let served = within(bench.served.recv()).await.unwrap();
    assert!(
        matches!(served, Err(ServeError::Tls(TlsFailure::Protocol(_)))),
        "{served:?}"
    );
}

#[tokio::test]
async fn the_roots_and_the_svid_must_be_of_use() {
    let authority = Authority::new();
    let mut svid = authority.svid("server");
    assert!(tls::server_config(&svid, &[], TRUST_DOMAIN).is_err());
    assert!(
        tls::server_config(&svid, &[b"no certificate".as_slice().into()], TRUST_DOMAIN).is_err()
    );
    svid.key = authority.svid("other").key;
    let error = tls::server_config(&svid, &authority.roots, TRUST_DOMAIN).unwrap_err();
    assert!(error.to_string().contains("is of no use"), "{error}");
}

#[tokio::test]
async fn a_handshake_that_stalls_is_ended_and_a_flood_of_them_is_bounded() {
    let mut setup = Setup::default();
    setup.server_limits.handshake_timeout = Duration::from_millis(300);
    setup.server_limits.handshakes = 2;
    let mut bench = setup.start().await;
    let mut stalled = Vec::new();
    for _ in 0..3 {
        stalled.push(TcpStream::connect(bench.address).await.unwrap());
    }
    let mut ends = Vec::new();
    for _ in 0..3 {
        ends.push(within(bench.served.recv()).await.unwrap().unwrap_err());
    }
    assert!(
        matches!(ends[0], ServeError::TooManyHandshakes { limit: 2 }),
        "{ends:?}"
    );
    assert!(
        ends[1..]
            .iter()
            .all(|end| matches!(end, ServeError::HandshakeTimeout)),
        "{ends:?}"
    );
    // Nothing is left of them.
    assert_eq!(bench.server.connections(), 0);
    bench.connect().await.unwrap();
}

/// Checks what the foreign client cannot know: not the name.
#[derive(Debug)]
struct AnyName(Arc<WebPkiServerVerifier>);

impl rustls::client::danger::ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        _: &rustls::pki_types::CertificateDer<'_>,
        _: &[rustls::pki_types::CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        _: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        self.0
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
