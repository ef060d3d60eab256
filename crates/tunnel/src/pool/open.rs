//! Opens a connection for the pool, and looks after it until its end.

use std::{
    future::Future,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use h2::client::SendRequest;
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use super::{Connection, Lease, Pool, PoolKey, Ready, lock};
use crate::{
    ClientTls, ConnectError, TlsFailure,
    connection::{Event, KeepAlive},
    limits,
    stream::{self, Failure, Handshaken, TlsStream},
};

type Http2 = h2::client::Connection<TlsStream, Bytes>;

/// Whoever opens a connection, for itself and for those who wait. Dropped, it gives the task to one of them.
pub(super) struct Opener {
    pool: Pool,
    key: PoolKey,
    number: u64,
    result: watch::Sender<Option<Result<(), ConnectError>>>,
}

impl Opener {
    pub(super) fn new(
        pool: Pool,
        key: PoolKey,
        number: u64,
        result: watch::Sender<Option<Result<(), ConnectError>>>,
    ) -> Self {
        Self {
            pool,
            key,
            number,
            result,
        }
    }

    /// Opens it and takes the first place on it. The others wait until it is in the pool.
    pub(super) async fn open<D, F>(
        self,
        dial: &D,
        tls: &ClientTls,
    ) -> Result<(SendRequest<Bytes>, Lease), ConnectError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<TcpStream>>,
    {
        let limit = self.pool.shared.limits.handshake_timeout;
        let opened = timeout(limit, self.handshake(dial, tls))
            .await
            .unwrap_or_else(|_| {
                Err(ConnectError::Timeout {
                    what: "the connection to the tunnel's other end",
                    seconds: limit.as_secs(),
                })
            });
        let (send, http2, failure) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.withdraw();
                self.result.send_replace(Some(Err(error.clone())));
                return Err(error);
            }
        };
        if self.pool.shared.draining.is_cancelled() {
            return Err(ConnectError::Draining);
        }
        let connection = Arc::new(Connection {
            number: self.number,
            streams: AtomicUsize::new(0),
            gone: AtomicBool::new(false),
            idle_since: Mutex::new(Instant::now()),
            failure,
        });
        let lease = Lease::take(&connection);
        let tasks = self.pool.shared.tasks.clone();
        let expiry = Instant::now() + until(tls.not_after);
        tasks.spawn(self.attend(http2, send.clone(), connection, expiry));
        Ok((send, lease))
    }

    async fn handshake<D, F>(
        &self,
        dial: &D,
        tls: &ClientTls,
    ) -> Result<(SendRequest<Bytes>, Http2, Failure), ConnectError>
    where
        D: Fn() -> F,
        F: Future<Output = io::Result<TcpStream>>,
    {
        let unreachable = |error| ConnectError::Unreachable(Arc::new(error));
        let tcp = dial().await.map_err(unreachable)?;
        tcp.set_nodelay(true).map_err(unreachable)?;
        let Handshaken {
            stream, failure, ..
        } = stream::connect(tcp, tls).await.map_err(|error| {
            TlsFailure::inside(&error).map_or_else(|| unreachable(error), ConnectError::Tls)
        })?;
        let limits = &self.pool.shared.limits;
        let (send, http2) = h2::client::Builder::new()
            .initial_window_size(limits::STREAM_WINDOW)
            .initial_connection_window_size(limits::CONNECTION_WINDOW)
            .max_frame_size(limits::MAX_FRAME)
            .max_send_buffer_size(limits::SEND_BUFFER)
            .max_header_list_size(limits::MAX_HEADERS)
            .data_frame_budget(limits::SMALL_FRAME_BUDGET)
            .initial_max_send_streams(limits.streams)
            .enable_push(false)
            .handshake(stream)
            .await
            .map_err(|error| ConnectError::Broken(error.to_string()))?;
        Ok((send, http2, failure))
    }

    /// Drives the connection: into the pool when it is settled, out of it when it is idle, broken or expired.
    async fn attend(
        self,
        mut http2: Http2,
        send: SendRequest<Bytes>,
        connection: Arc<Connection>,
        expiry: Instant,
    ) {
        let limits = self.pool.shared.limits.clone();
        let Some(ping_pong) = http2.ping_pong() else {
            return;
        };
        let interval = limits.ping_interval.min(limits.idle_timeout);
        let mut alive = KeepAlive::new(ping_pong, interval, limits.ping_timeout);
        alive.ping();
        let mut unsettled = Some(send);
        let ended = loop {
            let busy = connection.streams.load(Relaxed) > 0;
            tokio::select! {
                biased;
                end = &mut http2 => break end.map_err(|error| error.to_string()),
                event = alive.next(busy) => match event {
                    Event::TimedOut => break Err("the peer does not answer PINGs".to_owned()),
                    Event::Pong => {
                        if let Some(send) = unsettled.take() {
                            self.settle(send, &connection);
                        }
                    }
                    Event::Tick => self.retire_if_idle(&connection, limits.idle_timeout),
                },
                () = sleep_until(expiry) => break Err("its certificate has expired".to_owned()),
            }
        };
        connection.gone.store(true, Relaxed);
        self.remove(&connection);
        let error = match ended {
            Ok(()) => "the peer closed the connection".to_owned(),
            Err(error) => error,
        };
        tracing::debug!(peer = %self.key.address, %error, "tunnel connection ended");
        if unsettled.is_some() {
            self.withdraw();
            let error = match connection.failure.get() {
                Some(failure) => ConnectError::Tls(failure.clone()),
                None => ConnectError::Broken(error),
            };
            self.result.send_replace(Some(Err(error)));
        }
    }

    /// Puts the connection into the pool, unless its source was forgotten meanwhile.
    fn settle(&self, send: SendRequest<Bytes>, connection: &Arc<Connection>) {
        if self.withdraw() {
            let mut peers = self.pool.peers();
            peers
                .entry(self.key.clone())
                .or_default()
                .ready
                .push(Ready {
                    send,
                    connection: Arc::clone(connection),
                });
        }
        self.result.send_replace(Some(Ok(())));
    }

    fn retire_if_idle(&self, connection: &Connection, limit: Duration) {
        // Under the pool's lock nobody takes a place.
        let mut peers = self.pool.peers();
        if connection.streams.load(Relaxed) > 0 || lock(&connection.idle_since).elapsed() < limit {
            return;
        }
        if let Some(peer) = peers.get_mut(&self.key) {
            peer.ready
                .retain(|ready| ready.connection.number != self.number);
        }
        peers.retain(|_, peer| !peer.is_empty());
    }

    fn remove(&self, connection: &Connection) {
        let mut peers = self.pool.peers();
        if let Some(peer) = peers.get_mut(&self.key) {
            peer.ready
                .retain(|ready| ready.connection.number != connection.number);
            if peer.is_empty() {
                peers.remove(&self.key);
            }
        }
    }

    /// Takes it out of those in the making; was it there?
    fn withdraw(&self) -> bool {
        let mut peers = self.pool.peers();
        let Some(peer) = peers.get_mut(&self.key) else {
            return false;
        };
        let before = peer.opening.len();
        peer.opening.retain(|opening| opening.number != self.number);
        let found = peer.opening.len() < before;
        if peer.is_empty() {
            peers.remove(&self.key);
        }
        found
    }
}

impl Drop for Opener {
    fn drop(&mut self) {
        self.withdraw();
    }
}

fn until(time: SystemTime) -> Duration {
    // A certificate without an end in sight is looked at again in a year.
    time.duration_since(SystemTime::now())
        .unwrap_or_default()
        .min(Duration::from_secs(365 * 24 * 3600))
}
