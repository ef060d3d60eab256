//! Flow records out of the kernel's ring buffer.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use aya::maps::{MapData, RingBuf};

use crate::{Datagrams, FlowEvent, btf};

/// The one reader of a node's flow records. Readable (poll) when a quarter of the buffer is full; before that,
/// [`FlowReader::next`] finds what is there whenever it is asked.
pub struct FlowReader {
    ring: RingBuf<MapData>,
    /// What went between datagram sockets, which has no closing event.
    pub datagrams: Datagrams,
    /// Buffers that this one took the place of: programs may still write to them for a moment.
    earlier: Vec<EarlierRing>,
}

/// A buffer of another size, or with records of another layout.
pub(crate) struct EarlierRing {
    pub(crate) ring: RingBuf<MapData>,
    /// How long its records are.
    pub(crate) record: usize,
    /// How they become ours.
    pub(crate) plan: Vec<Option<u32>>,
}

impl FlowReader {
    pub(crate) fn new(
        ring: RingBuf<MapData>,
        earlier: Vec<EarlierRing>,
        datagrams: Datagrams,
    ) -> Self {
        Self {
            ring,
            datagrams,
            earlier,
        }
    }
}

impl EarlierRing {
    fn next(&mut self) -> Option<FlowEvent> {
        loop {
            let item = self.ring.next()?;
            let fits = item.len() == self.record;
            if let Some(event) = fits
                .then(|| FlowEvent::from_bytes(&btf::convert(&self.plan, &item)))
                .flatten()
            {
                return Some(event);
            }
        }
    }
}

impl Iterator for FlowReader {
    type Item = FlowEvent;

    fn next(&mut self) -> Option<FlowEvent> {
        if let Some(event) = self.earlier.iter_mut().find_map(EarlierRing::next) {
            return Some(event);
        }
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
