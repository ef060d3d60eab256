//! Who is at the other end of a Unix stream socket, as the kernel knows it: a process held by descriptor, and its cgroup.
//!
//! The kernel notes the process (its thread group) that called `connect()`, and hands it out as a descriptor
//! (`SO_PEERPIDFD`, Linux 6.5). Before that it hands out a number only, which may belong to a stranger by now; see
//! [`Moment`] for how that is ruled out. A socket that was passed on after `connect()` still speaks for who connected it.

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd},
    path::PathBuf,
};

use nix::{
    errno::Errno,
    sys::socket::{getsockopt, sockopt},
    time::{ClockId, clock_gettime},
};
use thiserror::Error;

use crate::{cgroup::location::CgroupMount, pidfd::PidFd};

/// Length of a clock tick in `/proc/PID/stat`: `USER_HZ` is 100 wherever Heddle runs (proc_pid_stat(5)).
const TICK_NANOS: u64 = 10_000_000;

/// A process that connected a socket.
#[derive(Debug)]
pub struct Peer {
    process: PidFd,
    pid: u32,
    uid: u32,
}

/// Why a peer is not known.
#[derive(Debug, Error)]
pub enum PeerError {
    /// It has ended: whoever holds the socket now is not who connected it.
    #[error("the process that connected has ended")]
    Gone,
    /// This kernel cannot tell it from a process that got its number later. Connecting again a moment later helps.
    #[error(
        "process {pid} is too young for this kernel (before Linux 6.5) to say that it is the one that connected: connect again"
    )]
    TooYoung {
        /// The process that has the number now.
        pid: u32,
    },
    /// Its cgroup lies outside of what this process can see.
    #[error("the cgroup {path} of process {pid} lies outside of the cgroup2 mount")]
    OutOfSight {
        /// The process.
        pid: u32,
        /// Its cgroup as `/proc` has it.
        path: String,
    },
    /// The kernel's answer made no sense or was an error.
    #[error("{what} failed: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The answer.
        source: io::Error,
    },
}

/// A time since boot at which a socket was not connected yet.
///
/// Before Linux 6.5 the peer is a number, and a process that exits after `connect()` gives it free. But who has the number
/// now and was alive before the socket was connected had the number at that time too, so it is the one. A
/// listener that was empty at a moment (`accept()` said `EAGAIN`) knows that what it accepts next was connected later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(u64);

impl Moment {
    /// When the machine started: before every process, so that nobody is old enough.
    pub const BOOT: Self = Self(0);

    /// Now.
    ///
    /// # Errors
    /// The kernel has no such clock.
    pub fn now() -> io::Result<Self> {
        let time = clock_gettime(ClockId::CLOCK_BOOTTIME)?;
        let nanos = u64::try_from(time.tv_sec()).unwrap_or_default() * 1_000_000_000
            + u64::try_from(time.tv_nsec()).unwrap_or_default();
        Ok(Self(nanos))
    }
}

impl Peer {
    /// Who connected `stream`, which was not connected yet at `unconnected`.
    ///
    /// # Errors
    /// It has ended, or cannot be told from another.
    pub fn of(stream: impl AsFd, unconnected: Moment) -> Result<Self, PeerError> {
        let stream = stream.as_fd();
        let credentials = getsockopt(&stream, sockopt::PeerCredentials)
            .map_err(|errno| failed("SO_PEERCRED", errno))?;
        match getsockopt(&stream, sockopt::PeerPidfd) {
            Ok(pidfd) => {
                let process = PidFd::from(pidfd);
                let pid = number_of(&process)?;
                Ok(Self {
                    process,
                    pid,
                    uid: credentials.uid(),
                })
            }
            Err(Errno::ENOPROTOOPT) => {
                Self::by_number(credentials.pid(), credentials.uid(), unconnected)
            }
            // A process that has been reaped has no descriptor (EINVAL until Linux 6.9).
            Err(Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => Err(PeerError::Gone),
            Err(errno) => Err(failed("SO_PEERPIDFD", errno)),
        }
    }

    fn by_number(pid: i32, uid: u32, unconnected: Moment) -> Result<Self, PeerError> {
        // 0: it has no number in this PID namespace.
        let pid = u32::try_from(pid).ok().filter(|pid| *pid > 0);
        let pid = pid.ok_or(PeerError::Gone)?;
        let process = PidFd::open(pid).map_err(|error| match error.raw_os_error() {
            Some(libc::ESRCH) => PeerError::Gone,
            _ => PeerError::Io {
                what: format!("pidfd_open of process {pid}"),
                source: error,
            },
        })?;
        let peer = Self { process, pid, uid };
        let started = peer.read("stat", |text| {
            // The name, second, is in parentheses and may hold anything; the start time is field 22.
            let (_, rest) = text.rsplit_once(')')?;
            rest.split_whitespace().nth(19)?.parse::<u64>().ok()
        })?;
        if (started + 1) * TICK_NANOS > unconnected.0 {
            return Err(PeerError::TooYoung { pid });
        }
        Ok(peer)
    }

    /// Its number in this process's PID namespace.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The user that it was when it connected.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// The folder of its cgroup, now.
    ///
    /// # Errors
    /// It has ended meanwhile: what was read may be another's, so it is thrown away.
    pub fn cgroup(&self, mount: &CgroupMount) -> Result<PathBuf, PeerError> {
        let path = self.read("cgroup", |text| {
            let line = text.lines().find_map(|line| line.strip_prefix("0::"))?;
            Some(line.to_owned())
        })?;
        mount.folder(&path).ok_or(PeerError::OutOfSight {
            pid: self.pid,
            path,
        })
    }

    /// Reads a file of `/proc/PID`. A process keeps its number until it has ended, so if it lives after the file was read,
    /// the number was its own all the time, and the file too.
    fn read<T>(&self, file: &str, parse: impl FnOnce(&str) -> Option<T>) -> Result<T, PeerError> {
        let path = format!("/proc/{}/{file}", self.pid);
        let text = fs::read(&path);
        if !self.process.is_alive() {
            return Err(PeerError::Gone);
        }
        let text = text.map_err(|source| PeerError::Io {
            what: format!("reading {path}"),
            source,
        })?;
        parse(&String::from_utf8_lossy(&text)).ok_or_else(|| PeerError::Io {
            what: format!("reading {path}"),
            source: io::ErrorKind::InvalidData.into(),
        })
    }
}

/// The process's number, from what the kernel says of its descriptor (`Pid:`, proc_pid_fdinfo(5)).
fn number_of(process: &PidFd) -> Result<u32, PeerError> {
    let path = format!("/proc/self/fdinfo/{}", process.as_fd().as_raw_fd());
    let text = fs::read_to_string(&path).map_err(|source| PeerError::Io {
        what: format!("reading {path}"),
        source,
    })?;
    let number = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    // -1: it has been reaped; 0: it is in no PID namespace that this process sees.
    number
        .and_then(|number| number.trim().parse().ok())
        .filter(|pid| *pid > 0)
        .ok_or(PeerError::Gone)
}

fn failed(what: &str, errno: Errno) -> PeerError {
    PeerError::Io {
        what: what.into(),
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests;
