//! HBONE, the tunnel between nodes: each carried TCP connection is one HTTP/2 `CONNECT` stream over mutual TLS.
//!
//! It knows nothing of namespaces, policy or configuration: who uses it gives it sockets, TLS settings and decisions.
//! Everything here lives on one worker thread: a connection and its streams never leave the thread that accepted or
//! opened it.
//!
//! - [`tls`]: settings of both sides; who is let in
//! - [`server`]: accepts connections and streams, asks a [`Handler`] about each
//! - [`pool`]: opens streams over pooled connections
//! - [`relay`]: the bytes between a TCP connection and a stream, and how it ended
//! - [`headers`]: what a `CONNECT` says about the connection that it carries
//! - [`limits`]: every bound, with its reason
//! - `stream`: TLS over a socket
//! - `connection`: the HTTP/2 connection's own life: pings, idleness, expiry
//! - `handshakes`: how many are in progress

mod connection;
mod error;
mod handshakes;
pub mod headers;
pub mod limits;
pub mod pool;
pub mod relay;
pub mod server;
mod stream;
pub mod tls;

pub use error::{ConnectError, ServeError, TlsError, TlsFailure};
pub use headers::{Authority, ConnectHeaders};
pub use limits::{ClientLimits, ServerLimits};
pub use pool::{Pool, PoolFigures, PoolKey, TunnelStream};
pub use relay::{End, Outcome, Side, relay};
pub use server::{Accepted, ConnectRequest, Handler, Peer, Refusal, Server, Session};
pub use tls::{ClientTls, ServerTls};
