//! The serving end: follows each connection's plan, and keeps account of what it saw until it is asked.
//!
//! One run at a time: accounts are the server's, not a client's.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use serde::{Deserialize, Serialize};
use socket2::{Domain, SockRef, Socket, Type};

use super::{
    CONTROL_PORT_OFFSET, DATA_PORTS, StressServerArguments,
    engine::{self, Buffers, Totals, Ways},
    header::Opening,
    link::DEADLINE,
    plan::{Plan, Scenario},
    tally::Tally,
};

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// Buffers of a socket that is to fill up.
pub(super) const SMALL_BUFFER: usize = 64 << 10;
/// Longer than anything that a connection may wait for.
const LAST_CONNECTIONS: Duration = DEADLINE.saturating_add(Duration::from_secs(10));
/// The longest question.
const MAX_QUESTION: u64 = 1024;

/// What the client asks at the control port: one line of JSON.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Question {
    /// How many connections must have ended before there is an answer.
    pub(super) connections: u64,
}

#[derive(Default)]
struct Account {
    tally: Mutex<Tally>,
    ended: Condvar,
}

pub(super) fn run(arguments: &StressServerArguments) -> anyhow::Result<()> {
    let account = Arc::new(Account::default());
    let control = listen(port(arguments.port, CONTROL_PORT_OFFSET)?)?;
    let listeners = (0..DATA_PORTS)
        .map(|offset| listen(port(arguments.port, offset)?).map(Arc::new))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let workers = usize::from(arguments.workers);
    for index in 0..workers.max(listeners.len()) {
        let listener = Arc::clone(&listeners[index % listeners.len()]);
        let account = Arc::clone(&account);
        thread::Builder::new()
            .spawn(move || work(&listener, &account))
            .context("cannot start a worker")?;
    }
    println!("listening on {}", arguments.port);
    for stream in control.incoming().flatten() {
        if let Err(error) = answer(stream, &account) {
            eprintln!("control connection: {error}");
        }
    }
    Ok(())
}

/// `first` plus `offset`.
pub(super) fn port(first: u16, offset: u16) -> anyhow::Result<u16> {
    first
        .checked_add(offset)
        .context("the port must leave room for four ports above it")
}

/// Listens on all addresses of both families.
fn listen(port: u16) -> anyhow::Result<TcpListener> {
    let bound = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_only_v6(false)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        socket.listen(BACKLOG)?;
        Ok(socket)
    };
    let socket = bound().with_context(|| format!("cannot listen on port {port}"))?;
    Ok(socket.into())
}

fn work(listener: &TcpListener, account: &Account) {
    let mut buffers = Buffers::new();
    loop {
        match listener.accept() {
            Ok((stream, peer)) => account.ended(serve(stream, peer, &mut buffers)),
            // A connection that is gone before it was accepted is the client's to miss.
            Err(error) => eprintln!("accept: {error}"),
        }
    }
}

/// How a connection ended.
enum Served {
    Planned(Scenario, u64, Totals),
    Unknown,
    Failed(String),
}

fn serve(mut stream: TcpStream, peer: SocketAddr, buffers: &mut Buffers) -> Served {
    let opening = stream
        .set_read_timeout(Some(DEADLINE))
        .and_then(|()| Opening::read(&mut stream, DEADLINE));
    let header = match opening {
        Ok(Opening::Header(header)) => header,
        Ok(Opening::Empty) => return Served::Planned(Scenario::Empty, 0, Totals::default()),
        Ok(Opening::BrokenOff) => return Served::Unknown,
        Err(error) => return Served::Failed(format!("connection from {peer}: {error}")),
    };
    let plan = Plan::of(header.seed, header.number);
    let failed = |what: String| {
        Served::Failed(format!(
            "connection {} ({}, server, seed {}): {what}",
            header.number,
            plan.scenario.name(),
            header.seed
        ))
    };
    if plan.small_buffers
        && let Err(error) = shrink(&SockRef::from(&stream))
    {
        return failed(error.to_string());
    }
    let ways = Ways::of_server(header.seed, header.number);
    match engine::play(stream, &plan.server, ways, buffers) {
        Ok(totals) => Served::Planned(plan.scenario, header.number, totals),
        Err(trouble) => failed(trouble.to_string()),
    }
}

/// Small buffers, for an end that is to be stopped.
pub(super) fn shrink(socket: &Socket) -> io::Result<()> {
    socket.set_recv_buffer_size(SMALL_BUFFER)?;
    socket.set_send_buffer_size(SMALL_BUFFER)
}

impl Account {
    fn ended(&self, served: Served) {
        // Nothing panics while it holds the lock.
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        match served {
            Served::Planned(scenario, number, totals) => tally.add(scenario, number, totals),
            Served::Unknown => tally.unknown += 1,
            Served::Failed(what) => tally.fail(what),
        }
        drop(tally);
        self.ended.notify_all();
    }

    /// The account since it was last taken, as soon as enough connections have ended.
    fn take(&self, connections: u64) -> Tally {
        let until = Instant::now() + LAST_CONNECTIONS;
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if tally.connections() + tally.failed >= connections || left.is_zero() {
                return std::mem::take(&mut tally);
            }
            let waited = self.ended.wait_timeout(tally, left);
            tally = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn answer(stream: TcpStream, account: &Account) -> io::Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.set_write_timeout(Some(DEADLINE))?;
    let mut line = String::new();
    let mut reader = BufReader::new(io::Read::take(&stream, MAX_QUESTION));
    if reader.read_line(&mut line)? == 0 {
        // A readiness probe.
        return Ok(());
    }
    let question: Question = serde_json::from_str(&line)?;
    let mut text = serde_json::to_vec(&account.take(question.connections))?;
    text.push(b'\n');
    (&stream).write_all(&text)
}
