//! The bytes between a TCP connection and a stream of the tunnel, and how the connection ended.
//!
//! The hot path: no allocation per byte, no lock of ours, no logging. One task moves both directions. A socket is read
//! until a read comes back short, which saves the one that would say "nothing there"; what is read is passed on
//! without a copy, except small reads, which would hold a large buffer.
//!
//! What one connection can hold here: towards the tunnel [`limits::SEND_BUFFER`](crate::limits::SEND_BUFFER) and one
//! read; from the tunnel [`limits::STREAM_WINDOW`](crate::limits::STREAM_WINDOW), because the window is opened again
//! only for bytes that were written to the socket. A reader that stalls thus stops the writer at the other end.
//!
//! FIN becomes END_STREAM and a reset RST_STREAM, and the other way round. A relay that is dropped resets both sides:
//! an end that nobody meant must not look like one.

mod buffers;

use std::{
    collections::VecDeque,
    future::poll_fn,
    io::{self, IoSlice},
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::{Buf as _, Bytes};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::{io::AsyncWrite as _, net::TcpStream};
use tokio_util::sync::CancellationToken;

use crate::pool::TunnelStream;

/// Frames that are gathered for one write.
const GATHER: usize = 16;

/// One of the two sides of a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The TCP connection.
    Tcp,
    /// The stream.
    Tunnel,
}

/// How a relayed connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Both sides said that they were done.
    Clean,
    /// One side was reset, and so was the other.
    Reset(Side),
    /// It was ended from here: policy does not allow it any more.
    Policy,
    /// The tunnel broke or was closed under it.
    Broken(String),
    /// Its task was dropped, at the end of the process.
    Abandoned,
}

/// A relayed connection's figures.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Bytes that were read from the TCP connection and given to the tunnel.
    pub bytes_to_tunnel: u64,
    /// Bytes from the tunnel that were written to the TCP connection.
    pub bytes_from_tunnel: u64,
    /// From the beginning of the relay to its end.
    pub duration: Duration,
    /// How it ended.
    pub end: End,
}

/// Moves bytes until both directions are done, a side is reset, or `ended` is cancelled.
pub async fn relay(tcp: TcpStream, stream: TunnelStream, ended: CancellationToken) -> Outcome {
    let TunnelStream {
        send,
        receive,
        lease,
    } = stream;
    let mut relay = Relay::new(tcp, send, receive);
    let end = relay.run(&ended).await;
    drop(lease);
    relay.finish(end)
}

