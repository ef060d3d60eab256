//! The Unix socket on which workloads get their identities: the SPIFFE Workload API and SDS, by one server.
//!
//! Who connects is attested once, when the connection is accepted (`attest`); every call on it is answered for that
//! workload. One who is no workload is told so by each call (PermissionDenied), so that its client shows why. The listening
//! socket comes from outside and may outlive the agent: who connects meanwhile waits in it.

mod authority;
mod connection;

use std::{
    fmt, io,
    os::unix::net::{UnixListener, UnixStream},
    sync::Arc,
    time::Duration,
};

use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_server::SecretDiscoveryServiceServer;
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use linux::{peer::Moment, readable::Readable};
use tokio::{sync::mpsc, task::spawn_blocking};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, transport::Server};

use self::connection::{Connection, Slots, Who};
use crate::{
    IdentitySource,
    attest::{AttestError, Attestor, Caller},
    sds::SecretService,
    workload_api::{WorkloadApi, proto::spiffe_workload_api_server::SpiffeWorkloadApiServer},
};

/// Largest request, in bytes.
const MAX_REQUEST_BYTES: usize = 64 * 1024;
/// Largest set of headers of a request, in bytes.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// How long the streams of callers may take to end when the server stops.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause after an `accept()` that failed for want of something, such as descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How much the server takes on. What is beyond a bound is refused at once and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections in all; the next is closed.
    pub connections: usize,
    /// Connections of one workload, and of all strangers together; the next is closed.
    pub connections_per_workload: usize,
    /// Calls and streams at a time on one connection; the client's HTTP/2 waits with the next.
    pub streams_per_connection: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            connections_per_workload: 64,
            streams_per_connection: 32,
        }
    }
}

/// Why something was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Refusal {
    /// The caller is no workload of this node, or cannot be told.
    UnknownCaller,
    /// A workload asked for another identity than its own.
    NotTheCallers,
    /// A call without the metadata that the Workload API asks for.
    NoSecurityHeader,
    /// A connection beyond a bound.
    TooManyConnections,
}

impl Refusal {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::UnknownCaller,
        Self::NotTheCallers,
        Self::NoSecurityHeader,
        Self::TooManyConnections,
    ];

    /// As the label of a metric.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnknownCaller => "unknown_caller",
            Self::NotTheCallers => "not_the_callers",
            Self::NoSecurityHeader => "no_security_header",
            Self::TooManyConnections => "too_many_connections",
        }
    }
}

/// Where refusals are counted, and how often they are logged: a caller must not fill the log.
#[derive(Clone)]
pub struct Hooks {
    count: Arc<dyn Fn(Refusal) + Send + Sync>,
    log: Arc<DefaultDirectRateLimiter>,
}

impl Hooks {
    /// Calls `count` for every refusal.
    pub fn new(count: impl Fn(Refusal) + Send + Sync + 'static) -> Self {
        /// Lines of log per second, after a burst of as many.
        const LINES: std::num::NonZeroU32 = std::num::NonZeroU32::new(5).unwrap();
        Self {
            count: Arc::new(count),
            log: Arc::new(RateLimiter::direct(Quota::per_second(LINES))),
        }
    }

    pub(crate) fn refused(&self, refusal: Refusal) {
        (self.count)(refusal);
    }

    pub(crate) fn may_log(&self) -> bool {
        self.log.check().is_ok()
    }

    /// A workload has asked for what is not its own.
    pub(crate) fn not_the_callers(&self, caller: &Caller, asked: &str) -> Status {
        let asked = cut(asked);
        self.refused(Refusal::NotTheCallers);
        if self.may_log() {
            tracing::warn!(
                workload = %caller.uid, id = %caller.id, asked,
                "a workload asked for an identity that is not its own",
            );
        }
        Status::permission_denied(format!(
            "`{asked}` is not this workload's: its identity is {}",
            caller.id
        ))
    }
}

impl Default for Hooks {
    /// Counts nothing.
    fn default() -> Self {
        Self::new(|_| {})
    }
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks").finish_non_exhaustive()
    }
}

