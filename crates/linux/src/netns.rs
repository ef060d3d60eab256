//! Network namespaces, held by descriptor: a namespace without a name vanishes with its last holder.
//!
//! Work inside of a namespace is done on a fresh thread that has entered it, so that no other code
//! is ever moved; or, if every microsecond counts, on a thread that is known to do nothing else meanwhile. Sockets made there stay there, whichever thread uses them later.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::Arc,
    thread,
};

use nix::sched::{CloneFlags, setns, unshare};

use crate::sys;

/// A network namespace. Clones share one descriptor.
#[derive(Debug, Clone)]
pub struct Netns {
    fd: Arc<OwnedFd>,
}

impl Netns {
    /// Makes a new namespace. Its loopback interface is down.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SYS_ADMIN`; `ENOSPC` past `user.max_net_namespaces`.
    pub fn create() -> io::Result<Self> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Self::current()
        })?
    }

    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// `/proc` is not mounted, or the process is out of descriptors.
    pub fn current() -> io::Result<Self> {
        Self::open("/proc/thread-self/ns/net")
    }

    /// Opens a namespace file such as `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// Those of `open(2)`.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Ok(Self::from_fd(File::open(path)?.into()))
    }

    /// Takes a descriptor that came from elsewhere; it is checked when the namespace is first entered.
    #[must_use]
    pub fn from_fd(fd: OwnedFd) -> Self {
        Self { fd: Arc::new(fd) }
    }

    /// Runs `work` on a fresh thread inside the namespace and waits for it. A panic of `work` goes on in the caller.
    ///
    /// # Errors
    /// The namespace cannot be entered (`EPERM`, or `EINVAL` if the descriptor is none), or no thread can be started.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_thread(|| {
            setns(self, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })?
    }

    /// Runs `work` in the namespace on this very thread, which is `home`'s before and after it. Some microseconds
    /// instead of a fresh thread's tens: for threads that are their owner's alone, such as a worker's.
    ///
    /// # Errors
    /// As [`Netns::run`]. If `home` cannot be entered again, the thread stays where it is: nothing can go on there.
    pub fn visit<T>(&self, home: &Self, work: impl FnOnce() -> T) -> io::Result<T> {
        struct Return<'a>(&'a Netns);
        impl Drop for Return<'_> {
            fn drop(&mut self) {
                // Only on a panic: otherwise it was done, and the outcome looked at.
                if thread::panicking() {
                    let _ = setns(self.0, CloneFlags::CLONE_NEWNET);
                }
            }
        }
        setns(self, CloneFlags::CLONE_NEWNET)?;
        let back = Return(home);
        let done = work();
        drop(back);
        setns(home, CloneFlags::CLONE_NEWNET)?;
        Ok(done)
    }

    /// The kernel's number for the namespace: never used again, and the same that BPF's `bpf_get_netns_cookie` gives.
    ///
    /// # Errors
    /// As [`Netns::run`]; `ENOPROTOOPT` before Linux 5.14.
    pub fn cookie(&self) -> io::Result<u64> {
        self.run(|| {
            let socket = std::os::unix::net::UnixDatagram::unbound()?;
            sys::netns_cookie(&socket)
        })?
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)?;
        handle
            .join()
            .map_err(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_new_namespace_is_another_one_and_its_loopback_is_down() {
        let host = Netns::current().unwrap();
        let made = Netns::create().unwrap();
        assert_ne!(host.cookie().unwrap(), made.cookie().unwrap());
        assert_eq!(made.cookie().unwrap(), made.clone().cookie().unwrap());
        assert_eq!(
            Netns::current().unwrap().cookie().unwrap(),
            host.cookie().unwrap()
        );

        let error = made
            .run(|| TcpStream::connect(("127.0.0.1", 1)))
            .unwrap()
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NetworkUnreachable);
    }

    #[test]
    fn sockets_stay_where_they_were_made() {
        let made = Netns::create().unwrap();
        let listener = made
            .run(|| TcpListener::bind("127.0.0.1:0"))
            .unwrap()
            .unwrap();
        assert_eq!(
            sys::netns_cookie(&listener).unwrap(),
            made.cookie().unwrap()
        );
    }

    #[test]
    fn a_visitor_comes_back() {
        thread::spawn(|| {
            let home = Netns::current().unwrap();
            let made = Netns::create().unwrap();
            let inside = made
                .visit(&home, || Netns::current().unwrap().cookie().unwrap())
                .unwrap();
            assert_eq!(inside, made.cookie().unwrap());
            let panicked = std::panic::catch_unwind(|| made.visit(&home, || panic!("of the test")));
            assert!(panicked.is_err());
            let after = Netns::current().unwrap().cookie().unwrap();
            assert_eq!(after, home.cookie().unwrap());
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_descriptor_that_is_no_namespace_is_an_error() {
        let file = File::open("/dev/null").unwrap();
        let error = Netns::from_fd(file.into()).run(|| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
