//! The accepting side: takes TLS connections and their `CONNECT` streams, asks the [`Handler`] about each, and relays
//! what it lets in. Policy, addresses and the connection to the application are the handler's.
//!
//! Answers: 200 and then bytes; 400 for another method or a bad authority; 431 for too many headers; otherwise what the handler says (401
//! policy, 400 not its address, 503 not reachable or no answer in time).

use std::{
    future::Future,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{Method, Request, Response, StatusCode};
use identity::SpiffeId;
use tokio::{
    net::TcpStream,
    time::{Instant as TokioInstant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    Authority, ConnectHeaders, End, Outcome, ServeError, ServerLimits, ServerTls, TlsFailure,
    connection::{Event, KeepAlive},
    handshakes::Handshakes,
    headers, limits,
    relay::{Relay, reset_on_close},
    stream::{self, Failure, Handshaken, TlsStream},
};

/// Who is at the other end of a tunnel connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its identity, from its certificate.
    pub id: SpiffeId,
    /// Where it connects from; of IPv4 as such, also on an IPv6 socket.
    pub address: SocketAddr,
    /// The address of ours that it connected to.
    pub local_address: SocketAddr,
}

/// What a peer asks for.
#[derive(Debug, Clone)]
pub struct ConnectRequest {
    /// The peer.
    pub peer: Arc<Peer>,
    /// Where it wants to be connected to.
    pub authority: Authority,
    /// What it says about the connection that it carries.
    pub headers: ConnectHeaders,
}

/// Leave to pass.
#[derive(Debug)]
pub struct Accepted<S> {
    /// The connection to the application.
    pub upstream: TcpStream,
    /// Told how it ended.
    pub session: S,
    /// Cancelled to end the stream: RST_STREAM to the peer, RST to the application.
    pub ended: CancellationToken,
}

/// No leave to pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The answer: 400, 401, 431 or 503.
    pub status: StatusCode,
    /// Why, for logs; the peer is not told.
    pub reason: String,
}

/// An accepted stream's account, which is settled once.
pub trait Session: Send + 'static {
    /// The stream has ended. Called exactly once, also when the connection or the runtime ends under it.
    fn finished(self, outcome: &Outcome);
}

/// Decides about streams.
pub trait Handler: Send + Sync + 'static {
    /// The account of a stream.
    type Session: Session;

    /// Decides, and connects to the application.
    fn connect(
        &self,
        request: &ConnectRequest,
    ) -> impl Future<Output = Result<Accepted<Self::Session>, Refusal>> + Send;

    /// A stream was refused: by the handler, or before it was asked (then `authority` may be no authority).
    fn refused(&self, peer: &Peer, authority: &str, refusal: &Refusal);
}

/// The accepting side of one worker.
pub struct Server<H> {
    shared: Arc<Shared<H>>,
}

struct Shared<H> {
    handler: H,
    limits: ServerLimits,
    handshakes: Handshakes,
    connections: AtomicUsize,
}

