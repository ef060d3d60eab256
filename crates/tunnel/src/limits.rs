//! Every bound of the tunnel, with its reason. What happens at each bound stands beside it.

use std::time::Duration;

/// What one stream may have under way towards us before we read it (and the most that a stalled one holds here).
pub const STREAM_WINDOW: u32 = 4 << 20;
/// The same for a connection. Larger than a stream's: with equal values one stalled stream would stop all others.
pub const CONNECTION_WINDOW: u32 = 16 << 20;
/// Largest DATA frame that we ask for. A frame is held whole before it is passed on, so that larger ones cost
/// memory and delay; smaller ones cost a header and a wakeup more often.
pub const MAX_FRAME: u32 = 128 << 10;
/// Bytes of a stream that wait here to be sent. When they are reached, its TCP connection is not read any more.
pub const SEND_BUFFER: usize = 512 << 10;
/// Longest header list (RFC 9113, section 6.5.2) of a `CONNECT`; a longer one is refused with 431.
pub const MAX_HEADERS: u32 = 16 << 10;
/// Longest header list that is looked at: beyond it the protocol layer answers 431 by itself, of which nobody learns, or
/// ends the connection.
pub const MOST_HEADERS: u32 = 64 << 10;
/// Streams that a peer reset before we took notice of them; one more ends the connection (CVE-2023-44487).
pub const MAX_PENDING_RESETS: usize = 64;
/// Bookkeeping that a peer may cause with DATA frames far smaller than what they cost; more ends the connection.
/// Enough for a stalled stream whose window is full of frames of a few hundred bytes.
pub const SMALL_FRAME_BUDGET: usize = 32 << 20;

/// Bounds of the accepting side.
#[derive(Debug, Clone)]
pub struct ServerLimits {
    /// Time for the TLS handshake; then the connection is closed.
    pub handshake_timeout: Duration,
    /// Time for the handler's answer to a `CONNECT`; then it is answered with 503.
    pub connect_timeout: Duration,
    /// Handshakes in progress on one worker; one more ends the oldest (they cost the CPU most).
    pub handshakes: usize,
    /// Connections of one worker; one more is refused.
    pub connections: usize,
    /// Streams of one connection; one more is answered with RST_STREAM (REFUSED_STREAM).
    pub streams: u32,
    /// A PING goes out after this long without one, if there are streams.
    pub ping_interval: Duration,
    /// A PING that is not answered in this time ends the connection and its streams.
    pub ping_timeout: Duration,
    /// A connection without streams for this long is told to go away.
    pub idle_timeout: Duration,
}

/// Bounds of the opening side.
#[derive(Debug, Clone)]
pub struct ClientLimits {
    /// Time for the TCP connection and the TLS handshake.
    pub handshake_timeout: Duration,
    /// Time until the peer has answered a `CONNECT`.
    pub connect_timeout: Duration,
    /// Streams of one connection; the next one goes over another. A peer that allows fewer is obeyed.
    pub streams: usize,
    /// Connections to one peer under one identity; then `connect` fails with `ConnectError::Full`.
    pub connections_per_key: usize,
    /// Connections of the pool; an idle one makes room for a new one, otherwise `ConnectError::Full`.
    pub connections: usize,
    /// A PING goes out after this long without one, if there are streams.
    pub ping_interval: Duration,
    /// A PING that is not answered in this time ends the connection and its streams.
    pub ping_timeout: Duration,
    /// A connection without streams for this long is closed.
    pub idle_timeout: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(10),
            handshakes: 256,
            connections: 16_384,
            streams: 200,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            // Longer than a client's, so that it is the client that closes: no CONNECT crosses our GOAWAY.
            idle_timeout: Duration::from_secs(600),
        }
    }
}

impl Default for ClientLimits {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(10),
            streams: 100,
            connections_per_key: 64,
            connections: 4096,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(300),
        }
    }
}
