//! Figures out of rounds: medians of all sides, the ratio of the last two with its spread, and whether the aim is met.
//!
//! A ratio is formed within each round and the median taken of those, so that a machine that is slow for
//! some rounds is slow on both sides of the division.

use std::{fmt, time::Duration};

use serde::Serialize;

use crate::{
    client::Measurement,
    scenario::{Metric, Scenario, median},
};

/// Name of the side whose workloads ask for spliced connections.
pub(super) const SPLICED: &str = "spliced";

/// What a figure should be, as a ratio to plain TCP.
fn aim(metric: Metric, scenario: &Scenario, side: &str) -> Aim {
    match metric {
        // What the splice is for.
        Metric::P50 if side == SPLICED && scenario.size <= 64 => Aim::AtMost(0.70),
        Metric::P50 | Metric::P99 => Aim::AtMost(1.02),
        Metric::Bytes => Aim::AtLeast(0.98),
        Metric::Connections => Aim::AtLeast(0.92),
    }
}

/// The ratio (mesh to plain TCP that is contained alike) that Heddle aims at.
#[derive(Debug, Clone, Copy)]
enum Aim {
    AtMost(f64),
    AtLeast(f64),
}

impl Aim {
    fn is_met(self, ratio: f64) -> bool {
        match self {
            Self::AtMost(bound) => ratio <= bound,
            Self::AtLeast(bound) => ratio >= bound,
        }
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(bound) => write!(formatter, "≤ {bound:.2}"),
            Self::AtLeast(bound) => write!(formatter, "≥ {bound:.2}"),
        }
    }
}

/// Time in which all replicas should be up, beyond the programs' own start.
const START_AIM: Duration = Duration::from_secs(3);

/// All measurements of a run.
#[derive(Debug)]
pub(super) struct Report {
    /// What is compared: the last with the one before it. The first is bare plain TCP.
    sides: Vec<&'static str>,
    /// By scenario and round: one measurement of each side.
    scenarios: Vec<(Scenario, Vec<Vec<Measurement>>)>,
    start: Option<StartFigure>,
}

impl Report {
    /// `sides` are two or more.
    pub(super) fn new(scenarios: &[Scenario], sides: &[&'static str]) -> Self {
        Self {
            sides: sides.to_vec(),
            scenarios: scenarios
                .iter()
                .map(|&scenario| (scenario, Vec::new()))
                .collect(),
            start: None,
        }
    }

    /// Adds what one round measured for the scenario of this index, one measurement of each side.
    pub(super) fn add(&mut self, scenario: usize, measured: Vec<Measurement>) {
        self.scenarios[scenario].1.push(measured);
    }

    /// Adds the time of `heddle up`, and what starting the programs takes by itself.
    pub(super) fn start_of_replicas(&mut self, replicas: u32, up: Duration, own: Duration) {
        let beyond = up.saturating_sub(own);
        self.start = Some(StartFigure {
            replicas,
            up_seconds: up.as_secs_f64(),
            own_seconds: own.as_secs_f64(),
            beyond_seconds: beyond.as_secs_f64(),
            aim_seconds: START_AIM.as_secs_f64(),
            met: beyond < START_AIM,
        });
    }

    /// The figures, for printing or as JSON.
    pub(super) fn figures(&self) -> Figures {
        let comparisons = self
            .scenarios
            .iter()
            .flat_map(|(scenario, rounds)| {
                let metrics = scenario.metrics().iter();
                metrics.map(|metric| Comparison::of(scenario, *metric, rounds, &self.sides))
            })
            .collect();
        Figures {
            sides: self.sides.clone(),
            comparisons,
            start: self.start.clone(),
        }
    }
}

/// Everything a run found.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    sides: Vec<&'static str>,
    comparisons: Vec<Comparison>,
    start: Option<StartFigure>,
}

/// One figure on all sides.
#[derive(Debug, Serialize)]
struct Comparison {
    scenario: String,
    metric: &'static str,
    unit: &'static str,
    rounds: usize,
    /// By side.
    medians: Vec<f64>,
    /// Of the last side to the one before it: what the aim is about.
    ratio_median: f64,
    ratio_min: f64,
    ratio_max: f64,
    /// Of the last side to the first.
    ratio_to_plain: f64,
    aim: String,
    met: bool,
}

