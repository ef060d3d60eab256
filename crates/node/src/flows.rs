//! Flow records: out of the kernel's ring buffer, with names put to the numbers, into a bounded history, to
//! followers, and into metrics.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use api::report::{FlowEnd, FlowEventKind, FlowRecord, FlowReporter, Verdict};
use kernel::{Datagrams, FlowEvent, FlowKind, FlowReader, Reason};
use linux::readable::Readable;
use telemetry::tcp::{DeniedLabels, Reporter, SecurityPolicy, TcpLabels, TcpMetrics};
use tokio::sync::{broadcast, watch};

use crate::{
    NodeError,
    connections::{Cause, Ended},
    names::NameBook,
};

/// Records kept per node. The oldest make room.
const HISTORY: usize = 65_536;
/// Records a follower may be behind before it misses some.
const FOLLOW_QUEUE: usize = 8192;
/// How often the ring buffer is read when the kernel sees no reason to wake us.
const LOOK: Duration = Duration::from_millis(100);
/// How long an agent that has just started waits for names before it writes records without them.
const NAMES_PATIENCE: Duration = Duration::from_secs(10);
/// Datagrams have no end: after this long without one, what went between two sockets is a record. (What exporters of
/// flows call the inactive timeout, 15 s by default in most.)
const DATAGRAMS_OVER: Duration = Duration::from_secs(15);
/// How often it is looked for such ends.
const DATAGRAMS_LOOK: Duration = Duration::from_secs(1);
/// Records handled before other tasks get their turn.
const BATCH: usize = 1024;

/// The node's flow records.
#[derive(Debug)]
pub(crate) struct FlowLog {
    history: Mutex<VecDeque<Arc<FlowRecord>>>,
    live: broadcast::Sender<Arc<FlowRecord>>,
    sequence: AtomicU64,
}

impl FlowLog {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            history: Mutex::new(VecDeque::new()),
            live: broadcast::channel(FOLLOW_QUEUE).0,
            sequence: AtomicU64::new(0),
        })
    }

    /// The records after a sequence number, and those to come.
    pub(crate) fn since(
        &self,
        sequence: u64,
    ) -> (Vec<Arc<FlowRecord>>, broadcast::Receiver<Arc<FlowRecord>>) {
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let old = history
            .iter()
            .filter(|record| record.sequence > sequence)
            .cloned()
            .collect();
        (old, self.live.subscribe())
    }

    fn push(&self, mut record: FlowRecord) {
        record.sequence = self.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        let record = Arc::new(record);
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        if history.len() == HISTORY {
            history.pop_front();
        }
        history.push_back(Arc::clone(&record));
        // No follower is no loss: the history has it.
        let _ = self.live.send(record);
    }
}

/// Turns kernel events into records. Runs until the agent ends. What happened while an agent was away waits in the
/// kernel until `names_known` is true, so that it gets its names.
pub(crate) async fn read(
    mut reader: FlowReader,
    scribe: Arc<Scribe>,
    mut names_known: watch::Receiver<bool>,
) -> Result<(), NodeError> {
    // Without a control plane there may never be names: numbers are better than nothing.
    let _ = tokio::time::timeout(NAMES_PATIENCE, names_known.wait_for(|known| *known)).await;
    let mut looked = Instant::now();
    let watch = Readable::watch(&reader).map_err(NodeError::io("watch the flow records"))?;
    loop {
        // Either the buffer fills quickly and the kernel says so, or it is time to look.
        if let Ok(outcome) = tokio::time::timeout(LOOK, watch.wait()).await {
            outcome.map_err(NodeError::io("wait for flow records"))?;
        }
        loop {
            let events: Vec<FlowEvent> = reader.by_ref().take(BATCH).collect();
            for event in &events {
                scribe.write(event);
            }
            if events.len() < BATCH {
                break;
            }
            tokio::task::yield_now().await;
        }
        if looked.elapsed() >= DATAGRAMS_LOOK {
            looked = Instant::now();
            scribe.write_ended(&mut reader.datagrams)?;
        }
    }
}

/// Puts names to the kernel's numbers.
pub(crate) struct Scribe {
    log: Arc<FlowLog>,
    clock: Clock,
    names: Arc<NameBook>,
    metrics: TcpMetrics,
    node: String,
    /// Why connections were ended whose last record is still to come.
    pub(crate) ended: Ended,
}

