//! What happens on one stress connection: a scenario, and the steps that each of the two ends takes in it.
//!
//! Both ends compute the same [`Plan`] from (seed, number), so that neither has to tell the other what to expect.
//! Every step of one end has its counterpart on the other; how the steps are taken is in [`super::engine`].

use serde::{Deserialize, Serialize};

use super::content::Mixer;

/// Connections in a row that may share a source port: one thread makes them, one right after the other.
pub(super) const BLOCK: u64 = 8;
/// Source ports are reused in this many of a thousand blocks.
const REUSE_PER_MILLE: u64 = 70;
/// A program that answers within it is as good as any: what a stalled reader waits.
const LONGEST_STALL: u64 = 25;
/// More than the buffers of both ends and what a splice may hold, when the sockets' buffers are small.
const MORE_THAN_BUFFERS: u64 = 4 << 20;

/// What a connection is about.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Scenario {
    /// A request, a response.
    Short,
    /// Connected, and closed without a byte.
    Empty,
    /// One large body to the server.
    Upload,
    /// One large body to the client.
    Download,
    /// Large bodies both ways at the same time.
    Duplex,
    /// Small messages to and fro.
    PingPong,
    /// More than 128 KiB at once, then small messages to and fro.
    Burst,
    /// Many small writes.
    TinyWrites,
    /// Writes and reads of one byte.
    SingleBytes,
    /// Writes of several buffers at once.
    Vectored,
    /// The client ends its side; the server goes on.
    HalfCloseClient,
    /// The server ends its side; the client goes on.
    HalfCloseServer,
    /// The client closes first, without waiting for anything.
    ClientCloses,
    /// The client breaks the connection off in the middle.
    ResetByClient,
    /// The server breaks the connection off in the middle.
    ResetByServer,
    /// The client breaks the connection off before the server can have looked at it.
    ResetAtOnce,
    /// The reader waits until the writer must have been stopped.
    SlowReader,
    /// A source port used again at once, after the server closed first.
    ReuseServerCloses,
    /// The same, while the server has not read all of the earlier connection yet.
    ReuseUnread,
    /// A source port used again at once, after the client broke off.
    ReuseReset,
}

impl Scenario {
    /// The name, as in the report.
    pub(super) fn name(self) -> String {
        let name = serde_json::to_value(self).unwrap_or_default();
        name.as_str().unwrap_or_default().to_owned()
    }

    /// Whether the connection is from a small range of source ports.
    pub(super) fn reuses_port(self) -> bool {
        matches!(
            self,
            Self::ReuseServerCloses | Self::ReuseUnread | Self::ReuseReset
        )
    }

    /// Whether the connection is broken off on purpose: then a prefix of the bytes arrives.
    pub(super) fn is_broken_off(self) -> bool {
        matches!(
            self,
            Self::ResetByClient | Self::ResetByServer | Self::ResetAtOnce | Self::ReuseReset
        )
    }

    /// Whether the client says who it is. Without that, the server knows no more than that someone came.
    pub(super) fn has_header(self) -> bool {
        !matches!(self, Self::Empty | Self::ResetAtOnce)
    }
}

/// How often each scenario is drawn, in thousands, where no source port is reused.
const WEIGHTS: [(Scenario, u64); 17] = [
    (Scenario::Short, 408),
    (Scenario::Empty, 50),
    (Scenario::Upload, 14),
    (Scenario::Download, 14),
    (Scenario::Duplex, 60),
    (Scenario::PingPong, 60),
    (Scenario::Burst, 20),
    (Scenario::TinyWrites, 60),
    (Scenario::SingleBytes, 20),
    (Scenario::Vectored, 60),
    (Scenario::HalfCloseClient, 60),
    (Scenario::HalfCloseServer, 60),
    (Scenario::ClientCloses, 20),
    (Scenario::ResetByClient, 40),
    (Scenario::ResetByServer, 40),
    (Scenario::ResetAtOnce, 11),
    (Scenario::SlowReader, 3),
];

/// How bytes are handed to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pieces {
    /// As much as there is.
    Whole,
    /// This many at a time.
    Of(usize),
    /// Several buffers of uneven sizes at a time.
    Vectored,
}

