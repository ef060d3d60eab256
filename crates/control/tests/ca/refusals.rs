//! Raw calls: what is signed, what is refused with which words, and what is counted.

use std::{num::NonZeroU32, time::Duration};

use identity::{
    SpiffeId,
    authority::{Authority, AuthorityConfig, Request as CertificateRequest},
    ca_api::{
        RETRY_AFTER,
        heddle::{MintJwtRequest, WatchBundleRequest, trust_client::TrustClient},
        istio::IstioCertificateRequest,
    },
    certificate::not_after,
};
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, Request};

use crate::world::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_node_gets_what_runs_on_it_and_nothing_else() {
    let world = World::start(|_| {});
    let node = world.join("n1").await;
    assert_eq!(node.id, SpiffeId::of_node(DOMAIN, "n1").unwrap());
    let (a, b) = (account("a"), account("b"));
    let key = KeyPair::generate().unwrap();
    let answer = world.ask(Some(&node), &csr(&key), Some(a.as_str())).await;
    assert_eq!(svid(&answer.unwrap(), &key).id, a);
    // Its own, renewed.
    let answer = world.ask(Some(&node), &csr(&key), None).await;
    assert_eq!(svid(&answer.unwrap(), &key).id, node.id);

    let refusal = |identity: &str, code: Code, words: &[&str]| {
        let (identity, words) = (identity.to_owned(), words.join("|"));
        let (world, node) = (&world, &node);
        async move {
            let status = world
                .ask(Some(node), &new_csr(), Some(&identity))
                .await
                .unwrap_err();
            assert_eq!(status.code(), code, "{status}");
            for word in words.split('|') {
                assert!(status.message().contains(word), "{status} / {word}");
            }
        }
    };
    refusal(
        b.as_str(),
        Code::PermissionDenied,
        &["node `n1` may not have", b.as_str(), "there run shop/a"],
    )
    .await;
    refusal(
        "spiffe://cluster.local/heddle/node/n2",
        Code::PermissionDenied,
        &["node `n1` may not have", "node/n2"],
    )
    .await;
    refusal(
        "spiffe://else.where/ns/shop/sa/a",
        Code::InvalidArgument,
        &["is not of trust domain `cluster.local`"],
    )
    .await;
    refusal("shop/a", Code::InvalidArgument, &["no SPIFFE id"]).await;
    let lonely = world.join("n3").await;
    let status = world.ask(Some(&lonely), &new_csr(), Some(a.as_str())).await;
    let status = status.unwrap_err();
    assert!(status.message().contains("nothing runs there"), "{status}");
    let counts = world.ca().status();
    assert_eq!((counts.signed, counts.joined), (4, 2));
    assert_eq!((counts.denied, counts.invalid), (3, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_token_is_good_once_and_for_its_node_alone() {
    let world = World::start(|_| {});
    let token = world.token("n1");
    let ask = |csr: String, identity: Option<&str>, token: &str| {
        let request = with_token(asking(&csr, identity), token);
        let world = &world;
        async move { world.connect(None).await.create_certificate(request).await }
    };
    for identity in [
        "spiffe://cluster.local/heddle/node/n2",
        account("a").as_str(),
    ] {
        let status = ask(new_csr(), Some(identity), &token).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied);
        let words = "a join token is good for the identity of node `n1` alone";
        assert!(status.message().contains(words), "{status}");
    }
    // A request that is refused does not use it up.
    let status = ask("no csr".into(), None, &token).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    ask(new_csr(), None, &token).await.unwrap();
    for (token, words) in [
        (token.as_str(), "used already"),
        (&"0".repeat(64), "unknown"),
        ("", "unknown"),
    ] {
        let status = ask(new_csr(), None, token).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        assert!(status.message().contains(words), "{status}");
    }
    let contested = world.token("n1");
    let tries = (0..8).map(|_| ask(new_csr(), None, &contested));
    let outcomes = futures::future::join_all(tries).await;
    assert_eq!(outcomes.iter().filter(|it| it.is_ok()).count(), 1);
    let status = world.ask(None, &new_csr(), None).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("or a join token"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_others_and_expired_ones_count_for_nothing() {
    let world = World::start(|_| {});
    let foreign = Authority::generate(AuthorityConfig::new(DOMAIN)).unwrap();
    let id = SpiffeId::of_node(DOMAIN, "n1").unwrap();
    let forged = foreign.sign_server(&id, &[], &[]).unwrap();
    let status = world
        .ask(Some(&forged), &new_csr(), None)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("is of no use: "), "{status}");

    let workload = world
        .ca()
        .authority()
        .sign_server(&account("a"), &[], &[])
        .unwrap();
    let status = world
        .ask(Some(&workload), &new_csr(), None)
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(
        status.message().contains("is no node of this mesh"),
        "{status}"
    );

    // One that ends while its connection is open.
    let key = KeyPair::generate().unwrap();
    let request = CertificateRequest::from_pem(&csr(&key)).unwrap();
    let short = Some(Duration::from_secs(2));
    let chain = world
        .ca()
        .authority()
        .sign(&request, &id, short)
        .unwrap()
        .chain;
    let end = not_after(&chain[0]).unwrap();
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    let short = identity::Svid::new(chain, key).unwrap();
    let mut client = world.connect(Some(&short)).await;
    client
        .create_certificate(asking(&new_csr(), None))
        .await
        .unwrap();
    let mut trust = TrustClient::new(channel(world.address, &world.roots(), Some(&short)).await);
    let mut bundles = trust
        .watch_bundle(WatchBundleRequest {})
        .await
        .unwrap()
        .into_inner();
    bundles.message().await.unwrap().unwrap();
    let ended = timeout(DEADLINE, bundles.message()).await.unwrap().unwrap();
    assert!(ended.is_none(), "the stream ends with the certificate");
    assert!(std::time::SystemTime::now() >= end);
    let status = client.create_certificate(asking(&new_csr(), None)).await;
    let status = status.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("has expired"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_malformed_is_refused_with_its_reason() {
    let world = World::start(|_| {});
    let node = world.join("n1").await;
    let id = account("a");
    let named = |names: &[&str]| {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names
            .iter()
            .map(|name| SanType::URI((*name).try_into().unwrap()))
            .collect();
        let key = KeyPair::generate().unwrap();
        params.serialize_request(&key).unwrap().pem().unwrap()
    };
    for (csr, words) in [
        (String::new(), "it is no PEM"),
        (
            "-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n".into(),
            "cannot be read",
        ),
        (
            named(&[account("b").as_str()]),
            "asks for spiffe://cluster.local/ns/shop/sa/b",
        ),
        (named(&[id.as_str(), account("b").as_str()]), "alone"),
        (
            csr(&KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap()),
            "not ECDSA on P-256",
        ),
        ("x".repeat(20_000), "longer than 16384 bytes"),
    ] {
        let status = world
            .ask(Some(&node), &csr, Some(id.as_str()))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(words), "{status} / {words}");
    }
    world
        .ask(Some(&node), &named(&[id.as_str()]), Some(id.as_str()))
        .await
        .unwrap();
    let mut client = world.connect(Some(&node)).await;
    let huge = client
        .create_certificate(asking(&"x".repeat(70_000), None))
        .await;
    assert_eq!(huge.unwrap_err().code(), Code::OutOfRange);
    let negative = Request::new(IstioCertificateRequest {
        validity_duration: -1,
        csr: new_csr(),
        metadata: None,
    });
    let status = client.create_certificate(negative).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    // The connection and the authority live on.
    client
        .create_certificate(asking(&new_csr(), None))
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_asks_too_often_waits_and_others_do_not() {
    let world = World::start(|config| {
        config.limits.node_rate = NonZeroU32::new(1).unwrap();
        config.limits.node_burst = NonZeroU32::new(5).unwrap();
    });
    let (one, other) = (world.join("n1").await, world.join("n2").await);
    let mut client = world.connect(Some(&one)).await;
    let mut limited = None;
    for _ in 0..20 {
        if let Err(status) = client.create_certificate(asking(&new_csr(), None)).await {
            limited = Some(status);
            break;
        }
    }
    let status = limited.expect("a limit");
    assert_eq!(status.code(), Code::ResourceExhausted);
    let hint: u64 = status
        .metadata()
        .get(RETRY_AFTER)
        .unwrap()
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=1000).contains(&hint), "{hint}");
    world.ask(Some(&other), &new_csr(), None).await.unwrap();
    tokio::time::sleep(Duration::from_millis(hint)).await;
    client
        .create_certificate(asking(&new_csr(), None))
        .await
        .unwrap();
    assert_eq!(world.ca().status().limited, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_minted_for_what_runs_on_the_node() {
    let world = World::start(|_| {});
    let node = world.join("n1").await;
    let mut trust = TrustClient::new(channel(world.address, &world.roots(), Some(&node)).await);
    let ask = |id: &SpiffeId, audience: &[&str]| {
        Request::new(MintJwtRequest {
            spiffe_id: id.to_string(),
            audience: audience.iter().map(|it| (*it).to_owned()).collect(),
            lifetime_seconds: 0,
        })
    };
    let token = trust.mint_jwt(ask(&account("a"), &["db"])).await.unwrap();
    assert_eq!(token.into_inner().token.split('.').count(), 3);
    let status = trust
        .mint_jwt(ask(&account("b"), &["db"]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    let status = trust.mint_jwt(ask(&account("a"), &[])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let mut stranger = TrustClient::new(channel(world.address, &world.roots(), None).await);
    let status = stranger
        .mint_jwt(ask(&account("a"), &["db"]))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    // A join token opens no other call.
    let request = with_token(ask(&account("a"), &["db"]), &world.token("n1"));
    let status = stranger.mint_jwt(request).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_do_not_keep_nodes_out() {
    let world = World::start(|config| config.limits.strangers = 3);
    let node = world.join("n1").await;
    let mut client = world.connect(Some(&node)).await;
    // Handshakes that never come: three hold a place, the others are closed at once.
    let mut stalled = Vec::new();
    for _ in 0..10 {
        stalled.push(TcpStream::connect(world.address).await.unwrap());
    }
    eventually("seven are closed", || {
        world.ca().status().dropped_connections == 7
    })
    .await;
    client
        .create_certificate(asking(&new_csr(), None))
        .await
        .unwrap();
    // Those that stall are given up, and their places are free again.
    eventually("all are closed", || {
        world.ca().status().dropped_connections == 10
    })
    .await;
    for mut stream in stalled {
        let mut rest = Vec::new();
        let closed = timeout(DEADLINE, stream.read_to_end(&mut rest))
            .await
            .unwrap();
        assert!(rest.is_empty(), "{closed:?}");
    }
    let mut garbage = TcpStream::connect(world.address).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    eventually("garbage is closed", || {
        world.ca().status().dropped_connections == 11
    })
    .await;
    world.join("n2").await;
}
