//! Figures out of rounds: the medians of both sides beside the aims, with the spread of the tunnel's.

use std::fmt;

use serde::Serialize;

use super::{
    agents::Resident,
    load::{Load, Sample},
};
use crate::scenario::median;

/// What was measured.
#[derive(Debug, Default)]
pub(super) struct Report {
    /// By load and round: plain TCP and the tunnel.
    loads: Vec<(Load, Vec<[Sample; 2]>)>,
    /// Times of first connections in milliseconds, over IPv4 and over IPv6.
    cold: [Vec<[f64; 2]>; 2],
    pub(super) memory: Option<Memory>,
}

/// The agents' memory, step by step.
#[derive(Debug)]
pub(super) struct Memory {
    /// Before anything was carried.
    pub(super) at_rest: Resident,
    /// After the first connection.
    pub(super) first: Resident,
    pub(super) idle_connections: u32,
    pub(super) before_idle: Resident,
    pub(super) with_idle: Resident,
}

/// What a figure of the tunnel should be.
#[derive(Debug, Clone, Copy)]
enum Aim {
    AtMost(f64),
    AtLeast(f64),
    /// At most this much more than plain TCP.
    Added(f64),
}

/// All figures of a run.
#[derive(Debug, Serialize)]
pub(super) struct Figures {
    figures: Vec<Figure>,
}

#[derive(Debug, Serialize)]
struct Figure {
    name: String,
    unit: &'static str,
    plain: Option<f64>,
    tunnel: f64,
    min: f64,
    max: f64,
    aim: Option<String>,
    met: Option<bool>,
}

impl Report {
    /// Adds what one round measured of a load.
    pub(super) fn add(&mut self, load: Load, samples: [Sample; 2]) {
        match self.loads.iter_mut().find(|(known, _)| *known == load) {
            Some((_, rounds)) => rounds.push(samples),
            None => self.loads.push((load, vec![samples])),
        }
    }

    /// Adds the times of one first connection.
    pub(super) fn cold(&mut self, is_v6: bool, plain: f64, tunnel: f64) {
        self.cold[usize::from(is_v6)].push([plain, tunnel]);
    }

    /// The figures, for printing or as JSON.
    pub(super) fn figures(&self) -> Figures {
        let mut figures = Vec::new();
        for (load, rounds) in &self.loads {
            figures.extend(of_load(*load, rounds));
        }
        for (family, times) in ["IPv4", "IPv6"].into_iter().zip(&self.cold) {
            let name = format!("first connection, {family}");
            let side = |side: usize| times.iter().map(|time| time[side]).collect();
            figures.push(Figure::new(
                name,
                "ms",
                side(0),
                side(1),
                Some(Aim::AtMost(20.0)),
            ));
        }
        if let Some(memory) = &self.memory {
            figures.extend(memory.figures());
        }
        Figures { figures }
    }
}

fn of_load(load: Load, rounds: &[[Sample; 2]]) -> Vec<Figure> {
    let both = |of: &dyn Fn(&Sample) -> f64| {
        [0, 1].map(|side: usize| {
            rounds
                .iter()
                .map(|round| of(&round[side]))
                .collect::<Vec<f64>>()
        })
    };
    let figure = |name: &str, unit, [plain, tunnel]: [Vec<f64>; 2], aim| {
        Figure::new(format!("{load}: {name}"), unit, plain, tunnel, aim)
    };
    let p50 = |aim| figure("p50", "µs", both(&|sample| sample.p50), aim);
    let p99 = || figure("p99", "µs", both(&|sample| sample.p99), None);
    let rate =
        |name, unit, scale: f64, aim| figure(name, unit, both(&|sample| sample.rate * scale), aim);
    let cpu = |name, unit, scale: f64, aim| {
        let tunnel = rounds.iter().filter_map(|[_, tunnel]| tunnel.cpu);
        let tunnel = tunnel.map(|cpu| cpu * scale).collect();
        figure(name, unit, [Vec::new(), tunnel], aim)
    };
    match load {
        Load::PingPong => vec![
            p50(Some(Aim::Added(50.0))),
            p99(),
            cpu("agents' CPU each", "µs", 1.0, Some(Aim::AtMost(48.0))),
        ],
        Load::Bulk(_) => vec![
            rate("throughput", "Gbit/s", 8e-9, Some(Aim::AtLeast(11.0))),
            // Microseconds per byte are mega-seconds per megabyte: 1000 s per GB.
            cpu("agents' CPU", "s/GB", 1e3, Some(Aim::AtMost(0.95))),
        ],
        Load::Connections(count) => {
            let aim = (count > 1).then_some(Aim::AtLeast(8500.0));
            vec![
                rate("rate", "1/s", 1.0, aim),
                p50(None),
                p99(),
                cpu("agents' CPU each", "µs", 1.0, None),
            ]
        }
        Load::Http => vec![
            rate("requests", "1/s", 1.0, None),
            p50(None),
            p99(),
            cpu("agents' CPU each", "µs", 1.0, Some(Aim::AtMost(20.0))),
        ],
    }
}

