use jsonwebtoken::{EncodingKey, Header, encode, get_current_timestamp, jwk::Jwk};
use serde_json::json;

use super::*;

const DOMAIN: &str = "cluster.local";
const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
const OTHER: &str = "spiffe://cluster.local/ns/shop/sa/db";

struct Authority {
    key: EncodingKey,
    bundle: TrustBundle,
}

fn authority() -> Authority {
    let pair = rcgen::KeyPair::generate().unwrap();
    let key = EncodingKey::from_ec_der(&pair.serialize_der());
    let mut jwk =
        serde_json::to_value(Jwk::from_encoding_key(&key, Algorithm::ES256).unwrap()).unwrap();
    jwk["kid"] = json!("k1");
    jwk["use"] = json!("jwt-svid");
    let mut x509 = jwk.clone();
    x509["kid"] = json!("k2");
    x509["use"] = json!("x509-svid");
    let strange = json!({"kty": "new", "kid": "k3"});
    let bundle = TrustBundle {
        trust_domain: DOMAIN.into(),
        roots: Vec::new(),
        jwt_keys: json!({"keys": [strange, x509, jwk]}).to_string(),
    };
    Authority { key, bundle }
}

impl Authority {
    fn token(&self, change: impl FnOnce(&mut Header, &mut Value)) -> String {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some("k1".into());
        let now = get_current_timestamp();
        let mut claims = json!({"sub": WEB, "aud": ["db", "cache"], "exp": now + 300, "iat": now});
        change(&mut header, &mut claims);
        encode(&header, &claims, &self.key).unwrap()
    }

    fn check(&self, change: impl FnOnce(&mut Header, &mut Value)) -> JwtValidationError {
        validate(&self.token(change), "db", &self.bundle).unwrap_err()
    }
}

#[test]
fn a_good_token_holds_for_each_of_its_audiences() {
    let authority = authority();
    let token = authority.token(|_, claims| claims["deep"] = json!({"n": [1, null]}));
    for audience in ["db", "cache"] {
        let valid = validate(&token, audience, &authority.bundle).unwrap();
        assert_eq!(valid.id.as_str(), WEB);
        assert_eq!(valid.claims["deep"], json!({"n": [1, null]}));
    }
    let single = authority.token(|_, claims| claims["aud"] = json!("db"));
    validate(&single, "db", &authority.bundle).unwrap();
    let untyped = authority.token(|header, _| header.typ = None);
    validate(&untyped, "db", &authority.bundle).unwrap();
}

#[test]
fn audience_time_and_subject_are_checked() {
    let authority = authority();
    let now = get_current_timestamp();
    let good = authority.token(|_, _| {});
    for audience in ["web", "d", ""] {
        assert_eq!(
            validate(&good, audience, &authority.bundle).unwrap_err(),
            JwtValidationError::Audience(audience.into())
        );
    }
    let expired = authority.check(|_, claims| claims["exp"] = json!(now - 60));
    assert_eq!(expired, JwtValidationError::Time);
    let early = authority.check(|_, claims| claims["nbf"] = json!(now + 60));
    assert_eq!(early, JwtValidationError::Time);
    for claim in ["exp", "aud", "sub"] {
        let error = authority.check(|_, claims| {
            claims.as_object_mut().unwrap().remove(claim);
        });
        assert!(
            matches!(error, JwtValidationError::Claim(_)),
            "{claim}: {error}"
        );
    }
    let error = authority.check(|_, claims| claims["exp"] = json!("tomorrow"));
    assert!(matches!(error, JwtValidationError::Claim(_)), "{error}");
    let error = authority.check(|_, claims| claims["sub"] = json!("joe"));
    assert!(matches!(error, JwtValidationError::Claim(_)), "{error}");
    let error = authority.check(|_, claims| claims["sub"] = json!("spiffe://other/ns/a/sa/b"));
    assert!(
        matches!(error, JwtValidationError::ForeignSubject { .. }),
        "{error}"
    );
}

#[test]
fn only_the_bundles_jwt_keys_and_the_standards_algorithms_count() {
    let authority = authority();
    for kid in ["k2", "k3", "k4", ""] {
        let error = authority.check(|header, _| header.kid = Some(kid.into()));
        assert!(
            matches!(error, JwtValidationError::UnknownKey { .. }),
            "{kid}: {error}"
        );
    }
    let forged = self::authority().token(|_, _| {});
    assert_eq!(
        validate(&forged, "db", &authority.bundle).unwrap_err(),
        JwtValidationError::Signature
    );
    // The public key as a shared secret: the classic confusion of algorithms.
    let secret = EncodingKey::from_secret(authority.bundle.jwt_keys.as_bytes());
    let mut header = Header::new(Algorithm::HS256);
    header.kid = Some("k1".into());
    let claims = json!({"sub": WEB, "aud": "db", "exp": get_current_timestamp() + 300});
    let confused = encode(&header, &claims, &secret).unwrap();
    assert_eq!(
        validate(&confused, "db", &authority.bundle).unwrap_err(),
        JwtValidationError::Algorithm
    );
    // {"alg":"none","kid":"k1"}
    let good = authority.token(|_, _| {});
    let parts: Vec<&str> = good.split('.').collect();
    let none = format!("eyJhbGciOiJub25lIiwia2lkIjoiazEifQ.{}.", parts[1]);
    assert_eq!(
        validate(&none, "db", &authority.bundle).unwrap_err(),
        JwtValidationError::Algorithm
    );
    // Another's claims under a good signature.
    let others = authority.token(|_, claims| claims["sub"] = json!(OTHER));
    let others: Vec<&str> = others.split('.').collect();
    let swapped = [parts[0], others[1], parts[2]].join(".");
    assert_eq!(
        validate(&swapped, "db", &authority.bundle).unwrap_err(),
        JwtValidationError::Signature
    );
}

#[test]
fn malformed_tokens_are_said_to_be_so() {
    let authority = authority();
    let check = |token: &str| validate(token, "db", &authority.bundle).unwrap_err();
    let long = "a".repeat(MAX_TOKEN_BYTES + 1);
    for token in ["", "a", "a.b", "a.b.c", "a.b.c.d", "..", long.as_str()] {
        assert!(
            matches!(check(token), JwtValidationError::Malformed(_)),
            "{token:.20}"
        );
    }
    for change in [
        (|header| header.kid = None) as fn(&mut Header),
        |header| header.typ = Some("at+jwt".into()),
        |header| header.crit = Some(vec!["b64".into()]),
    ] {
        let error = authority.check(|header, _| change(header));
        assert!(matches!(error, JwtValidationError::Malformed(_)), "{error}");
    }
    let without_keys = TrustBundle {
        jwt_keys: String::new(),
        ..authority.bundle.clone()
    };
    let error = validate(&authority.token(|_, _| {}), "db", &without_keys).unwrap_err();
    assert!(
        matches!(error, JwtValidationError::UnknownKey { .. }),
        "{error}"
    );
}

proptest::proptest! {
    #[test]
    fn noise_is_survived(noise in "[A-Za-z0-9_.=-]{0,200}") {
        proptest::prop_assert!(validate(&noise, "db", &TrustBundle::default()).is_err());
    }
}
