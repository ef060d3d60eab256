//! What the authority signs, what it refuses to be, and its rotations, under a clock of the test's.

use std::{
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
};

use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose,
    PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SanType,
};

use super::*;
use crate::certificate::{from_pem, parse, to_pem, verify};

const DOMAIN: &str = "cluster.local";

/// A clock that stands still until it is moved.
#[derive(Clone)]
struct Hands(Arc<AtomicU64>);

impl Hands {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self(Arc::new(AtomicU64::new(now.unwrap().as_secs())))
    }

    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(self.0.load(Ordering::SeqCst))
    }

    fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::SeqCst);
    }

    fn config(&self, lifetime: u64) -> AuthorityConfig {
        let hands = self.clone();
        AuthorityConfig {
            lifetime: Duration::from_secs(lifetime),
            clock: Arc::new(move || hands.now()),
            ..AuthorityConfig::new(DOMAIN)
        }
    }
}

fn account(name: &str) -> SpiffeId {
    SpiffeId::of_account(DOMAIN, "shop", name).unwrap()
}

fn request(names: Vec<SanType>) -> Request {
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    // Wishes that are not granted.
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
    let key = KeyPair::generate().unwrap();
    Request::from_pem(&params.serialize_request(&key).unwrap().pem().unwrap()).unwrap()
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

#[test]
fn a_certificate_is_the_identitys_and_nothing_else() {
    let hands = Hands::new();
    let authority = Authority::generate(hands.config(3600)).unwrap();
    let id = account("frontend");
    let issued = authority
        .sign(&request(vec![uri(id.as_str())]), &id, None)
        .unwrap();
    verify(&issued.chain, &issued.roots, hands.now()).unwrap();
    assert_eq!(
        issued.chain.len(),
        1,
        "a root that signs is not in the chain"
    );
    let leaf = parse(&issued.chain[0]).unwrap();
    assert_eq!(SpiffeId::of_certificate(&issued.chain[0]).unwrap(), id);
    assert_eq!(leaf.subject().iter().count(), 0);
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert!(names.critical, "as the subject is empty");
    assert_eq!(names.value.general_names.len(), 1);
    assert!(!leaf.is_ca());
    let usage = leaf.key_usage().unwrap().unwrap();
    assert_eq!(usage.value.flags, 1, "digitalSignature alone");
    let usage = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(usage.client_auth && usage.server_auth && !usage.code_signing && !usage.any);
    assert_eq!(leaf.serial.to_bytes_be().len(), 16);
    let (from, to) = certificate::validity(&leaf);
    assert_eq!(from, hands.now() - Duration::from_secs(60));
    assert_eq!(to, hands.now() + Duration::from_secs(3600));

    let other = authority.sign(&request(Vec::new()), &id, None).unwrap();
    assert_ne!(
        parse(&other.chain[0]).unwrap().raw_serial(),
        leaf.raw_serial()
    );
}

#[test]
fn lifetimes_are_within_bounds() {
    let hands = Hands::new();
    let authority = Authority::generate(hands.config(3600)).unwrap();
    let lifetime = |wish| {
        let wish = Some(Duration::from_secs(wish));
        let issued = authority
            .sign(&request(Vec::new()), &account("a"), wish)
            .unwrap();
        let leaf = parse(&issued.chain[0]).unwrap();
        let (_, to) = certificate::validity(&leaf);
        to.duration_since(hands.now()).unwrap().as_secs()
    };
    assert_eq!(lifetime(600), 600);
    assert_eq!(lifetime(1 << 40), 3600, "no more than is configured");
    assert_eq!(lifetime(0), LEAST_LIFETIME.as_secs());
    for lifetime in [1, 91 * 86400] {
        let error = Authority::generate(hands.config(lifetime)).unwrap_err();
        assert!(matches!(error, AuthorityError::Lifetime { .. }), "{error}");
    }
}

#[test]
fn no_other_name_is_signed() {
    let authority = Authority::generate(AuthorityConfig::new(DOMAIN)).unwrap();
    let id = account("frontend");
    for names in [
        vec![uri(account("api").as_str())],
        vec![uri(id.as_str()), uri(account("api").as_str())],
        vec![uri(id.as_str()), uri(id.as_str())],
        vec![
            uri(id.as_str()),
            SanType::DnsName("a.example".try_into().unwrap()),
        ],
        vec![SanType::DnsName("a.example".try_into().unwrap())],
    ] {
        let error = authority.sign(&request(names), &id, None).unwrap_err();
        assert!(matches!(error, SignError::OtherName { .. }), "{error}");
        assert!(error.is_callers_fault());
    }
    let foreign = SpiffeId::of_account("else.where", "shop", "frontend").unwrap();
    let error = authority
        .sign(&request(Vec::new()), &foreign, None)
        .unwrap_err();
    assert!(
        matches!(error, SignError::OtherTrustDomain { .. }),
        "{error}"
    );
}

#[test]
fn a_rotated_root_signs_when_it_is_known_and_the_old_one_goes_when_nothing_needs_it() {
    let hands = Hands::new();
    let authority = Authority::generate(hands.config(100)).unwrap();
    let bundle = authority.bundle();
    let old = bundle.borrow().roots[0].clone();
    let sign = || {
        let issued = authority
            .sign(&request(Vec::new()), &account("a"), None)
            .unwrap();
        verify(&issued.chain, &bundle.borrow().roots, hands.now()).unwrap();
        issued.chain
    };
    sign();
    authority.rotate_root().unwrap();
    assert_eq!(bundle.borrow().roots.len(), 2, "both are trusted");
    let error = authority.rotate_root().unwrap_err();
    assert!(matches!(error, AuthorityError::RotationUnderWay), "{error}");
    authority.advance(true).unwrap();
    verify(&sign(), std::slice::from_ref(&old), hands.now()).unwrap();
    hands.advance(10);
    authority.advance(false).unwrap();
    verify(&sign(), std::slice::from_ref(&old), hands.now()).unwrap();
    authority.advance(true).unwrap();
    let new = sign();
    verify(&new, std::slice::from_ref(&old), hands.now()).unwrap_err();
    hands.advance(99);
    authority.advance(true).unwrap();
    assert_eq!(
        bundle.borrow().roots.len(),
        2,
        "a certificate of the old one is valid"
    );
    hands.advance(20);
    authority.advance(true).unwrap();
    assert_eq!(bundle.borrow().roots.len(), 1);
    assert!(!bundle.borrow().roots.contains(&old));
    sign();
    // A node that never confirms does not hold it up for ever.
    authority.rotate_root().unwrap();
    let announced = bundle.borrow().roots[0].clone();
    hands.advance(101);
    authority.advance(false).unwrap();
    verify(&sign(), &[announced], hands.now()).unwrap();
}

#[test]
fn a_root_near_its_end_is_rotated() {
    let hands = Hands::new();
    let authority = Authority::generate(hands.config(3600)).unwrap();
    hands.advance(7 * 365 * 86400);
    authority.advance(true).unwrap();
    assert_eq!(authority.bundle().borrow().roots.len(), 1);
    hands.advance(365 * 86400 + 60);
    authority.advance(true).unwrap();
    assert_eq!(authority.bundle().borrow().roots.len(), 2);
    hands.advance(2 * 365 * 86400);
    authority.advance(true).unwrap();
    authority
        .sign(&request(Vec::new()), &account("a"), None)
        .unwrap();
}

#[test]
fn tokens_are_checked_with_the_published_keys() {
    let authority = Authority::generate(AuthorityConfig::new(DOMAIN)).unwrap();
    let audience = vec!["db".to_owned()];
    let token = authority
        .mint_jwt(&account("a"), &audience, Some(Duration::from_secs(3600)))
        .unwrap();
    let left = token.expires_at.duration_since(SystemTime::now()).unwrap();
    assert!(left <= MAX_TOKEN_LIFETIME);
    let check = |token: &Token| {
        let keys: JwkSet = serde_json::from_str(&authority.bundle().borrow().jwt_keys).unwrap();
        let kid = decode_header(&token.text).unwrap().kid.unwrap();
        let key = keys.find(&kid).expect("the key is published");
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&["db"]);
        let key = DecodingKey::from_jwk(key).unwrap();
        decode::<serde_json::Value>(&token.text, &key, &validation).unwrap()
    };
    assert_eq!(check(&token).claims["sub"], account("a").as_str());
    authority.rotate_root().unwrap();
    check(&token);
    for audience in [
        vec![],
        vec![String::new()],
        vec!["a".repeat(300)],
        vec!["a".into(); 17],
    ] {
        let error = authority
            .mint_jwt(&account("a"), &audience, None)
            .unwrap_err();
        assert!(matches!(error, SignError::Audience { .. }), "{error}");
    }
}

