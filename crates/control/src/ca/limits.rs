//! How much the authority takes on.

use std::{num::NonZeroU32, time::Duration};

use governor::{
    DefaultDirectRateLimiter, DefaultKeyedRateLimiter, Quota, RateLimiter,
    clock::{Clock as _, DefaultClock},
};

/// Bounds of the authority.
#[derive(Debug, Clone)]
pub struct CaLimits {
    /// Signatures per second that one node may ask for in the long run.
    pub node_rate: NonZeroU32,
    /// Signatures that one node may ask for at once: a node that starts asks for all its identities.
    pub node_burst: NonZeroU32,
    /// The same for all nodes together.
    pub total_rate: NonZeroU32,
    /// The same for all nodes together.
    pub total_burst: NonZeroU32,
    /// Connections of nodes that have a certificate.
    pub connections: usize,
    /// Connections that have not shown one (yet).
    pub strangers: usize,
}

/// Signatures are counted here.
pub(super) struct RateLimits {
    node: DefaultKeyedRateLimiter<String>,
    total: DefaultDirectRateLimiter,
    complaints: DefaultDirectRateLimiter,
    clock: DefaultClock,
}

impl Default for CaLimits {
    /// A core signs some thousands per second; ten nodes that start at once with 250 identities each are served in seconds.
    fn default() -> Self {
        Self {
            node_rate: count(50),
            node_burst: count(500),
            total_rate: count(500),
            total_burst: count(2000),
            connections: 1024,
            strangers: 64,
        }
    }
}

impl RateLimits {
    pub(super) fn new(limits: &CaLimits) -> Self {
        let quota = |rate, burst| Quota::per_second(rate).allow_burst(burst);
        Self {
            node: RateLimiter::keyed(quota(limits.node_rate, limits.node_burst)),
            total: RateLimiter::direct(quota(limits.total_rate, limits.total_burst)),
            complaints: RateLimiter::direct(quota(count(5), count(50))),
            clock: DefaultClock::default(),
        }
    }

    /// Counts one signature for a node whose name is proven, so that there are no more names than nodes.
    ///
    /// # Errors
    /// Too many; the answer is how long to wait.
    pub(super) fn take(&self, node: &str) -> Result<(), Duration> {
        let now = self.clock.now();
        let wait = |until: &governor::NotUntil<_>| until.wait_time_from(now);
        self.node
            .check_key(&node.to_owned())
            .map_err(|until| wait(&until))?;
        self.total.check().map_err(|until| wait(&until))
    }

    /// Whether another refusal is worth a line in the log; all are counted.
    pub(super) fn may_complain(&self) -> bool {
        self.complaints.check().is_ok()
    }
}

const fn count(number: u32) -> NonZeroU32 {
    NonZeroU32::MIN.saturating_add(number - 1)
}
