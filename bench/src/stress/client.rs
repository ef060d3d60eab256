//! The connecting end: makes the connections of a run in rounds, and compares accounts with the server after each.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs},
    ops::Range,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serde::Serialize;
use socket2::{Domain, Socket, Type};

use super::{
    CONTROL_PORT_OFFSET, DATA_PORTS, StressArguments,
    engine::{self, Buffers, Totals, Ways},
    header::{Header, LENGTH},
    link::DEADLINE,
    plan::{BLOCK, Plan, Scenario, Style},
    server::{self, Question},
    tally::{MAX_FAILURES, Tally},
};

/// Connections between two comparisons of accounts.
const ROUND: u64 = 50_000;
/// Source ports that one thread uses again and again.
const PORTS_PER_THREAD: u16 = 8;
/// After so many failures nothing new is learnt.
const ENOUGH_FAILURES: u64 = MAX_FAILURES as u64 / 2;
/// The server answers when its last connection has ended.
const ANSWER: Duration = DEADLINE.saturating_mul(2);

/// The outcome of a run, printed as one line of JSON.
#[derive(Debug, Serialize)]
struct Outcome {
    seed: u64,
    connections: u64,
    scenarios: std::collections::BTreeMap<Scenario, u64>,
    /// Bytes that the client sent.
    sent: u64,
    /// Bytes that the client received.
    received: u64,
    /// Blocking calls that returned EAGAIN before their time, on both ends.
    early_wakeups: u64,
    /// Source ports that were not free yet when they were to be used again.
    ports_not_free: u64,
    mismatches: u64,
    seconds: f64,
    connections_per_second: f64,
}

pub(super) fn run(arguments: &StressArguments) -> anyhow::Result<()> {
    let run = Run::prepare(arguments)?;
    let numbers = match arguments.only {
        None => 0..arguments.connections,
        Some(only) if Plan::of(arguments.seed, only).scenario.reuses_port() => {
            let first = only / BLOCK * BLOCK;
            first..first + BLOCK
        }
        Some(only) => only..only + 1,
    };
    // An account of what another client left behind is not ours.
    run.ask(0)?;
    let started = Instant::now();
    let mut whole = Tally::default();
    let mut from = numbers.start;
    while from < numbers.end && whole.failed < ENOUGH_FAILURES {
        let round = from..numbers.end.min(from + ROUND);
        from = round.end;
        run.round(round, &mut whole)?;
        eprintln!(
            "{} of {} connections, {} failures, {:.0} s",
            from - numbers.start,
            numbers.end - numbers.start,
            whole.failed,
            started.elapsed().as_secs_f64()
        );
    }
    run.tell(whole, started.elapsed())
}

struct Run<'a> {
    arguments: &'a StressArguments,
    targets: Vec<SocketAddr>,
    ports_not_free: AtomicU64,
    stop: AtomicBool,
}

impl<'a> Run<'a> {
    fn prepare(arguments: &'a StressArguments) -> anyhow::Result<Self> {
        let name = &arguments.connect;
        let targets: Vec<SocketAddr> = name
            .to_socket_addrs()
            .with_context(|| format!("cannot resolve {name}"))?
            .collect();
        let first = targets
            .first()
            .with_context(|| format!("{name} has no address"))?;
        server::port(first.port(), CONTROL_PORT_OFFSET)?;
        let ports = arguments.concurrency * PORTS_PER_THREAD;
        ensure!(
            arguments.source_ports.checked_add(ports).is_some(),
            "--source-ports must leave room for {ports} ports"
        );
        Ok(Self {
            arguments,
            targets,
            ports_not_free: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        })
    }

    /// Makes these connections, and adds both ends' accounts of them to `whole`.
    fn round(&self, numbers: Range<u64>, whole: &mut Tally) -> anyhow::Result<()> {
        let next = AtomicU64::new(numbers.start);
        let tallies = thread::scope(|scope| {
            let threads: Vec<_> = (0..self.arguments.concurrency)
                .map(|index| {
                    let (next, end) = (&next, numbers.end);
                    scope.spawn(move || self.work(index, next, end))
                })
                .collect();
            threads
                .into_iter()
                .map(thread::ScopedJoinHandle::join)
                .collect::<Result<Vec<_>, _>>()
        });
        let Ok(tallies) = tallies else {
            bail!("a thread of the client panicked");
        };
        let mut client = Tally::default();
        for tally in tallies {
            client.join(tally);
        }
        let at_once = client.scenarios.get(&Scenario::ResetAtOnce);
        let not_seen = at_once.map_or(0, |sum| sum.connections);
        let server = self.ask(client.connections() + client.failed - not_seen)?;
        // Where a connection failed, the accounts differ; the failures say it better.
        if client.failed + server.failed == 0 {
            for difference in client.differences(&server) {
                client.fail(difference);
            }
        }
        client.early += server.early;
        client.failed += server.failed;
        client.failures.extend(server.failures);
        whole.absorb(client);
        Ok(())
    }

