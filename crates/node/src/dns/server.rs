//! Serves the sockets of workloads: one task per socket, and one per query that goes upstream.
//!
//! Everything that one workload can hold is bounded, so that its flood is its own. What is answered
//! is decided in [`super::message`].

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use telemetry::Counter;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tracing::warn;

use super::{
    DnsError, DnsSockets, Upstream, Zone,
    message::{Transport, Verdict, handle, server_failure},
    metrics::DnsMetrics,
};

/// Queries of one workload that wait for the machine's resolver; one more is dropped.
const MAX_FORWARDS: usize = 64;
/// Connections of one workload and address family; one more is closed at once.
const MAX_CONNECTIONS: usize = 32;
/// A connection without a complete query for this long is closed, as is one that takes no answer (RFC 7766, section 6.2.3).
const IDLE: Duration = Duration::from_secs(10);
/// More than any query needs; what is longer is cut off and so malformed.
const LARGEST_QUERY: usize = 4096;
/// Pause after an error of a socket, so that one that lasts does not take a whole CPU.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// Whose queries are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkloadDns {
    /// Namespace, to which single labels are relative.
    pub namespace: String,
    /// Name of the `Workload` object, for metrics.
    pub workload: String,
}

/// Answers the queries of a node's workloads.
#[derive(Debug, Clone)]
pub struct DnsServer {
    zone: Arc<ArcSwap<Zone>>,
    upstream: Upstream,
    metrics: DnsMetrics,
}

/// Serves one workload's sockets until it is dropped.
#[derive(Debug)]
#[must_use = "dropping it ends the service"]
pub struct DnsHandle {
    _tasks: JoinSet<()>,
}

impl DnsServer {
    /// A server for the names in `zone`, of which always the current snapshot is used, and, through `upstream`, all others.
    #[must_use]
    pub fn new(zone: Arc<ArcSwap<Zone>>, upstream: Upstream, metrics: DnsMetrics) -> Self {
        Self {
            zone,
            upstream,
            metrics,
        }
    }

    /// Serves a workload's sockets on the current tokio runtime, until the handle is dropped.
    ///
    /// # Errors
    /// [`DnsError::Serve`] if the runtime does not take a socket.
    pub fn serve(
        &self,
        workload: &WorkloadDns,
        sockets: DnsSockets,
    ) -> Result<DnsHandle, DnsError> {
        let service = Arc::new(Service {
            namespace: workload.namespace.clone(),
            dropped_queries: self.metrics.dropped(workload, "query"),
            dropped_connections: self.metrics.dropped(workload, "connection"),
            forwards: Arc::new(Semaphore::new(MAX_FORWARDS)),
            server: self.clone(),
        });
        let failed = |source| DnsError::Serve { source };
        let mut tasks = JoinSet::new();
        for socket in sockets.udp {
            let socket = UdpSocket::from_std(socket).map_err(failed)?;
            tasks.spawn(Arc::clone(&service).serve_udp(Arc::new(socket)));
        }
        for listener in sockets.tcp {
            let listener = TcpListener::from_std(listener).map_err(failed)?;
            tasks.spawn(Arc::clone(&service).serve_tcp(listener));
        }
        Ok(DnsHandle { _tasks: tasks })
    }
}

/// One workload's service.
struct Service {
    namespace: String,
    dropped_queries: Counter,
    dropped_connections: Counter,
    forwards: Arc<Semaphore>,
    server: DnsServer,
}

