//! JSON messages with descriptors beside them, over `SOCK_SEQPACKET` Unix sockets by path.
//!
//! One message is one packet: either all of it arrives, descriptors included, or an error does.
//! The system calls are in `wire`; [`send_blocking`] and [`recv_blocking`] serve programs without a tokio runtime.

mod wire;

use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials as PeerCredentialsOption};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;
use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// Largest message, in bytes of JSON.
pub const MAX_MESSAGE_BYTES: usize = 256 * 1024;
/// Most descriptors beside one message.
pub const MAX_DESCRIPTORS: usize = 16;

/// What can go wrong on such a socket. After an error of receiving, the connection is of no use.
#[derive(Debug, Error)]
pub enum Error {
    /// Binding, connecting, sending or receiving.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried, and on which path.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The message is not what this side expects.
    #[error(
        "message of {bytes} bytes is not understood (maybe the other side is another version): {source}"
    )]
    Json {
        /// Size of the message.
        bytes: usize,
        /// Where it went wrong.
        source: serde_json::Error,
    },
    /// Larger than [`MAX_MESSAGE_BYTES`].
    #[error("message of {bytes} bytes; at most {MAX_MESSAGE_BYTES} are allowed")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// More than [`MAX_DESCRIPTORS`], or this process has no room for them.
    #[error(
        "message with more than {MAX_DESCRIPTORS} descriptors, or the process is out of descriptors (see `ulimit -n`)"
    )]
    TooManyDescriptors,
}

/// The process at the other end, as it was when it connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id.
    pub pid: i32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A listening socket. Its file is removed when it is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: AsyncFd<OwnedFd>,
    path: PathBuf,
}

impl Listener {
    /// Listens on `path`, for the owner only. A file that is there already is replaced: who calls this
    /// must know that no one else uses the path. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Io`], such as a path longer than 107 bytes.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let failed = |source| io_error(format!("listen on {}", path.display()), source);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let socket = wire::listen(&path).map_err(failed)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let socket = sys::register(socket, Interest::READABLE).map_err(failed)?;
        Ok(Self { socket, path })
    }

    /// The next connection.
    ///
    /// # Errors
    /// [`Error::Io`], such as being out of descriptors; later calls may succeed.
    pub async fn accept(&self) -> Result<Stream, Error> {
        let accepted = self
            .socket
            .async_io(Interest::READABLE, |socket| wire::accept(socket.as_fd()))
            .await
            .map_err(|source| io_error(format!("accept on {}", self.path.display()), source))?;
        Stream::from_fd(accepted)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // One that someone removed already is fine.
        let _ = fs::remove_file(&self.path);
    }
}

/// A connection. Sending and receiving may go on at the same time; each by one task at a time.
#[derive(Debug)]
pub struct Stream {
    socket: AsyncFd<OwnedFd>,
}

impl Stream {
    /// Connects to a [`Listener`]. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Io`]; `WouldBlock` when the listener's queue is full.
    pub async fn connect(path: &Path) -> Result<Self, Error> {
        let socket = wire::connect(path)
            .map_err(|source| io_error(format!("connect to {}", path.display()), source))?;
        Self::from_fd(socket)
    }