/// One thing that one end does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Sends this many bytes.
    Send(u64, Pieces),
    /// Receives this many bytes, at most so many at a time.
    Receive(u64, usize),
    /// Does both at the same time.
    Exchange { send: u64, receive: u64 },
    /// Sends so much that it must be stopped, as the other end does not read before it has said one byte.
    Press(u64),
    /// Lets time pass, in milliseconds.
    Stall(u64),
    /// Ends its own side.
    CloseWrite,
    /// The other end has ended its side: no byte more, and no error.
    End,
    /// Breaks the connection off.
    Reset,
    /// Sends and receives at most this much, until the other end has broken off.
    SufferReset { send: u64, receive: u64 },
}

/// How an end waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// In blocking calls; both ways at the same time with two threads.
    Blocking,
    /// Edge-triggered, as event loops do.
    Edge,
}

/// One end's part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) steps: Vec<Step>,
    pub(super) style: Style,
}

/// A connection's plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) scenario: Scenario,
    pub(super) client: Part,
    pub(super) server: Part,
    /// Both ends' sockets get small buffers, so that they fill up.
    pub(super) small_buffers: bool,
}

impl Plan {
    /// The plan of connection `number` in the run of `seed`.
    pub(super) fn of(seed: u64, number: u64) -> Self {
        let mut random = Mixer::new(seed ^ 0x706c_616e, number);
        Self::with(scenario(seed, number, &mut random), &mut random)
    }

    fn with(scenario: Scenario, random: &mut Mixer) -> Self {
        let (client, server) = steps(scenario, random);
        let [client, server] = [client, server].map(|steps| Part {
            // Only who does not block can tell that it would have.
            style: if steps.iter().any(|step| matches!(step, Step::Press(_))) || random.coin() {
                Style::Edge
            } else {
                Style::Blocking
            },
            steps,
        });
        Self {
            scenario,
            client,
            server,
            small_buffers: scenario == Scenario::SlowReader,
        }
    }
}

fn scenario(seed: u64, number: u64, random: &mut Mixer) -> Scenario {
    let mut of_block = Mixer::new(seed ^ 0x626c_6f63, number / BLOCK);
    if of_block.below(1000) < REUSE_PER_MILLE {
        return match random.below(3) {
            0 => Scenario::ReuseServerCloses,
            1 => Scenario::ReuseUnread,
            _ => Scenario::ReuseReset,
        };
    }
    let mut draw = random.below(1000);
    for (scenario, weight) in WEIGHTS {
        if draw < weight {
            return scenario;
        }
        draw -= weight;
    }
    Scenario::Short
}

const WHOLE: Pieces = Pieces::Whole;
/// Reads as large as the buffer is.
const ANY: usize = usize::MAX;