#[test]
fn the_root_outlives_a_restart_and_damage_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("ca");
    let hands = Hands::new();
    let open = || Authority::open(hands.config(100), &state, None);
    let first = open().unwrap();
    let roots = first.roots_pem();
    let error = open().unwrap_err().to_string();
    assert!(error.contains("another control plane uses it"), "{error}");
    first.rotate_root().unwrap();
    let (both, keys) = (first.roots_pem(), first.bundle().borrow().jwt_keys.clone());
    drop(first);
    let again = open().unwrap();
    assert_eq!(again.roots_pem(), both);
    assert!(both.contains(&roots));
    assert_eq!(again.bundle().borrow().jwt_keys, keys);
    hands.advance(10);
    again.advance(true).unwrap();
    drop(again);
    let error = Authority::open(AuthorityConfig::new("else.where"), &state, None).unwrap_err();
    assert!(
        matches!(error, AuthorityError::OtherTrustDomain { .. }),
        "{error}"
    );

    let file = state.join("ca.json");
    let content = std::fs::read(&file).unwrap();
    let damage = |content: &[u8]| {
        std::fs::write(&file, content).unwrap();
        let error = open().unwrap_err();
        assert!(matches!(error, AuthorityError::Damaged { .. }), "{error}");
        assert_eq!(
            std::fs::read(&file).unwrap(),
            content,
            "it is left as it is"
        );
    };
    damage(&content[..content.len() / 2]);
    damage(b"");
    let text = String::from_utf8(content.clone()).unwrap();
    damage(text.replace("signing", "retired").as_bytes());
    damage(
        text.replace("BEGIN PRIVATE KEY", "BEGIN NOTHING")
            .as_bytes(),
    );
    std::fs::write(&file, &content).unwrap();
    open().unwrap();
}

