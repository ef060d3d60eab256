//! What is measured on either side, with which program, and what one measurement yields.

use std::{
    fmt,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, ensure};

use super::{Side, plain::Plain};
use crate::{
    client::{Measurement, Mode},
    scenario::{Ends, PORT},
};

/// The message of the ping-pong in bytes.
const MESSAGE: u32 = 1024;
/// Size of a write of bulk data in bytes.
const BLOCK: u32 = 128 << 10;
/// wrk's connections.
const HTTP_CONNECTIONS: u32 = 64;

/// Everything that is measured in a round.
pub(super) const LOADS: [Load; 7] = [
    Load::PingPong,
    Load::Bulk(1),
    Load::Bulk(8),
    Load::Bulk(64),
    Load::Connections(1),
    Load::Connections(16),
    Load::Http,
];

/// One kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// Round trips of 1 KiB.
    PingPong,
    /// Bytes in one direction, on this many connections.
    Bulk(u32),
    /// New connections, this many at a time.
    Connections(u32),
    /// HTTP/1.1 requests on connections that are kept.
    Http,
}

/// What one measurement found.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sample {
    /// In microseconds; zero where there is none.
    pub(super) p50: f64,
    pub(super) p99: f64,
    /// Round trips, bytes, connections or requests per second.
    pub(super) rate: f64,
    /// CPU time of the agents for one of them, in microseconds.
    pub(super) cpu: Option<f64>,
}

impl fmt::Display for Load {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PingPong => write!(formatter, "ping-pong 1 KiB"),
            Self::Bulk(count) => write!(formatter, "bulk, {count} at a time"),
            Self::Connections(count) => write!(formatter, "new connections, {count} at a time"),
            Self::Http => write!(formatter, "http keep-alive, {HTTP_CONNECTIONS} at a time"),
        }
    }
}

impl Load {
    /// Measures once.
    pub(super) fn measure(self, side: &dyn Side, ends: &Ends) -> anyhow::Result<Sample> {
        let before = side.agents_cpu()?;
        let (mut sample, operations) = match self {
            Self::PingPong => self.with_client(side, ends, Mode::Pingpong, MESSAGE, 1)?,
            Self::Bulk(count) => self.with_client(side, ends, Mode::Bulk, BLOCK, count)?,
            Self::Connections(count) => self.with_client(side, ends, Mode::Connect, 1, count)?,
            Self::Http => with_wrk(side, ends)?,
        };
        if let (Some(before), Some(after)) = (before, side.agents_cpu()?) {
            sample.cpu = Some((after - before) as f64 / operations.max(1) as f64);
        }
        Ok(sample)
    }

    fn with_client(
        self,
        side: &dyn Side,
        ends: &Ends,
        mode: Mode,
        size: u32,
        connections: u32,
    ) -> anyhow::Result<(Sample, u64)> {
        let [host, _] = side.hosts();
        let arguments = client_arguments(mode, size, connections, ends.seconds, &host);
        let command = side.client(&ends.program.display().to_string(), &arguments)?;
        let measured: Measurement = serde_json::from_str(&output_of(command)?)
            .with_context(|| format!("measuring {self} gave no measurement"))?;
        ensure!(
            measured.errors == 0,
            "{} connections failed while measuring {self}",
            measured.errors
        );
        let rate = match self {
            Self::PingPong | Self::Http => measured.messages_per_second,
            Self::Bulk(_) => measured.bytes_per_second,
            Self::Connections(_) => measured.connections_per_second,
        };
        let sample = Sample {
            p50: measured.p50_ns as f64 / 1e3,
            p99: measured.p99_ns as f64 / 1e3,
            rate,
            cpu: None,
        };
        Ok((sample, measured.operations))
    }
}

fn client_arguments(
    mode: Mode,
    size: u32,
    connections: u32,
    seconds: f64,
    host: &str,
) -> Vec<String> {
    vec![
        "client".to_owned(),
        format!("--mode={}", mode.argument()),
        format!("--size={size}"),
        format!("--connections={connections}"),
        format!("--seconds={seconds}"),
        format!("--connect={host}:{PORT}"),
    ]
}

fn with_wrk(side: &dyn Side, ends: &Ends) -> anyhow::Result<(Sample, u64)> {
    let [_, host] = side.hosts();
    let arguments = [
        "--threads=1".to_owned(),
        format!("--connections={HTTP_CONNECTIONS}"),
        format!("--duration={}s", ends.seconds.ceil().max(1.0)),
        "--latency".to_owned(),
        format!("http://{host}:{}/", super::objects::HTTP_PORT),
    ];
    let output = output_of(side.client("wrk", &arguments)?).context("wrk failed")?;
    let wrk = Wrk::parse(&output).with_context(|| format!("wrk said: {output}"))?;
    let sample = Sample {
        p50: wrk.p50,
        p99: wrk.p99,
        rate: wrk.rate,
        cpu: None,
    };
    Ok((sample, wrk.requests))
}

