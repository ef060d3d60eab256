//! `heddle-bench direct-scale`: what a large mesh costs on one node.
//!
//! A real node agent is told of 10, 1,000 and 10,000 services (each with its policy), and two real workloads measure the
//! direct path under each load, in alternating rounds: the figures must not grow with the load. Under the
//! largest load it is then timed how changes travel: from the control plane's push until the kernel's tables
//! show them. [`node`] is the node, [`objects`] the mesh, [`changes`] the timings, [`report`] the figures.

mod changes;
mod node;
mod objects;
mod report;

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Args;

use self::{
    node::{Node, Pod},
    objects::Range,
    report::Report,
};
use crate::{
    protocol::ACCEPT_PORT_OFFSET,
    scenario::{Ends, Format, PORT, SCENARIOS, heddle_program},
};

/// Arguments of `heddle-bench direct-scale`.
#[derive(Debug, Args)]
pub(crate) struct ScaleArguments {
    /// Numbers of services, each with an endpoint and a policy; the first is what the others are compared with.
    #[arg(
        long,
        default_value = "10,1000,10000",
        value_delimiter = ',',
        num_args = 1
    )]
    services: Vec<u32>,
    /// Rounds; each measures everything once under each load.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Time of one measurement in seconds.
    #[arg(long, default_value_t = 0.4)]
    seconds: f64,
    /// CPUs of the client and the server.
    #[arg(long, default_value = "0,0", value_delimiter = ',', num_args = 1)]
    cpus: Vec<usize>,
    /// Endpoints of the large service.
    #[arg(long, default_value_t = 10_000)]
    endpoints: u32,
    /// How often each kind of change is timed.
    #[arg(long, default_value_t = 40)]
    changes: u32,
    /// Workloads on the node.
    #[arg(long, default_value_t = 200)]
    workloads: u32,
    /// Everything, but small and once: shows that it works, not how fast.
    #[arg(long)]
    quick: bool,
    /// Name of the mesh: two runs at a time need two.
    #[arg(long, default_value = "bench-scale")]
    mesh: String,
    /// The heddle command (default: the one beside this program).
    #[arg(long)]
    heddle: Option<PathBuf>,
    /// How to print the figures.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// How much is measured.
#[derive(Debug, Clone)]
struct Plan {
    services: Vec<u32>,
    rounds: usize,
    endpoints: u32,
    changes: u32,
    workloads: u32,
}

impl Plan {
    fn of(arguments: &ScaleArguments) -> anyhow::Result<Self> {
        if arguments.quick {
            return Ok(Self {
                services: vec![10, 200],
                rounds: 1,
                endpoints: 500,
                changes: 4,
                workloads: 8,
            });
        }
        ensure!(
            !arguments.services.is_empty() && arguments.rounds > 0 && arguments.changes > 1,
            "--services needs a number, --rounds at least 1, --changes at least 2"
        );
        ensure!(
            (2..=240).contains(&arguments.workloads),
            "--workloads must be in 2..=240: a node has addresses for no more"
        );
        ensure!(
            arguments.services.iter().all(|count| *count <= 16_000)
                && arguments.endpoints <= 30_000,
            "at most 16,000 services and 30,000 endpoints fit a node's tables"
        );
        Ok(Self {
            services: arguments.services.clone(),
            rounds: arguments.rounds,
            endpoints: arguments.endpoints.max(20),
            changes: arguments.changes,
            workloads: arguments.workloads,
        })
    }
}

/// Measures, and prints the report.
pub(crate) fn run(arguments: &ScaleArguments) -> anyhow::Result<()> {
    let &[client_cpu, server_cpu] = arguments.cpus.as_slice() else {
        bail!("--cpus takes two numbers, the client's and the server's: --cpus 0,0");
    };
    ensure!(
        nix::unistd::geteuid().is_root(),
        "run as root: namespaces are made and eBPF programs loaded"
    );
    let plan = Plan::of(arguments)?;
    let ends = Ends {
        program: std::env::current_exe().context("cannot tell where this program is")?,
        client_cpu: Some(client_cpu),
        server_cpu: Some(server_cpu),
        seconds: if arguments.quick {
            0.1
        } else {
            arguments.seconds
        },
    };
    let heddle = heddle_program(arguments.heddle.as_ref(), &ends)?;

    let bed = Bed::start(&heddle, &arguments.mesh, ends)?;
    let mut report = Report::new(&plan.services, &SCENARIOS);
    let loaded = bed.measure_rounds(&plan, &mut report)?;
    changes::measure(&bed, &plan, loaded, &mut report)?;
    drop(bed);
    match arguments.output {
        Format::Table => print!("{report}"),
        Format::Json => println!("{}", serde_json::to_string_pretty(&report.figures())?),
    }
    Ok(())
}