impl Scribe {
    pub(crate) fn new(
        log: Arc<FlowLog>,
        names: Arc<NameBook>,
        metrics: TcpMetrics,
        node: String,
    ) -> Arc<Self> {
        Arc::new(Self {
            log,
            clock: Clock::new(),
            names,
            metrics,
            node,
            ended: Ended::default(),
        })
    }

    fn write(&self, event: &FlowEvent) {
        let Some(kind) = event.kind() else {
            return;
        };
        let mut record = self.record(event, kind);
        if kind == FlowKind::Closed
            && !event.is_datagram()
            && let Some(cause) = self.ended.take(ends(event))
        {
            self.tell(&mut record, cause);
        }
        // The standard metrics are of TCP; refusals are Heddle's own, of everything.
        if !event.is_datagram() || record.event == FlowEventKind::Refused {
            self.count(&record);
        }
        self.log.push(record);
    }

    /// The record of a connection that is open, as it would be written at this moment.
    pub(crate) fn open(&self, event: FlowEvent, state: &str) -> FlowRecord {
        FlowRecord {
            event: FlowEventKind::Open,
            state: state.to_owned(),
            ..self.record(&event, FlowKind::Opened)
        }
    }

    /// Counts a connection that was ended because it is no longer allowed; writes its record if the kernel will not.
    pub(crate) fn ended(&self, event: FlowEvent, cause: Cause, write: bool) {
        let mut record = self.record(&event, FlowKind::Closed);
        self.tell(&mut record, cause);
        self.metrics.ended(&denied_labels(&record));
        if write {
            self.log.push(record);
        }
    }

    /// Counts and keeps what happened to a connection that the agent carries. Node, time and number are filled in.
    pub(crate) fn carried(&self, mut record: FlowRecord) {
        record.node.clone_from(&self.node);
        record.time_ms = self.clock.wall_ms(monotonic_ns());
        if record.event == FlowEventKind::Ended {
            self.metrics.ended(&denied_labels(&record));
        }
        self.count(&record);
        self.log.push(record);
    }

    fn tell(&self, record: &mut FlowRecord, cause: Cause) {
        record.event = FlowEventKind::Ended;
        record.verdict = Verdict::Denied;
        record.reason = cause.reason.to_owned();
        record.policy = self.names.policy(cause.policy);
    }

    /// A policy's name, if it has one here.
    pub(crate) fn policy(&self, id: u32) -> Option<String> {
        self.names.policy(id)
    }

    /// The kernel's time, CLOCK_MONOTONIC.
    pub(crate) fn now_ns(&self) -> u64 {
        monotonic_ns()
    }

    /// Writes the records of datagrams that seem to be over.
    fn write_ended(&self, datagrams: &mut Datagrams) -> Result<(), NodeError> {
        let latest = monotonic_ns().saturating_sub(DATAGRAMS_OVER.as_nanos() as u64);
        for (tuple, seen) in datagrams.all()? {
            if seen.last_ns < latest
                && let Some(last) = datagrams.take(&tuple)?
            {
                self.write(&FlowEvent::of_datagrams(&tuple, &last));
            }
        }
        Ok(())
    }

    fn record(&self, event: &FlowEvent, kind: FlowKind) -> FlowRecord {
        let refused = matches!(kind, FlowKind::RefusedConnect | FlowKind::RefusedIngress);
        let reason = Reason::from_number(event.reason);
        FlowRecord {
            sequence: 0,
            time_ms: self.clock.wall_ms(event.time_ns),
            node: self.node.clone(),
            // The kernel decides where a connection begins, and writes its record there; only a stranger's is the server's.
            reporter: if kind == FlowKind::RefusedIngress || event.source_workload == 0 {
                FlowReporter::Destination
            } else {
                FlowReporter::Source
            },
            event: match kind {
                FlowKind::Opened => FlowEventKind::Opened,
                FlowKind::Closed if event.established() => FlowEventKind::Closed,
                FlowKind::Closed => FlowEventKind::Failed,
                FlowKind::RefusedConnect | FlowKind::RefusedIngress => FlowEventKind::Refused,
            },
            state: match kind {
                FlowKind::Opened => "established",
                FlowKind::Closed => "closed",
                FlowKind::RefusedConnect | FlowKind::RefusedIngress => "",
            }
            .into(),
            source: self.end(event.source_workload, event.source, event.source_port),
            destination: self.end(
                event.destination_workload,
                event.destination,
                event.destination_port,
            ),
            service: self.names.service(event.service),
            protocol: if event.is_datagram() { "UDP" } else { "TCP" }.into(),
            path: if refused { "none" } else { "direct" }.into(),
            spliced: !refused && event.spliced(),
            verdict: if refused {
                Verdict::Denied
            } else {
                Verdict::Allowed
            },
            reason: reason.map_or("unknown", Reason::name).into(),
            policy: self.names.policy(event.policy),
            bytes_sent: event.bytes_sent,
            bytes_received: event.bytes_received,
            rtt_us: event.srtt_us,
            retransmits: event.retransmits,
            duration_us: event.duration_ns / 1000,
            connection: event.cookie,
        }
    }

