//! The opening side: streams over pooled connections, of one worker.
//!
//! A connection serves one [`PoolKey`]: one source, one address, one set of expected identities. Whoever needs the
//! first one opens it; those who come meanwhile wait for it, and more connections are opened only for more than its
//! streams can carry. It enters the pool when its first PING is answered, because only then the peer's limit of streams
//! is known. The lock is of this worker alone: it is there so that futures may be spawned, and is never contended.

mod open;

use std::{
    collections::HashMap,
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::SendRequest};
use http::{Request, StatusCode};
use identity::SpiffeId;
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{Authority, ClientLimits, ClientTls, ConnectError, ConnectHeaders, stream};

/// How often a stream is tried when the connection it was on goes away under it.
const ATTEMPTS: usize = 3;

/// Which streams may share a connection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PoolKey {
    /// The caller's number for the workload that calls, its source address, and the generation of its identity.
    pub source: u64,
    /// The peer's tunnel address.
    pub address: SocketAddr,
    /// Who the peer may be.
    pub expected: Arc<[SpiffeId]>,
}

/// A stream that the peer has answered with 200. Dropped, it is reset.
pub struct TunnelStream {
    pub(crate) send: SendStream<Bytes>,
    pub(crate) receive: RecvStream,
    pub(crate) lease: Lease,
}

/// What a pool holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolFigures {
    /// Connections that take streams.
    pub connections: usize,
    /// Connections in the making.
    pub opening: usize,
    /// Streams on the former.
    pub streams: usize,
}

/// The pool of one worker. Clones are the same pool.
#[derive(Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    limits: ClientLimits,
    peers: Mutex<HashMap<PoolKey, Peer>>,
    /// Cancelled when the pool takes no more.
    draining: CancellationToken,
    /// The connections' tasks.
    tasks: TaskTracker,
    next: AtomicU64,
}

#[derive(Default)]
struct Peer {
    ready: Vec<Ready>,
    opening: Vec<Opening>,
}

/// A connection that takes streams. The pool's handle keeps it open: without it, it ends with its last stream.
struct Ready {
    send: SendRequest<Bytes>,
    connection: Arc<Connection>,
}

/// A connection in the making.
struct Opening {
    number: u64,
    /// Who will use it, the one who opens it included.
    users: usize,
    result: watch::Receiver<Option<Result<(), ConnectError>>>,
}

/// What the pool, the connection's task and its streams know of a connection.
struct Connection {
    number: u64,
    streams: AtomicUsize,
    /// It takes no more streams.
    gone: AtomicBool,
    idle_since: Mutex<Instant>,
    /// The peer's verdict on our certificate comes only when a stream is on it already.
    failure: stream::Failure,
}

/// A stream's place on a connection.
pub(crate) struct Lease(Arc<Connection>);

impl Lease {
    fn take(connection: &Arc<Connection>) -> Self {
        connection.streams.fetch_add(1, Relaxed);
        Self(Arc::clone(connection))
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.0.streams.fetch_sub(1, Relaxed) == 1 {
            *lock(&self.0.idle_since) = Instant::now();
        }
    }
}

/// What someone who wants a stream has to do.
enum Step {
    Use(SendRequest<Bytes>, Lease),
    Wait(watch::Receiver<Option<Result<(), ConnectError>>>),
    Open(open::Opener),
}

/// What became of a request on one connection.
enum Failure {
    /// The peer has not acted on it: another connection may do.
    Again,
    Final(ConnectError),
}

impl Pool {
    /// An empty pool.
    #[must_use]
    pub fn new(limits: ClientLimits) -> Self {
        Self {
            shared: Arc::new(Shared {
                limits,
                peers: Mutex::default(),
                draining: CancellationToken::new(),
                tasks: TaskTracker::new(),
                next: AtomicU64::new(0),
            }),
        }
    }

    /// Opens a stream to `authority` through the peer of `key`. `dial` makes the TCP connection if one is needed, and
    /// `tls` is what it is then used with.
    ///
    /// # Errors
    /// There is no connection, the peer refused, or a bound was reached.
    pub async fn connect<D, F>(
        &self,
        key: &PoolKey,
        dial: D,
        tls: &ClientTls,
        authority: &Authority,
        headers: &ConnectHeaders,
    ) -> Result<TunnelStream, ConnectError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<TcpStream>>,
    {
        for _ in 0..ATTEMPTS {
            let (send, lease) = self.acquire(key, &dial, tls).await?;
            let request = headers.request(authority)?;
            match self.request(send, lease, request).await {
                Ok(stream) => return Ok(stream),
                Err(Failure::Again) => {}
                Err(Failure::Final(error)) => return Err(error),
            }
        }
        Err(ConnectError::Draining)
    }

    /// Connections of this source take no more streams and end with those that they have: its workload is gone, or
    /// its certificate was replaced.
    pub fn forget(&self, source: u64) {
        self.peers().retain(|key, _| key.source != source);
    }

    /// Takes no more streams; those that are there go on.
    pub fn drain(&self) {
        self.shared.draining.cancel();
        self.peers().clear();
        self.shared.tasks.close();
    }

    /// Ends when a pool that drains has no connection any more.
    pub async fn drained(&self) {
        self.shared.tasks.wait().await;
    }

    /// What it holds now.
    #[must_use]
    pub fn figures(&self) -> PoolFigures {
        let mut figures = PoolFigures::default();
        for peer in self.peers().values() {
            figures.connections += peer.ready.len();
            figures.opening += peer.opening.len();
            for ready in &peer.ready {
                figures.streams += ready.connection.streams.load(Relaxed);
            }
        }
        figures
    }

