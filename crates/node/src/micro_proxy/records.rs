//! The flow records of connections that the agent carries: each has one on the client's node and one on the server's.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use api::report::{FlowEnd, FlowEventKind, FlowRecord, FlowReporter, Verdict};
use kernel::Reason;

use crate::{flows::Scribe, names::WorkloadNames, policy::Judgement};

/// Numbers of the kernel's connections are socket cookies, which count up from one.
const FIRST_NUMBER: u64 = 1 << 63;
static NEXT_NUMBER: AtomicU64 = AtomicU64::new(FIRST_NUMBER);

/// What is known of a connection before anything has happened to it.
#[derive(Debug)]
pub(crate) struct Subject {
    pub(crate) reporter: FlowReporter,
    pub(crate) source: FlowEnd,
    pub(crate) destination: FlowEnd,
    /// `NAMESPACE/NAME`.
    pub(crate) service: Option<String>,
    /// What carries it: `tunnel`, or `agent` for a stranger's.
    pub(crate) path: &'static str,
}

/// How a connection that was established came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Figures {
    /// By the client.
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

/// The record in the making. Each way to its end takes it.
pub(crate) struct Record {
    scribe: Arc<Scribe>,
    record: FlowRecord,
    begun: Instant,
}

impl Record {
    pub(crate) fn new(scribe: &Arc<Scribe>, subject: Subject) -> Self {
        Self {
            scribe: Arc::clone(scribe),
            begun: Instant::now(),
            record: FlowRecord {
                sequence: 0,
                time_ms: 0,
                node: String::new(),
                reporter: subject.reporter,
                event: FlowEventKind::Opened,
                state: "established".into(),
                source: subject.source,
                destination: subject.destination,
                service: subject.service,
                protocol: "TCP".into(),
                path: subject.path.into(),
                spliced: false,
                verdict: Verdict::Allowed,
                reason: Reason::None.name().into(),
                policy: None,
                bytes_sent: 0,
                bytes_received: 0,
                rtt_us: 0,
                retransmits: 0,
                duration_us: 0,
                connection: NEXT_NUMBER.fetch_add(1, Ordering::Relaxed),
            },
        }
    }

    /// It was not let through.
    pub(crate) fn refused(mut self, reason: &str, policy: Option<String>) {
        self.record.event = FlowEventKind::Refused;
        self.record.state.clear();
        self.record.path = "none".into();
        self.record.verdict = Verdict::Denied;
        self.record.reason = reason.into();
        self.record.policy = policy;
        self.write();
    }

    /// It was let through, but did not come about.
    pub(crate) fn failed(mut self, reason: &str) {
        self.record.event = FlowEventKind::Failed;
        self.record.state = "closed".into();
        self.record.reason = reason.into();
        self.write();
    }

    /// It is established, because of this.
    pub(crate) fn opened(&mut self, reason: &str, policy: Option<String>) {
        self.record.reason = reason.into();
        self.record.policy = policy;
        self.record.duration_us = micros(self.begun);
        self.scribe.carried(self.record.clone());
    }

    /// It has ended; `cause` says so if policy has ended it.
    pub(crate) fn closed(mut self, figures: Figures, cause: Option<&Judgement>) {
        self.record.event = FlowEventKind::Closed;
        self.record.state = "closed".into();
        self.record.bytes_sent = figures.sent;
        self.record.bytes_received = figures.received;
        if let Some(cause) = cause {
            self.record.event = FlowEventKind::Ended;
            self.record.verdict = Verdict::Denied;
            self.record.reason = cause.reason.name().into();
            self.record.policy.clone_from(&cause.policy);
        }
        self.write();
    }

    fn write(mut self) {
        self.record.duration_us = micros(self.begun);
        self.scribe.carried(self.record);
    }
}

/// One end, by its names.
pub(crate) fn end(names: WorkloadNames, address: SocketAddr) -> FlowEnd {
    FlowEnd {
        namespace: names.namespace,
        workload: names.workload,
        pod: names.pod,
        identity: names.identity,
        address: Some(address.ip().to_canonical()),
        port: address.port(),
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
