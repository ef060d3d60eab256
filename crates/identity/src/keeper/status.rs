//! What `heddle certs` shows of one identity.

use std::{
    collections::BTreeSet,
    time::{Duration, SystemTime},
};

use api::report::{Certificate, CertificateState};

use super::renewal::Health;
use crate::{SpiffeId, Svid};

/// How an identity's certificate stands, and who needs it.
pub(super) fn certificate(
    id: &SpiffeId,
    svid: Option<&Svid>,
    health: &Health,
    users: &BTreeSet<String>,
    now: SystemTime,
) -> Certificate {
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
    Certificate {
        identity: id.to_string(),
        state,
        serial: svid.map(|svid| svid.serial.clone()).unwrap_or_default(),
        not_before: svid.map(|svid| seconds(svid.not_before)),
        not_after: svid.map(|svid| seconds(svid.not_after)),
        issued: health.issued,
        last_error: health.last_error.clone(),
        users: users.iter().cloned().collect(),
    }
}
