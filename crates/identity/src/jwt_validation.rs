//! Checks a JWT-SVID: form, algorithm, key, signature, audience, time and subject (spiffe.io, JWT-SVID, sections 2 to 5).
//!
//! Tokens are made elsewhere, by the authority.

use jsonwebtoken::{
    Algorithm, DecodingKey, Validation, decode, decode_header, errors::ErrorKind, jwk::Jwk,
};
use serde_json::{Map, Value};

use crate::{SpiffeId, TrustBundle};

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// How far the issuer's clock may differ from ours, in seconds.
const CLOCK_SKEW_SECONDS: u64 = 10;
/// What the standard allows (section 2.1.1) and our library can check; all are asymmetric.
const ALGORITHMS: &[Algorithm] = &[
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
];

/// A token that holds.
#[derive(Debug, Clone, PartialEq)]
pub struct ValidJwt {
    /// Whose it is.
    pub id: SpiffeId,
    /// All its claims.
    pub claims: Map<String, Value>,
}

/// Why a token does not hold. The fault is the token's, and trying again does not help.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtValidationError {
    /// It is no JWT in compact form, or too long, or its header is not what the standard asks for.
    #[error("the token is malformed: {0}")]
    Malformed(String),
    /// None that the standard allows.
    #[error("the token's algorithm is not allowed for JWT-SVIDs")]
    Algorithm,
    /// Its key is in no bundle that we trust.
    #[error(
        "the token is signed with the key {kid:?}, which is not in the bundle of {trust_domain}"
    )]
    UnknownKey {
        /// The key's id.
        kid: String,
        /// Whose bundle was looked at.
        trust_domain: String,
    },
    /// The signature is another's.
    #[error("the token's signature does not hold")]
    Signature,
    /// It is over, or not yet valid.
    #[error("the token has expired or is not valid yet")]
    Time,
    /// It is for others.
    #[error("the token is not for the audience {0:?}")]
    Audience(String),
    /// A claim that must be there is not, or is malformed.
    #[error("a claim is missing or malformed: {0}")]
    Claim(String),
    /// Its subject is of a trust domain whose bundle this is not.
    #[error("the token's subject {subject} is not of the trust domain {trust_domain}")]
    ForeignSubject {
        /// The subject.
        subject: String,
        /// The one that we know.
        trust_domain: String,
    },
}

/// Checks `token` for `audience` against the keys of `bundle`.
///
/// # Errors
/// It does not hold.
pub fn validate(
    token: &str,
    audience: &str,
    bundle: &TrustBundle,
) -> Result<ValidJwt, JwtValidationError> {
    let malformed = |reason: &str| JwtValidationError::Malformed(reason.into());
    if token.len() > MAX_TOKEN_BYTES {
        return Err(malformed("it is longer than 16 KiB"));
    }
    if token.split('.').count() != 3 {
        return Err(malformed("it has not three parts"));
    }
    let header = decode_header(token).map_err(|error| match error.kind() {
        // `none`, and what the library does not know, is no value of its enumeration.
        ErrorKind::Json(error) if error.to_string().contains("unknown variant") => {
            JwtValidationError::Algorithm
        }
        _ => JwtValidationError::Malformed(error.to_string()),
    })?;
    if !ALGORITHMS.contains(&header.alg) {
        return Err(JwtValidationError::Algorithm);
    }
    if !matches!(header.typ.as_deref(), None | Some("JWT" | "JOSE")) {
        return Err(malformed("its type is neither JWT nor JOSE"));
    }
    if header.crit.is_some() {
        return Err(malformed("it asks for extensions that are not known here"));
    }
    let kid = header.kid.ok_or_else(|| malformed("it names no key"))?;
    let key = key(bundle, &kid, header.alg).ok_or(JwtValidationError::UnknownKey {
        kid,
        trust_domain: bundle.trust_domain.clone(),
    })?;

    let mut rules = Validation::new(header.alg);
    rules.set_audience(&[audience]);
    rules.set_required_spec_claims(&["exp", "aud", "sub"]);
    rules.validate_nbf = true;
    rules.leeway = CLOCK_SKEW_SECONDS;
    let claims = decode::<Map<String, Value>>(token, &key, &rules)
        .map_err(|error| match error.kind() {
            ErrorKind::InvalidSignature => JwtValidationError::Signature,
            ErrorKind::InvalidAlgorithm => JwtValidationError::Algorithm,
            ErrorKind::ExpiredSignature | ErrorKind::ImmatureSignature => JwtValidationError::Time,
            ErrorKind::InvalidAudience => JwtValidationError::Audience(audience.into()),
            _ => JwtValidationError::Claim(error.to_string()),
        })?
        .claims;
    let subject = claims
        .get("sub")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let id: SpiffeId = subject
        .parse()
        .map_err(|error| JwtValidationError::Claim(format!("sub: {error}")))?;
    if id.trust_domain() != bundle.trust_domain {
        return Err(JwtValidationError::ForeignSubject {
            subject: subject.into(),
            trust_domain: bundle.trust_domain.clone(),
        });
    }
    Ok(ValidJwt { id, claims })
}

/// The key `kid` of the bundle, if it may sign JWT-SVIDs with this algorithm. Keys of kinds that are not known here are no hindrance.
fn key(bundle: &TrustBundle, kid: &str, algorithm: Algorithm) -> Option<DecodingKey> {
    let set: Value = serde_json::from_str(&bundle.jwt_keys).ok()?;
    let text = |key: &Value, name: &str| Some(key.get(name)?.as_str()?.to_owned());
    let found = set
        .get("keys")?
        .as_array()?
        .iter()
        .find(|key| text(key, "kid").as_deref() == Some(kid))?;
    // A SPIFFE bundle holds keys of both kinds (SPIFFE_Trust_Domain_and_Bundle, section 4.2.2).
    if text(found, "use").as_deref() == Some("x509-svid") {
        return None;
    }
    let jwk: Jwk = serde_json::from_value(found.clone()).ok()?;
    let key = DecodingKey::from_jwk(&jwk).ok()?;
    (key.family() == algorithm.family()).then_some(key)
}

#[cfg(test)]
mod tests;
