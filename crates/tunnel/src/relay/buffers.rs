//! Where TCP sockets are read into: a few large buffers that all relays of a worker share, so that an idle
//! connection holds none. What a large read brought is passed on without a copy; the buffer is used again when that
//! is gone.

use std::{
    cell::RefCell,
    future::Future as _,
    io,
    pin::pin,
    task::{Context, Poll, ready},
};

use bytes::{Bytes, BytesMut};
use tokio::{io::AsyncReadExt as _, net::TcpStream};

/// One buffer, and the most that one read brings.
const BUFFER: usize = 256 << 10;
/// Less room than this is not worth a system call.
const ROOM: usize = 64 << 10;
/// A read that brought less is copied: passed on as it is, it would hold a whole buffer.
const COPY_BELOW: usize = 8 << 10;
/// Buffers that are kept for use again.
const KEPT: usize = 8;

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::new(Buffers {
        current: BytesMut::new(),
        used: Vec::new(),
    });
}

struct Buffers {
    /// Empty, with room.
    current: BytesMut,
    /// Buffers whose bytes were passed on and may still be held elsewhere.
    used: Vec<BytesMut>,
}

/// Reads once. No bytes mean that the peer has sent its last.
pub(super) fn poll_read(tcp: &mut TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
    BUFFERS.with_borrow_mut(|buffers| {
        if buffers.current.capacity() < ROOM {
            buffers.renew();
        }
        let buffer = &mut buffers.current;
        let count = ready!(pin!(tcp.read_buf(buffer)).poll(cx))?;
        Poll::Ready(Ok(if count < COPY_BELOW {
            let bytes = Bytes::copy_from_slice(buffer);
            buffer.clear();
            bytes
        } else {
            buffer.split().freeze()
        }))
    })
}

impl Buffers {
    /// Puts a whole buffer in the place of the one that is used up.
    fn renew(&mut self) {
        let free = self
            .used
            .iter_mut()
            .position(|buffer| buffer.try_reclaim(BUFFER));
        let next = match free {
            Some(at) => self.used.swap_remove(at),
            None => BytesMut::with_capacity(BUFFER),
        };
        let last = std::mem::replace(&mut self.current, next);
        // With all of them in use elsewhere, this one is left to whoever holds its bytes.
        if self.used.len() < KEPT {
            self.used.push(last);
        }
    }
}