    fn end(&self, workload: u32, address: kernel::Address, port: u16) -> FlowEnd {
        let names = self.names.workload(workload).unwrap_or_default();
        let known = address != kernel::Address::default();
        FlowEnd {
            namespace: names.namespace,
            workload: names.workload,
            pod: names.pod,
            identity: names.identity,
            address: known.then(|| address.into()),
            port,
        }
    }

    fn count(&self, record: &FlowRecord) {
        match record.event {
            FlowEventKind::Opened => self.metrics.opened(&labels(record)),
            FlowEventKind::Closed | FlowEventKind::Ended => {
                // The metric speaks as the server does: what the client received was sent.
                self.metrics
                    .closed(&labels(record), record.bytes_received, record.bytes_sent);
            }
            FlowEventKind::Failed | FlowEventKind::Open => {}
            FlowEventKind::Refused => self.metrics.denied(&denied_labels(record)),
        }
    }
}

/// Client and server.
fn ends(event: &FlowEvent) -> (SocketAddr, SocketAddr) {
    (
        SocketAddr::new(event.source.into(), event.source_port),
        SocketAddr::new(event.destination.into(), event.destination_port),
    )
}

fn labels(record: &FlowRecord) -> TcpLabels {
    let service = record
        .service
        .as_deref()
        .and_then(|name| name.split_once('/'));
    let (service_namespace, service_name) = service.unwrap_or_default();
    TcpLabels {
        reporter: reporter(record),
        source_workload: or_unknown(&record.source.workload),
        source_workload_namespace: or_unknown(&record.source.namespace),
        source_principal: or_unknown(&record.source.identity),
        destination_workload: or_unknown(&record.destination.workload),
        destination_workload_namespace: or_unknown(&record.destination.namespace),
        destination_principal: or_unknown(&record.destination.identity),
        destination_service: or_unknown(record.service.as_deref().unwrap_or_default()),
        destination_service_name: or_unknown(service_name),
        destination_service_namespace: or_unknown(service_namespace),
        connection_security_policy: if record.source.identity.is_empty() {
            SecurityPolicy::None
        } else {
            SecurityPolicy::MutualTls
        },
        response_flags: "-".into(),
    }
}

fn denied_labels(record: &FlowRecord) -> DeniedLabels {
    DeniedLabels {
        reporter: reporter(record),
        reason: record.reason.clone(),
        policy: record.policy.clone().unwrap_or_default(),
        source_workload: or_unknown(&record.source.workload),
        source_workload_namespace: or_unknown(&record.source.namespace),
        destination_workload: or_unknown(&record.destination.workload),
        destination_workload_namespace: or_unknown(&record.destination.namespace),
    }
}

fn reporter(record: &FlowRecord) -> Reporter {
    match record.reporter {
        FlowReporter::Source => Reporter::Source,
        FlowReporter::Destination => Reporter::Destination,
    }
}

fn or_unknown(name: &str) -> String {
    if name.is_empty() {
        "unknown".into()
    } else {
        name.into()
    }
}

/// Kernel time (CLOCK_MONOTONIC) as wall-clock time.
struct Clock {
    offset_ns: u128,
}

impl Clock {
    fn new() -> Self {
        let wall = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_nanos();
        Self {
            offset_ns: wall.saturating_sub(monotonic_ns().into()),
        }
    }

    fn wall_ms(&self, monotonic_ns: u64) -> u64 {
        u64::try_from((self.offset_ns + u128::from(monotonic_ns)) / 1_000_000).unwrap_or(u64::MAX)
    }
}

/// The clock of the kernel's records.
fn monotonic_ns() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| Duration::from(time).as_nanos() as u64)
}
