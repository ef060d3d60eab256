//! Keepers against a real authority: first certificates, renewals, rotations, restarts of either side.

use std::{
    os::unix::fs::MetadataExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use api::report::CertificateState;
use identity::{
    IdentitySource as _, JwtError, Keeper, SpiffeId, certificate::verify, keeper::KeeperError,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, crypto::aws_lc_rs, server::WebPkiClientVerifier,
    version::TLS13,
};
use tokio::time::{sleep, timeout};

use crate::world::*;

fn node(name: &str) -> SpiffeId {
    SpiffeId::of_node(DOMAIN, name).unwrap()
}

fn short(config: &mut control::CaConfig) {
    config.lifetime = Duration::from_secs(4);
    config.propagation = Duration::from_secs(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_joins_and_has_the_identities_that_it_wants() {
    let world = World::start(|_| {});
    let keeper = world.keeper("n1", vec![world.token("n1")]);
    let (a, b) = (account("a"), account("b"));
    let mut watch = keeper.want(&a, "pod-1").unwrap();
    keeper.want(&a, "pod-2").unwrap();
    let svid = until(&keeper, &a, |_| true).await;
    assert_eq!(svid.id, a);
    let bundle = keeper.bundle().borrow().clone();
    verify(&svid.chain, &bundle.roots, SystemTime::now()).unwrap();
    let token = keeper.jwt(&a, &["db".into()]).await.unwrap();
    assert_eq!(token.split('.').count(), 3);
    let refused = keeper.jwt(&b, &["db".into()]).await.unwrap_err();
    assert!(matches!(refused, JwtError::Refused(_)), "{refused}");

    // What runs elsewhere is refused, and said why; it is given as soon as it is placed here.
    keeper.want(&b, "pod-3").unwrap();
    eventually("refused", || {
        let status = keeper.status();
        let b = status.iter().find(|it| it.identity == b.as_str()).unwrap();
        b.state == CertificateState::Refused
            && b.last_error
                .as_deref()
                .is_some_and(|error| error.contains("there run shop/a"))
    })
    .await;
    world.accounts.place("n1", "shop/b");
    until(&keeper, &b, |_| true).await;
    let status = keeper.status();
    let states: Vec<_> = status
        .iter()
        .map(|it| (it.identity.as_str(), it.state))
        .collect();
    let own = node("n1");
    let valid = CertificateState::Valid;
    assert_eq!(
        states,
        [
            (own.as_str(), valid),
            (a.as_str(), valid),
            (b.as_str(), valid)
        ]
    );
    assert_eq!(status[1].serial, svid.serial);
    assert_eq!(status[1].users, ["pod-1", "pod-2"]);

    let folder = world.state_dir("n1");
    assert_eq!(std::fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
    for entry in std::fs::read_dir(&folder).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().mode() & 0o777, 0o600);
    }
    let before = files(&folder);
    keeper.release(&a, "pod-1");
    keeper.release(&a, "pod-1");
    assert!(keeper.svid(&a).borrow().is_some(), "pod-2 has it still");
    keeper.release(&a, "pod-2");
    assert!(keeper.svid(&a).borrow().is_none());
    assert!(watch.borrow_and_update().is_none());
    assert_eq!(files(&folder), before - 1, "its key is gone");
    for id in [
        node("n1"),
        SpiffeId::of_account("else.where", "shop", "a").unwrap(),
    ] {
        let error = keeper.want(&id, "pod-1").unwrap_err();
        assert!(matches!(error, KeeperError::NotAWorkload(_)), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_renewed_around_half_of_their_lifetime() {
    let world = World::start(short);
    // One token: everything after the first certificate is done without.
    let keeper = world.keeper("n1", vec![world.token("n1")]);
    let a = account("a");
    keeper.want(&a, "pod").unwrap();
    for id in [&a, &node("n1")] {
        let mut last = until(&keeper, id, |_| true).await;
        for _ in 0..3 {
            let next = until(&keeper, id, |svid| svid.serial != last.serial).await;
            assert!(next.not_after > last.not_after);
            assert!(
                SystemTime::now() < last.not_after,
                "the last one was still good"
            );
            assert_ne!(next.key, last.key, "a new key each time");
            last = next;
        }
    }
    assert_eq!(world.ca().status().joined, 1);
    assert_eq!(world.ca().status().failed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_lasts_over_restarts_of_either_side() {
    let mut world = World::start(|_| {});
    let keeper = world.keeper("n1", vec![world.token("n1")]);
    let a = account("a");
    keeper.want(&a, "pod").unwrap();
    let svid = until(&keeper, &a, |_| true).await;
    eventually("the bundle is kept", || {
        world.state_dir("n1").join("bundle.json").exists()
    })
    .await;
    let roots = world.roots();
    let config = world.keeper_config("n1", vec![]);
    drop(keeper);
    world.stop().await;

    // The authority is away: the agent has what it had.
    let keeper = Keeper::start(config.clone()).unwrap();
    let again = keeper.want(&a, "pod").unwrap().borrow().clone().unwrap();
    assert_eq!(again.serial, svid.serial);
    let unavailable = keeper.jwt(&a, &["db".into()]).await.unwrap_err();
    assert!(
        matches!(unavailable, JwtError::Unavailable(_)),
        "{unavailable}"
    );
    let b = account("b");
    world.accounts.place("n1", "shop/b");
    keeper.want(&b, "pod-b").unwrap();
    eventually("a failure is told", || {
        let status = keeper.status();
        let b = status.iter().find(|it| it.identity == b.as_str()).unwrap();
        b.last_error
            .as_deref()
            .is_some_and(|error| error.contains("not reachable"))
    })
    .await;

    // It comes back, with the same root, and is found again without a token.
    world.listen();
    assert_eq!(world.roots(), roots);
    let new = until(&keeper, &b, |_| true).await;
    verify(
        &new.chain,
        &keeper.bundle().borrow().roots,
        SystemTime::now(),
    )
    .unwrap();

    // Damage is no more than a reason to ask again.
    drop(keeper);
    for entry in std::fs::read_dir(world.state_dir("n1")).unwrap() {
        std::fs::write(entry.unwrap().path(), "{").unwrap();
    }
    let keeper = world.keeper("n1", vec![world.token("n1")]);
    keeper.want(&a, "pod").unwrap();
    until(&keeper, &a, |new| new.serial != svid.serial).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_expired_is_dropped_and_the_node_joins_anew() {
    let mut world = World::start(short);
    let keeper = world.keeper("n1", vec![world.token("n1")]);
    let a = account("a");
    let mut watch = keeper.want(&a, "pod").unwrap();
    until(&keeper, &a, |_| true).await;
    world.stop().await;
    timeout(DEADLINE, watch.wait_for(Option::is_none))
        .await
        .unwrap()
        .unwrap();
    let mut own = keeper.node_svid();
    timeout(DEADLINE, own.wait_for(Option::is_none))
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(
        keeper.status()[0].state,
        CertificateState::Pending
    ));
    world.listen();
    // Its certificate is gone, and it has no token.
    eventually("it says that it needs one", || {
        let error = keeper.status()[0].last_error.clone().unwrap_or_default();
        error.contains("no token is left")
    })
    .await;
    drop(keeper);
    let keeper = world.keeper("n1", vec!["used-up".into(), world.token("n1")]);
    keeper.want(&a, "pod").unwrap();
    until(&keeper, &a, |_| true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_a_lost_root_leads_to_joining_anew() {
    let mut world = World::start(|_| {});
    let keeper = world.keeper("n1", vec![world.token("n1")]);
    let a = account("a");
    keeper.want(&a, "pod").unwrap();
    until(&keeper, &a, |_| true).await;
    eventually("the bundle is kept", || {
        world.state_dir("n1").join("bundle.json").exists()
    })
    .await;
    drop(keeper);
    world.stop().await;
    std::fs::remove_dir_all(&world.config.state_dir).unwrap();
    world.listen();
    let keeper = world.keeper("n1", vec![world.token("n1")]);
    keeper.want(&a, "pod").unwrap();
    // Its kept certificates still look good to it; the authority tells it otherwise when it asks.
    let status = timeout(DEADLINE, async {
        loop {
            let bundle = world.ca().authority().bundle().borrow().clone();
            if let Some(svid) = keeper.svid(&a).borrow().clone()
                && verify(&svid.chain, &bundle.roots, SystemTime::now()).is_ok()
            {
                return;
            }
            sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(status.await.is_ok(), "{:#?}", keeper.status());
}

/// Two nodes whose workloads connect to each other all the time, while certificates live for seconds and the root
/// is rotated under them, until the old one is gone.
#[tokio::test(flavor = "multi_thread")]
async fn no_handshake_fails_while_roots_rotate() {
    let world = World::start(short);
    let one = world.keeper("n1", vec![world.token("n1")]);
    let other = world.keeper("n2", vec![world.token("n2")]);
    let (a, b) = (account("a"), account("b"));
    one.want(&a, "pod").unwrap();
    other.want(&b, "pod").unwrap();
    until(&one, &a, |_| true).await;
    until(&other, &b, |_| true).await;
    let first = world.ca().authority().bundle().borrow().roots.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let handshakes = {
        let (one, other, stop) = (one.clone(), other.clone(), Arc::clone(&stop));
        let (a, b) = (a.clone(), b.clone());
        tokio::spawn(async move {
            let mut count = 0;
            while !stop.load(Ordering::SeqCst) {
                handshake(&one, &a, &other, &b).await;
                handshake(&other, &b, &one, &a).await;
                count += 2;
                sleep(Duration::from_millis(5)).await;
            }
            count
        })
    };
    world.ca().authority().rotate_root().unwrap();
    for keeper in [&one, &other] {
        let mut bundle = keeper.bundle();
        let both = bundle.wait_for(|bundle| bundle.roots.len() == 2);
        timeout(DEADLINE, both).await.unwrap().unwrap();
    }
    for keeper in [&one, &other] {
        let mut bundle = keeper.bundle();
        let alone = bundle.wait_for(|bundle| bundle.roots.len() == 1 && bundle.roots != first);
        timeout(DEADLINE, alone).await.unwrap().unwrap();
    }
    stop.store(true, Ordering::SeqCst);
    let count = handshakes.await.expect("no handshake failed");
    assert!(count > 100, "{count} handshakes");
    assert_eq!(world.ca().status().unauthenticated, 0);
}

async fn handshake(client: &Keeper, as_client: &SpiffeId, server: &Keeper, as_server: &SpiffeId) {
    let store = |keeper: &Keeper| {
        let mut store = RootCertStore::empty();
        for root in &keeper.bundle().borrow().roots {
            store.add(root.clone()).unwrap();
        }
        Arc::new(store)
    };
    let provider = Arc::new(aws_lc_rs::default_provider());
    let svid = server
        .svid(as_server)
        .borrow()
        .clone()
        .expect("a valid one");
    let verifier =
        WebPkiClientVerifier::builder_with_provider(store(server), Arc::clone(&provider));
    let server_config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(svid.chain.clone(), svid.key.clone_key().into())
        .unwrap();
    let server_chain = svid.chain.clone();
    let svid = client
        .svid(as_client)
        .borrow()
        .clone()
        .expect("a valid one");
    // rustls looks for a DNS name, which a workload has none of: the server's chain is verified beside the handshake.
    verify(&server_chain, &store_roots(client), SystemTime::now()).unwrap();
    let (near, far) = tokio::io::duplex(16 * 1024);
    let client_config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyName(provider)))
        .with_client_auth_cert(svid.chain.clone(), svid.key.clone_key().into())
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server_config));
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client_config));
    let name = "peer".try_into().unwrap();
    let (accepted, connected) = tokio::join!(acceptor.accept(far), connector.connect(name, near));
    accepted.unwrap();
    connected.unwrap();
}

fn store_roots(keeper: &Keeper) -> Vec<rustls::pki_types::CertificateDer<'static>> {
    keeper.bundle().borrow().roots.clone()
}

/// Takes any name; signatures count.
#[derive(Debug)]
struct AnyName(Arc<rustls::crypto::CryptoProvider>);

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
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &rustls::pki_types::CertificateDer<'_>,
        signature: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
