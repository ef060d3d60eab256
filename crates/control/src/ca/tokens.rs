//! Join tokens: with one, a node obtains its first certificate.
//!
//! A token is 256 random bits, good for one node, once, for five minutes. Only its hash is kept, and it is looked up by
//! that hash: how long a look takes says nothing about any token.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustls::crypto::aws_lc_rs;
use sha2::{Digest as _, Sha256};

/// How long a token is good.
pub const TOKEN_LIFETIME: Duration = Duration::from_secs(300);
/// For so long it can be said of a token that it was used or has expired; after that it is unknown.
const MEMORY: Duration = Duration::from_secs(900);
/// Tokens that are remembered, used ones included.
const MAX_TOKENS: usize = 4096;
/// Anything longer is no token.
const MAX_TEXT: usize = 256;

/// The tokens that are out.
#[derive(Debug, Default)]
pub struct JoinTokens {
    issued: Mutex<HashMap<[u8; 32], Issued>>,
}

#[derive(Debug)]
struct Issued {
    node: String,
    at: Instant,
    used: bool,
}

/// Why there is no token, or why one is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinTokenError {
    /// It was never issued, or long ago.
    #[error("the join token is unknown")]
    Unknown,
    /// It was used.
    #[error("the join token was used already")]
    Used,
    /// It is too old.
    #[error("the join token has expired")]
    Expired,
    /// Too many are out.
    #[error("too many join tokens are out: wait until some have expired")]
    TooMany,
    /// The system gives no randomness.
    #[error("the system gives no randomness for a join token")]
    NoRandomness,
    /// The mesh has no such node.
    #[error("the mesh has no such node")]
    UnknownNode,
}

impl JoinTokens {
    /// A new token for a node.
    ///
    /// # Errors
    /// [`JoinTokenError::TooMany`], [`JoinTokenError::NoRandomness`].
    pub fn issue(&self, node: &str) -> Result<String, JoinTokenError> {
        self.issue_at(node, Instant::now())
    }

    fn issue_at(&self, node: &str, now: Instant) -> Result<String, JoinTokenError> {
        let mut bytes = [0u8; 32];
        aws_lc_rs::default_provider()
            .secure_random
            .fill(&mut bytes)
            .map_err(|_| JoinTokenError::NoRandomness)?;
        let mut token = String::with_capacity(64);
        for byte in bytes {
            // Writing to a text does not fail.
            let _ = write!(token, "{byte:02x}");
        }
        let mut issued = self.lock();
        issued.retain(|_, token| now.duration_since(token.at) < MEMORY);
        if issued.len() >= MAX_TOKENS {
            issued.retain(|_, token| token.is_good(now));
        }
        if issued.len() >= MAX_TOKENS {
            return Err(JoinTokenError::TooMany);
        }
        let entry = Issued {
            node: node.to_owned(),
            at: now,
            used: false,
        };
        issued.insert(hash(&token), entry);
        Ok(token)
    }

    /// The node that a token is good for, without using it up.
    ///
    /// # Errors
    /// It is not good.
    pub fn check(&self, token: &str) -> Result<String, JoinTokenError> {
        self.look(token, false, Instant::now())
    }

    /// As [`Self::check`], and uses it up.
    ///
    /// # Errors
    /// It is not good (any more).
    pub fn redeem(&self, token: &str) -> Result<String, JoinTokenError> {
        self.look(token, true, Instant::now())
    }

    fn look(&self, token: &str, using: bool, now: Instant) -> Result<String, JoinTokenError> {
        if token.len() > MAX_TEXT {
            return Err(JoinTokenError::Unknown);
        }
        let mut issued = self.lock();
        let entry = issued
            .get_mut(&hash(token))
            .ok_or(JoinTokenError::Unknown)?;
        if entry.used {
            return Err(JoinTokenError::Used);
        }
        if !entry.is_good(now) {
            return Err(JoinTokenError::Expired);
        }
        entry.used = using;
        Ok(entry.node.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<[u8; 32], Issued>> {
        // Whole entries, whatever happened.
        self.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Issued {
    fn is_good(&self, now: Instant) -> bool {
        !self.used && now.duration_since(self.at) < TOKEN_LIFETIME
    }
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_once_and_not_for_long() {
        let (tokens, start) = (JoinTokens::default(), Instant::now());
        let (one, other) = (tokens.issue("n1").unwrap(), tokens.issue("n2").unwrap());
        assert_eq!(one.len(), 64);
        assert_ne!(one, other);
        assert_eq!(tokens.check(&one).unwrap(), "n1");
        assert_eq!(tokens.redeem(&one).unwrap(), "n1");
        assert_eq!(tokens.redeem(&one), Err(JoinTokenError::Used));
        assert_eq!(tokens.check(&one), Err(JoinTokenError::Used));
        for text in ["", "n1", &"a".repeat(64), &"a".repeat(1000)] {
            assert_eq!(tokens.redeem(text), Err(JoinTokenError::Unknown));
        }
        let later = start + TOKEN_LIFETIME + Duration::from_secs(1);
        let redeem = |now| tokens.look(&other, true, now);
        assert_eq!(redeem(later), Err(JoinTokenError::Expired));
        let later = later + MEMORY;
        tokens.issue_at("n1", later).unwrap();
        assert_eq!(redeem(later), Err(JoinTokenError::Unknown));
    }

    #[test]
    fn tokens_are_bounded_and_used_ones_make_room() {
        let (tokens, start) = (JoinTokens::default(), Instant::now());
        let first = tokens.issue_at("n1", start).unwrap();
        for _ in 1..MAX_TOKENS {
            tokens.issue_at("n1", start).unwrap();
        }
        let too_many = Err(JoinTokenError::TooMany);
        assert_eq!(tokens.issue_at("n1", start), too_many);
        tokens.redeem(&first).unwrap();
        tokens.issue_at("n1", start).unwrap();
        assert_eq!(tokens.issue_at("n1", start), too_many);
        tokens.issue_at("n1", start + TOKEN_LIFETIME).unwrap();
    }
}
