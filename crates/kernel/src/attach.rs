//! Where each program is attached, and how a link is taken over: a pinned link gets the new program in one
//! step (BPF_LINK_UPDATE), so that there is never none and never two.

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya_obj::generated::bpf_attach_type as attach_type;
use serde::{Deserialize, Serialize};

use crate::{
    KernelError, raw,
    sys::{self, LinkTarget},
};

/// The programs attached to the node's cgroup, in the order in which they are attached or replaced: those that only
/// read a socket's state or a handshake first, then along a connection's life backwards, so that whatever an earlier
/// version's program writes is read by programs that know where to look (`bpf/carry.h`). Until the last one is in
/// place a socket has no identity, and is refused.
pub(crate) const CGROUP_PROGRAMS: &[(&str, attach_type)] = &[
    ("heddle_ingress", attach_type::BPF_CGROUP_INET_INGRESS),
    (
        "heddle_getpeername4",
        attach_type::BPF_CGROUP_INET4_GETPEERNAME,
    ),
    (
        "heddle_getpeername6",
        attach_type::BPF_CGROUP_INET6_GETPEERNAME,
    ),
    ("heddle_recvmsg4", attach_type::BPF_CGROUP_UDP4_RECVMSG),
    ("heddle_recvmsg6", attach_type::BPF_CGROUP_UDP6_RECVMSG),
    ("heddle_bind4", attach_type::BPF_CGROUP_INET4_BIND),
    ("heddle_bind6", attach_type::BPF_CGROUP_INET6_BIND),
    ("heddle_sockops", attach_type::BPF_CGROUP_SOCK_OPS),
    ("heddle_connect4", attach_type::BPF_CGROUP_INET4_CONNECT),
    ("heddle_connect6", attach_type::BPF_CGROUP_INET6_CONNECT),
    ("heddle_sendmsg4", attach_type::BPF_CGROUP_UDP4_SENDMSG),
    ("heddle_sendmsg6", attach_type::BPF_CGROUP_UDP6_SENDMSG),
    (
        "heddle_sock_create",
        attach_type::BPF_CGROUP_INET_SOCK_CREATE,
    ),
];

/// The program on every workload's veth.
pub(crate) const DEVICE_PROGRAM: &str = "heddle_spoof";

/// The program in every workload's network namespace.
pub(crate) const STEER_PROGRAM: &str = "heddle_steer";

/// The program that every send on a spliced socket runs.
pub(crate) const SPLICE_PROGRAM: &str = "heddle_splice";
/// The map of spliced sockets, which it is attached to.
pub(crate) const SPLICE_MAP: &str = "splice_sockets";

/// An attached program, for `heddle status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedProgram {
    /// Program name.
    pub program: String,
    /// `cgroup`, `map`, `device INDEX` or `workload NUMBER`.
    pub target: String,
    /// Its pin.
    pub pin: PathBuf,
}

/// Attaches a program to the node's cgroup, or replaces the one that is there.
pub(crate) fn to_cgroup(
    links: &Path,
    name: &str,
    kind: attach_type,
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
) -> Result<AttachedProgram, KernelError> {
    let pin = links.join(name);
    replace_or_create(&pin, name, program, || {
        sys::link_create(program, LinkTarget::Cgroup(cgroup), kind)
    })?;
    Ok(AttachedProgram {
        program: name.into(),
        target: "cgroup".into(),
        pin,
    })
}

/// Attaches the spoofing guard to a device of the caller's network namespace, or replaces it.
pub(crate) fn to_device(
    links: &Path,
    index: u32,
    program: BorrowedFd<'_>,
) -> Result<AttachedProgram, KernelError> {
    let pin = device_pin(links, index);
    replace_or_create(&pin, DEVICE_PROGRAM, program, || {
        sys::link_create(
            program,
            LinkTarget::Device(index),
            attach_type::BPF_TCX_INGRESS,
        )
    })?;
    Ok(AttachedProgram {
        program: DEVICE_PROGRAM.into(),
        target: format!("device {index}"),
        pin,
    })
}

/// Attaches the steering program to a workload's network namespace, or replaces it. A link to another namespace, which a
/// number of the workload's may have had before, gives way.
pub(crate) fn to_namespace(
    links: &Path,
    workload: u32,
    program: BorrowedFd<'_>,
    netns: BorrowedFd<'_>,
) -> Result<AttachedProgram, KernelError> {
    let pin = namespace_pin(links, workload);
    if pin.exists() && !is_of_namespace(&pin, netns).map_err(failed("look at", STEER_PROGRAM))? {
        fs::remove_file(&pin).map_err(failed("remove the dead link of", STEER_PROGRAM))?;
    }
    replace_or_create(&pin, STEER_PROGRAM, program, || {
        sys::link_create(
            program,
            LinkTarget::Namespace(netns),
            attach_type::BPF_SK_LOOKUP,
        )
    })?;
    Ok(steering(workload, pin))
}

/// Replaces the steering program where it is attached already. `None` if the namespace is gone, and with it the link.
pub(crate) fn renew_namespace(
    links: &Path,
    workload: u32,
    program: BorrowedFd<'_>,
) -> Result<Option<AttachedProgram>, KernelError> {
    let pin = namespace_pin(links, workload);
    let renewed = replace(&pin, STEER_PROGRAM, program)?;
    Ok(renewed.then(|| steering(workload, pin)))
}

