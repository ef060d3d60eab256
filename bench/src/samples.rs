//! Latencies of one measurement, exact up to a bound, and their percentiles.

use std::time::Duration;

/// Most samples that one measurement keeps (32 MB); it ends when they are full.
const MAX_SAMPLES: usize = 8 << 20;

/// Latencies in nanoseconds. Those over four seconds count as four seconds.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    nanoseconds: Vec<u32>,
}

impl Samples {
    /// With room for some seconds of messages, so that growing does not disturb the first of them.
    pub(crate) fn new() -> Self {
        Self {
            nanoseconds: Vec::with_capacity(1 << 18),
        }
    }

    /// Keeps one latency.
    pub(crate) fn push(&mut self, latency: Duration) {
        self.nanoseconds
            .push(u32::try_from(latency.as_nanos()).unwrap_or(u32::MAX));
    }

    /// Adds another thread's.
    pub(crate) fn append(&mut self, mut others: Self) {
        self.nanoseconds.append(&mut others.nanoseconds);
    }

    /// Whether there is no room for more.
    pub(crate) fn is_full(&self) -> bool {
        self.nanoseconds.len() >= MAX_SAMPLES
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.nanoseconds.len()
    }

    /// The given percentiles (0 to 100, nearest rank) in nanoseconds; zeros when there are no samples.
    pub(crate) fn percentiles<const N: usize>(&mut self, percents: [f64; N]) -> [u64; N] {
        self.nanoseconds.sort_unstable();
        percents.map(|percent| {
            let rank = (percent / 100.0 * self.nanoseconds.len() as f64).ceil() as usize;
            self.nanoseconds
                .get(rank.saturating_sub(1))
                .map_or(0, |&nanoseconds| u64::from(nanoseconds))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_nearest_rank() {
        let mut samples = Samples::new();
        for nanoseconds in (1..=100).rev() {
            samples.push(Duration::from_nanos(nanoseconds));
        }
        assert_eq!(
            samples.percentiles([0.0, 50.0, 99.0, 100.0]),
            [1, 50, 99, 100]
        );
    }

    #[test]
    fn no_samples_give_zeros() {
        assert_eq!(Samples::new().percentiles([50.0]), [0]);
    }
}
