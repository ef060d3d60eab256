//! Starting a child in its cgroup and network namespace: the move happens in the child between fork and
//! exec, so that the program never runs, nor opens a socket, anywhere else.
#![allow(unsafe_code)] // `pre_exec` is unsafe: its closure must keep to async-signal-safe calls.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::Command,
};

use crate::netns::Netns;

/// Number of the first descriptor of [`Placement::inherit`] in the child, as in systemd's socket activation.
pub const FIRST_INHERITED: RawFd = 3;
/// Most descriptors that a child may inherit besides its standard ones.
pub const MAX_INHERITED: usize = 64;

/// Where a child starts and as whom. The order is: session, cgroups, namespace, descriptors, user.
#[derive(Debug, Default)]
pub struct Placement {
    cgroups: Vec<File>,
    netns: Option<Netns>,
    inherit: Vec<OwnedFd>,
    user: Option<User>,
    dies_with_parent: bool,
    keeps_session: bool,
}

#[derive(Debug)]
struct User {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

impl Placement {
    /// A child like any other, but in a session of its own and with the standard descriptors only.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The child joins the cgroup at `path` (v2, or of a v1 hierarchy). May be called once per hierarchy.
    ///
    /// # Errors
    /// The folder's `cgroup.procs` cannot be opened for writing.
    pub fn cgroup(mut self, path: &Path) -> io::Result<Self> {
        let procs = path.join("cgroup.procs");
        self.cgroups
            .push(OpenOptions::new().write(true).open(procs)?);
        Ok(self)
    }

    /// The child starts in this network namespace.
    #[must_use]
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.clone());
        self
    }

    /// The child gets these descriptors, from [`FIRST_INHERITED`] on, and no others but the standard ones.
    ///
    /// # Errors
    /// More than [`MAX_INHERITED`].
    pub fn inherit(mut self, descriptors: Vec<OwnedFd>) -> io::Result<Self> {
        if descriptors.len() > MAX_INHERITED {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} descriptors to inherit, at most {MAX_INHERITED} can be",
                    descriptors.len()
                ),
            ));
        }
        self.inherit = descriptors;
        Ok(self)
    }

    /// The child runs as this user. Its groups are these, not the parent's.
    #[must_use]
    pub fn user(mut self, uid: u32, gid: u32, groups: Vec<u32>) -> Self {
        self.user = Some(User { uid, gid, groups });
        self
    }

    /// The child gets SIGKILL when the **thread** that spawns it ends, so that thread must live as long as
    /// the process does.
    #[must_use]
    pub fn dies_with_parent(mut self) -> Self {
        self.dies_with_parent = true;
        self
    }

    /// The child stays in the parent's session: it may use its terminal, and Ctrl-C reaches both.
    #[must_use]
    pub fn keeps_session(mut self) -> Self {
        self.keeps_session = true;
        self
    }

    /// Arranges it for `command`, which must not be spawned more than once.
    pub fn apply(self, command: &mut Command) {
        let mut moved = [-1; MAX_INHERITED];
        // SAFETY: the closure only makes system calls on descriptors opened beforehand; it does not
        // allocate, lock or panic (the array's length bounds the index).
        unsafe {
            command.pre_exec(move || self.enter(&mut moved));
        }
    }

    fn enter(&self, moved: &mut [RawFd; MAX_INHERITED]) -> io::Result<()> {
        if !self.keeps_session {
            // SAFETY: no pointers. Fails only for a group leader, which a forked child never is.
            unsafe { libc::setsid() };
        }
        for procs in &self.cgroups {
            // SAFETY: one readable byte; "0" means the writing process.
            check(unsafe { libc::write(procs.as_raw_fd(), c"0".as_ptr().cast(), 1) } as i32)?;
        }
        if let Some(netns) = &self.netns {
            // SAFETY: no pointers.
            check(unsafe {
                libc::setns(
                    std::os::fd::AsFd::as_fd(netns).as_raw_fd(),
                    libc::CLONE_NEWNET,
                )
            })?;
        }
        // First out of the way of the target numbers, then onto them: a source may have a target's number.
        let beyond = FIRST_INHERITED + MAX_INHERITED as RawFd;
        for (slot, descriptor) in moved.iter_mut().zip(&self.inherit) {
            // SAFETY: no pointers.
            *slot = check(unsafe {
                libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, beyond)
            })?;
        }
        for (target, source) in (FIRST_INHERITED..).zip(moved.iter().take(self.inherit.len())) {
            // SAFETY: no pointers; dup2 clears close-on-exec on the copy.
            check(unsafe { libc::dup2(*source, target) })?;
        }
        // Descriptors that this process was itself given without close-on-exec must not reach further.
        let first = FIRST_INHERITED as libc::c_uint + self.inherit.len() as libc::c_uint;
        // SAFETY: no pointers.
        check(unsafe {
            libc::close_range(first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32)
        })?;
        if let Some(user) = &self.user {
            // SAFETY: the pointer and the length are those of one vector.
            check(unsafe { libc::setgroups(user.groups.len(), user.groups.as_ptr()) })?;
            // SAFETY: no pointers. The group goes first: the user may not be allowed to.
            check(unsafe { libc::setgid(user.gid) })?;
            // SAFETY: no pointers.
            check(unsafe { libc::setuid(user.uid) })?;
        }
        if self.dies_with_parent {
            // SAFETY: no pointers. After the change of user, which would clear it.
            check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
        }
        Ok(())
    }
}

/// The descriptor number `index` of those that this process inherited by [`Placement::inherit`], as a
/// duplicate that is close-on-exec.
///
/// # Errors
/// `EBADF` if there is none.
pub fn inherited(index: usize) -> io::Result<OwnedFd> {
    let number = RawFd::try_from(index)
        .ok()
        .filter(|_| index < MAX_INHERITED)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: no pointers; a number that is not open is answered by an error.
    let copy = check(unsafe { libc::fcntl(FIRST_INHERITED + number, libc::F_DUPFD_CLOEXEC, 0) })?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_child_is_another_user_with_that_users_groups() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "id -u; id -g; id -G"]);
        Placement::new()
            .user(12345, 23456, vec![7, 8])
            .dies_with_parent()
            .apply(&mut command);
        let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
        assert_eq!(output, "12345\n23456\n23456 7 8\n");
    }

    #[test]
    fn the_child_starts_in_the_namespace_with_its_descriptors() {
        let netns = Netns::create().unwrap();
        let expected = netns
            .run(|| std::fs::read_link("/proc/thread-self/ns/net"))
            .unwrap()
            .unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"hello").unwrap();
        drop(writer);

        let mut command = Command::new("/bin/sh");
        command.args([
            "-c",
            "readlink /proc/self/ns/net; cat <&3; ls /proc/self/fd | wc -l",
        ]);
        Placement::new()
            .netns(&netns)
            .inherit(vec![reader.into()])
            .unwrap()
            .apply(&mut command);
        let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
        // 0, 1, 2, 3 and the folder that `ls` reads.
        assert_eq!(output, format!("{}\nhello5\n", expected.display()));
    }
}