    /// One thread's connections, one after the other.
    fn work(&self, thread: u16, next: &AtomicU64, end: u64) -> Tally {
        let mut buffers = Buffers::new();
        let mut tally = Tally::default();
        let first_port = self.arguments.source_ports + thread * PORTS_PER_THREAD;
        let mut ports = (0..PORTS_PER_THREAD)
            .cycle()
            .map(|index| first_port + index);
        loop {
            let first = next.fetch_add(BLOCK, Ordering::Relaxed);
            if first >= end || self.stop.load(Ordering::Relaxed) {
                return tally;
            }
            let mut port = ports.next().unwrap_or(first_port);
            for number in first..end.min(first + BLOCK) {
                let plan = Plan::of(self.arguments.seed, number);
                let asked_for = &self.arguments.scenario;
                if !asked_for.is_empty() && !asked_for.contains(&plan.scenario) {
                    continue;
                }
                match self.connection(number, &plan, &mut port, &mut ports, &mut buffers) {
                    Ok(totals) => tally.add(plan.scenario, number, totals),
                    Err(what) => {
                        tally.fail(format!(
                            "connection {number} ({}, client, seed {}): {what}",
                            plan.scenario.name(),
                            self.arguments.seed
                        ));
                        if tally.failed >= ENOUGH_FAILURES {
                            self.stop.store(true, Ordering::Relaxed);
                            return tally;
                        }
                    }
                }
            }
        }
    }

    fn connection(
        &self,
        number: u64,
        plan: &Plan,
        port: &mut u16,
        ports: &mut impl Iterator<Item = u16>,
        buffers: &mut Buffers,
    ) -> Result<Totals, String> {
        let reuses = plan.scenario.reuses_port();
        let choice = if reuses { number / BLOCK } else { number };
        let target = self.target(choice);
        let failed = |error: io::Error| format!("connect to {target}: {error}");
        let mut tries = 0;
        let mut stream = loop {
            let source = reuses.then_some(*port);
            match open(target, source, plan) {
                Ok(stream) => break stream,
                Err(error) if reuses && tries < PORTS_PER_THREAD && is_port_not_free(&error) => {
                    self.ports_not_free.fetch_add(1, Ordering::Relaxed);
                    tries += 1;
                    *port = ports.next().unwrap_or(*port);
                }
                Err(error) => return Err(failed(error)),
            }
        };
        let seed = self.arguments.seed;
        let header = Header { seed, number };
        let opened = match plan.scenario {
            Scenario::Empty => Ok(()),
            // Nothing, or a part of the header.
            Scenario::ResetAtOnce => {
                let part = (number % LENGTH as u64) as usize;
                stream.write_all(&header.bytes()[..part])
            }
            _ => header.write(&mut stream),
        };
        opened.map_err(|error| format!("send the header: {error}"))?;
        let ways = Ways::of_client(seed, number);
        let played = engine::play(stream, &plan.client, ways, buffers);
        played.map_err(|trouble| trouble.to_string())
    }

    /// One of the server's addresses and data ports.
    fn target(&self, choice: u64) -> SocketAddr {
        let count = self.targets.len() as u64;
        let mut target = self.targets[(choice % count) as usize];
        let offset = (choice / count % u64::from(DATA_PORTS)) as u16;
        // `prepare` saw that there is room.
        target.set_port(target.port().saturating_add(offset));
        target
    }

    /// What the server saw since it was last asked, when so many connections have ended there.
    fn ask(&self, connections: u64) -> anyhow::Result<Tally> {
        let mut target = self.targets[0];
        target.set_port(target.port().saturating_add(CONTROL_PORT_OFFSET));
        let asked = || -> io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&target, DEADLINE)?;
            stream.set_read_timeout(Some(ANSWER))?;
            let mut question = serde_json::to_vec(&Question { connections })?;
            question.push(b'\n');
            stream.write_all(&question)?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line)?;
            Ok(line)
        };
        let line = asked().with_context(|| format!("cannot ask the server at {target}"))?;
        serde_json::from_str(&line).context("the server's answer cannot be read")
    }

    fn tell(&self, whole: Tally, elapsed: Duration) -> anyhow::Result<()> {
        for failure in &whole.failures {
            eprintln!("{failure}");
        }
        let seconds = elapsed.as_secs_f64();
        let connections = whole.connections();
        let sum = |of: fn(&super::tally::Sum) -> u64| whole.scenarios.values().map(of).sum();
        let outcome = Outcome {
            seed: self.arguments.seed,
            connections,
            scenarios: whole
                .scenarios
                .iter()
                .map(|(scenario, sum)| (*scenario, sum.connections))
                .collect(),
            sent: sum(|sum| sum.sent),
            received: sum(|sum| sum.received),
            early_wakeups: whole.early,
            ports_not_free: self.ports_not_free.load(Ordering::Relaxed),
            mismatches: whole.failed,
            seconds,
            connections_per_second: connections as f64 / seconds,
        };
        println!("{}", serde_json::to_string(&outcome)?);
        ensure!(
            whole.failed == 0,
            "{} failures; one alone: add --seed {} --only NUMBER",
            whole.failed,
            self.arguments.seed
        );
        Ok(())
    }
}

/// Connects, from a certain source port if one is given.
fn open(target: SocketAddr, source: Option<u16>, plan: &Plan) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
    if plan.small_buffers {
        server::shrink(&socket)?;
    }
    if let Some(port) = source {
        socket.set_reuse_address(true)?;
        let any = match target {
            SocketAddr::V4(_) => SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
            SocketAddr::V6(_) => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
        };
        socket.bind(&any.into())?;
    }
    match plan.client.style {
        Style::Blocking => {
            socket.set_write_timeout(Some(DEADLINE))?;
            socket.connect(&target.into())?;
        }
        Style::Edge => socket.connect_timeout(&target.into(), DEADLINE)?,
    }
    Ok(socket.into())
}

/// The port is another program's, or the last connection from it is still ending.
fn is_port_not_free(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
    )
}
