//! The measuring end: one measurement, one line of JSON.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream, ToSocketAddrs},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::{
    affinity,
    protocol::{ACCEPT_PORT_OFFSET, Header, MAX_SIZE, Purpose},
    samples::Samples,
};

/// A peer that does not answer for this long ends the measurement with an error.
const PATIENCE: Duration = Duration::from_secs(10);

/// Failed connections in a row after which nothing is being measured any more.
const MAX_FAILURES_IN_A_ROW: u64 = 100;

/// Most connections of one measurement: each has a thread, here or at the server.
const MAX_CONNECTIONS: u32 = 2048;

/// Time at the start of a measurement that is not counted: caches, routes and windows settle in it.
const WARM_UP: Duration = Duration::from_millis(200);

/// Arguments of `heddle-bench client`.
#[derive(Debug, Args)]
pub(crate) struct ClientArguments {
    /// What to measure.
    #[arg(long, value_enum)]
    mode: Mode,
    /// Message size in bytes (write size for bulk).
    #[arg(long, default_value_t = 64)]
    size: u32,
    /// How long to measure, after a short warm-up.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Connections at a time: bulk, connect and idle.
    #[arg(long, default_value_t = 1)]
    connections: u32,
    /// Where the server's data port is: `HOST:PORT`, `[ADDRESS]:PORT`.
    #[arg(long)]
    connect: String,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// What a measurement measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Mode {
    /// Round trips of one message on one connection.
    Pingpong,
    /// Bytes in one direction.
    Bulk,
    /// Connections, one after the other, each closed by the server as soon as it stands.
    Connect,
    /// One connection and its first round trip, without a warm-up.
    Cold,
    /// Connections with one round trip each, then held until standard input ends. Prints when all are open.
    Idle,
}

impl Mode {
    /// The value of `--mode` that asks for it.
    pub(crate) fn argument(self) -> &'static str {
        match self {
            Self::Pingpong => "pingpong",
            Self::Bulk => "bulk",
            Self::Connect => "connect",
            Self::Cold => "cold",
            Self::Idle => "idle",
        }
    }
}

/// The outcome of one measurement. Fields that a mode does not measure are zero.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measurement {
    /// What was measured.
    pub(crate) mode: Mode,
    /// Message size in bytes.
    pub(crate) size: u32,
    /// Time measured, in seconds.
    pub(crate) seconds: f64,
    /// Median latency of a round trip, or of a connection from `connect` to the server's close, in nanoseconds.
    pub(crate) p50_ns: u64,
    /// 99th percentile of the same.
    pub(crate) p99_ns: u64,
    /// Round trips per second.
    pub(crate) messages_per_second: f64,
    /// Payload bytes per second, in one direction.
    pub(crate) bytes_per_second: f64,
    /// Connections per second.
    pub(crate) connections_per_second: f64,
    /// Connections that failed.
    pub(crate) errors: u64,
    /// Everything that was done, the warm-up included: round trips, bytes or connections. What CPU time is divided by.
    pub(crate) operations: u64,
}

/// Measures and prints.
pub(crate) fn run(arguments: &ClientArguments) -> anyhow::Result<()> {
    let (measurement, held) = measure(arguments)?;
    println!("{}", serde_json::to_string(&measurement)?);
    if !held.is_empty() {
        std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    }
    Ok(())
}

/// The measurement, and the connections that are to stay open after it.
fn measure(arguments: &ClientArguments) -> anyhow::Result<(Measurement, Vec<TcpStream>)> {
    ensure!(
        (1..=MAX_SIZE).contains(&arguments.size),
        "--size must be in 1..={MAX_SIZE}"
    );
    ensure!(
        (1..=MAX_CONNECTIONS).contains(&arguments.connections),
        "--connections must be in 1..={MAX_CONNECTIONS}"
    );
    let duration = Duration::try_from_secs_f64(arguments.seconds)
        .ok()
        .filter(|duration| !duration.is_zero())
        .context("--seconds must be more than 0")?;
    affinity::pin(arguments.cpu)?;
    // As the server does: in a session of its own on every side, or the sides are scheduled differently.
    let _ = nix::unistd::setsid();
    let target = resolve(&arguments.connect)?;
    let (size, count) = (arguments.size, arguments.connections);
    let measurement = match arguments.mode {
        Mode::Pingpong => ping_pong(target, size, duration)?,
        Mode::Bulk => {
            let all = at_a_time(count, || bulk(target, size, duration))?;
            let mut sum = nothing_yet(Mode::Bulk, size, duration.as_secs_f64());
            for one in all {
                sum.bytes_per_second += one.bytes_per_second;
                sum.operations += one.operations;
            }
            sum
        }
        Mode::Connect => {
            let all = at_a_time(count, || connections(target, duration))?;
            sum_of_connections(all, duration)
        }
        Mode::Cold => cold(target, size)?,
        Mode::Idle => return idle(target, size, count),
    };
    Ok((measurement, Vec::new()))
}

