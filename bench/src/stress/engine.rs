//! Takes one end through its part of a plan, and checks everything that it sees.
//!
//! What goes wrong becomes a [`Trouble`] that names the step and the offset; which connection it was is added by
//! the caller. The steps are [`super::plan`]'s, the bytes [`super::content`]'s, the waiting [`super::link`]'s.

use std::{
    fmt,
    io::{self, IoSlice},
    net::TcpStream,
    thread,
    time::Duration,
};

use super::{
    content::{Content, Direction},
    link::Link,
    plan::{Part, Pieces, Step},
};

/// The most that is handed to the kernel, or taken from it, in one call: more than a splice takes at once.
const BUFFER: usize = 256 << 10;
/// Slices of a vectored write.
const SLICES: usize = 5;

/// Memory that an end works with, used for one connection after the other.
pub(super) struct Buffers {
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
}

impl Buffers {
    pub(super) fn new() -> Self {
        Self {
            outgoing: vec![0; BUFFER],
            incoming: vec![0; BUFFER],
        }
    }
}

/// How far an end came.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Totals {
    /// Bytes that the kernel took.
    pub(super) sent: u64,
    /// Bytes that came, every one of them right.
    pub(super) received: u64,
    /// Blocking calls that came back before their time.
    pub(super) early: u64,
}

/// What went wrong on one end.
#[derive(Debug)]
pub(super) struct Trouble {
    step: String,
    totals: Totals,
    what: String,
}

impl fmt::Display for Trouble {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { sent, received, .. } = self.totals;
        write!(
            formatter,
            "{}: {} ({sent} bytes sent, {received} received)",
            self.step, self.what
        )
    }
}

/// Which of the two ends this is, and what goes over the wire.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ways {
    outgoing: Content,
    incoming: Content,
}

impl Ways {
    pub(super) fn of_client(seed: u64, connection: u64) -> Self {
        Self {
            outgoing: Content::new(seed, connection, Direction::ToServer),
            incoming: Content::new(seed, connection, Direction::ToClient),
        }
    }

    pub(super) fn of_server(seed: u64, connection: u64) -> Self {
        let Self { outgoing, incoming } = Self::of_client(seed, connection);
        Self {
            outgoing: incoming,
            incoming: outgoing,
        }
    }
}

/// Takes a part to its end. The socket is closed when this returns.
pub(super) fn play(
    stream: TcpStream,
    part: &Part,
    ways: Ways,
    buffers: &mut Buffers,
) -> Result<Totals, Trouble> {
    let mut totals = Totals::default();
    let link = Link::new(stream, part.style).map_err(|error| Trouble {
        step: "prepare the socket".into(),
        totals,
        what: error.to_string(),
    })?;
    let mut end = End {
        link,
        ways,
        buffers,
        sent: 0,
        received: 0,
    };
    for (index, step) in part.steps.iter().enumerate() {
        let done = match step {
            // The last step, as the socket is gone after it.
            Step::Reset => {
                totals = end.totals();
                return match end.link.reset() {
                    Ok(()) => Ok(totals),
                    Err(error) => Err(trouble(index, step, totals, error.to_string())),
                };
            }
            step => end.take(step),
        };
        totals = end.totals();
        done.map_err(|what| trouble(index, step, totals, what))?;
    }
    Ok(totals)
}

fn trouble(index: usize, step: &Step, totals: Totals, what: String) -> Trouble {
    Trouble {
        step: format!("step {} {step:?}", index + 1),
        totals,
        what,
    }
}

struct End<'a> {
    link: Link,
    ways: Ways,
    buffers: &'a mut Buffers,
    sent: u64,
    received: u64,
}

/// What was wrong, in words.
type Taken<T = ()> = Result<T, String>;

