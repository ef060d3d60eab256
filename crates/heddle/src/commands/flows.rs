//! `heddle flows`: one line per record. The table of `--summary` is in [`summary`].

mod summary;

use std::{
    io::Write as _,
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use api::report::{FlowEnd, FlowEventKind, FlowRecord, Verdict};

use crate::{
    cli::{FlowsArgs, Output, VerdictFilter},
    client::Lines,
    mesh_api,
    output::{bytes, micros, time_of_day},
    select,
};

pub(super) async fn run(args: FlowsArgs) -> anyhow::Result<ExitCode> {
    let socket = mesh_api::socket(&args.common.mesh)?;
    let open = match (args.open, args.follow) {
        (true, _) => "only",
        (false, false) => "too",
        // Who follows hears of their end.
        (false, true) => "no",
    };
    let path = format!("/v1/flows?follow={}&open={open}", args.follow);
    let mut lines = Lines::get(&socket, &path).await?;
    let mut summary = summary::Summary::default();
    while let Some(record) = lines.next::<FlowRecord>().await? {
        if !wanted(&args, &record, now()) {
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

fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
}

/// Whether a record passes the filters; `now` is the time since 1970.
fn wanted(args: &FlowsArgs, record: &FlowRecord, now: Duration) -> bool {
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
        FlowEventKind::Open => "open",
        FlowEventKind::Ended => "ENDED",
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
    let spliced = if record.spliced { " (spliced)" } else { "" };
    let mut line = format!(
        "{} {event:<7} {} -> {}{service} path={}{spliced} reason={}{policy}",
        time_of_day(record.time_ms),
        full(&record.source),
        full(&record.destination),
        record.path,
        record.reason,
    );
    if record.event == FlowEventKind::Open {
        line.push_str(&format!(" state={}", record.state));
    }
    if matches!(
        record.event,
        FlowEventKind::Closed | FlowEventKind::Ended | FlowEventKind::Open
    ) {
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

#[cfg(test)]
mod tests;
