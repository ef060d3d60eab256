//! `heddle flows`.

use std::{
    collections::{BTreeMap, HashMap},
    io::Write as _,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use api::report::{FlowEnd, FlowEventKind, FlowRecord, Verdict};
use serde::Serialize;

use crate::{
    cli::{FlowsArgs, Output, VerdictFilter},
    client::Lines,
    mesh_api,
    output::{self, bytes, micros, time_of_day},
    select,
};

pub(super) async fn run(args: FlowsArgs) -> anyhow::Result<ExitCode> {
    let socket = mesh_api::socket(&args.common.mesh)?;
    let mut lines = Lines::get(&socket, &format!("/v1/flows?follow={}", args.follow)).await?;
    let mut summary = Summary::default();
    while let Some(record) = lines.next::<FlowRecord>().await? {
        if !wanted(&args, &record) {
            continue;
        }
        if args.summary {
            summary.add(&record);
        } else if !print(&record, args.common.output)? {
            break;
        }
    }
    if args.summary {
        summary.print(args.common.output)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn wanted(args: &FlowsArgs, record: &FlowRecord) -> bool {
    let matches = |wanted: &str, end: &FlowEnd| {
        select::matches(wanted, &end.namespace, &end.workload, &end.pod)
    };
    let service = |wanted: &str| {
        record
            .service
            .as_deref()
            .and_then(|name| name.split_once('/'))
            .is_some_and(|(namespace, name)| select::matches(wanted, namespace, name, name))
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    args.from
        .as_deref()
        .is_none_or(|from| matches(from, &record.source))
        && args
            .to
            .as_deref()
            .is_none_or(|to| matches(to, &record.destination) || service(to))
        && args.verdict.is_none_or(|verdict| {
            (verdict == VerdictFilter::Allowed) == (record.verdict == Verdict::Allowed)
        })
        && args
            .reason
            .as_deref()
            .is_none_or(|reason| record.reason == reason)
        && args
            .since
            .is_none_or(|since| u128::from(record.time_ms) + since.as_millis() >= now.as_millis())
}

/// Returns whether someone still reads.
fn print(record: &FlowRecord, form: Output) -> anyhow::Result<bool> {
    let line = match form {
        Output::Json => serde_json::to_string(record)?,
        Output::Table => text(record),
    };
    let mut stdout = std::io::stdout().lock();
    match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn text(record: &FlowRecord) -> String {
    let event = match record.event {
        FlowEventKind::Opened => "opened",
        FlowEventKind::Closed => "closed",
        FlowEventKind::Failed => "failed",
        FlowEventKind::Refused => "REFUSED",
    };
    let service = record
        .service
        .as_ref()
        .map(|name| format!(" (service {name})"))
        .unwrap_or_default();
    let policy = record
        .policy
        .as_ref()
        .map(|name| format!(" by {name}"))
        .unwrap_or_default();
    let mut line = format!(
        "{} {event:<7} {} -> {}{service} path={} reason={}{policy}",
        time_of_day(record.time_ms),
        full(&record.source),
        full(&record.destination),
        record.path,
        record.reason,
    );
    if record.event == FlowEventKind::Closed {
        line.push_str(&format!(
            " sent={} received={} rtt={} retransmits={} lasted={}",
            bytes(record.bytes_sent),
            bytes(record.bytes_received),
            micros(u64::from(record.rtt_us)),
            record.retransmits,
            micros(record.duration_us),
        ));
    }
    line
}

/// Replica, address and identity.
fn full(end: &FlowEnd) -> String {
    let mut text = if end.pod.is_empty() {
        "outside".to_owned()
    } else {
        format!("{}/{}", end.namespace, end.pod)
    };
    if let Some(address) = end.address {
        let socket = std::net::SocketAddr::new(address, end.port);
        text.push_str(&format!("@{socket}"));
    }
    if !end.identity.is_empty() {
        text.push_str(&format!(
            "[{}]",
            end.identity.trim_start_matches("spiffe://")
        ));
    }
    text
}

/// Connections by client, server, path and verdict.
#[derive(Default)]
struct Summary {
    rows: BTreeMap<Key, Row>,
    /// Connections that are still open, with the round-trip time of their handshake.
    open: HashMap<(String, u64), (Key, u32)>,
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
    fn add(&mut self, record: &FlowRecord) {
        let key = Key::of(record);
        let row = self.rows.entry(key.clone()).or_default();
        let connection = (record.node.clone(), record.connection);
        match record.event {
            FlowEventKind::Opened => {
                row.connections += 1;
                row.open += 1;
                self.open.insert(connection, (key, record.rtt_us));
            }
            FlowEventKind::Closed => {
                // The history may begin after the opening.
                if self.open.remove(&connection).is_some() {
                    row.open -= 1;
                } else {
                    row.connections += 1;
                }
                row.sent += record.bytes_sent;
                row.received += record.bytes_received;
                row.rtts
                    .extend((record.rtt_us > 0).then_some(record.rtt_us));
            }
            FlowEventKind::Failed | FlowEventKind::Refused => row.connections += 1,
        }
    }

    fn print(&mut self, form: Output) -> anyhow::Result<()> {
        for (key, rtt) in self.open.values() {
            if let Some(row) = self.rows.get_mut(key) {
                row.rtts.extend((*rtt > 0).then_some(*rtt));
            }
        }
        let lines: Vec<SummaryLine<'_>> = self
            .rows
            .iter_mut()
            .map(|(key, row)| row.line(key))
            .collect();
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