/// The client's steps and the server's.
fn steps(scenario: Scenario, random: &mut Mixer) -> (Vec<Step>, Vec<Step>) {
    use Step::{CloseWrite, End, Exchange, Press, Receive, Reset, Send, Stall, SufferReset};
    match scenario {
        Scenario::Short => {
            let [request, response] = [random.size(1, 4096), random.size(1, 16_384)];
            (
                vec![Send(request, WHOLE), Receive(response, ANY), End],
                vec![Receive(request, ANY), Send(response, WHOLE)],
            )
        }
        Scenario::Empty => (vec![], vec![End]),
        Scenario::Upload => {
            let body = random.size(129 << 10, 4 << 20);
            (
                vec![Send(body, WHOLE), Receive(1, ANY), End],
                vec![Receive(body, ANY), Send(1, WHOLE)],
            )
        }
        Scenario::Download => {
            let body = random.size(129 << 10, 4 << 20);
            (
                vec![Receive(body, ANY), End],
                vec![Receive(0, ANY), Send(body, WHOLE)],
            )
        }
        Scenario::Duplex => {
            let [up, down] = [
                random.size(1 << 10, 512 << 10),
                random.size(1 << 10, 512 << 10),
            ];
            let exchange = |send, receive| Exchange { send, receive };
            (vec![exchange(up, down), End], vec![exchange(down, up)])
        }
        Scenario::PingPong => rounds(random, 2, 30),
        Scenario::Burst => {
            let burst = random.size(129 << 10, 400 << 10);
            let (mut client, mut server) = rounds(random, 2, 12);
            if random.coin() {
                client.insert(0, Send(burst, WHOLE));
                server.insert(0, Receive(burst, ANY));
            } else {
                client.insert(0, Receive(burst, ANY));
                server.insert(0, Send(burst, WHOLE));
            }
            (client, server)
        }
        Scenario::TinyWrites => {
            let size = 1 + random.below(64);
            let total = size * (8 + random.below(56));
            let back = random.size(1, 2048);
            (
                vec![
                    Send(total, Pieces::Of(size as usize)),
                    Receive(back, 64),
                    End,
                ],
                vec![Receive(total, ANY), Send(back, Pieces::Of(32))],
            )
        }
        Scenario::SingleBytes => {
            let [up, down] = [1 + random.below(64), 1 + random.below(64)];
            (
                vec![Send(up, Pieces::Of(1)), Receive(down, 1), End],
                vec![Receive(up, 1), Send(down, Pieces::Of(1))],
            )
        }
        Scenario::Vectored => {
            let [up, down] = [random.size(8, 128 << 10), random.size(8, 64 << 10)];
            (
                vec![Send(up, Pieces::Vectored), Receive(down, ANY), End],
                vec![Receive(up, ANY), Send(down, Pieces::Vectored)],
            )
        }
        Scenario::HalfCloseClient => {
            let [up, down] = [random.size(1, 64 << 10), random.size(1, 200 << 10)];
            (
                vec![Send(up, WHOLE), CloseWrite, Receive(down, ANY), End],
                vec![Receive(up, ANY), End, Send(down, WHOLE)],
            )
        }
        Scenario::HalfCloseServer => {
            let [request, down, up] = [
                random.size(1, 1024),
                random.size(1, 64 << 10),
                random.size(1, 200 << 10),
            ];
            (
                vec![
                    Send(request, WHOLE),
                    Receive(down, ANY),
                    End,
                    Send(up, WHOLE),
                ],
                vec![
                    Receive(request, ANY),
                    Send(down, WHOLE),
                    CloseWrite,
                    Receive(up, ANY),
                    End,
                ],
            )
        }
        Scenario::ClientCloses => {
            let up = random.size(1, 16 << 10);
            (vec![Send(up, WHOLE)], vec![Receive(up, ANY), End])
        }
        Scenario::ResetByClient => {
            let (breaks, suffers) = broken_off(random);
            (breaks, suffers)
        }
        Scenario::ResetByServer => {
            let (breaks, suffers) = broken_off(random);
            (suffers, breaks)
        }
        // What the server sees of it is not told by a plan: it never learns which plan it was.
        Scenario::ResetAtOnce => (vec![Reset], vec![]),
        Scenario::SlowReader => {
            let stall = 5 + random.below(LONGEST_STALL - 5);
            let presses = vec![Press(MORE_THAN_BUFFERS), Receive(1, ANY)];
            let stalls = vec![
                Stall(stall),
                Send(1, WHOLE),
                Receive(MORE_THAN_BUFFERS, ANY),
            ];
            if random.coin() {
                ([presses, vec![End]].concat(), stalls)
            } else {
                ([stalls, vec![End]].concat(), presses)
            }
        }
        Scenario::ReuseServerCloses => {
            let [request, response] = [random.size(1, 4096), random.size(1, 16_384)];
            (
                vec![Send(request, WHOLE), Receive(response, ANY), End],
                vec![Receive(request, ANY), Send(response, WHOLE)],
            )
        }
        Scenario::ReuseUnread => {
            let [request, response, late] = [
                random.size(1, 2048),
                random.size(1, 4096),
                random.size(1, 32 << 10),
            ];
            (
                vec![
                    Send(request, WHOLE),
                    Receive(response, ANY),
                    End,
                    Send(late, WHOLE),
                ],
                vec![
                    Receive(request, ANY),
                    Send(response, WHOLE),
                    CloseWrite,
                    // The client's next connection has the same addresses and ports by then.
                    Stall(1 + random.below(4)),
                    Receive(late, ANY),
                    End,
                ],
            )
        }
        Scenario::ReuseReset => {
            let [request, response] = [random.size(1, 4096), random.size(1, 16_384)];
            (
                vec![Send(request, WHOLE), Receive(response, ANY), Reset],
                vec![
                    Receive(request, ANY),
                    Send(response, WHOLE),
                    SufferReset {
                        send: 0,
                        receive: 0,
                    },
                ],
            )
        }
    }
}