impl Memory {
    fn figures(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        for (index, agent) in ["client's agent", "server's agent"].into_iter().enumerate() {
            let mut add = |name: String, unit, value: f64, aim| {
                figures.push(Figure::new(
                    format!("{agent}: {name}"),
                    unit,
                    Vec::new(),
                    vec![value],
                    aim,
                ));
            };
            let mebibytes = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            let states = [
                ("at rest", &self.at_rest),
                ("after the first tunnel", &self.first),
            ];
            for (state, resident) in states {
                let aim = (state != "at rest").then_some(Aim::AtMost(12.0));
                add(
                    format!("memory {state}"),
                    "MiB",
                    mebibytes(resident.all[index]),
                    aim,
                );
                let name = format!("of it allocated, {state}");
                add(name, "MiB", mebibytes(resident.anonymous[index]), None);
            }
            let (before, with) = (self.before_idle.all[index], self.with_idle.all[index]);
            let each =
                with.saturating_sub(before) as f64 / 1024.0 / f64::from(self.idle_connections);
            add(
                "memory per idle connection".into(),
                "KiB",
                each,
                Some(Aim::AtMost(4.0)),
            );
        }
        figures
    }
}

impl Figure {
    fn new(
        name: String,
        unit: &'static str,
        plain: Vec<f64>,
        tunnel: Vec<f64>,
        aim: Option<Aim>,
    ) -> Self {
        let plain = (!plain.is_empty()).then(|| median(&plain));
        let middle = median(&tunnel);
        Self {
            name,
            unit,
            plain,
            tunnel: middle,
            min: tunnel.iter().copied().fold(f64::INFINITY, f64::min),
            max: tunnel.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            aim: aim.map(|aim| aim.to_string()),
            met: aim.map(|aim| aim.is_met(plain, middle)),
        }
    }
}

impl Aim {
    fn is_met(self, plain: Option<f64>, tunnel: f64) -> bool {
        match self {
            Self::AtMost(bound) => tunnel <= bound,
            Self::AtLeast(bound) => tunnel >= bound,
            Self::Added(bound) => plain.is_some_and(|plain| tunnel - plain <= bound),
        }
    }
}

impl fmt::Display for Aim {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(bound) => write!(formatter, "≤ {bound}"),
            Self::AtLeast(bound) => write!(formatter, "≥ {bound}"),
            Self::Added(bound) => write!(formatter, "plain + {bound}"),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = ("", "", "plain TCP", "tunnel", "(min – max)", "aim");
        let (name, unit, plain, tunnel, spread, aim) = header;
        writeln!(
            formatter,
            "{name:<48}{unit:<8}{plain:>10}{tunnel:>11}   {spread:<22}{aim}"
        )?;
        for line in self.figures().figures {
            let plain = line
                .plain
                .map_or_else(String::new, |plain| format!("{plain:.2}"));
            let spread = format!("({:.2} – {:.2})", line.min, line.max);
            let (name, unit, tunnel) = (line.name, line.unit, line.tunnel);
            write!(
                formatter,
                "{name:<48}{unit:<8}{plain:>10}{tunnel:>11.2}   {spread:<22}"
            )?;
            if let (Some(aim), Some(met)) = (line.aim, line.met) {
                write!(formatter, "{aim:<12}{}", if met { "met" } else { "missed" })?;
            }
            writeln!(formatter)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(p50: f64, cpu: Option<f64>) -> Sample {
        Sample {
            p50,
            p99: p50 * 2.0,
            rate: 1e9,
            cpu,
        }
    }

    #[test]
    fn latency_is_judged_by_what_the_tunnel_adds() {
        let mut report = Report::default();
        for added in [40.0, 49.0, 90.0] {
            report.add(
                Load::PingPong,
                [sample(30.0, None), sample(30.0 + added, Some(44.0))],
            );
        }
        let figures = report.figures().figures;
        let p50 = &figures[0];
        assert_eq!((p50.plain, p50.met), (Some(30.0), Some(true)));
        assert!(
            (p50.tunnel - 79.0).abs() < 1e-9 && (p50.max - 120.0).abs() < 1e-9,
            "{p50:?}"
        );
        assert_eq!((figures[2].plain, figures[2].met), (None, Some(true)));
    }

    #[test]
    fn bulk_is_told_in_gigabits_and_seconds_per_gigabyte() {
        let mut report = Report::default();
        report.add(Load::Bulk(8), [sample(0.0, None), sample(0.0, Some(0.001))]);
        let figures = report.figures().figures;
        assert!((figures[0].tunnel - 8.0).abs() < 1e-9, "{figures:?}");
        assert!((figures[1].tunnel - 1.0).abs() < 1e-9, "{figures:?}");
        assert_eq!((figures[0].met, figures[1].met), (Some(false), Some(false)));
    }

    #[test]
    fn idle_connections_are_told_per_connection() {
        let resident = |bytes| Resident {
            all: [bytes, 2 * bytes],
            anonymous: [bytes, bytes],
        };
        let memory = Memory {
            at_rest: resident(1 << 20),
            first: resident(2 << 20),
            idle_connections: 1000,
            before_idle: resident(2 << 20),
            with_idle: resident((2 << 20) + 3_072_000),
        };
        let report = Report {
            memory: Some(memory),
            ..Report::default()
        };
        let figures = report.figures().figures;
        let each: Vec<_> = figures.iter().filter(|line| line.unit == "KiB").collect();
        assert!(
            (each[0].tunnel - 3.0).abs() < 1e-9 && each[0].met == Some(true),
            "{each:?}"
        );
        assert!(
            (each[1].tunnel - 6.0).abs() < 1e-9 && each[1].met == Some(false),
            "{each:?}"
        );
    }
}
