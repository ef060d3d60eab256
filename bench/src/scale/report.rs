//! What a run found: the direct path under each load as a ratio to the smallest, the times of changes beside their
//! aims, and memory.

use std::{fmt, time::Duration};

use kernel::MapMemory;
use serde::Serialize;

use crate::{
    client::Measurement,
    scenario::{Metric, Scenario, median},
};

/// How far a figure under a larger load may stray from the smallest load's: what two runs under one load differ by.
const TOLERANCE: f64 = 0.05;

/// All that was measured.
#[derive(Debug)]
pub(super) struct Report {
    services: Vec<u32>,
    scenarios: Vec<Scenario>,
    /// By load, scenario and round.
    measured: Vec<Vec<Vec<Measurement>>>,
    timings: Vec<Timing>,
    memory: Vec<Memory>,
}

/// The times of one kind of change.
#[derive(Debug)]
pub(super) struct Timing {
    what: String,
    aim: Option<f64>,
    milliseconds: Vec<f64>,
}

/// What the agent and the maps take.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Memory {
    when: String,
    agent_bytes: u64,
    maps_bytes: u64,
    maps: Vec<MapFigure>,
}

#[derive(Debug, Clone, Serialize)]
struct MapFigure {
    map: String,
    capacity: u64,
    bytes: u64,
}

impl Timing {
    /// `aim` is in milliseconds.
    pub(super) fn new(what: String, aim: Option<f64>) -> Self {
        Self {
            what,
            aim,
            milliseconds: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, time: Duration) {
        self.milliseconds.push(time.as_secs_f64() * 1e3);
    }
}

impl Memory {
    pub(super) fn new(when: &str, agent_bytes: u64, maps: Vec<MapMemory>) -> Self {
        Self {
            when: when.into(),
            agent_bytes,
            maps_bytes: maps.iter().map(|map| map.bytes).sum(),
            maps: maps
                .into_iter()
                .map(|map| MapFigure {
                    map: map.map,
                    capacity: map.capacity,
                    bytes: map.bytes,
                })
                .collect(),
        }
    }
}

impl Report {
    pub(super) fn new(services: &[u32], scenarios: &[Scenario]) -> Self {
        Self {
            services: services.to_vec(),
            scenarios: scenarios.to_vec(),
            measured: vec![vec![Vec::new(); scenarios.len()]; services.len()],
            timings: Vec::new(),
            memory: Vec::new(),
        }
    }

    /// Adds a round's measurement; `load` and `scenario` are indexes.
    pub(super) fn add(&mut self, load: usize, scenario: usize, measurement: Measurement) {
        self.measured[load][scenario].push(measurement);
    }

    pub(super) fn timing(&mut self, timing: Timing) {
        self.timings.push(timing);
    }

    pub(super) fn memory(&mut self, memory: Memory) {
        self.memory.push(memory);
    }

    /// The figures, for printing or as JSON.
    pub(super) fn figures(&self) -> Figures {
        let paths = self
            .scenarios
            .iter()
            .enumerate()
            .flat_map(|(index, scenario)| {
                scenario
                    .metrics()
                    .iter()
                    .map(move |metric| self.path(index, scenario, *metric))
            });
        Figures {
            services: self.services.clone(),
            paths: paths.collect(),
            changes: self.timings.iter().map(ChangeFigure::of).collect(),
            memory: self.memory.clone(),
        }
    }

    fn path(&self, index: usize, scenario: &Scenario, metric: Metric) -> PathFigure {
        let values = |load: usize| -> Vec<f64> {
            let rounds = self.measured[load][index].iter();
            rounds.map(|measurement| metric.of(measurement)).collect()
        };
        let smallest = values(0);
        let ratio = |load: usize| {
            let ratios: Vec<f64> = values(load)
                .iter()
                .zip(&smallest)
                .map(|(value, smallest)| value / smallest)
                .collect();
            median(&ratios)
        };
        let loads = 0..self.services.len();
        let ratios: Vec<f64> = loads.clone().map(ratio).collect();
        let holds = |ratio: &f64| match metric {
            Metric::P50 | Metric::P99 => *ratio <= 1.0 + TOLERANCE,
            Metric::Bytes | Metric::Connections => *ratio >= 1.0 - TOLERANCE,
        };
        let (name, unit) = metric.name_and_unit();
        PathFigure {
            scenario: scenario.to_string(),
            metric: name,
            unit,
            medians: loads.map(|load| median(&values(load))).collect(),
            met: ratios.iter().all(holds),
            ratios,
        }
    }
}

/// Everything a run found.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    services: Vec<u32>,
    paths: Vec<PathFigure>,
    changes: Vec<ChangeFigure>,
    memory: Vec<Memory>,
}

