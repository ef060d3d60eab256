//! Handshakes in progress, bounded. Where there is no room for another one, the oldest makes room: a handshake of an honest
//! peer takes milliseconds, so that one who opens connections and says nothing pushes out his own, not others'.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// All of one server.
#[derive(Debug)]
pub(crate) struct Handshakes {
    limit: usize,
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    next: u64,
    /// In the order in which they began.
    begun: BTreeMap<u64, CancellationToken>,
}

/// One of them. Dropped, it is over.
#[derive(Debug)]
pub(crate) struct Handshake<'a> {
    all: &'a Handshakes,
    number: u64,
    pushed_out: CancellationToken,
}

impl Handshakes {
    /// No more than `limit`, but always room for one.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            limit: limit.max(1),
            waiting: Mutex::default(),
        }
    }

    /// One begins.
    pub(crate) fn begin(&self) -> Handshake<'_> {
        let pushed_out = CancellationToken::new();
        let mut waiting = self.lock();
        while waiting.begun.len() >= self.limit {
            if let Some((_, oldest)) = waiting.begun.pop_first() {
                oldest.cancel();
            }
        }
        let number = waiting.next;
        waiting.next += 1;
        waiting.begun.insert(number, pushed_out.clone());
        Handshake {
            all: self,
            number,
            pushed_out,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Nothing that holds the lock can panic half-way through a change.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handshake<'_> {
    /// Ends when this one must make room.
    pub(crate) async fn pushed_out(&self) {
        self.pushed_out.cancelled().await;
    }
}

impl Drop for Handshake<'_> {
    fn drop(&mut self) {
        self.all.lock().begun.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room() {
        let all = Handshakes::new(2);
        let out = |one: &Handshake<'_>| one.pushed_out.is_cancelled();
        let (first, second) = (all.begin(), all.begin());
        assert!(!out(&first) && !out(&second));
        let third = all.begin();
        assert!(out(&first) && !out(&second) && !out(&third));
        // What has been pushed out takes no other's place when it goes.
        drop(first);
        assert_eq!(all.lock().begun.len(), 2);
        drop(third);
        let fourth = all.begin();
        assert!(!out(&second) && !out(&fourth));
        drop((second, fourth));
        assert!(all.lock().begun.is_empty());
    }

    #[test]
    fn there_is_room_for_one() {
        let all = Handshakes::new(0);
        let first = all.begin();
        let second = all.begin();
        assert!(first.pushed_out.is_cancelled() && !second.pushed_out.is_cancelled());
    }
}
