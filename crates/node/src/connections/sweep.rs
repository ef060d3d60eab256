//! Ends the connections that the rules forbid, after every change that may forbid one.
//!
//! The kernel's tables hold the new rules before a sweep is asked for, so what it meets was decided by the old ones
//! or is allowed. A connection that was decided by old rules but is not in a table yet (its `connect()` is on its way)
//! is met by the second look. Changes that come while a sweep is under way are swept together.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    ops::BitOr,
    sync::{Arc, Mutex},
    time::Duration,
};

use api::report::EndedCount;
use kernel::KernelError;
use linux::sock_diag::{Protocol, SockDiag};
use tokio::{sync::Notify, time::timeout};

use super::{
    Connection, Connections,
    ended::Cause,
    judge::{Judge, Judgement},
    lock,
};

/// How long after a sweep the same is looked through again: longer than a `connect()` takes to put its socket into
/// the kernel's table, and short enough for what it finds to end within a second of the change.
const SECOND_LOOK: Duration = Duration::from_millis(300);
/// How soon a sweep that could not be finished is tried again.
const RETRY: Duration = Duration::from_millis(100);
/// Connections of one workload that are ended before the rest is looked for.
const BATCH: usize = 4096;
/// How often one namespace is read anew because there was more than a batch.
const MAX_BATCHES: usize = 1024;
/// Pairs of reason and policy that are counted apart.
const MAX_TALLIED: usize = 1024;

/// What a change may have forbidden.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Scope {
    streams: bool,
    datagrams: bool,
}

impl Scope {
    /// Anything.
    pub(crate) const ALL: Self = Self {
        streams: true,
        datagrams: true,
    };
    /// Connected datagram sockets alone.
    pub(crate) const DATAGRAMS: Self = Self {
        streams: false,
        datagrams: true,
    };

    fn is_empty(self) -> bool {
        self == Self::default()
    }

    fn protocols(self) -> impl Iterator<Item = Protocol> {
        let streams = self.streams.then_some(Protocol::Tcp);
        let datagrams = self.datagrams.then_some(Protocol::Udp);
        streams.into_iter().chain(datagrams)
    }
}

impl BitOr for Scope {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self {
            streams: self.streams || other.streams,
            datagrams: self.datagrams || other.datagrams,
        }
    }
}

/// Sweeps that were asked for and not begun.
#[derive(Debug, Default)]
pub(super) struct Requests {
    scope: Mutex<Scope>,
    news: Notify,
}

impl Requests {
    async fn next(&self) -> Scope {
        loop {
            let scope = std::mem::take(&mut *lock(&self.scope));
            if !scope.is_empty() {
                return scope;
            }
            self.news.notified().await;
        }
    }
}

/// What was ended so far, and what is wrong.
#[derive(Debug, Default)]
pub(super) struct Tally {
    counts: Mutex<BTreeMap<(&'static str, u32), u64>>,
    problem: Mutex<Option<String>>,
}

impl Tally {
    /// Notes what is wrong now, if anything; it is logged once however often it is met.
    fn tell(&self, problem: Option<String>) {
        let mut known = lock(&self.problem);
        if let Some(text) = problem.as_ref().filter(|_| *known != problem) {
            tracing::error!(problem = %text, "not in effect");
        }
        *known = problem;
    }
}

/// What one pass over the namespaces came to.
#[derive(Debug, Default)]
struct Pass {
    ended: usize,
    failures: Vec<String>,
    unsure: bool,
}

impl Connections {
    /// Asks for a sweep. Returns at once.
    pub(crate) fn sweep(&self, scope: Scope) {
        let mut wanted = lock(&self.sweeps.scope);
        *wanted = *wanted | scope;
        drop(wanted);
        self.sweeps.news.notify_one();
    }

    /// Sweeps whenever it is asked for. Runs until the agent ends.
    pub(crate) async fn run_sweeps(self: Arc<Self>) {
        let mut again: Option<(Duration, Scope)> = None;
        loop {
            let (scope, is_second_look) = match again.take() {
                None => (self.sweeps.next().await, false),
                Some((delay, old)) => match timeout(delay, self.sweeps.next()).await {
                    Ok(new) => (new | old, false),
                    Err(_) => (old, true),
                },
            };
            let connections = Arc::clone(&self);
            let pass = tokio::task::spawn_blocking(move || connections.pass(scope))
                .await
                .unwrap_or_else(|panic| Pass {
                    failures: vec![panic.to_string()],
                    ..Pass::default()
                });
            if pass.ended > 0 {
                tracing::info!(connections = pass.ended, "ended what is no longer allowed");
            }
            again = if !pass.failures.is_empty() || pass.unsure {
                Some((RETRY, scope))
            } else if pass.ended > 0 || !is_second_look {
                Some((SECOND_LOOK, scope))
            } else {
                None
            };
            self.tally.tell(pass.failures.into_iter().next());
        }
    }

