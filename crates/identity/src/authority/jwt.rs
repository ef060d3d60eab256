//! The key that JWT-SVIDs are signed with, and the tokens. Source: the JWT-SVID standard, spiffe.io.

use std::time::{Duration, SystemTime};

use jsonwebtoken::{
    Algorithm, EncodingKey, Header, encode,
    jwk::{Jwk, PublicKeyUse, ThumbprintHash},
};
use rcgen::KeyPair;
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject as _};
use serde::Serialize;

use super::{AuthorityError, SignError};
use crate::SpiffeId;

/// Longest lifetime of a token.
pub const MAX_TOKEN_LIFETIME: Duration = Duration::from_secs(300);
const MAX_AUDIENCES: usize = 16;
const MAX_AUDIENCE_BYTES: usize = 256;

/// A token, and when it ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The JWT in its compact form.
    pub text: String,
    /// Not valid after.
    pub expires_at: SystemTime,
}

pub(super) struct JwtKey {
    pem: String,
    key: EncodingKey,
    public: Jwk,
    kid: String,
}

#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    aud: &'a [String],
    iat: u64,
    exp: u64,
}

impl JwtKey {
    pub(super) fn generate() -> Result<Self, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::crypto)?;
        Self::from_pem(&key.serialize_pem())
    }

    pub(super) fn from_pem(pem: &str) -> Result<Self, AuthorityError> {
        let der =
            PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).map_err(AuthorityError::crypto)?;
        let key = EncodingKey::from_ec_der(der.secret_pkcs8_der());
        let mut public =
            Jwk::from_encoding_key(&key, Algorithm::ES256).map_err(AuthorityError::crypto)?;
        let kid = public.thumbprint(ThumbprintHash::SHA256);
        public.common.key_id = Some(kid.clone());
        // SPIFFE Trust Domain and Bundle, section 4.2.2.
        public.common.public_key_use = Some(PublicKeyUse::Other("jwt-svid".into()));
        Ok(Self {
            pem: pem.to_owned(),
            key,
            public,
            kid,
        })
    }

    pub(super) fn pem(&self) -> &str {
        &self.pem
    }

    pub(super) fn public(&self) -> &Jwk {
        &self.public
    }

    pub(super) fn mint(
        &self,
        id: &SpiffeId,
        audience: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<Token, SignError> {
        let fits = |audience: &String| (1..=MAX_AUDIENCE_BYTES).contains(&audience.len());
        if !(1..=MAX_AUDIENCES).contains(&audience.len()) || !audience.iter().all(fits) {
            return Err(SignError::Audience {
                most: MAX_AUDIENCES,
                longest: MAX_AUDIENCE_BYTES,
            });
        }
        let expires_at = now + lifetime.min(MAX_TOKEN_LIFETIME);
        let header = Header {
            kid: Some(self.kid.clone()),
            ..Header::new(Algorithm::ES256)
        };
        let claims = Claims {
            sub: id.as_str(),
            aud: audience,
            iat: seconds(now),
            exp: seconds(expires_at),
        };
        let text = encode(&header, &claims, &self.key).map_err(AuthorityError::crypto)?;
        Ok(Token { text, expires_at })
    }
}

impl std::fmt::Debug for JwtKey {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JwtKey")
            .field("kid", &self.kid)
            .finish_non_exhaustive()
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}
