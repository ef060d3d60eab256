//! `heddle flows --summary`: connections by client, server, path and verdict, those that are open with their figures
//! as they stand.

use std::collections::{BTreeMap, HashMap};

use api::report::{FlowEnd, FlowEventKind, FlowRecord, FlowReporter, Verdict};
use serde::Serialize;

use crate::{
    cli::Output,
    output::{self, bytes, micros},
};

/// Connections by client, server, path and verdict.
#[derive(Default)]
pub(super) struct Summary {
    rows: BTreeMap<Key, Row>,
    /// Connections that are still open, by node and number.
    open: HashMap<(String, u64), OpenConnection>,
}

/// What is known of a connection that has not ended.
struct OpenConnection {
    key: Key,
    /// Of its handshake, until newer figures come.
    rtt_us: u32,
    sent: u64,
    received: u64,
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Key {
    from: String,
    to: String,
    path: String,
    verdict: String,
    reason: String,
    policy: String,
}

#[derive(Default)]
struct Row {
    connections: u64,
    open: u64,
    sent: u64,
    received: u64,
    rtts: Vec<u32>,
}

/// A row as JSON.
#[derive(Serialize)]
struct SummaryLine<'a> {
    #[serde(flatten)]
    key: &'a Key,
    connections: u64,
    open: u64,
    bytes_sent: u64,
    bytes_received: u64,
    rtt_p50_us: u32,
}

impl Summary {
    pub(super) fn add(&mut self, record: &FlowRecord) {
        if is_told_twice(record) {
            return;
        }
        let key = Key::of(record);
        let row = self.rows.entry(key.clone()).or_default();
        let connection = (record.node.clone(), record.connection);
        match record.event {
            FlowEventKind::Opened | FlowEventKind::Open => {
                let now = OpenConnection {
                    key,
                    rtt_us: record.rtt_us,
                    sent: record.bytes_sent,
                    received: record.bytes_received,
                };
                // Its opening may be in the history, or may be forgotten by it.
                if self.open.insert(connection, now).is_none() {
                    row.connections += 1;
                    row.open += 1;
                }
            }
            FlowEventKind::Closed | FlowEventKind::Ended => {
                let opened = self.open.remove(&connection);
                row.sent += record.bytes_sent;
                row.received += record.bytes_received;
                row.rtts
                    .extend((record.rtt_us > 0).then_some(record.rtt_us));
                // The history may begin after the opening.
                row.connections += 1;
                // One that was ended for another reason than it was allowed for is told under that one.
                if let Some(row) = opened.and_then(|open| self.rows.get_mut(&open.key)) {
                    row.open -= 1;
                    row.connections -= 1;
                }
            }
            FlowEventKind::Failed | FlowEventKind::Refused => row.connections += 1,
        }
    }

    /// The rows, with what is still open counted in.
    fn lines(&mut self) -> Vec<SummaryLine<'_>> {
        for open in std::mem::take(&mut self.open).into_values() {
            if let Some(row) = self.rows.get_mut(&open.key) {
                row.rtts.extend((open.rtt_us > 0).then_some(open.rtt_us));
                row.sent += open.sent;
                row.received += open.received;
            }
        }
        self.rows
            .iter_mut()
            .filter(|(_, row)| row.connections > 0)
            .map(|(key, row)| row.line(key))
            .collect()
    }

    pub(super) fn print(mut self, form: Output) -> anyhow::Result<()> {
        let lines = self.lines();
        if form == Output::Json {
            return output::json(&lines);
        }
        let mut table = output::table(&[
            "FROM",
            "TO",
            "PATH",
            "VERDICT",
            "CONNECTIONS",
            "OPEN",
            "SENT",
            "RECEIVED",
            "P50 RTT",
            "REASON",
            "POLICY",
        ]);
        for line in lines {
            table.add_row(vec![
                line.key.from.clone(),
                line.key.to.clone(),
                line.key.path.clone(),
                line.key.verdict.clone(),
                line.connections.to_string(),
                line.open.to_string(),
                bytes(line.bytes_sent),
                bytes(line.bytes_received),
                micros(u64::from(line.rtt_p50_us)),
                line.key.reason.clone(),
                line.key.policy.clone(),
            ]);
        }
        output::print(&table);
        Ok(())
    }
}

