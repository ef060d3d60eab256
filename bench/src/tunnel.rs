//! `heddle-bench tunnel`: two workloads on two nodes, joined by the tunnel, beside plain TCP, in one run.
//!
//! Both sides carry the same measurements in turn, each first as often as the other: [`plain`] is two namespaces joined
//! by veth and bridge and nothing else, [`mesh`] is a real mesh of two nodes with policy and flow records on. Nothing is
//! pinned: client, both agents and server share the machine's CPUs, as they would. [`load`] is what is measured,
//! [`agents`] what it costs the agents, and [`report`] makes figures of it.

mod agents;
mod load;
mod mesh;
mod objects;
mod plain;
mod report;

use std::{path::PathBuf, process::Command};

use anyhow::ensure;
use clap::Args;

use self::{
    load::{LOADS, Sample},
    mesh::Mesh,
    plain::Plain,
    report::{Memory, Report},
};
use crate::{
    direct::own_program,
    scenario::{Ends, Format, heddle_program},
};

/// Workloads whose first connection is measured, half of them over IPv6.
const COLD_CLIENTS: usize = 8;
/// Connections that are held while memory is looked at.
const IDLE: u32 = 1000;

/// Arguments of `heddle-bench tunnel`.
#[derive(Debug, Args)]
pub(crate) struct TunnelArguments {
    /// Rounds; each measures everything once on both sides.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Time of one measurement in seconds (of HTTP: at least 1, and whole).
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Measure only what has this in its name: `bulk`, `ping-pong`, `connections`, `http`.
    #[arg(long)]
    only: Option<String>,
    /// The heddle command (default: the one beside this program).
    #[arg(long)]
    heddle: Option<PathBuf>,
    /// How to print the figures.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// One side of the comparison.
trait Side {
    /// `program` with `arguments` where the client is.
    fn client(&self, program: &str, arguments: &[String]) -> anyhow::Result<Command>;
    /// The server and the web server, as the client says them.
    fn hosts(&self) -> [String; 2];
    /// CPU time that the agents have taken so far, in microseconds; `None` where there are none.
    fn agents_cpu(&self) -> anyhow::Result<Option<u64>>;
}

/// Measures, and prints the report.
pub(crate) fn run(arguments: &TunnelArguments) -> anyhow::Result<()> {
    ensure!(arguments.rounds > 0, "--rounds must be at least 1");
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run as root: namespaces are made and eBPF programs loaded"
    );
    let ends = Ends {
        program: own_program()?,
        client_cpu: None,
        server_cpu: None,
        seconds: arguments.seconds,
    };
    let heddle = heddle_program(arguments.heddle.as_ref(), &ends)?;
    let plain = Plain::start(&ends)?;
    let mesh = Mesh::start(&heddle, &ends, COLD_CLIENTS)?;
    let mut report = Report::default();
    measure_first_connections(&plain, &mesh, &ends, &mut report)?;
    measure_rounds(arguments, &plain, &mesh, &ends, &mut report)?;
    drop((mesh, plain));
    match arguments.output {
        Format::Table => print!("{report}"),
        Format::Json => println!("{}", serde_json::to_string_pretty(&report.figures())?),
    }
    Ok(())
}

/// What can be measured only once: the first connections, and the memory before and after them.
fn measure_first_connections(
    plain: &Plain,
    mesh: &Mesh,
    ends: &Ends,
    report: &mut Report,
) -> anyhow::Result<()> {
    eprintln!("first connections and idle ones");
    let at_rest = mesh.memory()?;
    let mut first = None;
    for number in 0..COLD_CLIENTS {
        let is_v6 = number % 2 == 0;
        let milliseconds = mesh.cold(ends, number, is_v6)?;
        report.cold(is_v6, load::cold(plain, ends)?, milliseconds);
        if first.is_none() {
            first = Some(mesh.memory()?);
        }
    }
    let before = mesh.memory()?;
    let idle = load::idle(mesh, ends, IDLE)?;
    let during = mesh.memory()?;
    idle.close()?;
    report.memory = Some(Memory {
        at_rest,
        first: first.unwrap_or(at_rest),
        idle_connections: IDLE,
        before_idle: before,
        with_idle: during,
    });
    Ok(())
}

fn measure_rounds(
    arguments: &TunnelArguments,
    plain: &Plain,
    mesh: &Mesh,
    ends: &Ends,
    report: &mut Report,
) -> anyhow::Result<()> {
    let wanted = |name: &str| {
        let only = arguments.only.as_deref();
        only.is_none_or(|only| name.contains(only))
    };
    let sides: [&dyn Side; 2] = [plain, mesh];
    for round in 0..arguments.rounds {
        eprintln!("round {} of {}", round + 1, arguments.rounds);
        for (index, load) in LOADS.iter().enumerate() {
            if !wanted(&load.to_string()) {
                continue;
            }
            let mut samples = [Sample::default(); 2];
            for turn in 0..sides.len() {
                let side = (round + index + turn) % sides.len();
                samples[side] = load.measure(sides[side], ends)?;
            }
            report.add(*load, samples);
        }
    }
    Ok(())
}
