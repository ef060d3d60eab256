//! The tunnel from end to end, over real sockets on loopback.
#![allow(clippy::unwrap_used, unreachable_pub)] // A test ends at the first thing that fails.

#[path = "tunnel/answers.rs"]
mod answers;
#[path = "tunnel/bench.rs"]
mod bench;
#[path = "tunnel/certificates.rs"]
mod certificates;
#[path = "tunnel/handshake.rs"]
mod handshake;
#[path = "tunnel/hostile.rs"]
mod hostile;
#[path = "tunnel/lifecycle.rs"]
mod lifecycle;
#[path = "tunnel/pooling.rs"]
mod pooling;
#[path = "tunnel/relay.rs"]
mod relay;
