//! Processes by descriptor: a signal can never reach a stranger who was given the same number later.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::Signal,
};

use crate::sys;

/// A process, whether it still runs or not.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
}

impl PidFd {
    /// Opens the process that has this number now.
    ///
    /// # Errors
    /// `ESRCH` if there is none.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self {
            fd: sys::pidfd_open(pid)?,
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `ESRCH` if the process has ended; `EPERM`.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        sys::pidfd_send_signal(&self.fd, signal as i32)
    }

    /// Whether the process still runs (a zombie does not).
    #[must_use]
    pub fn is_alive(&self) -> bool {
        // A signal would reach a zombie; the descriptor is readable from the process's end on (pidfd_open(2)).
        let mut ended = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut ended, PollTimeout::ZERO) {
                Err(Errno::EINTR) => {}
                ended => return ended == Ok(0),
            }
        }
    }
}

impl From<OwnedFd> for PidFd {
    /// A process descriptor that the kernel gave out in another way.
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::ExitStatusExt, process::Command};

    use super::*;

    #[test]
    fn signals_reach_the_process_and_fail_after_its_end() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pidfd = PidFd::open(child.id()).unwrap();
        assert!(pidfd.is_alive());
        pidfd.signal(Signal::SIGTERM).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
        assert!(!pidfd.is_alive());
        let error = pidfd.signal(Signal::SIGTERM).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn one_that_has_ended_and_is_not_reaped_does_not_run() {
        let mut child = Command::new("true").spawn().unwrap();
        let pidfd = PidFd::open(child.id()).unwrap();
        let start = std::time::Instant::now();
        while pidfd.is_alive() {
            assert!(start.elapsed().as_secs() < 20);
            std::thread::yield_now();
        }
        pidfd.signal(Signal::SIGTERM).unwrap();
        child.wait().unwrap();
        assert!(!pidfd.is_alive());
    }
}
