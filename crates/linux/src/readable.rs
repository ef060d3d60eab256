//! Waiting until a descriptor that is none of tokio's own kinds has something to read.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// Watches a descriptor, through a duplicate of it.
#[derive(Debug)]
pub struct Readable {
    fd: AsyncFd<OwnedFd>,
}

impl Readable {
    /// Starts to watch. Needs a tokio runtime.
    ///
    /// # Errors
    /// Out of descriptors, or `EPERM` for a descriptor that cannot be polled (a regular file).
    pub fn watch(fd: impl AsFd) -> io::Result<Self> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        sys::register(fd, Interest::READABLE).map(|fd| Self { fd })
    }

    /// Returns when there is something new to read.
    ///
    /// # Errors
    /// The runtime is shutting down.
    pub async fn wait(&self) -> io::Result<()> {
        self.fd.readable().await?.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::net::UnixStream};

    use super::*;

    #[tokio::test]
    async fn wakes_when_bytes_arrive() {
        let (mut writer, reader) = UnixStream::pair().unwrap();
        let watch = Readable::watch(&reader).unwrap();
        assert!(futures_now(watch.wait()).await.is_none());
        writer.write_all(b"x").unwrap();
        watch.wait().await.unwrap();
    }

    /// The future's output if it is ready at once.
    async fn futures_now<T>(future: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            output = future => Some(output),
            () = std::future::ready(()) => None,
        }
    }
}
