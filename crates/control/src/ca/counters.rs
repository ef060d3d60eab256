//! How it went so far, in numbers.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tonic::Code;

/// Counts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CaStatus {
    /// Certificates signed.
    pub signed: u64,
    /// Nodes that joined with a token.
    pub joined: u64,
    /// JWT-SVIDs signed.
    pub tokens: u64,
    /// Calls without a good certificate or token.
    pub unauthenticated: u64,
    /// Calls for what the caller may not have.
    pub denied: u64,
    /// Calls that are malformed.
    pub invalid: u64,
    /// Calls past a limit.
    pub limited: u64,
    /// Calls that failed through no fault of the caller.
    pub failed: u64,
    /// Connections closed for being too many, or because TLS failed or took too long.
    pub dropped_connections: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) signed: AtomicU64,
    pub(super) joined: AtomicU64,
    pub(super) tokens: AtomicU64,
    pub(super) dropped_connections: AtomicU64,
    unauthenticated: AtomicU64,
    denied: AtomicU64,
    invalid: AtomicU64,
    limited: AtomicU64,
    failed: AtomicU64,
}

impl Counters {
    pub(super) fn refused(&self, code: Code) {
        add(match code {
            Code::Unauthenticated => &self.unauthenticated,
            Code::PermissionDenied => &self.denied,
            Code::InvalidArgument => &self.invalid,
            Code::ResourceExhausted => &self.limited,
            _ => &self.failed,
        });
    }

    pub(super) fn status(&self) -> CaStatus {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        CaStatus {
            signed: get(&self.signed),
            joined: get(&self.joined),
            tokens: get(&self.tokens),
            unauthenticated: get(&self.unauthenticated),
            denied: get(&self.denied),
            invalid: get(&self.invalid),
            limited: get(&self.limited),
            failed: get(&self.failed),
            dropped_connections: get(&self.dropped_connections),
        }
    }
}

pub(super) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