impl Comparison {
    fn of(
        scenario: &Scenario,
        metric: Metric,
        rounds: &[Vec<Measurement>],
        names: &[&str],
    ) -> Self {
        let sides = names.len();
        let aim = aim(metric, scenario, names.last().copied().unwrap_or_default());
        let values = |side: usize| -> Vec<f64> {
            let measured = rounds.iter().filter_map(|round| round.get(side));
            measured.map(|measured| metric.of(measured)).collect()
        };
        let ratios = |side: usize| -> Vec<f64> {
            let last = values(sides - 1).into_iter();
            let pairs = last.zip(values(side));
            pairs.map(|(last, other)| last / other).collect()
        };
        let (metric_name, unit) = metric.name_and_unit();
        let compared = ratios(sides.saturating_sub(2));
        let ratio_median = median(&compared);
        Self {
            scenario: scenario.to_string(),
            metric: metric_name,
            unit,
            rounds: rounds.len(),
            medians: (0..sides).map(|side| median(&values(side))).collect(),
            ratio_median,
            ratio_min: compared.iter().copied().fold(f64::INFINITY, f64::min),
            ratio_max: compared.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            ratio_to_plain: median(&ratios(0)),
            aim: aim.to_string(),
            met: aim.is_met(ratio_median),
        }
    }
}

/// The start of many replicas.
#[derive(Debug, Clone, Serialize)]
struct StartFigure {
    replicas: u32,
    up_seconds: f64,
    own_seconds: f64,
    beyond_seconds: f64,
    aim_seconds: f64,
    met: bool,
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let figures = self.figures();
        write!(formatter, "{:<28}{:>7}", "", "")?;
        for side in &figures.sides {
            write!(formatter, "{side:>12}")?;
        }
        let compared = "last to one before";
        writeln!(
            formatter,
            "   {compared} (min – max)    aim            to plain TCP"
        )?;
        for line in &figures.comparisons {
            let name = format!("{} {}", line.scenario, line.metric);
            write!(formatter, "{name:<28}{:>7}", line.unit)?;
            for median in &line.medians {
                write!(formatter, "{median:>12.2}")?;
            }
            let spread = format!("({:.3} – {:.3})", line.ratio_min, line.ratio_max);
            writeln!(
                formatter,
                "   {:>8.3}  {spread:<21} {:<7}{:<7}{:>11.3}",
                line.ratio_median,
                line.aim,
                verdict(line.met),
                line.ratio_to_plain,
            )?;
        }
        if let Some(start) = &figures.start {
            writeln!(
                formatter,
                "\nheddle up of {} replicas: {:.2} s, of which the programs' own start {:.2} s; beyond it {:.2} s, aim < {:.0} s: {}",
                start.replicas,
                start.up_seconds,
                start.own_seconds,
                start.beyond_seconds,
                start.aim_seconds,
                verdict(start.met),
            )?;
        }
        Ok(())
    }
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
            p99_ns: p50_ns * 2,
            messages_per_second: 0.0,
            bytes_per_second: 0.0,
            connections_per_second: 0.0,
            errors: 0,
            operations: 0,
        }
    }

    #[test]
    fn ratios_are_formed_within_rounds() {
        let scenarios = [Scenario::new(Mode::Pingpong, 64)];
        let mut report = Report::new(&scenarios, &["plain TCP", "contained", "mesh"]);
        // The machine is ten times slower in the second round; the ratio is 1.01 throughout.
        for scale in [1, 10, 1] {
            let sides = [8_000, 10_000, 10_100].map(|p50| measurement(p50 * scale));
            report.add(0, sides.to_vec());
        }
        let figures = report.figures();
        let p50 = &figures.comparisons[0];
        assert_eq!((p50.metric, p50.unit), ("p50", "µs"));
        assert!((p50.ratio_max - 1.01).abs() < 1e-9, "{p50:?}");
        assert!((p50.medians[1] - 10.0).abs() < 1e-9, "{p50:?}");
        assert!((p50.ratio_to_plain - 1.2625).abs() < 1e-9, "{p50:?}");
        assert!(p50.met);
    }

    #[test]
    fn the_splice_has_an_aim_of_its_own_where_it_pays() {
        let aim =
            |size, side| aim(Metric::P50, &Scenario::new(Mode::Pingpong, size), side).to_string();
        assert_eq!(aim(64, SPLICED), "≤ 0.70");
        assert_eq!(aim(4096, SPLICED), "≤ 1.02");
        assert_eq!(aim(64, "mesh"), "≤ 1.02");
    }

    #[test]
    fn aims_look_the_right_way() {
        assert!(Aim::AtMost(1.02).is_met(1.0) && !Aim::AtMost(1.02).is_met(1.03));
        assert!(Aim::AtLeast(0.98).is_met(1.0) && !Aim::AtLeast(0.98).is_met(0.97));
    }
}