/// One figure of the direct path, by load.
#[derive(Debug, Serialize)]
struct PathFigure {
    scenario: String,
    metric: &'static str,
    unit: &'static str,
    medians: Vec<f64>,
    /// To the smallest load, formed within rounds.
    ratios: Vec<f64>,
    met: bool,
}

/// One kind of change.
#[derive(Debug, Serialize)]
struct ChangeFigure {
    what: String,
    times: usize,
    median_ms: f64,
    max_ms: f64,
    aim_ms: Option<f64>,
    /// Whether the median is below the aim.
    met: Option<bool>,
}

impl ChangeFigure {
    fn of(timing: &Timing) -> Self {
        let median_ms = median(&timing.milliseconds);
        Self {
            what: timing.what.clone(),
            times: timing.milliseconds.len(),
            median_ms,
            max_ms: timing
                .milliseconds
                .iter()
                .copied()
                .fold(f64::NEG_INFINITY, f64::max),
            aim_ms: timing.aim,
            met: timing.aim.map(|aim| median_ms < aim),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures = self.figures();
        write!(formatter, "{:<29}", "services (and policies)")?;
        for services in &figures.services {
            write!(formatter, "{services:>11}")?;
        }
        writeln!(
            formatter,
            "   ratios to the first, may stray by {:.0} %",
            TOLERANCE * 100.0
        )?;
        for line in &figures.paths {
            let name = format!("{} {}", line.scenario, line.metric);
            write!(formatter, "{name:<22}{:>7}", line.unit)?;
            for median in &line.medians {
                write!(formatter, "{median:>11.2}")?;
            }
            let ratios: Vec<String> = line
                .ratios
                .iter()
                .skip(1)
                .map(|r| format!("{r:.3}"))
                .collect();
            writeln!(formatter, "   {}  {}", ratios.join("  "), verdict(line.met))?;
        }
        writeln!(
            formatter,
            "\n{:<58}{:>10}{:>10}{:>7}",
            "changes, from the push", "median ms", "max ms", "times"
        )?;
        for line in &figures.changes {
            let (median, max) = (line.median_ms, line.max_ms);
            write!(
                formatter,
                "{:<58}{median:>10.2}{max:>10.2}{:>7}",
                line.what, line.times
            )?;
            if let (Some(aim), Some(met)) = (line.aim_ms, line.met) {
                write!(formatter, "   < {aim:.0} ms: {}", verdict(met))?;
            }
            writeln!(formatter)?;
        }
        for memory in &figures.memory {
            writeln!(
                formatter,
                "\nmemory {}: agent {:.1} MB, maps {:.1} MB",
                memory.when,
                megabytes(memory.agent_bytes),
                megabytes(memory.maps_bytes)
            )?;
            for map in &memory.maps {
                let size = megabytes(map.bytes);
                writeln!(
                    formatter,
                    "  {:<12}{size:>8.2} MB, room for {}",
                    map.map, map.capacity
                )?;
            }
        }
        Ok(())
    }
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn verdict(met: bool) -> &'static str {
    if met { "met" } else { "missed" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Mode;

    fn measurement(p50_ns: u64) -> Measurement {
        Measurement {
            mode: Mode::Pingpong,
            size: 64,
            seconds: 1.0,
            p50_ns,
            p99_ns: p50_ns,
            messages_per_second: 0.0,
            bytes_per_second: 0.0,
            connections_per_second: 0.0,
            errors: 0,
            operations: 0,
        }
    }

    #[test]
    fn loads_are_compared_within_rounds() {
        let mut report = Report::new(&[10, 10_000], &[Scenario::new(Mode::Pingpong, 64)]);
        // The machine is ten times slower in the second round.
        for scale in [1, 10, 1] {
            report.add(0, 0, measurement(10_000 * scale));
            report.add(1, 0, measurement(10_800 * scale));
        }
        let path = &report.figures().paths[0];
        assert!((path.ratios[1] - 1.08).abs() < 1e-9, "{path:?}");
        assert!(!path.met);
    }

    #[test]
    fn an_aim_is_the_medians() {
        let mut timing = Timing::new("one".into(), Some(5.0));
        for milliseconds in [1, 2, 50] {
            timing.add(Duration::from_millis(milliseconds));
        }
        let figure = ChangeFigure::of(&timing);
        assert_eq!((figure.met, figure.times), (Some(true), 3));
        assert!((figure.max_ms - 50.0).abs() < 1e-9);
    }
}
