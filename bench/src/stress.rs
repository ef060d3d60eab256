//! `heddle-bench stress` and `stress-server`: are all bytes the right ones, whatever programs do with their sockets?
//!
//! Nothing is measured here but time. A client makes many connections to a server; on each, both ends follow a plan
//! that the seed and the connection's number tell ([`plan`]), send bytes that the same two tell ([`content`]), and check
//! every byte and every end that they see ([`engine`], [`link`]). Afterwards the two ends' accounts are compared
//! ([`tally`]). What differs is printed with the connection's number, which alone runs that connection again.
//!
//! The two programs are [`client`] and [`server`]; what opens a connection is in [`header`].

mod client;
mod content;
mod engine;
mod header;
mod link;
mod plan;
mod server;
mod tally;

use clap::Args;

/// Data ports: PORT and those above it. Several, so that one that is in TIME_WAIT is not in the way.
const DATA_PORTS: u16 = 4;
/// Offset of the port that the accounts are asked at.
const CONTROL_PORT_OFFSET: u16 = DATA_PORTS;

/// Arguments of `heddle-bench stress-server`.
#[derive(Debug, Args)]
pub(crate) struct StressServerArguments {
    /// The first of four data ports; the fifth tells what the server saw.
    #[arg(long, default_value_t = 7100)]
    port: u16,
    /// Connections served at a time.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: u16,
}

/// Arguments of `heddle-bench stress`.
#[derive(Debug, Args)]
pub(crate) struct StressArguments {
    /// Where the server's first data port is: `HOST:PORT`. All addresses of the host are used.
    #[arg(long)]
    connect: String,
    /// How many connections to make.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    connections: u64,
    /// What tells the plans and the bytes of all connections.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Connections at a time.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: u16,
    /// First of the source ports that are used again and again: eight per connection at a time.
    #[arg(long, default_value_t = 12_000)]
    source_ports: u16,
    /// Only this connection (with its neighbours, if they share its source port).
    #[arg(long)]
    only: Option<u64>,
    /// Only connections of these scenarios.
    #[arg(long, value_enum, value_delimiter = ',')]
    scenario: Vec<plan::Scenario>,
}

/// Serves until it is killed.
pub(crate) fn serve(arguments: &StressServerArguments) -> anyhow::Result<()> {
    server::run(arguments)
}

/// Makes the connections, prints one line of JSON, and fails if anything was not as it should be.
pub(crate) fn run(arguments: &StressArguments) -> anyhow::Result<()> {
    client::run(arguments)
}