    /// A place on a connection, a new one if need be.
    async fn acquire<D, F>(
        &self,
        key: &PoolKey,
        dial: &D,
        tls: &ClientTls,
    ) -> Result<(SendRequest<Bytes>, Lease), ConnectError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<TcpStream>>,
    {
        loop {
            match self.step(key)? {
                Step::Use(send, lease) => return Ok((send, lease)),
                Step::Wait(mut result) => {
                    // Closed without a result: who opened it has given up. Someone else must.
                    if let Ok(result) = result.wait_for(Option::is_some).await
                        && let Some(Err(error)) = &*result
                    {
                        return Err(error.clone());
                    }
                }
                Step::Open(opener) => return opener.open(dial, tls).await,
            }
        }
    }

    fn step(&self, key: &PoolKey) -> Result<Step, ConnectError> {
        if self.shared.draining.is_cancelled() {
            return Err(ConnectError::Draining);
        }
        let limits = &self.shared.limits;
        let mut peers = self.peers();
        let peer = peers.entry(key.clone()).or_default();
        peer.ready
            .retain(|ready| !ready.connection.gone.load(Relaxed));
        // The oldest that has room, so that those that are not needed become idle.
        for ready in &peer.ready {
            let limit = limits.streams.min(ready.send.current_max_send_streams());
            if ready.connection.streams.load(Relaxed) < limit {
                return Ok(Step::Use(
                    ready.send.clone(),
                    Lease::take(&ready.connection),
                ));
            }
        }
        if let Some(opening) = peer
            .opening
            .iter_mut()
            .find(|opening| opening.users < limits.streams)
        {
            opening.users += 1;
            return Ok(Step::Wait(opening.result.clone()));
        }
        if peer.ready.len() + peer.opening.len() >= limits.connections_per_key {
            return Err(ConnectError::Full {
                limit: limits.connections_per_key,
            });
        }
        if !make_room(&mut peers, limits.connections) {
            peers.retain(|_, peer| !peer.is_empty());
            return Err(ConnectError::Full {
                limit: limits.connections,
            });
        }
        let number = self.shared.next.fetch_add(1, Relaxed);
        let (sender, result) = watch::channel(None);
        peers.entry(key.clone()).or_default().opening.push(Opening {
            number,
            users: 1,
            result,
        });
        Ok(Step::Open(open::Opener::new(
            self.clone(),
            key.clone(),
            number,
            sender,
        )))
    }

    async fn request(
        &self,
        send: SendRequest<Bytes>,
        lease: Lease,
        request: Request<()>,
    ) -> Result<TunnelStream, Failure> {
        let limit = self.shared.limits.connect_timeout;
        let exchange = async {
            // Until the request is out, whatever happens to the connection happens to nobody else.
            let mut send = send.ready().await.map_err(|_| Failure::Again)?;
            let (response, stream) = send
                .send_request(request, false)
                .map_err(|_| Failure::Again)?;
            drop(send);
            let response = response.await.map_err(|error| request_failure(&error))?;
            Ok((response, stream))
        };
        let (response, send) = match timeout(limit, exchange).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(failure)) => {
                if matches!(failure, Failure::Again) {
                    lease.0.gone.store(true, Relaxed);
                    if let Some(failure) = lease.0.failure.get() {
                        return Err(Failure::Final(failure.clone().into()));
                    }
                }
                return Err(failure);
            }
            Err(_) => {
                return Err(Failure::Final(ConnectError::Timeout {
                    what: "the answer to CONNECT",
                    seconds: limit.as_secs(),
                }));
            }
        };
        if response.status() != StatusCode::OK {
            return Err(Failure::Final(ConnectError::Refused {
                status: response.status().as_u16(),
            }));
        }
        Ok(TunnelStream {
            send,
            receive: response.into_body(),
            lease,
        })
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<PoolKey, Peer>> {
        lock(&self.shared.peers)
    }
}

/// The connection broke or was closed, or the stream was refused, before there was an answer. No byte of the carried
/// connection was sent, so that it may be tried again, unless the peer means this stream.
fn request_failure(error: &h2::Error) -> Failure {
    if error.is_reset() && error.reason() != Some(Reason::REFUSED_STREAM) {
        return Failure::Final(ConnectError::Reset(error.to_string()));
    }
    Failure::Again
}

/// Whether one more connection may be opened, if need be in the place of the one that is idle for longest.
fn make_room(peers: &mut HashMap<PoolKey, Peer>, limit: usize) -> bool {
    let count: usize = peers
        .values()
        .map(|peer| peer.ready.len() + peer.opening.len())
        .sum();
    if count < limit {
        return true;
    }
    let idlest = peers
        .iter()
        .flat_map(|(key, peer)| peer.ready.iter().map(move |ready| (key, ready)))
        .filter(|(_, ready)| ready.connection.streams.load(Relaxed) == 0)
        .min_by_key(|(_, ready)| *lock(&ready.connection.idle_since))
        .map(|(key, ready)| (key.clone(), ready.connection.number));
    let Some((key, number)) = idlest else {
        return false;
    };
    if let Some(peer) = peers.get_mut(&key) {
        peer.ready.retain(|ready| ready.connection.number != number);
    }
    true
}

impl Peer {
    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.opening.is_empty()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