impl Service {
    async fn serve_udp(self: Arc<Self>, socket: Arc<UdpSocket>) {
        // Dropped with this task, which ends the forwards too.
        let mut forwards = JoinSet::new();
        let mut buffer = vec![0; LARGEST_QUERY];
        loop {
            while forwards.try_join_next().is_some() {}
            let (length, client) = match socket.recv_from(&mut buffer).await {
                Ok(received) => received,
                Err(error) => {
                    warn!(%error, namespace = self.namespace, "cannot receive DNS queries");
                    sleep(ERROR_PAUSE).await;
                    continue;
                }
            };
            let packet = &buffer[..length];
            match self.handle(packet, Transport::Udp) {
                Verdict::Drop => {}
                Verdict::Reply(answer, _) => send(&socket, &answer, client).await,
                Verdict::Forward => {
                    let Ok(permit) = Arc::clone(&self.forwards).try_acquire_owned() else {
                        self.dropped_queries.inc();
                        continue;
                    };
                    let (service, socket) = (Arc::clone(&self), Arc::clone(&socket));
                    let query = packet.to_vec();
                    forwards.spawn(async move {
                        if let Some(answer) = service.forward(query, Transport::Udp).await {
                            send(&socket, &answer, client).await;
                        }
                        drop(permit);
                    });
                }
            }
        }
    }

    async fn serve_tcp(self: Arc<Self>, listener: TcpListener) {
        // Dropped with this task, which ends the connections too.
        let mut connections = JoinSet::new();
        loop {
            while connections.try_join_next().is_some() {}
            match listener.accept().await {
                Ok(_) if connections.len() >= MAX_CONNECTIONS => {
                    self.dropped_connections.inc();
                }
                Ok((stream, _)) => {
                    let service = Arc::clone(&self);
                    // How a connection ends is the client's affair.
                    connections.spawn(async move { drop(service.converse(stream).await) });
                }
                Err(error) => {
                    warn!(%error, namespace = self.namespace, "cannot accept DNS connections");
                    sleep(ERROR_PAUSE).await;
                }
            }
        }
    }

    /// Answers the queries of one connection, one after the other.
    async fn converse(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut buffer = Vec::new();
        loop {
            timeout(IDLE, read_message(&mut stream, &mut buffer)).await??;
            let answer = match self.handle(&buffer, Transport::Tcp) {
                Verdict::Drop => return Ok(()),
                Verdict::Reply(answer, _) => Some(answer),
                Verdict::Forward => match self.forwards.try_acquire() {
                    Ok(_permit) => self.forward(buffer.clone(), Transport::Tcp).await,
                    Err(_) => {
                        self.dropped_queries.inc();
                        server_failure(&buffer)
                    }
                },
            };
            let Some(answer) = answer else {
                return Ok(());
            };
            timeout(IDLE, write_message(&mut stream, &answer)).await??;
        }
    }

    fn handle(&self, packet: &[u8], transport: Transport) -> Verdict {
        let zone = self.server.zone.load();
        let verdict = handle(packet, transport, &zone, &self.namespace);
        match &verdict {
            Verdict::Drop => {
                self.server.metrics.malformed.inc();
            }
            Verdict::Reply(_, code) => self.server.metrics.replied(*code),
            Verdict::Forward => {}
        }
        verdict
    }

    async fn forward(&self, query: Vec<u8>, transport: Transport) -> Option<Vec<u8>> {
        let failure = server_failure(&query);
        match self.server.upstream.ask(query, transport).await {
            Some(answer) => {
                self.server.metrics.forwarded.inc();
                Some(answer)
            }
            None => {
                self.server.metrics.forward_failed.inc();
                failure
            }
        }
    }
}

async fn send(socket: &UdpSocket, answer: &[u8], client: SocketAddr) {
    // A client that is gone by now gets no answer; it does not wait for one either.
    let _ = socket.send_to(answer, client).await;
}

/// Reads one message with its length in front (RFC 1035, section 4.2.2).
async fn read_message(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<()> {
    let length = usize::from(stream.read_u16().await?);
    if length > LARGEST_QUERY {
        return Err(io::Error::other("a query longer than any needs to be"));
    }
    buffer.resize(length, 0);
    stream.read_exact(buffer).await.map(drop)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len())
        .map_err(|_| io::Error::other("an answer longer than a DNS message can be"))?;
    // In one write, so that it is one segment.
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}