impl End<'_> {
    fn totals(&self) -> Totals {
        Totals {
            sent: self.sent,
            received: self.received,
            early: self.link.early(),
        }
    }

    fn take(&mut self, step: &Step) -> Taken {
        match *step {
            Step::Send(count, pieces) => self.send(count, pieces),
            Step::Receive(count, most) => self.receive(count, most),
            Step::Exchange { send, receive } => match self.both_ways(send, receive)? {
                Met::Done => Ok(()),
                Met::Reset => Err("the other end broke off".into()),
            },
            Step::SufferReset { send, receive } => self.suffer_reset(send, receive),
            Step::Press(count) => self.press(count),
            Step::Stall(milliseconds) => {
                thread::sleep(Duration::from_millis(milliseconds));
                Ok(())
            }
            Step::CloseWrite => self
                .link
                .stream()
                .shutdown(std::net::Shutdown::Write)
                .map_err(said),
            Step::End => match self.link.read(&mut self.buffers.incoming[..64]) {
                Ok(0) => Ok(()),
                Ok(count) => Err(format!("{count} bytes came where the end should be")),
                Err(error) => Err(said(error)),
            },
            Step::Reset => Err("a reset is the last step".into()),
        }
    }

    fn send(&mut self, count: u64, pieces: Pieces) -> Taken {
        let last = self.sent + count;
        while self.sent < last {
            let most = match pieces {
                Pieces::Of(most) => most,
                Pieces::Whole | Pieces::Vectored => BUFFER,
            };
            let mut piece = outgoing(self.buffers, self.sent, last, most, self.ways.outgoing);
            while !piece.is_empty() {
                let taken = if pieces == Pieces::Vectored {
                    self.link.write(&slices(piece))
                } else {
                    self.link.write(&[IoSlice::new(piece)])
                };
                let taken = taken.map_err(said)?;
                self.sent += taken as u64;
                piece = &piece[taken..];
            }
        }
        Ok(())
    }

    fn receive(&mut self, count: u64, most: usize) -> Taken {
        let last = self.received + count;
        while self.received < last {
            let room = most.min(BUFFER).min((last - self.received) as usize);
            match self.link.read(&mut self.buffers.incoming[..room]) {
                Ok(0) => return Err(format!("ended {} bytes too early", last - self.received)),
                Ok(count) => self.check(count)?,
                Err(error) => return Err(said(error)),
            }
        }
        Ok(())
    }

    fn check(&mut self, count: usize) -> Taken {
        let bytes = &self.buffers.incoming[..count];
        let checked = self.ways.incoming.check(self.received, bytes);
        self.received += count as u64;
        checked.map_err(|mismatch| mismatch.to_string())
    }

    /// The other end reads nothing before it has sent a byte: until then, the kernel must stop taking.
    fn press(&mut self, count: u64) -> Taken {
        self.send(count, Pieces::Whole)?;
        match self.link.stream().peek(&mut [0]) {
            Ok(1) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(format!(
                "no back-pressure: {count} bytes were taken while the other end read none"
            )),
            other => Err(format!("instead of the other end's byte: {other:?}")),
        }
    }

    fn suffer_reset(&mut self, send: u64, receive: u64) -> Taken {
        match self.both_ways(send, receive)? {
            Met::Reset => return Ok(()),
            Met::Done => {}
        }
        match self.link.read(&mut self.buffers.incoming[..64]) {
            Ok(0) => Err("ended in order where a reset should be".into()),
            Ok(count) => Err(format!("{count} bytes came where a reset should be")),
            Err(error) if is_reset(&error) => Ok(()),
            Err(error) => Err(said(error)),
        }
    }

    /// Sends and receives at the same time, to the end or until the other end breaks off.
    fn both_ways(&mut self, send: u64, receive: u64) -> Taken<Met> {
        if self.link.is_edge() {
            self.both_ways_by_events(send, receive)
        } else {
            self.both_ways_by_threads(send, receive)
        }
    }

    fn both_ways_by_events(&mut self, send: u64, receive: u64) -> Taken<Met> {
        let last_out = self.sent + send;
        let last_in = self.received + receive;
        // What is made already and not sent yet.
        let mut made = 0..0;
        while self.sent < last_out || self.received < last_in {
            let mut moved = false;
            if self.sent < last_out {
                if made.is_empty() {
                    let content = self.ways.outgoing;
                    made = 0..outgoing(self.buffers, self.sent, last_out, BUFFER, content).len();
                }
                let piece = &self.buffers.outgoing[made.clone()];
                match self.link.try_write(&[IoSlice::new(piece)]) {
                    Ok(Some(count)) => {
                        self.sent += count as u64;
                        made.start += count;
                        moved = true;
                    }
                    Ok(None) => {}
                    Err(error) if is_reset(&error) => return Ok(Met::Reset),
                    Err(error) => return Err(said(error)),
                }
            }
            if self.received < last_in {
                let room = BUFFER.min((last_in - self.received) as usize);
                match self.link.try_read(&mut self.buffers.incoming[..room]) {
                    Ok(Some(0)) => {
                        return Err(format!("ended {} bytes too early", last_in - self.received));
                    }
                    Ok(Some(count)) => {
                        self.check(count)?;
                        moved = true;
                    }
                    Ok(None) => {}
                    Err(error) if is_reset(&error) => return Ok(Met::Reset),
                    Err(error) => return Err(said(error)),
                }
            }
            if !moved {
                self.link.wait().map_err(said)?;
            }
        }
        Ok(Met::Done)
    }

    fn both_ways_by_threads(&mut self, send: u64, receive: u64) -> Taken<Met> {
        let Self { link, ways, .. } = self;
        let (link, outgoing_content) = (&*link, ways.outgoing);
        let first = self.sent;
        let output = &mut self.buffers.outgoing;
        let input = &mut self.buffers.incoming;
        let received = &mut self.received;
        let incoming_content = self.ways.incoming;
        let (written, read) = thread::scope(|scope| {
            let writer = thread::Builder::new()
                .stack_size(64 << 10)
                .spawn_scoped(scope, move || {
                    write_all(link, output, outgoing_content, first, first + send)
                });
            let read = read_all(link, input, incoming_content, received, receive);
            let written = match writer {
                Ok(writer) => writer
                    .join()
                    .unwrap_or_else(|_| (first, Err("the writer panicked".into()))),
                Err(error) => (first, Err(format!("no thread to write with: {error}"))),
            };
            (written, read)
        });
        self.sent = written.0;
        match (written.1?, read?) {
            (Met::Done, Read::All) => Ok(Met::Done),
            // One error tells of the reset; whoever asks after that sees the end.
            (Met::Reset, Read::Ended | Read::All | Read::Reset) | (Met::Done, Read::Reset) => {
                Ok(Met::Reset)
            }
            (Met::Done, Read::Ended) => Err("ended too early".into()),
        }
    }
}