/// Runs `work` on as many threads.
fn at_a_time<T: Send>(
    count: u32,
    work: impl Fn() -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    if count == 1 {
        return Ok(vec![work()?]);
    }
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(&work)).collect();
        let results = threads.into_iter().map(|thread| {
            let result = thread.join();
            result.unwrap_or_else(|_| bail!("a thread of the client panicked"))
        });
        results.collect()
    })
}

/// The first address of `HOST:PORT`, as a simple program would take it.
fn resolve(target: &str) -> anyhow::Result<SocketAddr> {
    target
        .to_socket_addrs()
        .with_context(|| format!("cannot resolve {target}"))?
        .next()
        .with_context(|| format!("{target} has no address"))
}

fn ping_pong(target: SocketAddr, size: u32, duration: Duration) -> anyhow::Result<Measurement> {
    let mut stream = open(target, Purpose::PingPong, size)?;
    let mut message = vec![0xa5; size as usize];
    let mut exchange = || {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)
    };
    let mut samples = Samples::new();

    let warm = Instant::now() + WARM_UP;
    let mut uncounted: u64 = 0;
    while Instant::now() < warm {
        exchange().context("ping-pong broke off")?;
        uncounted += 1;
    }
    let started = Instant::now();
    let mut before = started;
    while before - started < duration && !samples.is_full() {
        exchange().context("ping-pong broke off")?;
        let after = Instant::now();
        samples.push(after - before);
        before = after;
    }
    let seconds = (before - started).as_secs_f64();

    let [p50_ns, p99_ns] = samples.percentiles([50.0, 99.0]);
    let messages_per_second = samples.len() as f64 / seconds;
    Ok(Measurement {
        p50_ns,
        p99_ns,
        messages_per_second,
        bytes_per_second: messages_per_second * f64::from(size),
        operations: uncounted + samples.len() as u64,
        ..nothing_yet(Mode::Pingpong, size, seconds)
    })
}

fn bulk(target: SocketAddr, size: u32, duration: Duration) -> anyhow::Result<Measurement> {
    let mut stream = open(target, Purpose::Bulk, size)?;
    let block = vec![0x5a; size as usize];
    let write =
        |stream: &mut TcpStream| stream.write_all(&block).context("bulk transfer broke off");

    let warm = Instant::now() + WARM_UP;
    let mut uncounted: u64 = 0;
    while Instant::now() < warm {
        write(&mut stream)?;
        uncounted += u64::from(size);
    }
    let started = Instant::now();
    let mut sent: u64 = 0;
    while started.elapsed() < duration {
        write(&mut stream)?;
        sent += u64::from(size);
    }
    // What is still under way counts with the time it takes: the server answers when it has read all.
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0; 8];
    read_answer(&mut stream, &mut answer).context("the server did not say how much arrived")?;
    let seconds = started.elapsed().as_secs_f64();
    let arrived = u64::from_be_bytes(answer);
    ensure!(
        arrived == sent + uncounted,
        "{} bytes were sent, {arrived} arrived",
        sent + uncounted
    );

    Ok(Measurement {
        bytes_per_second: sent as f64 / seconds,
        operations: arrived,
        ..nothing_yet(Mode::Bulk, size, seconds)
    })
}