impl<H> Clone for Server<H> {
    fn clone(&self) -> Self {
        Self {
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<H: Handler> Server<H> {
    /// Makes one. Its bounds hold for all connections that are given to it and its clones.
    pub fn new(handler: H, limits: ServerLimits) -> Self {
        Self {
            shared: Arc::new(Shared {
                handler,
                handshakes: Handshakes::new(limits.handshakes),
                limits,
                connections: AtomicUsize::new(0),
            }),
        }
    }

    /// Who decides.
    pub fn handler(&self) -> &H {
        &self.shared.handler
    }

    /// Open connections, those in the handshake included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Relaxed)
    }

    /// Serves one connection until it ends. When `drain` is cancelled, the peer is told to go away (GOAWAY), and the
    /// future ends with the last stream.
    ///
    /// # Errors
    /// A bound is reached, the handshake failed, or the connection ended badly.
    pub async fn serve(
        &self,
        tcp: TcpStream,
        tls: ServerTls,
        drain: CancellationToken,
    ) -> Result<(), ServeError> {
        let limits = &self.shared.limits;
        let _connection = Count::take(&self.shared.connections, limits.connections).ok_or(
            ServeError::TooManyConnections {
                limit: limits.connections,
            },
        )?;
        let handshake = self.shared.handshakes.begin();
        let (connection, peer, failure) = tokio::select! {
            biased;
            shaken = timeout(limits.handshake_timeout, self.handshake(tcp, tls)) =>
                shaken.map_err(|_| ServeError::HandshakeTimeout)??,
            () = handshake.pushed_out() => return Err(ServeError::TooManyHandshakes {
                limit: limits.handshakes,
            }),
        };
        drop(handshake);
        let end = self.drive(connection, Arc::new(peer), drain).await;
        match failure.get() {
            Some(failure) => Err(failure.clone().into()),
            None => end,
        }
    }

    async fn handshake(
        &self,
        tcp: TcpStream,
        tls: ServerTls,
    ) -> Result<(Connection, Peer, Failure), ServeError> {
        tcp.set_nodelay(true)?;
        let address = canonical(tcp.peer_addr()?);
        let local_address = canonical(tcp.local_addr()?);
        let Handshaken {
            stream,
            certificate,
            failure,
        } = stream::accept(tcp, &tls).await.map_err(ServeError::of_io)?;
        let id = SpiffeId::of_certificate(&certificate)
            .map_err(|error| TlsFailure::Certificate(error.to_string()))?;
        let connection = h2::server::Builder::new()
            .initial_window_size(limits::STREAM_WINDOW)
            .initial_connection_window_size(limits::CONNECTION_WINDOW)
            .max_frame_size(limits::MAX_FRAME)
            .max_send_buffer_size(limits::SEND_BUFFER)
            .max_header_list_size(limits::MOST_HEADERS)
            .max_pending_accept_reset_streams(limits::MAX_PENDING_RESETS)
            .data_frame_budget(limits::SMALL_FRAME_BUDGET)
            .max_concurrent_streams(self.shared.limits.streams)
            .handshake(stream)
            .await
            .map_err(|error| match failure.get() {
                Some(failure) => failure.clone().into(),
                None => ServeError::of(error),
            })?;
        let peer = Peer {
            id,
            address,
            local_address,
        };
        Ok((connection, peer, failure))
    }

    async fn drive(
        &self,
        mut connection: Connection,
        peer: Arc<Peer>,
        drain: CancellationToken,
    ) -> Result<(), ServeError> {
        let limits = &self.shared.limits;
        let Some(ping_pong) = connection.ping_pong() else {
            return Err(ServeError::Protocol("no PINGs can be sent".into()));
        };
        let interval = limits.ping_interval.min(limits.idle_timeout);
        let mut alive = KeepAlive::new(ping_pong, interval, limits.ping_timeout);
        let mut idle_since = TokioInstant::now();
        let mut draining = false;
        let mut told = pin!(drain.cancelled());
        let streams = TaskTracker::new();
        loop {
            let busy = connection.has_streams();
            tokio::select! {
                biased;
                request = connection.accept() => match request {
                    Some(Ok((request, respond))) => {
                        idle_since = TokioInstant::now();
                        let stream = Stream {
                            shared: Arc::clone(&self.shared),
                            peer: Arc::clone(&peer),
                            respond,
                        };
                        streams.spawn(stream.serve(request));
                    }
                    // A peer without streams that hangs up takes nothing with it.
                    Some(Err(error)) if error.is_io() && !connection.has_streams() => break,
                    Some(Err(error)) => return Err(ServeError::of(error)),
                    None => break,
                },
                event = alive.next(busy) => match event {
                    Event::TimedOut => return Err(ServeError::PingTimeout),
                    Event::Tick | Event::Pong => {
                        if busy {
                            idle_since = TokioInstant::now();
                        } else if idle_since.elapsed() >= limits.idle_timeout {
                            connection.graceful_shutdown();
                        }
                    }
                },
                () = &mut told, if !draining => {
                    draining = true;
                    connection.graceful_shutdown();
                }
            }
        }
        // What was received may still be on its way to applications.
        streams.close();
        streams.wait().await;
        Ok(())
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

type Connection = h2::server::Connection<TlsStream, Bytes>;

/// One `CONNECT`.
struct Stream<H> {
    shared: Arc<Shared<H>>,
    peer: Arc<Peer>,
    respond: SendResponse<Bytes>,
}

impl<H: Handler> Stream<H> {
    async fn serve(mut self, request: Request<RecvStream>) {
        let (request, receive) = match self.read(request) {
            Ok(request) => request,
            Err((authority, refusal)) => return self.refuse(&authority, &refusal),
        };
        match self.connect(&request).await {
            Some(Ok(accepted)) => {
                drop(request);
                self.relay(accepted, receive).await;
            }
            Some(Err(refusal)) => self.refuse(&request.authority.to_string(), &refusal),
            None => {}
        }
    }

    fn read(
        &self,
        request: Request<RecvStream>,
    ) -> Result<(ConnectRequest, RecvStream), (String, Refusal)> {
        let (parts, receive) = request.into_parts();
        let text = parts.uri.authority().map_or("", |text| text.as_str());
        let refused = |status: StatusCode, reason: &str| {
            let refusal = Refusal {
                status,
                reason: reason.to_owned(),
            };
            Err((text.chars().take(300).collect(), refusal))
        };
        let bad = |reason: &str| refused(StatusCode::BAD_REQUEST, reason);
        if headers::list_size(&parts.headers) > limits::MAX_HEADERS as usize {
            let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
            return refused(status, "its headers are too long");
        }
        if parts.method != Method::CONNECT {
            return bad("its method is not CONNECT");
        }
        let Ok(authority) = text.parse() else {
            return bad("its authority is no `ip:port` and no `host:port`");
        };
        let request = ConnectRequest {
            peer: Arc::clone(&self.peer),
            authority,
            headers: ConnectHeaders::read(&parts.headers),
        };
        Ok((request, receive))
    }

    /// Asks the handler; `None` if the peer did not wait for the answer.
    async fn connect(
        &mut self,
        request: &ConnectRequest,
    ) -> Option<Result<Accepted<H::Session>, Refusal>> {
        let shared = Arc::clone(&self.shared);
        let limit = shared.limits.connect_timeout;
        // Boxed, so that the memory is free again while bytes are relayed.
        let answer = Box::pin(timeout(limit, shared.handler.connect(request)));
        tokio::select! {
            biased;
            answer = answer => Some(answer.unwrap_or_else(|_| Err(Refusal {
                status: StatusCode::SERVICE_UNAVAILABLE,
                reason: "the application's side took too long".into(),
            }))),
            _ = std::future::poll_fn(|cx| self.respond.poll_reset(cx)) => None,
        }
    }

    fn refuse(&mut self, authority: &str, refusal: &Refusal) {
        self.shared.handler.refused(&self.peer, authority, refusal);
        let mut response = Response::new(());
        *response.status_mut() = refusal.status;
        // It fails if the peer has not waited, which then needs no answer.
        let _ = self.respond.send_response(response, true);
    }

    async fn relay(mut self, accepted: Accepted<H::Session>, receive: RecvStream) {
        let Accepted {
            upstream,
            session,
            ended,
        } = accepted;
        let mut account = Account {
            session: Some(session),
            relay: None,
        };
        // It fails only on a socket that is gone, which the relay then finds out.
        let _ = upstream.set_nodelay(true);
        match self.respond.send_response(Response::new(()), false) {
            Ok(send) => {
                drop(self);
                let relay = account.relay.insert(Relay::new(upstream, send, receive));
                let end = relay.run(&ended).await;
                account.settle(end);
            }
            Err(error) => {
                reset_on_close(&upstream);
                account.settle(End::Broken(error.to_string()));
            }
        }
    }
}

/// Settles a session's account exactly once, whatever ends it.
struct Account<S: Session> {
    session: Option<S>,
    relay: Option<Relay>,
}

impl<S: Session> Account<S> {
    fn settle(&mut self, end: End) {
        let outcome = match self.relay.take() {
            Some(relay) => relay.finish(end),
            None => Outcome {
                bytes_to_tunnel: 0,
                bytes_from_tunnel: 0,
                duration: Duration::ZERO,
                end,
            },
        };
        if let Some(session) = self.session.take() {
            session.finished(&outcome);
        }
    }
}

impl<S: Session> Drop for Account<S> {
    fn drop(&mut self) {
        self.settle(End::Abandoned);
    }
}

/// One of a bounded number.
struct Count<'a>(&'a AtomicUsize);

impl<'a> Count<'a> {
    fn take(count: &'a AtomicUsize, limit: usize) -> Option<Self> {
        if count.fetch_add(1, Relaxed) >= limit {
            count.fetch_sub(1, Relaxed);
            return None;
        }
        Some(Self(count))
    }
}

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
