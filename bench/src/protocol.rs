//! What client and server say to each other: a fixed header on the data port, nothing on the other.
//!
//! The data port (`PORT`) serves messages and bulk data; a [`Header`] opens each connection. The
//! accept port (`PORT + 1`) closes every connection at once, so that connections alone are measured.
//! The sockets are the caller's business: [`crate::server`] and [`crate::client`].

use std::io::{self, Read, Write};

/// Offset of the accept port from the data port.
pub(crate) const ACCEPT_PORT_OFFSET: u16 = 1;

/// Largest message that either end takes, in bytes: it is also the size of the buffer that is made.
pub(crate) const MAX_SIZE: u32 = 1 << 20;

/// What a connection to the data port is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// The server sends each message of `size` bytes back.
    PingPong,
    /// The server reads to the end, then answers with the number of bytes (8 bytes, big endian).
    Bulk,
}

/// First bytes of a connection to the data port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// What follows.
    pub(crate) purpose: Purpose,
    /// Message size in bytes, 1 to [`MAX_SIZE`].
    pub(crate) size: u32,
}

impl Header {
    /// Writes the header in one piece.
    pub(crate) fn write(self, stream: &mut impl Write) -> io::Result<()> {
        let mut bytes = [0; 5];
        bytes[0] = match self.purpose {
            Purpose::PingPong => b'P',
            Purpose::Bulk => b'B',
        };
        bytes[1..].copy_from_slice(&self.size.to_be_bytes());
        stream.write_all(&bytes)
    }

    /// Reads a header; anything that is none is `InvalidData`.
    pub(crate) fn read(stream: &mut impl Read) -> io::Result<Self> {
        let mut bytes = [0; 5];
        stream.read_exact(&mut bytes)?;
        let purpose = match bytes[0] {
            b'P' => Purpose::PingPong,
            b'B' => Purpose::Bulk,
            other => return Err(invalid(format!("unknown purpose {other:#x}"))),
        };
        let size = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]);
        if size == 0 || size > MAX_SIZE {
            return Err(invalid(format!("size {size} is not in 1..={MAX_SIZE}")));
        }
        Ok(Self { purpose, size })
    }
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_survives_the_wire() {
        for purpose in [Purpose::PingPong, Purpose::Bulk] {
            let sent = Header {
                purpose,
                size: 4096,
            };
            let mut wire = Vec::new();
            sent.write(&mut wire).unwrap();
            assert_eq!(Header::read(&mut wire.as_slice()).unwrap(), sent);
        }
    }

    #[test]
    fn sizes_out_of_bounds_and_strangers_are_refused() {
        for wire in [*b"P\0\0\0\0", *b"B\xff\xff\xff\xff", *b"GET /"] {
            let error = Header::read(&mut wire.as_slice()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
