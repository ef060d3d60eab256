//! The tunnel from end to end, over real sockets on loopback.
#![allow(clippy::unwrap_used, unreachable_pub)] // A test ends at the first thing that fails.

#[path = "tunnel/bench.rs"]
mod bench;
#[path = "tunnel/certificates.rs"]
mod certificates;
#[path = "tunnel/relay.rs"]
mod relay;