/// Serves until `stop`: then streams end with UNAVAILABLE, so that clients connect again, to whoever has the listener next.
///
/// # Errors
/// The listener cannot be used.
pub async fn serve<S: IdentitySource>(
    listener: UnixListener,
    attestor: Arc<dyn Attestor>,
    source: Arc<S>,
    limits: Limits,
    hooks: Hooks,
    stop: CancellationToken,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let (accepted, connections) = mpsc::channel(1);
    let reception = Reception {
        readable: Readable::watch(&listener)?,
        listener,
        attestor,
        slots: Slots::new(&limits),
        hooks: hooks.clone(),
        accepted,
    };
    let workload_api = WorkloadApi {
        source: Arc::clone(&source),
        hooks: hooks.clone(),
        stop: stop.clone(),
    };
    let secrets = SecretService {
        source,
        hooks,
        stop: stop.clone(),
    };
    let serving = Server::builder()
        .max_concurrent_streams(limits.streams_per_connection)
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .add_service(
            SpiffeWorkloadApiServer::new(workload_api).max_decoding_message_size(MAX_REQUEST_BYTES),
        )
        .add_service(
            SecretDiscoveryServiceServer::new(secrets).max_decoding_message_size(MAX_REQUEST_BYTES),
        )
        .serve_with_incoming_shutdown(
            ReceiverStream::new(connections),
            stop.clone().cancelled_owned(),
        );
    let drained = async {
        stop.cancelled().await;
        tokio::time::sleep(DRAIN).await;
    };
    let receiving = async {
        tokio::select! {
            error = reception.run() => Err(error),
            () = stop.cancelled() => Ok(()),
        }
    };
    let served = async {
        tokio::select! {
            served = serving => served.map_err(io::Error::other),
            () = drained => Ok(()),
        }
    };
    // A reception that fails drops its channel, which ends the server as well.
    let (received, served) = tokio::join!(receiving, served);
    received.and(served)
}

/// Who has made this call.
pub(crate) fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    match request.extensions().get::<Who>() {
        Some(Who::Workload(caller)) => Ok(caller.clone()),
        _ => Err(Status::permission_denied(
            "the caller is no workload of this node: there is no identity for it",
        )),
    }
}

/// For a log line or an error: what a caller says is as long as it likes.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(120).collect()
}

/// Accepts and attests, one after the other: what comes faster waits in the socket's queue.
struct Reception {
    readable: Readable,
    listener: UnixListener,
    attestor: Arc<dyn Attestor>,
    slots: Slots,
    hooks: Hooks,
    accepted: mpsc::Sender<io::Result<Connection>>,
}

impl Reception {
    /// Ends only with an error.
    async fn run(self) -> io::Error {
        // Who is in the queue now may have come long ago.
        let mut unconnected = Moment::BOOT;
        loop {
            let before = match Moment::now() {
                Ok(now) => now,
                Err(error) => return error,
            };
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = self.receive(stream, unconnected).await {
                        return error;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    // The queue was empty after `before`: who is accepted next has connected later.
                    unconnected = before;
                    if let Err(error) = self.readable.wait().await {
                        return error;
                    }
                }
                Err(error) => {
                    if self.hooks.may_log() {
                        tracing::warn!(%error, "a workload's connection could not be accepted");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn receive(&self, stream: UnixStream, unconnected: Moment) -> io::Result<()> {
        let attestor = Arc::clone(&self.attestor);
        // Reading a cgroup takes a lock of the kernel's that may be held for a while.
        let attested = spawn_blocking(move || {
            let attested = attestor.attest(&stream, unconnected);
            (stream, attested)
        });
        let (stream, attested) = attested.await.map_err(io::Error::other)?;
        let who = match attested {
            Ok(caller) => Who::Workload(caller),
            Err(error) => {
                self.note(&error);
                if error.is_transient() {
                    return Ok(());
                }
                Who::Stranger
            }
        };
        let Some(slot) = self.slots.take(&who) else {
            self.hooks.refused(Refusal::TooManyConnections);
            if self.hooks.may_log() {
                tracing::warn!(caller = %who, "too many connections to the identity socket: closed one");
            }
            return Ok(());
        };
        let connection = match Connection::new(stream, who, slot) {
            Ok(connection) => connection,
            // This one's descriptor is of no use; the others are served.
            Err(error) => {
                tracing::debug!(%error, "a workload's connection was lost");
                return Ok(());
            }
        };
        let sent = self.accepted.send(Ok(connection)).await;
        sent.map_err(|_| io::Error::other("the server has ended"))
    }

    fn note(&self, error: &AttestError) {
        self.hooks.refused(Refusal::UnknownCaller);
        if self.hooks.may_log() {
            tracing::warn!(%error, "an unknown caller asked for an identity");
        }
    }
}
