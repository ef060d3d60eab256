//! Flow records out of the kernel's ring buffer.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use aya::maps::{MapData, RingBuf};

use crate::{Datagrams, FlowEvent};

/// The one reader of a node's flow records. Readable (poll) when a quarter of the buffer is full; before that,
/// [`FlowReader::next`] finds what is there whenever it is asked.
pub struct FlowReader {
    ring: RingBuf<MapData>,
    /// What went between datagram sockets, which has no closing event.
    pub datagrams: Datagrams,
}

impl FlowReader {
    pub(crate) fn new(ring: RingBuf<MapData>, datagrams: Datagrams) -> Self {
        Self { ring, datagrams }
    }
}

impl Iterator for FlowReader {
    type Item = FlowEvent;

    fn next(&mut self) -> Option<FlowEvent> {
        loop {
            let item = self.ring.next()?;
            if let Some(event) = FlowEvent::from_bytes(&item) {
                return Some(event);
            }
        }
    }
}

impl AsRawFd for FlowReader {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }
}

impl AsFd for FlowReader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}