/// A CA as an operator has it.
struct OperatorCa {
    pem: String,
    key: KeyPair,
    params: CertificateParams,
}

fn operator_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params
        .distinguished_name
        .push(rcgen::DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.not_before = (SystemTime::now() - Duration::from_secs(86400)).into();
    params.not_after = (SystemTime::now() + Duration::from_secs(86400)).into();
    params
}

fn operator_root(change: impl FnOnce(&mut CertificateParams)) -> OperatorCa {
    let mut params = operator_params("Operator root");
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    OperatorCa {
        pem: params.self_signed(&key).unwrap().pem(),
        key,
        params,
    }
}

fn below(issuer: &OperatorCa, key: KeyPair) -> OperatorCa {
    let mut params = operator_params("Operator intermediate");
    params.use_authority_key_identifier_extension = true;
    let signed = params
        .signed_by(
            &key,
            &rcgen::Issuer::from_params(&issuer.params, &issuer.key),
        )
        .unwrap();
    OperatorCa {
        pem: signed.pem() + &issuer.pem,
        key,
        params,
    }
}

fn load(ca: &OperatorCa) -> Result<Authority, AuthorityError> {
    Authority::load(
        AuthorityConfig::new(DOMAIN),
        &ca.pem,
        &ca.key.serialize_pem(),
    )
}

#[test]
fn an_operators_ca_signs_and_openssl_agrees() {
    let root = operator_root(|_| {});
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    for ca in [
        below(&root, KeyPair::generate().unwrap()),
        below(&root, p384),
        root,
    ] {
        let authority = load(&ca).unwrap();
        let issued = authority
            .sign(&request(Vec::new()), &account("a"), None)
            .unwrap();
        openssl_verifies(&issued);
        let leaf = parse(&issued.chain[0]).unwrap();
        let (_, to) = certificate::validity(&leaf);
        assert!(
            to <= SystemTime::now() + Duration::from_secs(86400),
            "no longer than its CA"
        );
        let error = authority.rotate_root().unwrap_err();
        assert!(matches!(error, AuthorityError::OperatorRoot), "{error}");
    }
    let own = Authority::generate(AuthorityConfig::new(DOMAIN)).unwrap();
    openssl_verifies(&own.sign(&request(Vec::new()), &account("a"), None).unwrap());
}

