//! What is measured between a client and a server, whatever lies between the two: the scenarios, the figures of
//! each, and running one of them.

use std::{fmt, path::PathBuf, process::Output};

use anyhow::{Context, ensure};

use crate::client::{Measurement, Mode};

/// The data port of the server.
pub(crate) const PORT: u16 = 7000;

/// What is measured, in this order, in every round.
pub(crate) const SCENARIOS: [Scenario; 4] = [
    Scenario::new(Mode::Pingpong, 64),
    Scenario::new(Mode::Pingpong, 4096),
    Scenario::new(Mode::Bulk, 128 * 1024),
    Scenario::new(Mode::Connect, 64),
];

/// One kind of measurement.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) mode: Mode,
    /// Message size in bytes.
    pub(crate) size: u32,
}

impl Scenario {
    pub(crate) const fn new(mode: Mode, size: u32) -> Self {
        Self { mode, size }
    }

    /// The figures that this kind of measurement yields.
    pub(crate) fn metrics(&self) -> &'static [Metric] {
        match self.mode {
            Mode::Pingpong => &[Metric::P50, Metric::P99],
            Mode::Bulk => &[Metric::Bytes],
            Mode::Connect => &[Metric::Connections],
            // Of these, other benchmarks make figures.
            Mode::Cold | Mode::Idle => &[],
        }
    }

    /// Measures: `client` runs this program with the arguments it is given where the client is, and `target`
    /// is the server as the client says it.
    pub(crate) fn measure(
        &self,
        ends: &Ends,
        target: &str,
        client: impl FnOnce(&[String]) -> anyhow::Result<Output>,
    ) -> anyhow::Result<Measurement> {
        let mut arguments = vec![
            "client".to_owned(),
            format!("--mode={}", self.mode.argument()),
            format!("--size={}", self.size),
            format!("--seconds={}", ends.seconds),
            format!("--connect={target}"),
        ];
        arguments.extend(ends.client_cpu.map(|cpu| format!("--cpu={cpu}")));
        let output = client(&arguments)?;
        ensure!(
            output.status.success(),
            "measuring {self} against {target} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let measurement: Measurement =
            serde_json::from_slice(&output.stdout).with_context(|| {
                format!(
                    "the client did not print a measurement but: {}",
                    String::from_utf8_lossy(&output.stdout)
                )
            })?;
        ensure!(
            measurement.errors == 0,
            "{} connections to {target} failed while measuring {self}",
            measurement.errors
        );
        Ok(measurement)
    }
}

impl fmt::Display for Scenario {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Mode::Pingpong => write!(formatter, "ping-pong {} B", self.size),
            Mode::Bulk => write!(formatter, "bulk"),
            Mode::Connect => write!(formatter, "new connections"),
            Mode::Cold => write!(formatter, "first connection"),
            Mode::Idle => write!(formatter, "idle connections"),
        }
    }
}

/// One figure of a measurement.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Metric {
    P50,
    P99,
    Bytes,
    Connections,
}

impl Metric {
    /// In the unit that reports print.
    pub(crate) fn of(self, measurement: &Measurement) -> f64 {
        match self {
            Self::P50 => measurement.p50_ns as f64 / 1e3,
            Self::P99 => measurement.p99_ns as f64 / 1e3,
            Self::Bytes => measurement.bytes_per_second * 8.0 / 1e9,
            Self::Connections => measurement.connections_per_second,
        }
    }

    pub(crate) fn name_and_unit(self) -> (&'static str, &'static str) {
        match self {
            Self::P50 => ("p50", "µs"),
            Self::P99 => ("p99", "µs"),
            Self::Bytes => ("throughput", "Gbit/s"),
            Self::Connections => ("rate", "1/s"),
        }
    }
}

/// How both ends of a measurement run.
#[derive(Debug, Clone)]
pub(crate) struct Ends {
    /// This program, by a path that is the same inside a workload.
    pub(crate) program: PathBuf,
    /// `None`: wherever the scheduler puts them.
    pub(crate) client_cpu: Option<usize>,
    pub(crate) server_cpu: Option<usize>,
    pub(crate) seconds: f64,
}

impl Ends {
    /// Arguments of this program as the server.
    pub(crate) fn server_arguments(&self) -> Vec<String> {
        let mut arguments = vec!["server".to_owned(), format!("--port={PORT}")];
        arguments.extend(self.server_cpu.map(|cpu| format!("--cpu={cpu}")));
        arguments
    }
}

/// The heddle command: the one given, or the one beside this program.
pub(crate) fn heddle_program(given: Option<&PathBuf>, ends: &Ends) -> anyhow::Result<PathBuf> {
    let heddle = given
        .cloned()
        .unwrap_or_else(|| ends.program.with_file_name("heddle"));
    ensure!(
        heddle.exists(),
        "{} is missing: cargo build --release --bin heddle, or say --heddle PATH",
        heddle.display()
    );
    Ok(heddle)
}

/// The middle value, or the mean of the two middle ones; not a number when there is none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}

/// How figures are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_even_and_none() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).to_bits(), 2.0_f64.to_bits());
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).to_bits(), 2.5_f64.to_bits());
        assert!(median(&[]).is_nan());
    }
}
