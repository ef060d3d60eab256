//! The first bytes of a stress connection: which run, and which connection of it.

use std::{
    io::{self, Read, Write},
    time::{Duration, Instant},
};

const MAGIC: u64 = u64::from_be_bytes(*b"heddle/1");
pub(super) const LENGTH: usize = 24;

/// Tells the server which plan to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) seed: u64,
    pub(super) number: u64,
}

/// How a connection began, as the server sees it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Opening {
    Header(Header),
    /// It ended without a byte.
    Empty,
    /// It was broken off before the header was complete.
    BrokenOff,
}

impl Header {
    pub(super) fn bytes(self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[..8].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.seed.to_be_bytes());
        bytes[16..].copy_from_slice(&self.number.to_be_bytes());
        bytes
    }

    pub(super) fn write(self, stream: &mut impl Write) -> io::Result<()> {
        stream.write_all(&self.bytes())
    }

    fn parse(bytes: &[u8; LENGTH]) -> io::Result<Self> {
        let word = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
            u64::from_be_bytes(word)
        };
        if word(0) != MAGIC {
            let message = format!("not a stress connection: it begins with {bytes:02x?}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        Ok(Self {
            seed: word(1),
            number: word(2),
        })
    }
}

impl Opening {
    /// Reads from a blocking stream that gives up after `patience`. A spliced one may return sooner without anything
    /// (a reset does that: docs/splice.md), and tells what it was with the next call.
    pub(super) fn read(stream: &mut impl Read, patience: Duration) -> io::Result<Self> {
        let begun = Instant::now();
        let mut bytes = [0; LENGTH];
        let mut filled = 0;
        while filled < LENGTH {
            match stream.read(&mut bytes[filled..]) {
                Ok(0) if filled == 0 => return Ok(Self::Empty),
                Ok(0) => {
                    let message = format!("ended after {filled} bytes of the header");
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, message));
                }
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel's clock ticks coarsely.
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        && begun.elapsed() < patience / 20 * 19 => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Self::BrokenOff);
                }
                Err(error) => return Err(error),
            }
        }
        Header::parse(&bytes).map(Self::Header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn a_header_survives_the_wire() {
        let header = Header {
            seed: 1,
            number: u64::MAX,
        };
        let opening = Opening::read(&mut header.bytes().as_slice(), PATIENCE).unwrap();
        assert_eq!(opening, Opening::Header(header));
    }

    #[test]
    fn what_is_no_header_is_told_apart() {
        assert_eq!(
            Opening::read(&mut [].as_slice(), PATIENCE).unwrap(),
            Opening::Empty
        );
        let cut = Opening::read(&mut [1, 2, 3].as_slice(), PATIENCE).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        let other = Opening::read(&mut [0; LENGTH].as_slice(), PATIENCE).unwrap_err();
        assert_eq!(other.kind(), io::ErrorKind::InvalidData);
    }
}