/// The node with a client and a server on it.
struct Bed {
    // Before the node: its cgroup is removed when it is empty.
    _server_process: Process,
    server: Pod,
    client: Pod,
    node: Node,
    ends: Ends,
}

/// A process that ends with its owner.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It can only have ended already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const CLIENT: &str = "client";
const SERVER: &str = "server";
const PORTS: [u16; 2] = [PORT, PORT + ACCEPT_PORT_OFFSET];

impl Bed {
    fn start(heddle: &std::path::Path, mesh: &str, ends: Ends) -> anyhow::Result<Self> {
        let first = [
            objects::service_of(SERVER, objects::addresses(Range::Named, 0), &PORTS),
            objects::change_policy(&objects::namespace_wide("nobody")),
            objects::change_policy(&objects::selected(SERVER, CLIENT, &PORTS)),
        ];
        let node = Node::start(heddle, mesh, first.to_vec())?;
        let pods = [node.add_pod(SERVER)?, node.add_pod(CLIENT)?];
        let same: Vec<(u16, u16)> = PORTS.iter().map(|port| (*port, *port)).collect();
        let of_server: &[(&str, &[(u16, u16)])] = &[(SERVER, &same)];
        let known = node.push([
            objects::local(SERVER, &pods[0].addresses(), of_server, &[SERVER]),
            objects::local(CLIENT, &pods[1].addresses(), &[], &[]),
        ]);
        node.acknowledged(known)?;
        node.ready(&pods)?;
        let [server, client] = pods;
        let mut command = Command::new(&ends.program);
        command.args(ends.server_arguments()).stdout(Stdio::piped());
        server.contain(&mut command)?;
        let mut process = Process(command.spawn().context("cannot start the server")?);
        let mut line = String::new();
        if let Some(output) = process.0.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        ensure!(line.starts_with("listening"), "the server did not start");
        Ok(Self {
            _server_process: process,
            server,
            client,
            node,
            ends,
        })
    }

    /// Returns how many services are there at the end: the most.
    fn measure_rounds(&self, plan: &Plan, report: &mut Report) -> anyhow::Result<u32> {
        let mut loaded = 0;
        for round in 0..plan.rounds {
            eprintln!("round {} of {}", round + 1, plan.rounds);
            let mut order: Vec<usize> = (0..plan.services.len()).collect();
            // Up in one round and down in the next: whatever drifts does so for all.
            if round % 2 == 1 {
                order.reverse();
            }
            for index in order {
                self.load(&mut loaded, plan.services[index])?;
                for (scenario, of_scenario) in SCENARIOS.iter().enumerate() {
                    let target = format!("{}:{PORT}", objects::addresses(Range::Named, 0)[0]);
                    let measurement = of_scenario.measure(&self.ends, &target, |arguments| {
                        let mut command = Command::new(&self.ends.program);
                        command.args(arguments);
                        self.client.contain(&mut command)?;
                        command.output().context("cannot start the client")
                    })?;
                    report.add(index, scenario, measurement);
                }
            }
        }
        let most = plan.services.iter().copied().max().unwrap_or(0);
        self.load(&mut loaded, most)?;
        Ok(loaded)
    }

    /// Brings the number of services from `loaded` to `wanted`. Returns when the agent has it all in effect.
    fn load(&self, loaded: &mut u32, wanted: u32) -> anyhow::Result<Duration> {
        let added = (*loaded..wanted).flat_map(|number| objects::numbered(number, true));
        let gone = (wanted..*loaded).flat_map(|number| objects::numbered(number, false));
        let pushed = self.node.push(added.chain(gone));
        *loaded = wanted;
        self.node.acknowledged(pushed)
    }
}