/// Messages to and fro; the client asks.
fn rounds(random: &mut Mixer, least: u64, most: u64) -> (Vec<Step>, Vec<Step>) {
    let (mut client, mut server) = (Vec::new(), Vec::new());
    for _ in 0..least + random.below(most - least) {
        let [ping, pong] = [random.size(1, 2048), random.size(1, 2048)];
        client.extend([Step::Send(ping, WHOLE), Step::Receive(pong, ANY)]);
        server.extend([Step::Receive(ping, ANY), Step::Send(pong, WHOLE)]);
    }
    client.push(Step::End);
    (client, server)
}

/// Who breaks off at a random point of an exchange, and who has to bear it.
fn broken_off(random: &mut Mixer) -> (Vec<Step>, Vec<Step>) {
    let sent = random.size(1, 256 << 10);
    let offered = random.size(1, 512 << 10);
    // At least one byte: then the other end knows which connection this is.
    let taken = 1 + random.below(offered);
    let breaks = Step::Exchange {
        send: sent,
        receive: taken,
    };
    let suffers = Step::SufferReset {
        send: offered,
        receive: sent,
    };
    (vec![breaks, Step::Reset], vec![suffers])
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MANY: u64 = 40_000;

    #[test]
    fn the_weights_are_per_mille() {
        assert_eq!(WEIGHTS.iter().map(|(_, weight)| weight).sum::<u64>(), 1000);
    }

    #[test]
    fn a_plan_is_told_by_seed_and_number() {
        let plans = |seed| (0..100).map(move |number| Plan::of(seed, number));
        assert!(plans(1).eq(plans(1)));
        assert!(plans(1).ne(plans(2)));
    }

    #[test]
    fn every_scenario_comes_up_and_reused_ports_come_in_blocks() {
        let mut counts: BTreeMap<Scenario, u64> = BTreeMap::new();
        for number in 0..MANY {
            let scenario = Plan::of(3, number).scenario;
            *counts.entry(scenario).or_default() += 1;
            let first = Plan::of(3, number / BLOCK * BLOCK).scenario;
            assert_eq!(scenario.reuses_port(), first.reuses_port());
        }
        assert_eq!(counts.len(), WEIGHTS.len() + 3, "{counts:?}");
        assert!(counts.values().all(|count| *count > 50), "{counts:?}");
    }

    /// What one end sends the other end receives, and nobody waits for what does not come.
    #[test]
    fn both_ends_agree_on_how_much_is_sent() {
        for number in 0..MANY {
            let plan = Plan::of(4, number);
            let [from_client, to_client] = totals(&plan.client.steps);
            let [from_server, to_server] = totals(&plan.server.steps);
            if plan.scenario.is_broken_off() {
                assert!(to_server <= from_client || to_client <= from_server);
            } else {
                assert_eq!(
                    (from_client, from_server),
                    (to_server, to_client),
                    "{plan:?}"
                );
            }
        }
    }

    fn totals(steps: &[Step]) -> [u64; 2] {
        steps.iter().fold([0, 0], |[sent, received], step| {
            let (more_sent, more_received) = match *step {
                Step::Send(count, _) | Step::Press(count) => (count, 0),
                Step::Receive(count, _) => (0, count),
                Step::Exchange { send, receive } | Step::SufferReset { send, receive } => {
                    (send, receive)
                }
                _ => (0, 0),
            };
            [sent + more_sent, received + more_received]
        })
    }
}