/// Reads what comes after one's own shutdown. On a spliced socket a blocking read may then say EAGAIN although
/// there is time left (docs/splice.md).
fn read_answer(stream: &mut TcpStream, answer: &mut [u8]) -> std::io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut have = 0;
    while have < answer.len() {
        match stream.read(&mut answer[have..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What one thread found.
struct Connections {
    samples: Samples,
    errors: u64,
    per_second: f64,
    uncounted: u64,
}

fn connections(data_port: SocketAddr, duration: Duration) -> anyhow::Result<Connections> {
    let mut target = data_port;
    target.set_port(
        data_port
            .port()
            .checked_add(ACCEPT_PORT_OFFSET)
            .context("the data port must leave room for one port above it")?,
    );
    let mut samples = Samples::new();
    let mut errors: u64 = 0;
    let mut failures_in_a_row = 0;

    let warm = Instant::now() + WARM_UP;
    let mut uncounted = 0;
    while Instant::now() < warm {
        // What fails here fails again below, where it counts.
        uncounted += u64::from(connect_until_closed(target).is_ok());
    }
    let started = Instant::now();
    let mut before = started;
    while before - started < duration && !samples.is_full() {
        let outcome = connect_until_closed(target);
        let after = Instant::now();
        match outcome {
            Ok(()) => {
                samples.push(after - before);
                failures_in_a_row = 0;
            }
            Err(error) => {
                errors += 1;
                failures_in_a_row += 1;
                if failures_in_a_row >= MAX_FAILURES_IN_A_ROW {
                    bail!("{failures_in_a_row} connections to {target} failed in a row: {error}");
                }
            }
        }
        before = after;
    }
    let seconds = (before - started).as_secs_f64();
    Ok(Connections {
        per_second: samples.len() as f64 / seconds,
        samples,
        errors,
        uncounted,
    })
}

fn sum_of_connections(all: Vec<Connections>, duration: Duration) -> Measurement {
    let mut sum = nothing_yet(Mode::Connect, 0, duration.as_secs_f64());
    let mut samples = Samples::new();
    for one in all {
        sum.connections_per_second += one.per_second;
        sum.errors += one.errors;
        sum.operations += one.uncounted + one.samples.len() as u64;
        samples.append(one.samples);
    }
    [sum.p50_ns, sum.p99_ns] = samples.percentiles([50.0, 99.0]);
    sum
}

fn cold(target: SocketAddr, size: u32) -> anyhow::Result<Measurement> {
    let started = Instant::now();
    exchange_once(target, size)?;
    let elapsed = started.elapsed();
    let nanoseconds = u64::try_from(elapsed.as_nanos())?;
    Ok(Measurement {
        p50_ns: nanoseconds,
        p99_ns: nanoseconds,
        operations: 1,
        ..nothing_yet(Mode::Cold, size, elapsed.as_secs_f64())
    })
}

fn idle(
    target: SocketAddr,
    size: u32,
    count: u32,
) -> anyhow::Result<(Measurement, Vec<TcpStream>)> {
    let started = Instant::now();
    let open: anyhow::Result<Vec<TcpStream>> =
        (0..count).map(|_| exchange_once(target, size)).collect();
    let seconds = started.elapsed().as_secs_f64();
    let measurement = Measurement {
        operations: u64::from(count),
        connections_per_second: f64::from(count) / seconds,
        ..nothing_yet(Mode::Idle, size, seconds)
    };
    Ok((measurement, open?))
}

/// A connection that has carried one round trip.
fn exchange_once(target: SocketAddr, size: u32) -> anyhow::Result<TcpStream> {
    let mut stream = open(target, Purpose::PingPong, size)?;
    let mut message = vec![0xa5; size as usize];
    stream
        .write_all(&message)
        .and_then(|()| stream.read_exact(&mut message))
        .context("the first round trip failed")?;
    Ok(stream)
}

/// The server closes first, so that the TIME_WAIT is its own and the client's ports are free at once.
fn connect_until_closed(target: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect(target)?;
    match stream.read(&mut [0; 1])? {
        0 => Ok(()),
        _ => Err(std::io::Error::other("the accept port sent data")),
    }
}

fn open(target: SocketAddr, purpose: Purpose, size: u32) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)
        .with_context(|| format!("cannot connect to {target}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Header { purpose, size }
        .write(&mut stream)
        .with_context(|| format!("{target} does not take data"))?;
    Ok(stream)
}

fn nothing_yet(mode: Mode, size: u32, seconds: f64) -> Measurement {
    Measurement {
        mode,
        size,
        seconds,
        p50_ns: 0,
        p99_ns: 0,
        messages_per_second: 0.0,
        bytes_per_second: 0.0,
        connections_per_second: 0.0,
        errors: 0,
        operations: 0,
    }
}
