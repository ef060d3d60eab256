//! Waiting longer and longer between restarts of something that keeps ending.

use std::time::Duration;

/// Doubles from `first` up to `longest`, and begins anew after a run of `stable`.
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    stable: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration, stable: Duration) -> Self {
        Self {
            first,
            longest,
            stable,
            next: first,
        }
    }

    /// How long to wait after a run of length `ran`.
    pub(crate) fn after(&mut self, ran: Duration) -> Duration {
        if ran >= self.stable {
            self.next = self.first;
        }
        let wait = self.next;
        self.next = (wait * 2).min(self.longest);
        wait
    }

    /// The run did what it was for: the next wait is the first again.
    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_its_bound_and_recovers() {
        let seconds = Duration::from_secs;
        let mut backoff = Backoff::new(seconds(1), seconds(5), seconds(30));
        let waits: Vec<u64> = [0, 0, 29, 0, 30, 1]
            .map(|ran| backoff.after(seconds(ran)).as_secs())
            .into();
        assert_eq!(waits, [1, 2, 4, 5, 1, 2]);
        backoff.reset();
        assert_eq!(backoff.after(seconds(0)), seconds(1));
    }
}