fn steering(workload: u32, pin: PathBuf) -> AttachedProgram {
    AttachedProgram {
        program: STEER_PROGRAM.into(),
        target: format!("workload {workload}"),
        pin,
    }
}

fn is_of_namespace(pin: &Path, netns: BorrowedFd<'_>) -> io::Result<bool> {
    let link = sys::open_pin(pin)?;
    let attached = raw::namespace_of_link(link.as_fd())?;
    let wanted = nix::sys::stat::fstat(netns)?.st_ino;
    Ok(u64::from(attached) == wanted)
}

/// Forgets a workload's link; the kernel detaches it. Returns where its pin was.
pub(crate) fn from_namespace(links: &Path, workload: u32) -> io::Result<PathBuf> {
    let pin = namespace_pin(links, workload);
    match fs::remove_file(&pin) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(pin),
    }
}

/// Workloads that have a pinned link.
pub(crate) fn steered(links: &Path) -> io::Result<Vec<u32>> {
    numbered(links, "steer-")
}

fn namespace_pin(links: &Path, workload: u32) -> PathBuf {
    links.join(format!("steer-{workload}"))
}

/// Attaches the splice's program to its map, or replaces the one that is there. Sockets keep the program that they
/// entered the map under, and with it that program's maps: an update takes nothing from open connections. A map
/// of sockets cannot be copied into another, so where an update brings a new one, the sockets of the old
/// one stay spliced until they close.
pub(crate) fn to_splice_map(
    links: &Path,
    program: BorrowedFd<'_>,
    map: BorrowedFd<'_>,
    map_id: u32,
) -> Result<AttachedProgram, KernelError> {
    let kind = attach_type::BPF_SK_MSG_VERDICT;
    // The map is part of the name: a link of another map must not be taken for this one's.
    let pin = links.join(format!("{SPLICE_PROGRAM}-{map_id}"));
    let outcome = replace_or_create(&pin, SPLICE_PROGRAM, program, || {
        sys::link_create(program, LinkTarget::Map(map), kind)
    });
    match outcome {
        Err(KernelError::Attach { ref source, .. })
            if source.raw_os_error() == Some(nix::libc::EINVAL) =>
        {
            sys::attach_to_map(program, map, kind).map_err(|source| KernelError::Attach {
                action: "attach",
                program: SPLICE_PROGRAM.to_owned(),
                source,
            })?;
        }
        other => other?,
    }
    Ok(AttachedProgram {
        program: SPLICE_PROGRAM.into(),
        target: "map".into(),
        pin,
    })
}

/// Forgets links to maps that no program lets sockets into any more.
pub(crate) fn forget_other_splices(links: &Path, current: &Path) -> io::Result<()> {
    let prefix = format!("{SPLICE_PROGRAM}-");
    for entry in fs::read_dir(links)? {
        let entry = entry?;
        let is_splice = |name: &str| name.starts_with(&prefix);
        if entry.file_name().to_str().is_some_and(is_splice) && entry.path() != current {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Forgets a device's link; the kernel detaches it.
pub(crate) fn from_device(links: &Path, index: u32) -> io::Result<()> {
    match fs::remove_file(device_pin(links, index)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Device indexes that have a pinned link.
pub(crate) fn devices(links: &Path) -> io::Result<Vec<u32>> {
    numbered(links, "device-")
}

/// The numbers in names of pins that begin so.
fn numbered(links: &Path, prefix: &str) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(links)? {
        let name = entry?.file_name();
        let index = name.to_str().and_then(|name| name.strip_prefix(prefix));
        found.extend(index.and_then(|index| index.parse::<u32>().ok()));
    }
    Ok(found)
}

fn device_pin(links: &Path, index: u32) -> PathBuf {
    links.join(format!("device-{index}"))
}

fn replace_or_create(
    pin: &Path,
    name: &str,
    program: BorrowedFd<'_>,
    create: impl FnOnce() -> io::Result<OwnedFd>,
) -> Result<(), KernelError> {
    if pin.exists() && replace(pin, name, program)? {
        return Ok(());
    }
    let link = create().map_err(failed("attach", name))?;
    sys::pin(link.as_fd(), pin).map_err(failed("pin", name))
}

/// Returns false if what it was attached to is gone: then so is the pin.
fn replace(pin: &Path, name: &str, program: BorrowedFd<'_>) -> Result<bool, KernelError> {
    let link = sys::open_pin(pin).map_err(failed("open the pinned link of", name))?;
    match sys::link_update(link.as_fd(), program) {
        Ok(()) => Ok(true),
        // The cgroup, device or namespace is gone: the link is an empty shell.
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOLINK) => {
            fs::remove_file(pin).map_err(failed("remove the dead link of", name))?;
            Ok(false)
        }
        Err(error) => Err(failed("replace", name)(error)),
    }
}

fn failed(action: &'static str, program: &str) -> impl FnOnce(io::Error) -> KernelError {
    let program = program.to_owned();
    move |source| KernelError::Attach {
        action,
        program,
        source,
    }
}
