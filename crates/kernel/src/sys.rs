//! The bpf(2) commands that the loader library lacks or hides behind one type each: for links create, update in
//! place, pin, open a pin; for hash maps writing and removing many entries in one call.
#![allow(unsafe_code)] // bpf(2) has no safe wrapper for these commands.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use aya::Pod;
use aya_obj::generated::{bpf_attach_type, bpf_attr, bpf_cmd};
use nix::libc;

/// Attaches `program` to a cgroup, a map of sockets or a network namespace (a descriptor) or a device (its index in the caller's network namespace).
pub(crate) fn link_create(
    program: BorrowedFd<'_>,
    target: LinkTarget<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<OwnedFd> {
    let mut attr = empty();
    attr.link_create.__bindgen_anon_1.prog_fd = program.as_raw_fd() as u32;
    attr.link_create.attach_type = attach_type as u32;
    match target {
        LinkTarget::Cgroup(fd) | LinkTarget::Map(fd) | LinkTarget::Namespace(fd) => {
            attr.link_create.__bindgen_anon_2.target_fd = fd.as_raw_fd() as u32;
        }
        LinkTarget::Device(index) => attr.link_create.__bindgen_anon_2.target_ifindex = index,
    }
    let fd = call(bpf_cmd::BPF_LINK_CREATE, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a link binds a program to.
pub(crate) enum LinkTarget<'a> {
    Cgroup(BorrowedFd<'a>),
    Map(BorrowedFd<'a>),
    Namespace(BorrowedFd<'a>),
    Device(u32),
}

/// Makes `program` the one of a map of sockets, in place of an earlier one. It stays as long as the map does: the way
/// of kernels that have no links for such maps (before Linux 6.10).
pub(crate) fn attach_to_map(
    program: BorrowedFd<'_>,
    map: BorrowedFd<'_>,
    attach_type: bpf_attach_type,
) -> io::Result<()> {
    let mut attr = empty();
    attr.__bindgen_anon_5.__bindgen_anon_1.target_fd = map.as_raw_fd() as u32;
    attr.__bindgen_anon_5.attach_bpf_fd = program.as_raw_fd() as u32;
    attr.__bindgen_anon_5.attach_type = attach_type as u32;
    call(bpf_cmd::BPF_PROG_ATTACH, &mut attr).map(drop)
}

/// Replaces a link's program in one step: every packet and call sees the old one or the new one.
pub(crate) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = empty();
    attr.link_update.link_fd = link.as_raw_fd() as u32;
    attr.link_update.__bindgen_anon_1.new_prog_fd = program.as_raw_fd() as u32;
    call(bpf_cmd::BPF_LINK_UPDATE, &mut attr).map(drop)
}

/// Gives a link a name on a bpffs, so that it outlives this process.
pub(crate) fn pin(link: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = empty();
    attr.__bindgen_anon_4.bpf_fd = link.as_raw_fd() as u32;
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    call(bpf_cmd::BPF_OBJ_PIN, &mut attr).map(drop)
}

/// Opens a pinned link.
pub(crate) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = empty();
    attr.__bindgen_anon_4.pathname = path.as_ptr() as u64;
    let fd = call(bpf_cmd::BPF_OBJ_GET, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Inserts or replaces entries of a hash map, in order and in one call. `K` and `V` are of the map's sizes.
///
/// # Errors
/// How many were written, and why the next one was not.
pub(crate) fn update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> Result<(), (usize, io::Error)> {
    assert_eq!(keys.len(), values.len(), "every key has its value");
    let values = values.as_ptr() as u64;
    batch(bpf_cmd::BPF_MAP_UPDATE_BATCH, map, keys, values)
}

/// Removes entries of a hash map, in order and in one call. `K` is of the map's size.
///
/// # Errors
/// How many were removed, and why the next one was not.
pub(crate) fn delete_batch<K: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
) -> Result<(), (usize, io::Error)> {
    batch(bpf_cmd::BPF_MAP_DELETE_BATCH, map, keys, 0)
}

fn batch<K: Pod>(
    command: bpf_cmd,
    map: BorrowedFd<'_>,
    keys: &[K],
    values: u64,
) -> Result<(), (usize, io::Error)> {
    let mut attr = empty();
    attr.batch.map_fd = map.as_raw_fd() as u32;
    attr.batch.keys = keys.as_ptr() as u64;
    attr.batch.values = values;
    attr.batch.count = u32::try_from(keys.len()).unwrap_or(u32::MAX);
    match call(command, &mut attr) {
        Ok(_) => Ok(()),
        Err(error) => {
            // SAFETY: a union of plain integers; the kernel writes back how far it came.
            let done = unsafe { attr.batch.count };
            Err(((done as usize).min(keys.len()), error))
        }
    }
}

pub(crate) fn empty() -> bpf_attr {
    // SAFETY: a union of plain integers; all zero is what bpf(2) asks of unused fields.
    unsafe { std::mem::zeroed() }
}

pub(crate) fn call(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<RawFd> {
    // SAFETY: attr is a whole, initialised bpf_attr of the size given; every pointer in it is to a buffer, slice or
    // CString that lives until the caller returns, and that is mutable where the kernel writes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command as libc::c_long,
            std::ptr::from_mut(attr),
            size_of::<bpf_attr>(),
        )
    };
    match result {
        -1 => Err(io::Error::last_os_error()),
        fd => Ok(fd as RawFd),
    }
}