/// Both nodes tell of a connection that went through a tunnel: the server's knows by which policy, and counts.
fn is_told_twice(record: &FlowRecord) -> bool {
    record.path == "tunnel"
        && record.reporter == FlowReporter::Source
        && record.event != FlowEventKind::Failed
}

impl Key {
    fn of(record: &FlowRecord) -> Self {
        let end = |end: &FlowEnd| match (end.workload.as_str(), end.address) {
            ("", Some(address)) => address.to_string(),
            ("", None) => "outside".into(),
            (workload, _) => format!("{}/{workload}", end.namespace),
        };
        let destination = match (&record.service, record.destination.workload.is_empty()) {
            (Some(service), true) => service.clone(),
            _ => end(&record.destination),
        };
        Self {
            from: end(&record.source),
            to: format!("{destination}:{}", record.destination.port),
            path: if record.verdict == Verdict::Denied {
                "-".into()
            } else {
                record.path.clone()
            },
            verdict: match record.verdict {
                Verdict::Allowed => "allowed".into(),
                Verdict::Denied => "DENIED".into(),
            },
            reason: record.reason.clone(),
            policy: record.policy.clone().unwrap_or_else(|| "-".into()),
        }
    }
}

impl Row {
    fn line<'a>(&mut self, key: &'a Key) -> SummaryLine<'a> {
        self.rtts.sort_unstable();
        SummaryLine {
            key,
            connections: self.connections,
            open: self.open,
            bytes_sent: self.sent,
            bytes_received: self.received,
            rtt_p50_us: self.rtts.get(self.rtts.len() / 2).copied().unwrap_or(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::flows::tests::record;

    fn figures(event: FlowEventKind, connection: u64, sent: u64, received: u64) -> FlowRecord {
        FlowRecord {
            event,
            connection,
            bytes_sent: sent,
            bytes_received: received,
            ..record()
        }
    }

    #[test]
    fn open_connections_are_counted_once_with_their_figures() {
        let mut summary = Summary::default();
        for record in [
            figures(FlowEventKind::Opened, 1, 0, 0),
            figures(FlowEventKind::Opened, 2, 0, 0),
            figures(FlowEventKind::Closed, 1, 10, 20),
            // Begun before the history.
            figures(FlowEventKind::Closed, 3, 1, 2),
            figures(FlowEventKind::Open, 2, 100, 200),
            figures(FlowEventKind::Open, 4, 1000, 2000),
        ] {
            summary.add(&record);
        }
        let lines = summary.lines();
        assert_eq!(lines.len(), 1);
        assert_eq!((lines[0].connections, lines[0].open), (4, 2));
        assert_eq!((lines[0].bytes_sent, lines[0].bytes_received), (1111, 2222));
    }

    #[test]
    fn a_tunnelled_connection_counts_once() {
        let mut summary = Summary::default();
        for reporter in [FlowReporter::Source, FlowReporter::Destination] {
            summary.add(&FlowRecord {
                reporter,
                path: "tunnel".into(),
                ..figures(FlowEventKind::Closed, 1, 10, 20)
            });
        }
        let lines = summary.lines();
        assert_eq!(lines.len(), 1);
        assert_eq!((lines[0].connections, lines[0].bytes_sent), (1, 10));
    }

    #[test]
    fn what_was_ended_is_told_under_the_reason_of_its_end() {
        let mut summary = Summary::default();
        summary.add(&figures(FlowEventKind::Opened, 1, 0, 0));
        summary.add(&FlowRecord {
            verdict: Verdict::Denied,
            reason: "policy-deny".into(),
            ..figures(FlowEventKind::Ended, 1, 5, 6)
        });
        let lines = summary.lines();
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].key.reason, "policy-deny");
        assert_eq!((lines[0].connections, lines[0].open), (1, 0));
        assert_eq!(lines[0].bytes_received, 6);
    }
}