/// What wrk says.
#[derive(Debug, PartialEq)]
struct Wrk {
    p50: f64,
    p99: f64,
    rate: f64,
    requests: u64,
}

impl Wrk {
    fn parse(output: &str) -> anyhow::Result<Self> {
        let value = |name: &str| {
            let line = output
                .lines()
                .find_map(|line| line.trim().strip_prefix(name));
            line.map(str::trim)
                .with_context(|| format!("no line begins with {name}"))
        };
        for trouble in ["Socket errors:", "Non-2xx or 3xx responses:"] {
            ensure!(value(trouble).is_err(), "requests failed");
        }
        let line = output.lines().find(|line| line.contains(" requests in "));
        let requests = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
        Ok(Self {
            p50: microseconds(value("50%")?)?,
            p99: microseconds(value("99%")?)?,
            rate: value("Requests/sec:")?.parse()?,
            requests: requests.context("no count of requests")?,
        })
    }
}

/// A time as wrk prints it: `1.23ms`.
fn microseconds(text: &str) -> anyhow::Result<f64> {
    let at = text
        .find(char::is_alphabetic)
        .context("a time without its unit")?;
    let (number, unit) = text.split_at(at);
    let scale = match unit {
        "us" => 1.0,
        "ms" => 1e3,
        "s" => 1e6,
        other => anyhow::bail!("an unknown unit: {other}"),
    };
    Ok(number.parse::<f64>()? * scale)
}

/// Time in milliseconds of one connection and its first round trip on plain TCP.
pub(super) fn cold(plain: &Plain, ends: &Ends) -> anyhow::Result<f64> {
    let [host, _] = plain.hosts();
    let program = ends.program.display().to_string();
    cold_at(|arguments| plain.client(&program, arguments), &host)
}

/// The same with a client that `command` makes of arguments.
pub(super) fn cold_at(
    command: impl FnOnce(&[String]) -> anyhow::Result<Command>,
    host: &str,
) -> anyhow::Result<f64> {
    let command = command(&client_arguments(Mode::Cold, MESSAGE, 1, 1.0, host))?;
    let measured: Measurement =
        serde_json::from_str(&output_of(command)?).context("the first connection gave no time")?;
    Ok(measured.p50_ns as f64 / 1e6)
}

/// Connections that are open and carry nothing.
pub(super) struct Idle {
    client: Child,
}

impl Idle {
    /// Closes them.
    pub(super) fn close(mut self) -> anyhow::Result<()> {
        drop(self.client.stdin.take());
        let status = self.client.wait()?;
        ensure!(
            status.success(),
            "the client of idle connections failed ({status})"
        );
        Ok(())
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        // It has ended, but after an error.
        let _ = self.client.kill();
        let _ = self.client.wait();
    }
}

/// Opens connections, each of which carries one round trip, and returns when all are there.
pub(super) fn idle(side: &dyn Side, ends: &Ends, count: u32) -> anyhow::Result<Idle> {
    let [host, _] = side.hosts();
    let arguments = client_arguments(Mode::Idle, MESSAGE, count, ends.seconds, &host);
    let mut command = side.client(&ends.program.display().to_string(), &arguments)?;
    let mut client = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the client of idle connections")?;
    let output = client.stdout.take().context("the client has no output")?;
    let idle = Idle { client };
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    ensure!(
        !line.is_empty(),
        "the client could not open {count} connections"
    );
    Ok(idle)
}

fn output_of(mut command: Command) -> anyhow::Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("cannot start a client")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(
        output.status.success(),
        "a client failed ({}): {text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Running 1s test @ http://web:7080/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.56ms  302.11us   7.34ms   90.51%
    Req/Sec    41.03k     1.02k   42.84k    81.82%
  Latency Distribution
     50%    1.50ms
     75%    1.62ms
     90%    1.80ms
     99%  950.00us
  44900 requests in 1.10s, 12.46MB read
Requests/sec:  40818.18
Transfer/sec:     11.33MB
";

    #[test]
    fn wrk_is_understood() {
        let expected = Wrk {
            p50: 1500.0,
            p99: 950.0,
            rate: 40_818.18,
            requests: 44_900,
        };
        assert_eq!(Wrk::parse(OUTPUT).unwrap(), expected);
    }

    #[test]
    fn failed_requests_are_no_result() {
        let errors = "  Socket errors: connect 0, read 3, write 0, timeout 0\n";
        assert!(Wrk::parse(&format!("{OUTPUT}{errors}")).is_err());
        assert!(Wrk::parse("unable to connect").is_err());
    }
}