/// Both directions of one connection.
pub(crate) struct Relay {
    tcp: TcpStream,
    send: SendStream<Bytes>,
    receive: RecvStream,
    /// From the tunnel, not yet written.
    queue: VecDeque<Bytes>,
    to_tunnel: ToTunnel,
    from_tunnel: FromTunnel,
    bytes_to_tunnel: u64,
    bytes_from_tunnel: u64,
    started: Instant,
    finished: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ToTunnel {
    Open,
    Done,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FromTunnel {
    Open,
    /// END_STREAM was seen; the queue is still to be written.
    Ending,
    Done,
}

impl Relay {
    pub(crate) fn new(tcp: TcpStream, mut send: SendStream<Bytes>, receive: RecvStream) -> Self {
        // One byte shows whether there is room. More, while there is nothing to send, would take the connection's
        // window from the other streams.
        send.reserve_capacity(1);
        Self {
            tcp,
            send,
            receive,
            queue: VecDeque::new(),
            to_tunnel: ToTunnel::Open,
            from_tunnel: FromTunnel::Open,
            bytes_to_tunnel: 0,
            bytes_from_tunnel: 0,
            started: Instant::now(),
            finished: false,
        }
    }

    pub(crate) async fn run(&mut self, ended: &CancellationToken) -> End {
        let mut ended = pin!(ended.cancelled());
        poll_fn(|cx| {
            if ended.as_mut().poll(cx).is_ready() {
                return Poll::Ready(End::Policy);
            }
            self.poll(cx)
        })
        .await
    }

    /// Closes both sides as the end demands, and says how it was.
    pub(crate) fn finish(mut self, end: End) -> Outcome {
        self.finished = end == End::Clean;
        Outcome {
            bytes_to_tunnel: self.bytes_to_tunnel,
            bytes_from_tunnel: self.bytes_from_tunnel,
            duration: self.started.elapsed(),
            end,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if self.from_tunnel != FromTunnel::Done
            && let Poll::Ready(Err(end)) = self.poll_from_tunnel(cx)
        {
            return Poll::Ready(end);
        }
        if self.to_tunnel == ToTunnel::Open
            && let Poll::Ready(Err(end)) = self.poll_to_tunnel(cx)
        {
            return Poll::Ready(end);
        }
        if self.to_tunnel == ToTunnel::Done && self.from_tunnel == FromTunnel::Done {
            return Poll::Ready(End::Clean);
        }
        // Where nothing is awaited from the stream, a reset would go unnoticed.
        if (self.from_tunnel != FromTunnel::Open || self.queue.len() >= GATHER)
            && let Poll::Ready(reset) = self.send.poll_reset(cx)
        {
            return Poll::Ready(match reset {
                Ok(_) => End::Reset(Side::Tunnel),
                Err(error) => tunnel_end(&error),
            });
        }
        Poll::Pending
    }

    /// TCP → tunnel.
    fn poll_to_tunnel(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        loop {
            while self.send.capacity() == 0 {
                match ready!(self.send.poll_capacity(cx)) {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Poll::Ready(Err(tunnel_end(&error))),
                    None => return Poll::Ready(Err(End::Reset(Side::Tunnel))),
                }
            }
            let bytes = match ready!(buffers::poll_read(&mut self.tcp, cx)) {
                Ok(bytes) => bytes,
                Err(_) => return Poll::Ready(Err(End::Reset(Side::Tcp))),
            };
            let (count, last) = (bytes.len(), bytes.is_empty());
            if let Err(error) = self.send.send_data(bytes, last) {
                return Poll::Ready(Err(tunnel_end(&error)));
            }
            self.bytes_to_tunnel += count as u64;
            if last {
                self.to_tunnel = ToTunnel::Done;
                return Poll::Ready(Ok(()));
            }
            self.send.reserve_capacity(1);
        }
    }

    /// Tunnel → TCP.
    fn poll_from_tunnel(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        loop {
            let mut waiting = false;
            while self.from_tunnel == FromTunnel::Open && self.queue.len() < GATHER {
                match self.receive.poll_data(cx) {
                    Poll::Ready(Some(Ok(bytes))) if bytes.is_empty() => {}
                    Poll::Ready(Some(Ok(bytes))) => self.queue.push_back(bytes),
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(tunnel_end(&error))),
                    Poll::Ready(None) => self.from_tunnel = FromTunnel::Ending,
                    Poll::Pending => {
                        waiting = true;
                        break;
                    }
                }
            }
            if !self.queue.is_empty() {
                let count = match ready!(self.poll_write(cx)) {
                    Ok(0) | Err(_) => return Poll::Ready(Err(End::Reset(Side::Tcp))),
                    Ok(count) => count,
                };
                self.bytes_from_tunnel += count as u64;
                self.advance(count);
                if let Err(error) = self.receive.flow_control().release_capacity(count) {
                    return Poll::Ready(Err(tunnel_end(&error)));
                }
            } else if self.from_tunnel == FromTunnel::Ending {
                if ready!(Pin::new(&mut self.tcp).poll_shutdown(cx)).is_err() {
                    return Poll::Ready(Err(End::Reset(Side::Tcp)));
                }
                self.queue = VecDeque::new();
                self.from_tunnel = FromTunnel::Done;
                return Poll::Ready(Ok(()));
            } else if waiting {
                return Poll::Pending;
            }
        }
    }

    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if let [one] = self.queue.make_contiguous() {
            return Pin::new(&mut self.tcp).poll_write(cx, one);
        }
        let mut slices = [IoSlice::new(&[]); GATHER];
        let mut count = 0;
        for (slice, bytes) in slices.iter_mut().zip(&self.queue) {
            *slice = IoSlice::new(bytes);
            count += 1;
        }
        Pin::new(&mut self.tcp).poll_write_vectored(cx, &slices[..count])
    }

    /// Takes what was written from the queue.
    fn advance(&mut self, mut count: usize) {
        while let Some(first) = self.queue.front_mut() {
            if count < first.len() {
                first.advance(count);
                return;
            }
            count -= first.len();
            self.queue.pop_front();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if !self.finished {
            self.send.send_reset(Reason::CANCEL);
            reset_on_close(&self.tcp);
        }
    }
}

/// Lets the socket's close send a reset (RST) instead of an orderly end.
pub(crate) fn reset_on_close(tcp: &TcpStream) {
    // It fails only on a socket that is none any more.
    let _ = SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

fn tunnel_end(error: &h2::Error) -> End {
    if error.is_reset() && error.is_remote() {
        End::Reset(Side::Tunnel)
    } else {
        End::Broken(error.to_string())
    }
}
