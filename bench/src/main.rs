//! `heddle-bench`: measures Heddle's data paths beside plain TCP, in the same run.
//!
//! - [`server`] and [`client`] are the two ends of a measurement: small, blocking programs on the
//!   standard library's sockets, so that the figures are the kernel's and not a runtime's.
//! - [`stress`] asks no figures, but whether every byte is right.
//! - [`direct`] runs the two on the direct path and on plain TCP in turn, and compares.
//! - [`scale`] runs them on the direct path under small and large loads, and times how changes travel.
//! - [`tunnel`] runs them between two nodes, through the tunnel, and on plain TCP in turn, and compares.
//! - [`scenario`] is what the former two measure.
//! - [`protocol`] is what the two say to each other.
//! - [`samples`] turns latencies into percentiles.
//! - [`affinity`] keeps an end on one CPU, where asked.

mod affinity;
mod client;
mod direct;
mod protocol;
mod samples;
mod scale;
mod scenario;
mod server;
mod stress;
mod tunnel;

use clap::{Parser, Subcommand};

/// Measures Heddle's data paths beside plain TCP.
#[derive(Parser)]
#[command(name = "heddle-bench", version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The serving end: echoes, swallows bulk data, and (one port higher) accepts and closes.
    Server(server::ServerArguments),
    /// The measuring end: runs one measurement and prints it as one line of JSON.
    Client(client::ClientArguments),
    /// Compares the kernel's direct path in a mesh with plain TCP.
    Direct(direct::DirectArguments),
    /// Compares the direct path under small and large loads, and times how changes reach the kernel.
    DirectScale(scale::ScaleArguments),
    /// Compares the tunnel between two nodes of a mesh with plain TCP.
    Tunnel(tunnel::TunnelArguments),
    /// The serving end of a stress run: follows each connection's plan, and checks every byte.
    StressServer(stress::StressServerArguments),
    /// Makes many connections of all kinds, checks every byte both ways, and prints the account as a line of JSON.
    Stress(stress::StressArguments),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Server(arguments) => server::run(&arguments),
        Command::Client(arguments) => client::run(&arguments),
        Command::Direct(arguments) => direct::run(&arguments),
        Command::DirectScale(arguments) => scale::run(&arguments),
        Command::Tunnel(arguments) => tunnel::run(&arguments),
        Command::StressServer(arguments) => stress::serve(&arguments),
        Command::Stress(arguments) => stress::run(&arguments),
    }
}
