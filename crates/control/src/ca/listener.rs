//! TLS connections to the authority: its server certificate, and bounds on who may hold one open.

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpListener as StdListener},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use identity::{
    SpiffeId,
    authority::Authority,
    ca_api::{
        MAX_MESSAGE_BYTES, SERVER_NAME, heddle::trust_server::TrustServer,
        istio::istio_certificate_service_server::IstioCertificateServiceServer,
    },
};
use linux::netns::Netns;
use rustls::{ServerConfig, crypto::aws_lc_rs, server::NoServerSessionStorage, version::TLS13};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{JoinHandle, JoinSet},
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use super::{
    CaError,
    counters::{Counters, add},
    limits::CaLimits,
    peer::{AnyHolder, Peer, PeerIdentity},
    service::Service,
};

/// A handshake that takes longer is given up.
const HANDSHAKE_PATIENCE: Duration = Duration::from_secs(5);
/// Who has no certificate comes to fetch one, and has no reason to stay.
const STRANGER_PATIENCE: Duration = Duration::from_secs(15);
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Calls at a time on one connection.
const STREAMS: u32 = 64;
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// After a failure to accept (out of descriptors, for one).
const PAUSE: Duration = Duration::from_millis(100);

/// The server's certificate, renewed at half of its lifetime.
pub(super) struct ServerTls {
    authority: Arc<Authority>,
    id: SpiffeId,
    addresses: Vec<IpAddr>,
    config: ArcSwap<ServerConfig>,
    renew_after: ArcSwap<Duration>,
}

/// What all listeners of one call share.
struct Gate {
    tls: Arc<ServerTls>,
    strangers: Arc<Semaphore>,
    nodes: Arc<Semaphore>,
    counters: Arc<Counters>,
    connections: mpsc::Sender<io::Result<Connection>>,
}

/// An accepted connection, bounded in time unless its peer is known.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
    deadline: Option<Pin<Box<Sleep>>>,
    _place: OwnedSemaphorePermit,
}

pub(super) fn bind(
    netns: &Netns,
    addresses: &[SocketAddr],
) -> Result<Vec<(TcpListener, SocketAddr)>, CaError> {
    let mut listeners = Vec::new();
    for address in addresses {
        let error = |reason| CaError::Listen {
            address: *address,
            reason,
        };
        let socket = netns
            .run(|| StdListener::bind(address))
            .and_then(|bound| bound)
            .map_err(error)?;
        socket.set_nonblocking(true).map_err(error)?;
        let listener = TcpListener::from_std(socket).map_err(error)?;
        let bound = listener.local_addr().map_err(error)?;
        listeners.push((listener, bound));
    }
    Ok(listeners)
}

/// Starts the tasks that serve these sockets until `stop`.
pub(super) fn serve(
    listeners: Vec<TcpListener>,
    tls: ServerTls,
    service: Service,
    limits: &CaLimits,
    counters: Arc<Counters>,
    stop: &CancellationToken,
) -> Vec<JoinHandle<()>> {
    let (sender, connections) = mpsc::channel(1);
    let gate = Arc::new(Gate {
        tls: Arc::new(tls),
        strangers: Arc::new(Semaphore::new(limits.strangers)),
        nodes: Arc::new(Semaphore::new(limits.connections)),
        counters,
        connections: sender,
    });
    let mut tasks = vec![
        tokio::spawn(answer(connections, service, stop.clone())),
        tokio::spawn(renew(Arc::clone(&gate.tls), stop.clone())),
    ];
    for listener in listeners {
        tasks.push(tokio::spawn(accept(
            listener,
            Arc::clone(&gate),
            stop.clone(),
        )));
    }
    tasks
}

async fn answer(
    connections: mpsc::Receiver<io::Result<Connection>>,
    service: Service,
    stop: CancellationToken,
) {
    let served = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .http2_max_header_list_size(MAX_HEADER_BYTES)
        .max_concurrent_streams(STREAMS)
        .add_service(
            IstioCertificateServiceServer::new(service.clone())
                .max_decoding_message_size(MAX_MESSAGE_BYTES),
        )
        .add_service(TrustServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES))
        .serve_with_incoming_shutdown(ReceiverStream::new(connections), stop.cancelled_owned())
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the certificate authority stopped serving: certificates are not renewed");
    }
}

