//! Why connections were ended, until their last record comes out of the kernel and can be told the reason.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

/// Connections whose last record has not come yet. It comes within a fraction of a second, if it is not lost.
const MAX_WAITING: usize = 65_536;

/// Client and server.
type Ends = (SocketAddr, SocketAddr);

/// Why a connection was ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cause {
    /// A reason's name.
    pub(crate) reason: &'static str,
    /// Number of the policy that no longer allows it, 0 for none.
    pub(crate) policy: u32,
}

/// Shared by who ends connections and who writes the records.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    waiting: Mutex<Waiting>,
}

#[derive(Debug, Default)]
struct Waiting {
    causes: HashMap<Ends, Cause>,
    /// In the order of their coming. May name some that are gone.
    order: VecDeque<Ends>,
}

impl Ended {
    /// Must be called before the connection is ended: the record may be quicker than the answer.
    pub(crate) fn note(&self, ends: Ends, cause: Cause) {
        self.with(|waiting| {
            if waiting.causes.insert(ends, cause).is_none() {
                waiting.order.push_back(ends);
            }
            while waiting.order.len() > MAX_WAITING {
                if let Some(oldest) = waiting.order.pop_front() {
                    waiting.causes.remove(&oldest);
                }
            }
        });
    }

    /// Why the connection that has just ended was ended; `None` if it ended by itself.
    pub(crate) fn take(&self, ends: Ends) -> Option<Cause> {
        self.with(|waiting| waiting.causes.remove(&ends))
    }

    fn with<T>(&self, work: impl FnOnce(&mut Waiting) -> T) -> T {
        work(&mut self.waiting.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(number: u32) -> Ends {
        let client = SocketAddr::from((number.to_be_bytes(), 1));
        (client, "10.0.0.1:80".parse().unwrap())
    }

    #[test]
    fn a_cause_is_told_once() {
        let ended = Ended::default();
        let cause = Cause {
            reason: "policy-deny",
            policy: 7,
        };
        ended.note(ends(1), cause);
        assert_eq!(ended.take(ends(2)), None);
        assert_eq!(ended.take(ends(1)), Some(cause));
        assert_eq!(ended.take(ends(1)), None);
    }

    #[test]
    fn causes_whose_records_were_lost_make_room() {
        let ended = Ended::default();
        let cause = Cause {
            reason: "no-verdict",
            policy: 0,
        };
        let all = MAX_WAITING as u32 + 10;
        for number in 0..all {
            ended.note(ends(number), cause);
        }
        assert_eq!(ended.take(ends(0)), None);
        assert_eq!(ended.take(ends(all - 1)), Some(cause));
        ended.with(|waiting| assert_eq!(waiting.order.len(), MAX_WAITING));
    }
}
