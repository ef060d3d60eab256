//! `heddle-bench direct`: the kernel's direct path beside plain TCP, in one run.
//!
//! All sides carry the same measurements in turn, each first as often as the others, so that whatever drifts on the
//! machine drifts for all: [`plain`] is two namespaces joined by veth and bridge and nothing else, [`contained`] is
//! the same with processes that are contained as workloads are, [`mesh`] is two workloads of a real mesh
//! with policy and flow records on. [`report`] makes figures of it. What one measurement does is
//! [`crate::client`]'s business.

mod contained;
pub(crate) mod mesh;
pub(crate) mod plain;
mod report;

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, bail, ensure};
use clap::Args;

use self::{
    contained::Contained,
    mesh::Mesh,
    plain::Plain,
    report::{Report, SPLICED},
};
use crate::{
    client::Measurement,
    scenario::{Ends, Format, SCENARIOS, Scenario, heddle_program},
};

/// Arguments of `heddle-bench direct`.
#[derive(Debug, Args)]
pub(crate) struct DirectArguments {
    /// Rounds; each measures everything once on both sides.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Time of one measurement in seconds.
    #[arg(long, default_value_t = 0.4)]
    seconds: f64,
    /// CPUs of the client and the server. One for both makes the figures the work that is done per message;
    /// with two, most of the time goes into waking an idle CPU, which hides the difference and moves more.
    #[arg(long, default_value = "0,0", value_delimiter = ',', num_args = 1)]
    cpus: Vec<usize>,
    /// Replicas in the start-up measurement; 0 leaves it out.
    #[arg(long, default_value_t = 50)]
    replicas: u32,
    /// Compare plain TCP with itself instead of with a mesh: how far the ratios stray from 1 is the noise.
    #[arg(long)]
    control: bool,
    /// Let both workloads ask for spliced connections (docs/splice.md).
    #[arg(long, conflicts_with = "control")]
    splice: bool,
    /// The heddle command (default: the one beside this program).
    #[arg(long)]
    heddle: Option<PathBuf>,
    /// How to print the figures.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// One side of the comparison.
trait Side {
    /// Runs this program with `arguments` where the client is.
    fn client(&self, arguments: &[String]) -> anyhow::Result<std::process::Output>;
    /// `HOST:PORT` of the server as the client says it.
    fn target(&self) -> String;
}

/// Measures, and prints the report.
pub(crate) fn run(arguments: &DirectArguments) -> anyhow::Result<()> {
    let &[client_cpu, server_cpu] = arguments.cpus.as_slice() else {
        bail!("--cpus takes two numbers, the client's and the server's: --cpus 0,0");
    };
    ensure!(arguments.rounds > 0, "--rounds must be at least 1");
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run as root: namespaces are made and eBPF programs loaded"
    );
    let ends = Ends {
        program: own_program()?,
        client_cpu: Some(client_cpu),
        server_cpu: Some(server_cpu),
        seconds: arguments.seconds,
    };
    let plain = Plain::start(&ends)?;
    let mut report;
    if arguments.control {
        let again = Plain::start(&ends)?;
        report = Report::new(&SCENARIOS, &["plain TCP", "plain again"]);
        measure_rounds(arguments.rounds, &[&plain, &again], &ends, &mut report)?;
    } else {
        let heddle = heddle_program(arguments.heddle.as_ref(), &ends)?;
        let contained = Contained::start(&heddle, &ends)?;
        let mesh = Mesh::start(&heddle, &ends, arguments.splice)?;
        let name = if arguments.splice { SPLICED } else { "mesh" };
        report = Report::new(&SCENARIOS, &["plain TCP", "contained", name]);
        let sides: [&dyn Side; 3] = [&plain, &contained, &mesh];
        measure_rounds(arguments.rounds, &sides, &ends, &mut report)?;
        drop((mesh, contained));
        if arguments.replicas > 0 {
            eprintln!("start of {} replicas", arguments.replicas);
            let up = mesh::time_of_start(&heddle, arguments.replicas)?;
            report.start_of_replicas(arguments.replicas, up, own_start(arguments.replicas)?);
        }
    }
    match arguments.output {
        Format::Table => print!("{report}"),
        Format::Json => println!("{}", serde_json::to_string_pretty(&report.figures())?),
    }
    Ok(())
}

fn measure_rounds(
    rounds: usize,
    sides: &[&dyn Side],
    ends: &Ends,
    report: &mut Report,
) -> anyhow::Result<()> {
    for round in 0..rounds {
        eprintln!("round {} of {rounds}", round + 1);
        for (index, scenario) in SCENARIOS.iter().enumerate() {
            let mut measured = vec![None; sides.len()];
            for turn in 0..sides.len() {
                let side = (round + index + turn) % sides.len();
                measured[side] = Some(measure(sides[side], scenario, ends)?);
            }
            report.add(index, measured.into_iter().flatten().collect());
        }
    }
    Ok(())
}

fn measure(side: &dyn Side, scenario: &Scenario, ends: &Ends) -> anyhow::Result<Measurement> {
    scenario.measure(ends, &side.target(), |arguments| side.client(arguments))
}

/// This program's path. Workloads see the machine's files, but have a /tmp and a /run of their own.
pub(crate) fn own_program() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    for private in ["/tmp", "/run", "/var/tmp", "/dev"] {
        ensure!(
            !program.starts_with(private),
            "{} cannot be seen inside a workload: build into a folder outside {private}",
            program.display()
        );
    }
    Ok(program)
}

/// What starting the programs takes without any mesh: the share of a start that is their own.
fn own_start(replicas: u32) -> anyhow::Result<Duration> {
    let started = std::time::Instant::now();
    let mut children = Vec::new();
    for _ in 0..replicas {
        let child = Command::new(mesh::IDLE_PROGRAM[0])
            .args(&mesh::IDLE_PROGRAM[1..])
            .spawn()
            .with_context(|| format!("cannot start {}", mesh::IDLE_PROGRAM[0]))?;
        children.push(child);
    }
    let elapsed = started.elapsed();
    for mut child in children {
        child.kill()?;
        child.wait()?;
    }
    Ok(elapsed)
}
