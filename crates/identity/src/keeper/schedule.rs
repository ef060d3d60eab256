//! When a certificate is renewed, and how long to wait after a failure. Pure: time and chance come from outside.

use std::time::{Duration, SystemTime};

/// Renewals are spread over so much of the lifetime around its half, so that those of one moment do not stay together.
const JITTER: f64 = 0.1;
const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// From now to the renewal of a certificate: half of its lifetime, less or more a tenth. `chance`: 0 to 1.
pub(super) fn until_renewal(
    not_before: SystemTime,
    not_after: SystemTime,
    now: SystemTime,
    chance: f64,
) -> Duration {
    let lifetime = not_after.duration_since(not_before).unwrap_or_default();
    let at = not_before + lifetime.mul_f64(0.5 + JITTER * (2.0 * chance - 1.0));
    at.duration_since(now).unwrap_or_default()
}

/// The wait after the `failures`th failure in a row (from 1): doubled each time, up to 30 seconds, and less by up to half.
/// While a certificate is still valid, also no more than a quarter of what is `left` of it.
pub(super) fn until_retry(failures: u32, left: Option<Duration>, chance: f64) -> Duration {
    let doubled = FIRST_DELAY.saturating_mul(1 << failures.saturating_sub(1).min(16));
    let left = left.map_or(LONGEST_DELAY, |left| left / 4);
    let longest = LONGEST_DELAY.min(left).max(FIRST_DELAY);
    doubled.min(longest).mul_f64(1.0 - chance / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewal_is_around_half_of_the_lifetime() {
        let from = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        let to = from + Duration::from_secs(100);
        let at = |now, chance| until_renewal(from, to, now, chance).as_secs_f64().round();
        assert_eq!(at(from, 0.5), 50.0);
        assert_eq!(at(from, 0.0), 40.0);
        assert_eq!(at(from, 1.0), 60.0);
        assert_eq!(at(from + Duration::from_secs(30), 0.5), 20.0);
        assert_eq!(at(to, 0.5), 0.0);
    }

    #[test]
    fn retries_wait_longer_and_never_past_the_certificates_end() {
        let secs = Duration::from_secs;
        assert_eq!(until_retry(1, None, 0.0), FIRST_DELAY);
        assert_eq!(until_retry(1, None, 1.0), FIRST_DELAY / 2);
        assert_eq!(until_retry(2, None, 0.0), FIRST_DELAY * 2);
        assert_eq!(until_retry(40, None, 0.0), LONGEST_DELAY);
        assert_eq!(until_retry(u32::MAX, Some(secs(8)), 0.0), secs(2));
        assert_eq!(until_retry(9, Some(Duration::ZERO), 0.0), FIRST_DELAY);
    }
}