fn openssl_verifies(issued: &Issued) {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, pem: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, pem).unwrap();
        path
    };
    let roots = file("roots.pem", to_pem(&issued.roots));
    let leaf = file("leaf.pem", to_pem(&issued.chain[..1]));
    let chain = file("chain.pem", to_pem(&issued.chain));
    for purpose in ["sslclient", "sslserver"] {
        let output = Command::new("openssl")
            .args(["verify", "-x509_strict", "-purpose", purpose, "-CAfile"])
            .arg(&roots)
            .arg("-untrusted")
            .arg(&chain)
            .arg(&leaf)
            .output()
            .expect("openssl is installed by scripts/install.sh");
        assert!(output.status.success(), "{output:?}");
    }
}

#[test]
fn what_is_wrong_with_an_operators_ca_is_said() {
    let root = operator_root(|_| {});
    let day = Duration::from_secs(86400);
    let check = |ca: &OperatorCa, expected: &str| {
        let error = load(ca).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} / {expected}");
    };
    check(
        &operator_root(|params| params.not_after = (SystemTime::now() - day / 2).into()),
        "expired on",
    );
    check(
        &operator_root(|params| params.not_before = (SystemTime::now() + day / 2).into()),
        "is not valid before",
    );
    check(
        &operator_root(|params| params.is_ca = IsCa::ExplicitNoCa),
        "`CN=Operator root` is no CA certificate: its basicConstraints",
    );
    check(
        &operator_root(|params| params.key_usages = vec![KeyUsagePurpose::DigitalSignature]),
        "lacks keyCertSign",
    );
    let closed = operator_root(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    load(&closed).unwrap();
    check(
        &below(&closed, KeyPair::generate().unwrap()),
        "`CN=Operator root` allows 0 CA certificates below it (pathlen), the file has 1",
    );
    let mut alone = below(&root, KeyPair::generate().unwrap());
    let leaf_only = to_pem(&from_pem(&alone.pem).unwrap()[..1]);
    alone.pem.clone_from(&leaf_only);
    check(&alone, "which is no root: append");
    alone.pem = leaf_only + &operator_root(|_| {}).pem;
    check(&alone, "is not signed by `CN=Operator root`");
    let mut mismatched = below(&root, KeyPair::generate().unwrap());
    mismatched.key = KeyPair::generate().unwrap();
    check(
        &mismatched,
        "the key does not match the CA certificate `CN=Operator intermediate`",
    );
    mismatched.key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
    check(&mismatched, "the CA's key is");
    let constrained = operator_root(|params| {
        params.name_constraints = Some(rcgen::NameConstraints {
            permitted_subtrees: vec![rcgen::GeneralSubtree::DnsName("example.com".into())],
            excluded_subtrees: Vec::new(),
        });
    });
    assert!(load(&constrained).is_ok(), "it says nothing of URIs");
    for (certificate, key, expected) in [
        ("", root.key.serialize_pem(), "it holds no PEM certificate"),
        (
            "-----BEGIN CERTIFICATE-----\nAAA\n",
            root.key.serialize_pem(),
            "the CA certificate cannot be read",
        ),
        (&*root.pem, "no key".to_owned(), "the CA key cannot be read"),
        (&*root.pem, root.pem.clone(), "the CA key cannot be read"),
    ] {
        let error = Authority::load(AuthorityConfig::new(DOMAIN), certificate, &key)
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error} / {expected}");
    }
}

#[test]
fn an_operators_ca_takes_over_and_is_asked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("ca");
    let hands = Hands::new();
    let own = Authority::open(hands.config(100), &state, None).unwrap();
    let before = own.sign(&request(Vec::new()), &account("a"), None).unwrap();
    drop(own);
    let root = operator_root(|_| {});
    let key = root.key.serialize_pem();
    let open = || Authority::open(hands.config(100), &state, Some((&root.pem, &key)));
    let operators = open().unwrap();
    let bundle = operators.bundle().borrow().clone();
    verify(&before.chain, &bundle.roots, hands.now()).unwrap();
    drop(operators);
    let kept = std::fs::read_to_string(state.join("ca.json")).unwrap();
    let secret: String = key.lines().nth(1).unwrap().into();
    assert!(!kept.contains(&secret), "an operator's key is not kept");
    let error = Authority::open(hands.config(100), &state, None).unwrap_err();
    assert!(
        matches!(error, AuthorityError::OperatorMissing { .. }),
        "{error}"
    );
    let again = open().unwrap();
    assert_eq!(*again.bundle().borrow(), bundle);
    hands.advance(200);
    again.advance(true).unwrap();
    assert_eq!(
        again.bundle().borrow().roots.len(),
        1,
        "the old one is not needed any more"
    );
}