async fn accept(listener: TcpListener, gate: Arc<Gate>, stop: CancellationToken) {
    let mut handshakes = JoinSet::new();
    loop {
        while handshakes.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, address)) => match Arc::clone(&gate.strangers).try_acquire_owned() {
                Ok(place) => {
                    let (gate, stop) = (Arc::clone(&gate), stop.clone());
                    handshakes.spawn(async move {
                        tokio::select! {
                            () = gate.admit(stream, address, place) => {}
                            () = stop.cancelled() => {}
                        }
                    });
                }
                Err(_) => {
                    gate.drop_connection(address, &"too many connections without a certificate");
                }
            },
            Err(error) => {
                tracing::warn!(%error, "the certificate authority cannot accept a connection");
                sleep(PAUSE).await;
            }
        }
    }
}

impl Gate {
    async fn admit(&self, stream: TcpStream, address: SocketAddr, place: OwnedSemaphorePermit) {
        let acceptor = TlsAcceptor::from(self.tls.config.load_full());
        let stream = match timeout(HANDSHAKE_PATIENCE, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return self.drop_connection(address, &error),
            Err(_) => return self.drop_connection(address, &"the TLS handshake took too long"),
        };
        let roots = self.tls.authority.bundle().borrow().roots.clone();
        let chain = stream.get_ref().1.peer_certificates();
        let identity = PeerIdentity::of(chain, &roots, SystemTime::now());
        let (place, deadline) = match identity {
            PeerIdentity::Known { .. } => {
                let Ok(place) = Arc::clone(&self.nodes).try_acquire_owned() else {
                    return self.drop_connection(address, &"too many connections");
                };
                (place, None)
            }
            _ => (place, Some(Box::pin(sleep(STRANGER_PATIENCE)))),
        };
        let connection = Connection {
            stream,
            peer: Peer { address, identity },
            deadline,
            _place: place,
        };
        // The server is gone only when it stops.
        let _ = self.connections.send(Ok(connection)).await;
    }

    fn drop_connection(&self, peer: SocketAddr, reason: &dyn std::fmt::Display) {
        add(&self.counters.dropped_connections);
        tracing::debug!(%peer, %reason, "the certificate authority dropped a connection");
    }
}

impl ServerTls {
    pub(super) fn new(
        authority: Arc<Authority>,
        id: SpiffeId,
        addresses: Vec<IpAddr>,
    ) -> Result<Self, CaError> {
        let (config, renew_after) = server_config(&authority, &id, &addresses)?;
        Ok(Self {
            authority,
            id,
            addresses,
            config: ArcSwap::from_pointee(config),
            renew_after: ArcSwap::from_pointee(renew_after),
        })
    }

    fn renew(&self) -> Result<(), CaError> {
        let (config, renew_after) = server_config(&self.authority, &self.id, &self.addresses)?;
        self.config.store(Arc::new(config));
        self.renew_after.store(Arc::new(renew_after));
        Ok(())
    }
}

async fn renew(tls: Arc<ServerTls>, stop: CancellationToken) {
    let mut wait = **tls.renew_after.load();
    loop {
        tokio::select! {
            () = sleep(wait) => {}
            () = stop.cancelled() => return,
        }
        match tls.renew() {
            Ok(()) => wait = **tls.renew_after.load(),
            Err(error) => {
                tracing::error!(%error, "the certificate authority's own server is not renewed");
                wait = (wait / 4).max(PAUSE);
            }
        }
    }
}

/// The configuration, and how long it is to be used.
fn server_config(
    authority: &Authority,
    id: &SpiffeId,
    addresses: &[IpAddr],
) -> Result<(ServerConfig, Duration), CaError> {
    let tls = |error: rustls::Error| CaError::Server(error.to_string());
    let svid = authority.sign_server(id, &[SERVER_NAME], addresses)?;
    let left = svid
        .not_after
        .duration_since(SystemTime::now())
        .unwrap_or_default();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(tls)?
        .with_client_cert_verifier(Arc::new(AnyHolder::new(provider)))
        .with_single_cert(svid.chain, svid.key.into())
        .map_err(tls)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would skip the certificate, which is what calls are judged by.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok((config, (left / 2).max(PAUSE)))
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(read) = Pin::new(&mut self.stream).poll_read(cx, buffer) {
            return Poll::Ready(read);
        }
        match &mut self.deadline {
            Some(deadline) => {
                ready!(deadline.as_mut().poll(cx));
                Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
            }
            None => Poll::Pending,
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
