//! What each end saw, and whether the two accounts fit together.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{content::mix, engine::Totals, plan::Scenario};

/// Failures that are kept in words; all are counted.
pub(super) const MAX_FAILURES: usize = 40;

/// One end's account of a number of connections.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tally {
    /// Connections that went as planned.
    pub(super) scenarios: BTreeMap<Scenario, Sum>,
    /// Of those that were broken off: how much each end had sent and received. As many as a round has at most.
    broken_off: BTreeMap<u64, (u64, u64)>,
    /// Connections that were broken off before anything was known of them.
    pub(super) unknown: u64,
    /// Blocking calls that came back before their time.
    pub(super) early: u64,
    /// What was wrong, in words.
    pub(super) failures: Vec<String>,
    /// How much was wrong.
    pub(super) failed: u64,
}

/// Connections of one scenario.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sum {
    pub(super) connections: u64,
    /// Differs if they were not the same connections.
    numbers: u64,
    pub(super) sent: u64,
    pub(super) received: u64,
}

impl Tally {
    /// A connection went as planned.
    pub(super) fn add(&mut self, scenario: Scenario, number: u64, totals: Totals) {
        let sum = self.scenarios.entry(scenario).or_default();
        sum.connections += 1;
        sum.numbers = sum.numbers.wrapping_add(mix(number));
        sum.sent += totals.sent;
        sum.received += totals.received;
        self.early += totals.early;
        if scenario.is_broken_off() {
            self.broken_off
                .insert(number, (totals.sent, totals.received));
        }
    }

    /// A connection did not.
    pub(super) fn fail(&mut self, what: String) {
        self.failed += 1;
        if self.failures.len() < MAX_FAILURES {
            self.failures.push(what);
        }
    }

    /// Connections that went as planned, or were broken off at once.
    pub(super) fn connections(&self) -> u64 {
        self.scenarios.values().map(|sum| sum.connections).sum()
    }

    /// Takes another account in, but for the single connections.
    pub(super) fn absorb(&mut self, other: Self) {
        for (scenario, more) in other.scenarios {
            let sum = self.scenarios.entry(scenario).or_default();
            sum.connections += more.connections;
            sum.numbers = sum.numbers.wrapping_add(more.numbers);
            sum.sent += more.sent;
            sum.received += more.received;
        }
        self.unknown += other.unknown;
        self.early += other.early;
        self.failed += other.failed;
        let room = MAX_FAILURES.saturating_sub(self.failures.len());
        self.failures.extend(other.failures.into_iter().take(room));
    }

    /// Takes a part of the same account in.
    pub(super) fn join(&mut self, mut part: Self) {
        self.broken_off.append(&mut part.broken_off);
        self.absorb(part);
    }

    /// What does not fit between the client's account and the server's.
    pub(super) fn differences(&self, server: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let none = Sum::default();
        let scenarios = self.scenarios.keys().chain(server.scenarios.keys());
        let scenarios: std::collections::BTreeSet<_> = scenarios.collect();
        for scenario in scenarios {
            if *scenario == Scenario::ResetAtOnce {
                continue;
            }
            let client = self.scenarios.get(scenario).unwrap_or(&none);
            let server = server.scenarios.get(scenario).unwrap_or(&none);
            let numbers_differ = client.numbers != server.numbers && scenario.has_header();
            if client.connections != server.connections || numbers_differ {
                found.push(format!(
                    "{}: the client made {} connections, the server saw {}{}",
                    scenario.name(),
                    client.connections,
                    server.connections,
                    if numbers_differ {
                        ", and not the same ones"
                    } else {
                        ""
                    }
                ));
            }
            let bytes_differ = (client.sent, client.received) != (server.received, server.sent);
            if bytes_differ && !scenario.is_broken_off() {
                found.push(format!(
                    "{}: the client sent {} bytes and received {}, the server received {} and sent {}",
                    scenario.name(),
                    client.sent,
                    client.received,
                    server.received,
                    server.sent
                ));
            }
        }
        for (number, (sent, received)) in &self.broken_off {
            let Some((server_sent, server_received)) = server.broken_off.get(number) else {
                continue;
            };
            if server_received > sent || received > server_sent {
                found.push(format!(
                    "connection {number}: more bytes came than were sent: client {sent} and {received}, \
                     server {server_sent} and {server_received}"
                ));
            }
        }
        let at_once = self.scenarios.get(&Scenario::ResetAtOnce);
        let at_once = at_once.map_or(0, |sum| sum.connections);
        if server.unknown > at_once {
            found.push(format!(
                "{} connections were broken off before the header, {at_once} by the client",
                server.unknown
            ));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn totals(sent: u64, received: u64) -> Totals {
        Totals {
            sent,
            received,
            early: 0,
        }
    }

    fn pair() -> [Tally; 2] {
        let mut ends = [Tally::default(), Tally::default()];
        for number in 0..10 {
            ends[0].add(Scenario::Short, number, totals(100, 200));
            ends[1].add(Scenario::Short, number, totals(200, 100));
        }
        ends[0].add(Scenario::ResetByClient, 10, totals(500, 3));
        ends[1].add(Scenario::ResetByClient, 10, totals(9, 400));
        ends[0].add(Scenario::ResetAtOnce, 11, totals(0, 0));
        ends[1].unknown = 1;
        ends
    }

    #[test]
    fn accounts_that_fit_differ_in_nothing() {
        let [client, server] = pair();
        assert_eq!(client.differences(&server), Vec::<String>::new());
    }

    #[test]
    fn whatever_does_not_fit_is_found() {
        let cases: [fn(&mut Tally); 6] = [
            |server| server.add(Scenario::Short, 12, totals(0, 0)),
            |server| {
                let sum = server.scenarios.get_mut(&Scenario::Short).unwrap();
                sum.connections -= 1;
            },
            |server| server.scenarios.get_mut(&Scenario::Short).unwrap().numbers += 1,
            |server| server.scenarios.get_mut(&Scenario::Short).unwrap().received -= 1,
            |server| server.broken_off.extend([(10, (2, 400))]),
            |server| server.unknown = 2,
        ];
        for (index, spoil) in cases.into_iter().enumerate() {
            let [client, mut server] = pair();
            spoil(&mut server);
            let found = client.differences(&server);
            assert_eq!(found.len(), 1, "{index}: {found:?}");
        }
    }

    #[test]
    fn failures_are_all_counted_and_some_kept() {
        let mut tally = Tally::default();
        for number in 0..1000 {
            tally.fail(number.to_string());
        }
        let mut whole = Tally::default();
        whole.fail("first".into());
        whole.absorb(tally);
        assert_eq!((whole.failed, whole.failures.len()), (1001, MAX_FAILURES));
    }
}
