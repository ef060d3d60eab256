//! The serving end of a measurement: one thread per data connection, one for the accept port.

use std::{
    io::{self, Read, Write},
    net::{Ipv6Addr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use clap::Args;

use crate::{
    affinity,
    protocol::{ACCEPT_PORT_OFFSET, Header, Purpose},
};

/// Data connections served at a time; further ones are closed at once.
const MAX_CONNECTIONS: usize = 2048;

/// A client that says nothing for this long is gone.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// Arguments of `heddle-bench server`.
#[derive(Debug, Args)]
pub(crate) struct ServerArguments {
    /// The data port; the port above it accepts and closes.
    #[arg(long, default_value_t = 7000)]
    port: u16,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// Serves until it is killed.
pub(crate) fn run(arguments: &ServerArguments) -> anyhow::Result<()> {
    affinity::pin(arguments.cpu)?;
    // Containers start programs in sessions of their own, and the scheduler groups by session: without
    // this the baseline would be compared under another schedule. One that leads its session already stays.
    let _ = nix::unistd::setsid();
    let data = listen(arguments.port)?;
    let accept = listen(
        arguments
            .port
            .checked_add(ACCEPT_PORT_OFFSET)
            .context("--port must leave room for one port above it")?,
    )?;
    println!("listening on {}", arguments.port);
    thread::spawn(move || accept_and_close(&accept));
    serve_data(&data);
    Ok(())
}

/// Listens on all addresses of both families.
fn listen(port: u16) -> anyhow::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .with_context(|| format!("cannot listen on port {port}"))
}

fn accept_and_close(listener: &TcpListener) {
    for stream in listener.incoming() {
        // Closing is all there is to do; a client that is gone already is no error here.
        drop(stream);
    }
}

fn serve_data(listener: &TcpListener) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming().flatten() {
        if open.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
            continue;
        }
        open.fetch_add(1, Ordering::Relaxed);
        let open = Arc::clone(&open);
        thread::spawn(move || {
            if let Err(error) = serve(stream) {
                eprintln!("connection: {error}");
            }
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE_LIMIT))?;
    let header = Header::read(&mut stream)?;
    let mut buffer = vec![0; header.size as usize];
    match header.purpose {
        Purpose::PingPong => echo(&mut stream, &mut buffer),
        Purpose::Bulk => swallow(&mut stream, &mut buffer),
    }
}

fn echo(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    loop {
        match stream.read_exact(buffer) {
            Ok(()) => stream.write_all(buffer)?,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

fn swallow(stream: &mut TcpStream, buffer: &mut [u8]) -> io::Result<()> {
    let mut total: u64 = 0;
    loop {
        match stream.read(buffer)? {
            0 => return stream.write_all(&total.to_be_bytes()),
            count => total += count as u64,
        }
    }
}
