//! How much is said about bad peers: whoever sends a flood of nonsense must not fill the log with it. What is not said is
//! counted, here and in the metrics.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Lines at once.
const BURST: u32 = 100;
/// One more after this long.
const EVERY: Duration = Duration::from_millis(100);

/// The room for lines, of all workloads and workers together.
#[derive(Debug)]
pub(super) struct Complaints {
    room: Mutex<Room>,
}

#[derive(Debug)]
struct Room {
    left: u32,
    /// When it had been filled up last.
    filled: Instant,
    unsaid: u64,
}

impl Complaints {
    pub(super) fn new() -> Self {
        Self {
            room: Mutex::new(Room {
                left: BURST,
                filled: Instant::now(),
                unsaid: 0,
            }),
        }
    }

    /// Says something if there is room for it. `say` is given how much was left unsaid before.
    pub(super) fn say(&self, say: impl FnOnce(u64)) {
        // Nothing that holds the lock can panic half-way through a change.
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let unsaid = room.take(Instant::now());
        drop(room);
        if let Some(unsaid) = unsaid {
            say(unsaid);
        }
    }
}

impl Room {
    fn take(&mut self, now: Instant) -> Option<u64> {
        let since = now.saturating_duration_since(self.filled);
        let more = u32::try_from(since.as_millis() / EVERY.as_millis()).unwrap_or(u32::MAX);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(BURST);
            self.filled = now;
        }
        if self.left == 0 {
            self.unsaid += 1;
            return None;
        }
        self.left -= 1;
        Some(std::mem::take(&mut self.unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_and_what_is_unsaid_is_told_later() {
        let start = Instant::now();
        let mut room = Room {
            left: BURST,
            filled: start,
            unsaid: 0,
        };
        for _ in 0..BURST {
            assert_eq!(room.take(start), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(room.take(start + EVERY / 2), None);
        }
        assert_eq!(room.take(start + EVERY), Some(5));
        assert_eq!(room.take(start + EVERY), None);
        // However long it was quiet: no more than a burst.
        let later = start + 1000 * BURST * EVERY;
        assert_eq!(room.take(later), Some(1));
        assert_eq!(room.left, BURST - 1);
    }
}
