//! Delta ADS server: serves a [`Cache`] to any number of subscribers and knows what each of them has.
//!
//! A subscriber has at most one unanswered response per type. While it is slow, changes pile up as
//! nothing but a sequence number, and the next response carries their sum: a slow client costs no
//! memory and delays no other.
//!
//! - `server/subscription.rs`: what one client wants and holds of one type (no I/O).
//! - `server/stream.rs`: the task behind one client's stream.
//! - `server/clients.rs`: acknowledgements on record, for `heddle status`.

mod clients;
mod stream;
mod subscription;

use std::{
    io,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixListener,
    sync::watch,
    task::JoinHandle,
};
use tokio_stream::{Stream, wrappers::UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

pub use self::clients::{ClientState, ClientTypeState};
use self::{clients::Clients, stream::Service};
use crate::{MAX_MESSAGE_BYTES, cache::Cache};

/// A client that answers no PING for so long is gone.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Serves one cache; ends when shut down or dropped.
#[derive(Debug)]
pub struct Server {
    cache: Cache,
    clients: Clients,
    stop: CancellationToken,
    listeners: Vec<JoinHandle<()>>,
    sockets: Vec<PathBuf>,
}

/// Why a server cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another process answers on the socket.
    #[error(
        "{} is served by another process: stop it (`heddle down`), or choose another socket", path.display()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The path is something else than a socket.
    #[error("{} exists and is not a socket: remove it, or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused the socket.
    #[error("cannot listen on {}: {source}; does its folder exist, and is the path below 108 bytes?", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

impl Server {
    /// A server that does not listen yet. Fill `cache` before the first `listen_*`: subscribers take the
    /// first answer for everything that there is.
    #[must_use]
    pub fn new(cache: Cache) -> Self {
        Self {
            cache,
            clients: Clients::default(),
            stop: CancellationToken::new(),
            listeners: Vec::new(),
            sockets: Vec::new(),
        }
    }

    /// Listens on a Unix socket that only this user may connect to. A dead server's socket is replaced.
    ///
    /// # Errors
    /// The path is in use, is not a socket, or cannot be bound.
    pub async fn listen_unix(&mut self, path: &Path) -> Result<(), ServerError> {
        remove_dead_socket(path).await?;
        let bind_error = |source| ServerError::Bind {
            path: path.to_owned(),
            source,
        };
        let listener = UnixListener::bind(path).map_err(bind_error)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
            .map_err(bind_error)?;
        self.sockets.push(path.to_owned());
        self.serve(UnixListenerStream::new(listener));
        Ok(())
    }

    /// What every connected client has acknowledged.
    #[must_use]
    pub fn clients(&self) -> Vec<ClientState> {
        self.clients.list()
    }

    /// Notifies whenever [`Server::clients`] has changed.
    #[must_use]
    pub fn watch_clients(&self) -> watch::Receiver<u64> {
        self.clients.watch()
    }

    /// Ends all streams, stops listening and removes the sockets.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        for listener in self.listeners.drain(..) {
            if let Err(error) = listener.await {
                tracing::warn!(%error, "an xDS listener ended abnormally");
            }
        }
    }

    /// Serves connections from any transport until the server is shut down.
    fn serve<S, IO>(&mut self, incoming: S)
    where
        S: Stream<Item = io::Result<IO>> + Send + 'static,
        IO: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let service = Service::new(self.cache.clone(), self.clients.clone(), self.stop.clone());
        let service = AggregatedDiscoveryServiceServer::new(service)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let stop = self.stop.clone();
        self.listeners.push(tokio::spawn(async move {
            let served = tonic::transport::Server::builder()
                .http2_keepalive_interval(Some(KEEPALIVE))
                .http2_keepalive_timeout(Some(KEEPALIVE))
                .add_service(service)
                .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
                .await;
            if let Err(error) = served {
                tracing::error!(%error, "the xDS server stopped: data planes keep their last state");
            }
        }));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
        for path in &self.sockets {
            if let Err(error) = std::fs::remove_file(path) {
                tracing::debug!(%error, path = %path.display(), "could not remove the xDS socket");
            }
        }
    }
}

/// Removes the socket file that a server left behind; leaves one on which someone answers.
async fn remove_dead_socket(path: &Path) -> Result<(), ServerError> {
    let Ok(metadata) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !metadata.file_type().is_socket() {
        return Err(ServerError::NotASocket {
            path: path.to_owned(),
        });
    }
    if tokio::net::UnixStream::connect(path).await.is_ok() {
        return Err(ServerError::InUse {
            path: path.to_owned(),
        });
    }
    std::fs::remove_file(path).map_err(|source| ServerError::Bind {
        path: path.to_owned(),
        source,
    })
}
