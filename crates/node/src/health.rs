//! What `heddle status` says of the kernel's state: how full each map is, and what was lost or refused lately for lack
//! of room. Looked at now and then by the agent's loop, which also has what nobody else removes swept away here.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use api::report::MapStatus;
use kernel::{Kernel, KernelError, MapUse, Reason};

/// How often maps that programs write are counted: the kernel copies them out for that.
const COUNT_EVERY: Duration = Duration::from_secs(10);
/// How often handshakes are swept.
const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// Older than any handshake that TCP still works on (it gives up after some 130 s).
const HANDSHAKE_AGE: Duration = Duration::from_secs(180);
/// How long a loss is told as a problem.
const RECENT: Duration = Duration::from_secs(60);
/// Share of a map, in percent, from which on its use is a problem.
const NEARLY_FULL: u64 = 80;

/// Losses for lack of room, and what they mean.
const LOSSES: [(Reason, &str); 4] = [
    (
        Reason::HandshakesFull,
        "connections were refused because map handshakes was full: start the mesh with --map-size handshakes=N and a \
         larger N",
    ),
    (
        Reason::StateFull,
        "sockets were refused because the kernel had no memory for their state (map sockets)",
    ),
    (
        Reason::PeersFull,
        "datagrams were refused because their socket asked too many others within a minute (map peers)",
    ),
    (
        Reason::EventLost,
        "flow records were lost because map flows (or, for datagrams, map datagrams) was full; the connections are \
         unharmed: start the mesh with --map-size flow_bytes=N (or datagrams=N) and a larger N, or give the agent \
         more CPU time",
    ),
];

/// What was seen last.
#[derive(Debug, Default)]
pub(crate) struct Health {
    live: Vec<MapUse>,
    counted: Option<Instant>,
    swept: Option<Instant>,
    counts: HashMap<Reason, u64>,
    /// Since the last one of a row, and how many.
    losses: HashMap<Reason, (Instant, u64)>,
    /// Why the maps could not be looked at.
    failure: Option<String>,
}

impl Health {
    /// Looks at what has not been looked at for a while. That it cannot is a problem to tell, and no reason to stop.
    pub(crate) fn look(&mut self, kernel: &Kernel, now: Instant) {
        let failure = self.try_to_look(kernel, now).err();
        let failure = failure.map(|error| error.to_string());
        if failure != self.failure {
            if let Some(problem) = &failure {
                tracing::error!(problem, "cannot look at the kernel's maps");
            }
            self.failure = failure;
        }
    }

    fn try_to_look(&mut self, kernel: &Kernel, now: Instant) -> Result<(), KernelError> {
        let due = |last: Option<Instant>, every| last.is_none_or(|last| now - last >= every);
        if due(self.swept, SWEEP_EVERY) {
            let removed = kernel.sweep_handshakes(HANDSHAKE_AGE)?;
            self.swept = Some(now);
            if removed > 0 {
                tracing::info!(removed, "handshakes that nobody finished were removed");
            }
        }
        if due(self.counted, COUNT_EVERY) {
            self.live = kernel.count_live_maps()?;
            self.counted = Some(now);
        }
        self.note_losses(&kernel.reason_counts()?, now);
        Ok(())
    }

    fn note_losses(&mut self, counts: &[(Reason, u64)], now: Instant) {
        for (reason, count) in counts {
            // What an earlier agent's time lost is in the counters.
            let Some(before) = self.counts.insert(*reason, *count) else {
                continue;
            };
            if *count > before && LOSSES.iter().any(|(other, _)| other == reason) {
                let loss = self.losses.entry(*reason).or_insert((now, 0));
                *loss = (now, loss.1 + (count - before));
            }
        }
        self.losses.retain(|_, (last, _)| now - *last < RECENT);
    }

    /// Every map, as `heddle status` shows it.
    pub(crate) fn maps(&self, kernel: &Kernel) -> Vec<MapStatus> {
        let tables = kernel.table_uses();
        let uses = tables.iter().chain(&self.live);
        uses.map(|used| MapStatus {
            map: used.map.into(),
            entries: used.entries,
            capacity: used.capacity,
        })
        .collect()
    }

    /// What an operator should do something about.
    pub(crate) fn problems(&self, kernel: &Kernel) -> Vec<String> {
        let tables = kernel.table_uses();
        let full = tables.iter().chain(&self.live).filter_map(nearly_full);
        let losses = LOSSES.iter().filter_map(|(reason, text)| {
            let (_, count) = self.losses.get(reason)?;
            Some(format!("{count} {text}"))
        });
        full.chain(losses).chain(self.failure.clone()).collect()
    }
}

fn nearly_full(used: &MapUse) -> Option<String> {
    let (entries, capacity, setting) = (used.entries?, used.capacity?, used.setting?);
    let without_room = used.without_room?;
    let percent = (entries as u64 * 100).checked_div(u64::from(capacity))?;
    (percent >= NEARLY_FULL).then(|| {
        format!(
            "map {} is {percent} % full ({entries} of {capacity}), and {without_room}: start the mesh with \
             --map-size {setting}=N and a larger N",
            used.map
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_that_is_nearly_full_is_a_problem_that_says_what_to_do() {
        let used = |entries, capacity| MapUse {
            map: "slots",
            entries,
            capacity,
            setting: Some("endpoints"),
            without_room: Some("what finds no room is refused"),
        };
        assert_eq!(nearly_full(&used(Some(79), Some(100))), None);
        let problem = nearly_full(&used(Some(80), Some(100))).unwrap();
        assert!(
            problem.contains("slots is 80 % full (80 of 100)"),
            "{problem}"
        );
        assert!(problem.contains("--map-size endpoints=N"), "{problem}");
        assert_eq!(nearly_full(&used(None, Some(100))), None);
        assert_eq!(nearly_full(&used(Some(1), None)), None);
        let cache = MapUse {
            without_room: None,
            ..used(Some(100), Some(100))
        };
        assert_eq!(nearly_full(&cache), None);
    }

    #[test]
    fn a_loss_is_told_for_a_while_and_only_if_it_is_new() {
        let mut health = Health::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let lost = |health: &Health| {
            health
                .losses
                .get(&Reason::EventLost)
                .map(|(_, count)| *count)
        };
        health.note_losses(&[(Reason::EventLost, 5)], at(0));
        assert_eq!(lost(&health), None, "an earlier agent's");
        health.note_losses(&[(Reason::EventLost, 7)], at(2));
        health.note_losses(&[(Reason::EventLost, 8), (Reason::PolicyDeny, 9)], at(4));
        assert_eq!(lost(&health), Some(3));
        health.note_losses(&[(Reason::EventLost, 8), (Reason::PolicyDeny, 12)], at(63));
        assert_eq!(lost(&health), Some(3));
        health.note_losses(&[(Reason::EventLost, 8)], at(65));
        assert!(health.losses.is_empty());
    }
}
