//! The system calls under `seqpacket`: one packet in or out, with its descriptors.

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    path::Path,
};

use nix::{
    cmsg_space,
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{
        self, AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag,
        SockType, UnixAddr, sockopt,
    },
};

use super::MAX_MESSAGE_BYTES;
use crate::sys;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;
/// Most descriptors that the kernel lets one message carry (SCM_MAX_FD): with room for all of them, none is cut off.
const KERNEL_MAX_DESCRIPTORS: usize = 253;

/// What one `recvmsg` brought. No bytes mean that the other side has closed.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    pub(super) descriptors: Vec<OwnedFd>,
    pub(super) truncated: bool,
    pub(super) descriptors_lost: bool,
}

pub(super) fn listen(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    socket::bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    socket::listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}

pub(super) fn connect(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket)
}

pub(super) fn accept(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::accept4(listener.as_raw_fd(), flags)?;
    sys::own_received(vec![fd])
        .pop()
        .ok_or_else(|| io::ErrorKind::NotFound.into())
}

pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let ends = socket::socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    prepare(ends.0.as_fd(), false)?;
    prepare(ends.1.as_fd(), false)?;
    Ok(ends)
}

/// Makes room for a message of full size and sets whether calls wait.
pub(super) fn prepare(socket: BorrowedFd<'_>, nonblocking: bool) -> io::Result<()> {
    // The bound of unprivileged processes (net.core.wmem_max, usually 208 KiB, doubled) suffices as well.
    let room = 2 * MAX_MESSAGE_BYTES;
    if socket::setsockopt(&socket, sockopt::SndBufForce, &room).is_err() {
        socket::setsockopt(&socket, sockopt::SndBuf, &room)?;
    }
    let mut flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
    flags.set(OFlag::O_NONBLOCK, nonblocking);
    fcntl(socket, FcntlArg::F_SETFL(flags))?;
    Ok(())
}

pub(super) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let raw: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { &rights[..] };
    let parts = [IoSlice::new(bytes)];
    retried(|| {
        socket::sendmsg::<()>(
            socket.as_raw_fd(),
            &parts,
            control,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
    })?;
    Ok(())
}

pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Packet> {
    // The real length first (MSG_TRUNC reports it), so that the buffer has the message's size, not the bound's.
    let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC;
    let length = retried(|| socket::recv(socket.as_raw_fd(), &mut [], peek))?;
    let mut bytes = vec![0; length.clamp(1, MAX_MESSAGE_BYTES)];
    let mut control = cmsg_space!([RawFd; KERNEL_MAX_DESCRIPTORS]);
    let (read, flags, descriptors) = retried(|| {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = socket::recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let mut found = Vec::new();
        for part in message.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(raw) = part {
                found.extend(sys::own_received(raw));
            }
        }
        Ok((message.bytes, message.flags, found))
    })?;
    bytes.truncate(read);
    Ok(Packet {
        bytes,
        descriptors,
        truncated: flags.contains(MsgFlags::MSG_TRUNC),
        descriptors_lost: flags.contains(MsgFlags::MSG_CTRUNC),
    })
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket::socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        flags,
        None,
    )?)
}

fn retried<T>(mut call: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return Ok(other?),
        }
    }
}
