//! Requests that are none, and what is made of any bytes.

use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};

use super::*;
use crate::certificate::encode;

fn request(key: &KeyPair) -> Vec<u8> {
    let id = "spiffe://cluster.local/ns/shop/sa/a";
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(id.try_into().unwrap())];
    params.serialize_request(key).unwrap().der().to_vec()
}

#[test]
fn what_is_wrong_with_a_request_is_said() {
    let good = request(&KeyPair::generate().unwrap());
    Request::from_der(&good).unwrap();
    let mut longer = good.clone();
    longer.push(0);
    let mut forged = good.clone();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    let mut renamed = good.clone();
    let at = renamed
        .windows(7)
        .position(|part| part == b"/sa/a".as_slice() || part.starts_with(b"/sa/a"));
    renamed[at.unwrap() + 4] = b'b';
    for (der, expected) in [
        (good[..100].to_vec(), "cannot be read"),
        (Vec::new(), "cannot be read"),
        (longer, "bytes follow it"),
        (vec![0x30; MAX_BYTES + 1], "longer than"),
        (forged, "not signed by its own key"),
        (renamed, "not signed by its own key"),
        (
            request(&KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap()),
            "not ECDSA on P-256",
        ),
        (
            request(&KeyPair::generate_for(&PKCS_ED25519).unwrap()),
            "not ECDSA on P-256",
        ),
    ] {
        let error = Request::from_der(&der).unwrap_err().to_string();
        assert!(error.contains(expected), "{error} / {expected}");
    }
    for text in [
        "",
        "nothing",
        "-----BEGIN CERTIFICATE REQUEST-----\n!\n-----END CERTIFICATE REQUEST-----\n",
    ] {
        let error = Request::from_pem(text).unwrap_err().to_string();
        assert!(error.contains("it is no PEM"), "{error}");
    }
    Request::from_pem(&encode("CERTIFICATE REQUEST", &good)).unwrap();
    Request::from_pem(&encode("CERTIFICATE", &good)).unwrap_err();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        prop_assert!(Request::from_der(&bytes).is_err());
        prop_assert!(Request::from_pem(&encode("CERTIFICATE REQUEST", &bytes)).is_err());
    }

    #[test]
    fn any_text_is_refused(text in ".{0,400}") {
        prop_assert!(Request::from_pem(&text).is_err());
    }

    /// A changed request is refused, or says the same: the signature covers all of it.
    #[test]
    fn a_changed_request_is_refused(changes in proptest::collection::vec((any::<usize>(), any::<u8>()), 1..4)) {
        let good = request(&KeyPair::generate().unwrap());
        let mut bytes = good.clone();
        for (at, value) in changes {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        prop_assume!(bytes != good);
        if let Ok(read) = Request::from_der(&bytes) {
            let original = Request::from_der(&good).unwrap();
            prop_assert_eq!(read.names, original.names);
        }
    }
}