/// How an exchange went.
enum Met {
    Done,
    Reset,
}

/// How reading alone went.
enum Read {
    All,
    Ended,
    Reset,
}

fn write_all(
    link: &Link,
    buffer: &mut [u8],
    content: Content,
    first: u64,
    last: u64,
) -> (u64, Taken<Met>) {
    let mut sent = first;
    while sent < last {
        let count = buffer.len().min((last - sent) as usize);
        let piece = &mut buffer[..count];
        content.fill(sent, piece);
        match link.write_blocking(&[IoSlice::new(piece)]) {
            Ok(count) => sent += count as u64,
            Err(error) if is_reset(&error) => return (sent, Ok(Met::Reset)),
            Err(error) => return (sent, Err(said(error))),
        }
    }
    (sent, Ok(Met::Done))
}

fn read_all(
    link: &Link,
    buffer: &mut [u8],
    content: Content,
    received: &mut u64,
    count: u64,
) -> Taken<Read> {
    let last = *received + count;
    while *received < last {
        let room = buffer.len().min((last - *received) as usize);
        match link.read_blocking(&mut buffer[..room]) {
            Ok(0) => return Ok(Read::Ended),
            Ok(count) => {
                let checked = content.check(*received, &buffer[..count]);
                *received += count as u64;
                checked.map_err(|mismatch| mismatch.to_string())?;
            }
            Err(error) if is_reset(&error) => return Ok(Read::Reset),
            Err(error) => return Err(said(error)),
        }
    }
    Ok(Read::All)
}

/// The bytes to send next.
fn outgoing(buffers: &mut Buffers, sent: u64, last: u64, most: usize, content: Content) -> &[u8] {
    let count = most.min(BUFFER).min((last - sent) as usize);
    let piece = &mut buffers.outgoing[..count];
    content.fill(sent, piece);
    piece
}

/// Cuts into slices of uneven sizes, some of them empty if there is little to cut.
fn slices(piece: &[u8]) -> [IoSlice<'_>; SLICES] {
    let mut rest = piece;
    let mut left = SLICES;
    std::array::from_fn(|_| {
        left -= 1;
        let count = if left == 0 {
            rest.len()
        } else {
            rest.len() / 3
        };
        let (slice, after) = rest.split_at(count);
        rest = after;
        IoSlice::new(slice)
    })
}

fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

fn said(error: io::Error) -> String {
    error.to_string()
}