    /// Takes a connected socket, such as one end of [`pair`]. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn from_fd(socket: OwnedFd) -> Result<Self, Error> {
        wire::prepare(socket.as_fd(), true)
            .and_then(|()| sys::register(socket, Interest::READABLE | Interest::WRITABLE))
            .map(|socket| Self { socket })
            .map_err(|source| io_error("set up a socket".into(), source))
    }

    /// Sends one message; waits while the other side's queue is full.
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::TooManyDescriptors`], [`Error::Io`] (`BrokenPipe` when the other side is gone).
    pub async fn send<T: Serialize>(
        &self,
        message: &T,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        let bytes = encode(message, descriptors)?;
        self.socket
            .async_io(Interest::WRITABLE, |socket| {
                wire::send(socket.as_fd(), &bytes, descriptors)
            })
            .await
            .map_err(|source| io_error("send".into(), source))
    }

    /// The next message, `None` when the other side has closed.
    ///
    /// # Errors
    /// [`Error`]; the connection should be dropped then.
    pub async fn recv<T: DeserializeOwned>(&self) -> Result<Option<(T, Vec<OwnedFd>)>, Error> {
        let received = self
            .socket
            .async_io(Interest::READABLE, |socket| wire::receive(socket.as_fd()))
            .await
            .map_err(|source| io_error("receive".into(), source))?;
        decode(received)
    }

    /// Who is at the other end.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn peer_cred(&self) -> Result<PeerCredentials, Error> {
        let found = getsockopt(self.socket.get_ref(), PeerCredentialsOption)
            .map_err(|errno| io_error("read the peer's credentials".into(), errno.into()))?;
        Ok(PeerCredentials {
            pid: found.pid(),
            uid: found.uid(),
            gid: found.gid(),
        })
    }
}

/// Two connected ends, close-on-exec and blocking.
///
/// # Errors
/// Out of descriptors.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Error> {
    wire::pair().map_err(|source| io_error("make a pair of sockets".into(), source))
}

/// As [`Stream::send`], for a blocking socket.
///
/// # Errors
/// As [`Stream::send`].
pub fn send_blocking<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), Error> {
    let bytes = encode(message, descriptors)?;
    wire::send(socket, &bytes, descriptors).map_err(|source| io_error("send".into(), source))
}

/// As [`Stream::recv`], for a blocking socket.
///
/// # Errors
/// As [`Stream::recv`].
pub fn recv_blocking<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<Option<(T, Vec<OwnedFd>)>, Error> {
    decode(wire::receive(socket).map_err(|source| io_error("receive".into(), source))?)
}

fn encode<T: Serialize>(message: &T, descriptors: &[BorrowedFd<'_>]) -> Result<Vec<u8>, Error> {
    let bytes = serde_json::to_vec(message).map_err(|source| Error::Json { bytes: 0, source })?;
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(Error::TooLarge { bytes: bytes.len() });
    }
    if descriptors.len() > MAX_DESCRIPTORS {
        return Err(Error::TooManyDescriptors);
    }
    Ok(bytes)
}

fn decode<T: DeserializeOwned>(packet: wire::Packet) -> Result<Option<(T, Vec<OwnedFd>)>, Error> {
    if packet.truncated {
        return Err(Error::TooLarge {
            bytes: packet.bytes.len(),
        });
    }
    if packet.descriptors_lost || packet.descriptors.len() > MAX_DESCRIPTORS {
        return Err(Error::TooManyDescriptors);
    }
    if packet.bytes.is_empty() {
        return Ok(None);
    }
    let message = serde_json::from_slice(&packet.bytes).map_err(|source| Error::Json {
        bytes: packet.bytes.len(),
        source,
    })?;
    Ok(Some((message, packet.descriptors)))
}

fn io_error(what: String, source: io::Error) -> Error {
    Error::Io { what, source }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn socket_path(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("heddle-{name}-{}.sock", std::process::id()))
    }

    #[tokio::test]
    async fn messages_and_descriptors_cross() {
        let path = socket_path("cross");
        let listener = Listener::bind(&path).unwrap();
        let client = Stream::connect(&path).await.unwrap();
        let server = listener.accept().await.unwrap();
        let peer = server.peer_cred().unwrap();
        assert_eq!(u32::try_from(peer.pid).unwrap(), std::process::id());

        let (mut reader, mut writer) = io::pipe().unwrap();
        client.send(&("take", 7), &[writer.as_fd()]).await.unwrap();
        client.send(&("none", 8), &[]).await.unwrap();
        let ((word, number), mut descriptors) =
            server.recv::<(String, u32)>().await.unwrap().unwrap();
        assert_eq!((word.as_str(), number, descriptors.len()), ("take", 7, 1));
        let (second, rest) = server.recv::<(String, u32)>().await.unwrap().unwrap();
        assert_eq!((second.1, rest.len()), (8, 0));

        let mut received = fs::File::from(descriptors.remove(0));
        received.write_all(b"through").unwrap();
        writer.flush().unwrap();
        drop((received, writer));
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");

        drop(client);
        assert!(server.recv::<u32>().await.unwrap().is_none());
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn large_messages_pass_up_to_the_bound() {
        let (left, right) = pair().unwrap();
        let (left, right) = (
            Stream::from_fd(left).unwrap(),
            Stream::from_fd(right).unwrap(),
        );
        let text = "x".repeat(MAX_MESSAGE_BYTES - 2);
        let (sent, received) = tokio::join!(left.send(&text, &[]), right.recv::<String>());
        sent.unwrap();
        assert_eq!(received.unwrap().unwrap().0, text);
        let text = "x".repeat(MAX_MESSAGE_BYTES - 1);
        assert!(matches!(
            left.send(&text, &[]).await,
            Err(Error::TooLarge { .. })
        ));
        let stdin = io::stdin();
        let many = vec![stdin.as_fd(); MAX_DESCRIPTORS + 1];
        assert!(matches!(
            left.send(&1, &many).await,
            Err(Error::TooManyDescriptors)
        ));
    }

    #[tokio::test]
    async fn senders_wait_for_slow_receivers() {
        let (left, right) = pair().unwrap();
        let (left, right) = (
            Stream::from_fd(left).unwrap(),
            Stream::from_fd(right).unwrap(),
        );
        let text = "x".repeat(100_000);
        let send = async {
            for _ in 0..50 {
                left.send(&text, &[]).await.unwrap();
            }
        };
        let receive = async {
            for _ in 0..50 {
                assert_eq!(
                    right.recv::<String>().await.unwrap().unwrap().0.len(),
                    100_000
                );
            }
        };
        tokio::join!(send, receive);
    }

    #[test]
    fn foreign_messages_are_errors() {
        let (left, right) = pair().unwrap();
        send_blocking(left.as_fd(), &"text", &[]).unwrap();
        assert!(matches!(
            recv_blocking::<u32>(right.as_fd()),
            Err(Error::Json { bytes: 6, .. })
        ));
    }
}
