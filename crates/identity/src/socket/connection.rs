//! An accepted connection: its bytes, who made it, and the place that it takes up.

use std::{
    collections::HashMap,
    fmt, io,
    os::unix::net::UnixStream as StdUnixStream,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tonic::transport::server::Connected;

use super::{Limits, authority::Rewriter};
use crate::attest::Caller;

/// Most bytes that are read at a time: requests are small.
const READ_BYTES: usize = 4096;

/// Who has connected.
#[derive(Debug, Clone)]
pub(super) enum Who {
    Workload(Caller),
    Stranger,
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workload(caller) => f.write_str(&caller.uid),
            Self::Stranger => f.write_str("strangers"),
        }
    }
}

/// Takes its place along: it is free when the connection is dropped.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    rewriter: Rewriter,
    /// Rewritten and not yet read; empty most of the time.
    ready: Vec<u8>,
    who: Who,
    _slot: Slot,
}

impl Connection {
    pub(super) fn new(stream: StdUnixStream, who: Who, slot: Slot) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            stream: UnixStream::from_std(stream)?,
            rewriter: Rewriter::new(),
            ready: Vec::new(),
            who,
            _slot: slot,
        })
    }
}

impl Connected for Connection {
    type ConnectInfo = Who;

    fn connect_info(&self) -> Who {
        self.who.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.ready.is_empty() {
            let mut bytes = [0; READ_BYTES];
            let mut read = ReadBuf::new(&mut bytes);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                this.rewriter.finish(&mut this.ready);
                break;
            }
            this.rewriter.push(read.filled(), &mut this.ready);
        }
        let count = this.ready.len().min(buffer.remaining());
        buffer.put_slice(&this.ready[..count]);
        this.ready.drain(..count);
        if this.ready.is_empty() {
            this.ready = Vec::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, buffer)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// The places for connections: in all, of each workload, and of strangers.
#[derive(Debug)]
pub(super) struct Slots {
    connections: usize,
    per_caller: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// By workload; `None` for strangers.
    by_caller: HashMap<Option<Arc<str>>, usize>,
}

impl Slots {
    pub(super) fn new(limits: &Limits) -> Self {
        Self {
            connections: limits.connections,
            per_caller: limits.connections_per_workload,
            taken: Arc::default(),
        }
    }

    pub(super) fn take(&self, who: &Who) -> Option<Slot> {
        let caller = match who {
            Who::Workload(caller) => Some(Arc::clone(&caller.uid)),
            Who::Stranger => None,
        };
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let has = taken.by_caller.get(&caller).copied().unwrap_or_default();
        if taken.all >= self.connections || has >= self.per_caller {
            return None;
        }
        taken.all += 1;
        taken.by_caller.insert(caller.clone(), has + 1);
        Some(Slot {
            taken: Arc::clone(&self.taken),
            caller,
        })
    }
}

/// The place of one connection.
#[derive(Debug)]
pub(super) struct Slot {
    taken: Arc<Mutex<Taken>>,
    caller: Option<Arc<str>>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all -= 1;
        if let Some(count) = taken.by_caller.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                taken.by_caller.remove(&self.caller);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_callers_connections_leave_room_for_others() {
        let workload = |uid: &str| {
            Who::Workload(Caller {
                uid: uid.into(),
                id: "spiffe://d/ns/a/sa/b".parse().unwrap(),
            })
        };
        let slots = Slots::new(&Limits {
            connections: 5,
            connections_per_workload: 2,
            streams_per_connection: 1,
        });
        let mut held = Vec::new();
        for who in [workload("a"), Who::Stranger] {
            held.extend([slots.take(&who).unwrap(), slots.take(&who).unwrap()]);
            assert!(slots.take(&who).is_none());
        }
        held.push(slots.take(&workload("b")).unwrap());
        assert!(slots.take(&workload("c")).is_none(), "five in all");
        held.clear();
        assert!(slots.taken.lock().unwrap().by_caller.is_empty());
        assert!(slots.take(&workload("a")).is_some());
    }
}
