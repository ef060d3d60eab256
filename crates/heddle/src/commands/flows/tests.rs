//! The filters, for every kind of record.

use api::report::FlowReporter;
use clap::Parser as _;

use super::*;
use crate::cli::{Cli, Command};

const NOW: Duration = Duration::from_secs(1_000_000);

/// One that was allowed and opened, ten seconds before [`NOW`].
pub(super) fn record() -> FlowRecord {
    let end = |name: &str, port| FlowEnd {
        namespace: "shop".into(),
        workload: name.into(),
        pod: format!("{name}-0"),
        identity: format!("spiffe://cluster.local/ns/shop/sa/{name}"),
        address: Some("10.0.0.1".parse().unwrap()),
        port,
    };
    FlowRecord {
        sequence: 1,
        time_ms: 999_990_000,
        node: "node-1".into(),
        reporter: FlowReporter::Source,
        event: FlowEventKind::Opened,
        state: "established".into(),
        source: end("client", 40_000),
        destination: end("web", 8000),
        service: Some("shop/front".into()),
        protocol: "TCP".into(),
        spliced: false,
        path: "direct".into(),
        verdict: Verdict::Allowed,
        reason: "policy-allow".into(),
        policy: Some("shop/only".into()),
        bytes_sent: 0,
        bytes_received: 0,
        rtt_us: 20,
        retransmits: 0,
        duration_us: 10,
        connection: 7,
    }
}

fn of(event: FlowEventKind, verdict: Verdict, reason: &str) -> FlowRecord {
    FlowRecord {
        event,
        verdict,
        reason: reason.into(),
        ..record()
    }
}

fn every_kind() -> [FlowRecord; 6] {
    use FlowEventKind as Kind;
    [
        record(),
        of(Kind::Closed, Verdict::Allowed, "policy-allow"),
        of(Kind::Failed, Verdict::Allowed, "policy-allow"),
        of(Kind::Open, Verdict::Allowed, "no-policy"),
        of(Kind::Ended, Verdict::Denied, "policy-deny"),
        of(Kind::Refused, Verdict::Denied, "no-allow-matched"),
    ]
}

/// The kinds of record that pass.
fn passing(arguments: &[&str]) -> Vec<FlowEventKind> {
    let all = ["heddle", "flows"].iter().chain(arguments);
    let Command::Flows(args) = Cli::try_parse_from(all).unwrap().command else {
        panic!("another command");
    };
    let records = every_kind();
    let passed = records.iter().filter(|record| wanted(&args, record, NOW));
    passed.map(|record| record.event).collect()
}

#[test]
fn workloads_and_services_filter_every_kind() {
    for all in [
        &[][..],
        &["--from", "client"],
        &["--from", "shop/client-0"],
        &["--to", "web"],
        &["--to", "shop/front"],
        &["--since", "11s"],
        &["--from", "client", "--to", "web", "--since", "1m"],
    ] {
        assert_eq!(passing(all).len(), 6, "{all:?}");
    }
    for none in [
        &["--from", "web"][..],
        &["--to", "client"],
        &["--from", "other/client"],
        &["--since", "9s"],
        &["--reason", "no-endpoint"],
    ] {
        assert_eq!(passing(none), [], "{none:?}");
    }
}

#[test]
fn verdicts_and_reasons_filter_every_kind() {
    use FlowEventKind as Kind;
    assert_eq!(
        passing(&["--verdict", "allowed"]),
        [Kind::Opened, Kind::Closed, Kind::Failed, Kind::Open]
    );
    assert_eq!(
        passing(&["--verdict", "denied"]),
        [Kind::Ended, Kind::Refused]
    );
    assert_eq!(passing(&["--reason", "policy-deny"]), [Kind::Ended]);
    assert_eq!(passing(&["--reason", "no-policy"]), [Kind::Open]);
    assert_eq!(
        passing(&["--reason", "no-allow-matched", "--verdict", "denied"]),
        [Kind::Refused]
    );
}

#[test]
fn every_kind_has_a_line() {
    let lines = every_kind().map(|record| text(&record));
    for (line, word) in lines
        .iter()
        .zip(["opened", "closed", "failed", "open", "ENDED", "REFUSED"])
    {
        assert!(
            line.contains(&format!(" {word:<7} shop/client-0@")),
            "{line}"
        );
        let has_figures = line.contains(" sent=");
        assert_eq!(
            has_figures,
            ["closed", "open", "ENDED"].contains(&word),
            "{line}"
        );
    }
    assert!(lines[3].contains(" state=established"), "{}", lines[3]);
}