    /// How many were ended, by reason and policy.
    pub(crate) fn ended_counts(&self) -> Vec<EndedCount> {
        lock(&self.tally.counts)
            .iter()
            .map(|((reason, policy), count)| EndedCount {
                reason: (*reason).to_owned(),
                policy: self.scribe.policy(*policy),
                count: *count,
            })
            .collect()
    }

    /// Why connections that should be ended may not have been.
    pub(crate) fn problem(&self) -> Option<String> {
        lock(&self.tally.problem).clone()
    }

    /// Looks once at every connection of the scope, and ends those that the rules forbid.
    fn pass(&self, scope: Scope) -> Pass {
        let mut pass = Pass::default();
        let mut judge = Judge::new(&*self.view);
        for (uid, place) in self.places() {
            for protocol in scope.protocols() {
                for _ in 0..MAX_BATCHES {
                    match self.batch(&place, protocol, &mut judge, &mut pass) {
                        Ok(true) => {}
                        Ok(false) => break,
                        Err(error) => {
                            let text = format!(
                                "{uid}: connections that are no longer allowed may go on: {error}"
                            );
                            pass.failures.push(text);
                            break;
                        }
                    }
                }
            }
        }
        pass
    }

    /// Returns whether there may be more.
    fn batch(
        &self,
        place: &Mutex<SockDiag>,
        protocol: Protocol,
        judge: &mut Judge<'_, kernel::KernelView>,
        pass: &mut Pass,
    ) -> Result<bool, SweepError> {
        let mut forbidden = Vec::new();
        let mut met = HashSet::new();
        let mut failure: Option<KernelError> = None;
        let mut more = false;
        let dumped = self.dump(place, protocol, false, |connection| {
            match judge.judge(&connection) {
                Ok(Judgement::Stays) => {}
                Ok(Judgement::Unsure) => pass.unsure = true,
                Ok(Judgement::Ends(_)) if forbidden.len() == BATCH => more = true,
                // The kernel may tell one twice.
                Ok(Judgement::Ends(cause)) if met.insert(connection.socket.cookie) => {
                    forbidden.push((connection, cause));
                }
                Ok(Judgement::Ends(_)) => {}
                Err(error) => failure = Some(error),
            }
        })?;
        pass.unsure |= dumped.interrupted;
        for (connection, cause) in forbidden {
            pass.ended += usize::from(self.end(place, &connection, cause)?);
        }
        failure.map_or(Ok(more), |error| Err(error.into()))
    }

    /// Returns whether it was us.
    fn end(
        &self,
        place: &Mutex<SockDiag>,
        connection: &Connection,
        cause: Cause,
    ) -> io::Result<bool> {
        let is_stream = connection.protocol == Protocol::Tcp;
        // The kernel writes a closing record of a TCP connection, which gets the cause; of datagrams it does not.
        if is_stream {
            self.scribe.ended.note(connection.ends(), cause);
        }
        let outcome = lock(place).destroy(connection.protocol, &connection.socket);
        if is_stream && !matches!(outcome, Ok(true)) {
            self.scribe.ended.take(connection.ends());
        }
        if !outcome? {
            return Ok(false);
        }
        let event = connection.event(self.scribe.now_ns());
        self.scribe.ended(event, cause, !is_stream);
        let mut counts = lock(&self.tally.counts);
        let mut key = (cause.reason, cause.policy);
        if counts.len() >= MAX_TALLIED && !counts.contains_key(&key) {
            key.1 = 0;
        }
        *counts.entry(key).or_default() += 1;
        Ok(true)
    }
}

/// Why a namespace could not be swept.
#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error("the kernel's sockets: {0}")]
    Sockets(#[from] io::Error),
    #[error(transparent)]
    Rules(#[from] KernelError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn requests_that_come_together_are_one() {
        let requests = Requests::default();
        *lock(&requests.scope) = Scope::DATAGRAMS;
        requests.news.notify_one();
        *lock(&requests.scope) = Scope::DATAGRAMS | Scope::ALL;
        requests.news.notify_one();
        assert_eq!(requests.next().await, Scope::ALL);
        let none = timeout(Duration::from_millis(10), requests.next()).await;
        assert!(none.is_err(), "{none:?}");
    }

    #[test]
    fn a_scope_names_its_protocols() {
        let protocols = |scope: Scope| scope.protocols().collect::<Vec<_>>();
        assert_eq!(protocols(Scope::ALL), [Protocol::Tcp, Protocol::Udp]);
        assert_eq!(protocols(Scope::DATAGRAMS), [Protocol::Udp]);
        assert!(protocols(Scope::default()).is_empty());
    }
}
