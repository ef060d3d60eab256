//! What `heddle certs` shows of one identity.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use serde::{Deserialize, Serialize};

use super::renewal::Health;
use crate::{SpiffeId, Svid};

/// One identity's certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateStatus {
    /// SPIFFE id.
    pub identity: String,
    /// How it stands.
    pub state: CertificateState,
    /// Serial number in hexadecimal; empty while there is no certificate.
    pub serial: String,
    /// Unix time in seconds.
    pub not_before: Option<u64>,
    /// Unix time in seconds.
    pub not_after: Option<u64>,
    /// How often it was signed since the agent started.
    pub issued: u64,
    /// Why the last try to renew it failed; `None` after a success.
    pub last_error: Option<String>,
    /// Who needs it.
    pub users: Vec<String>,
}

/// How a certificate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum CertificateState {
    /// Valid; renewed when it is due.
    Valid,
    /// Valid, but its renewal fails.
    Stale,
    /// There is none yet, or it has expired; it is being asked for.
    Pending,
    /// There is none, and the authority says no.
    Refused,
}

impl CertificateStatus {
    pub(super) fn new(
        id: &SpiffeId,
        svid: Option<&Svid>,
        health: &Health,
        now: SystemTime,
    ) -> Self {
        let valid = svid.is_some_and(|svid| svid.not_after > now);
        let state = match (valid, &health.last_error) {
            (true, None) => CertificateState::Valid,
            (true, Some(_)) => CertificateState::Stale,
            (false, _) if health.refused => CertificateState::Refused,
            (false, _) => CertificateState::Pending,
        };
        let seconds = |time: SystemTime| {
            time.duration_since(SystemTime::UNIX_EPOCH)
                .map_or(0, |since: Duration| since.as_secs())
        };
        Self {
            identity: id.to_string(),
            state,
            serial: svid.map(|svid| svid.serial.clone()).unwrap_or_default(),
            not_before: svid.map(|svid| seconds(svid.not_before)),
            not_after: svid.map(|svid| seconds(svid.not_after)),
            issued: health.issued,
            last_error: health.last_error.clone(),
            users: Vec::new(),
        }
    }

    pub(super) fn used_by(mut self, users: &BTreeSet<String>) -> Self {
        self.users = users.iter().cloned().collect();
        self
    }
}
