//! One end's socket, and the two ways of waiting for it: blocking calls, and edge-triggered readiness.
//!
//! No wait is longer than [`DEADLINE`]: what takes longer hangs, and is a failure. A blocking call that comes back
//! with EAGAIN before its time is counted and tried again: TCP never does it, a splice may.

use std::{
    io::{self, IoSlice, Read, Write},
    net::TcpStream,
    os::fd::AsFd,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use socket2::SockRef;

use super::plan::Style;

/// No byte and no event for this long is a hang.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);

/// A socket and how it is waited for.
pub(super) struct Link {
    stream: TcpStream,
    edge: Option<Edge>,
    early: AtomicU64,
}

/// What is known of a non-blocking socket. Both are true until a call has said otherwise.
struct Edge {
    epoll: Epoll,
    readable: bool,
    writable: bool,
}

/// A try that may not have come to anything yet.
type Tried = io::Result<Option<usize>>;

impl Link {
    pub(super) fn new(stream: TcpStream, style: Style) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let edge = match style {
            Style::Blocking => {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(DEADLINE))?;
                stream.set_write_timeout(Some(DEADLINE))?;
                None
            }
            Style::Edge => {
                stream.set_nonblocking(true)?;
                let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
                let interest = EpollFlags::EPOLLIN
                    | EpollFlags::EPOLLOUT
                    | EpollFlags::EPOLLRDHUP
                    | EpollFlags::EPOLLET;
                epoll.add(&stream, EpollEvent::new(interest, 0))?;
                Some(Edge {
                    epoll,
                    readable: true,
                    writable: true,
                })
            }
        };
        Ok(Self {
            stream,
            edge,
            early: AtomicU64::new(0),
        })
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    pub(super) fn is_edge(&self) -> bool {
        self.edge.is_some()
    }

    /// Blocking calls that came back before their time.
    pub(super) fn early(&self) -> u64 {
        self.early.load(Ordering::Relaxed)
    }

    /// Breaks the connection off: the other end gets a reset.
    pub(super) fn reset(self) -> io::Result<()> {
        SockRef::from(&self.stream).set_linger(Some(Duration::ZERO))
    }

    /// Reads at least one byte, or 0 at the end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if !self.is_edge() {
            return self.read_blocking(buffer);
        }
        loop {
            match self.try_read(buffer)? {
                Some(count) => return Ok(count),
                None => self.wait()?,
            }
        }
    }

    /// Writes at least one byte.
    pub(super) fn write(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        if !self.is_edge() {
            return self.write_blocking(slices);
        }
        loop {
            match self.try_write(slices)? {
                Some(count) => return Ok(count),
                None => self.wait()?,
            }
        }
    }

    /// Reads what is there; `None` if nothing is. For the edge-triggered style only.
    pub(super) fn try_read(&mut self, buffer: &mut [u8]) -> Tried {
        let Some(edge) = self.edge.as_mut().filter(|edge| edge.readable) else {
            return Ok(None);
        };
        let tried = none_if_not_now((&self.stream).read(buffer));
        edge.readable = !matches!(tried, Ok(None));
        tried
    }

    /// Writes what there is room for; `None` if there is none. For the edge-triggered style only.
    pub(super) fn try_write(&mut self, slices: &[IoSlice<'_>]) -> Tried {
        let Some(edge) = self.edge.as_mut().filter(|edge| edge.writable) else {
            return Ok(None);
        };
        let tried = none_if_not_now((&self.stream).write_vectored(slices));
        edge.writable = !matches!(tried, Ok(None));
        tried
    }

    /// Waits for an event, after a try that came to nothing. For the edge-triggered style only.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        let Some(edge) = &mut self.edge else {
            return Err(io::Error::other("a blocking socket waits in its calls"));
        };
        let mut events = [EpollEvent::empty()];
        let timeout = EpollTimeout::try_from(DEADLINE).map_err(io::Error::other)?;
        loop {
            match edge.epoll.wait(&mut events, timeout) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(0) => return Err(hang("no event")),
                Ok(_) => break,
            }
        }
        let came = events[0].events();
        let both = EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP;
        edge.readable |= came.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | both);
        edge.writable |= came.intersects(EpollFlags::EPOLLOUT | both);
        Ok(())
    }

    /// As [`Link::read`], for the blocking style: a thread of its own may write meanwhile.
    pub(super) fn read_blocking(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.blocking(PollFlags::POLLIN, || (&self.stream).read(buffer))
    }

    /// As [`Link::write`], for the blocking style: a thread of its own may read meanwhile.
    pub(super) fn write_blocking(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.blocking(PollFlags::POLLOUT, || (&self.stream).write_vectored(slices))
    }

    fn blocking(
        &self,
        ready: PollFlags,
        mut call: impl FnMut() -> io::Result<usize>,
    ) -> io::Result<usize> {
        let begun = Instant::now();
        loop {
            match none_if_not_now(call()) {
                Ok(Some(count)) => return Ok(count),
                Err(error) => return Err(error),
                Ok(None) => {}
            }
            let Some(left) = DEADLINE
                .checked_sub(begun.elapsed())
                // The kernel's clock ticks coarsely.
                .filter(|left| *left > DEADLINE / 20)
            else {
                return Err(hang("the call did not return"));
            };
            self.early.fetch_add(1, Ordering::Relaxed);
            let timeout = PollTimeout::try_from(left).map_err(io::Error::other)?;
            let mut waited = [PollFd::new(self.stream.as_fd(), ready)];
            match poll(&mut waited, timeout) {
                Ok(0) => return Err(hang("the socket did not become ready")),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn none_if_not_now(done: io::Result<usize>) -> Tried {
    match done {
        Ok(count) => Ok(Some(count)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn hang(what: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("hangs: {what} within {} s", DEADLINE.as_secs()),
    )
}
