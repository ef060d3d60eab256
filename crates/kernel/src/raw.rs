//! The bpf(2) commands on maps whose types are not known at compile time: what a map is, the types it was made
//! with, and its entries as bytes. Migration (`migrate`) and counting use them; typed access is in `table`.
#![allow(unsafe_code)] // bpf(2) has no safe wrapper for these commands.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use aya_obj::generated::{
    bpf_attr, bpf_btf_info, bpf_cmd, bpf_link_info, bpf_map_info, bpf_prog_info,
};
use nix::libc;

use crate::sys::{call, empty};

/// Entries asked for at once: more than any hash bucket holds.
const BATCH: usize = 4096;

/// What a map is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MapShape {
    pub(crate) key_size: usize,
    pub(crate) value_size: usize,
    /// The types it was made with; 0 if none.
    pub(crate) btf: u32,
    pub(crate) key_type: u32,
    pub(crate) value_type: u32,
}

/// Asks the kernel what a map is.
pub(crate) fn shape(map: BorrowedFd<'_>) -> io::Result<MapShape> {
    // SAFETY: a struct of plain integers.
    let mut info: bpf_map_info = unsafe { std::mem::zeroed() };
    object_info(map, &mut info)?;
    Ok(MapShape {
        key_size: info.key_size as usize,
        value_size: info.value_size as usize,
        btf: info.btf_id,
        key_type: info.btf_key_type_id,
        value_type: info.btf_value_type_id,
    })
}

/// The raw types (BTF) that the kernel keeps under an id.
pub(crate) fn types(id: u32) -> io::Result<Vec<u8>> {
    let mut attr = empty();
    attr.__bindgen_anon_6.__bindgen_anon_1.btf_id = id;
    let fd = call(bpf_cmd::BPF_BTF_GET_FD_BY_ID, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a struct of plain integers.
    let mut info: bpf_btf_info = unsafe { std::mem::zeroed() };
    object_info(fd.as_fd(), &mut info)?;
    let mut bytes = vec![0u8; info.btf_size as usize];
    info.btf = bytes.as_mut_ptr() as u64;
    object_info(fd.as_fd(), &mut info)?;
    Ok(bytes)
}

/// The inode of the network namespace that a link is attached to; 0 if the namespace is gone.
pub(crate) fn namespace_of_link(link: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: a struct of plain integers.
    let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
    object_info(link, &mut info)?;
    // SAFETY: the link is one of a namespace, so this is the member that the kernel has written.
    Ok(unsafe { info.__bindgen_anon_1.netns.netns_ino })
}

/// The raw types of the program that a link runs; `None` if it was loaded without.
pub(crate) fn types_of_link(link: BorrowedFd<'_>) -> io::Result<Option<Vec<u8>>> {
    // SAFETY: a struct of plain integers.
    let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
    object_info(link, &mut info)?;
    let mut attr = empty();
    attr.__bindgen_anon_6.__bindgen_anon_1.prog_id = info.prog_id;
    let fd = call(bpf_cmd::BPF_PROG_GET_FD_BY_ID, &mut attr)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: a struct of plain integers.
    let mut info: bpf_prog_info = unsafe { std::mem::zeroed() };
    object_info(fd.as_fd(), &mut info)?;
    match info.btf_id {
        0 => Ok(None),
        id => types(id).map(Some),
    }
}

/// Calls `each` with every entry of a hash map, in pieces that the kernel reads bucket by bucket: entries that
/// come and go meanwhile may be seen or not, the others are seen once.
pub(crate) fn for_each(
    map: BorrowedFd<'_>,
    mut each: impl FnMut(&[u8], &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let MapShape {
        key_size,
        value_size,
        ..
    } = shape(map)?;
    let mut keys = vec![0u8; key_size * BATCH];
    let mut values = vec![0u8; value_size.next_multiple_of(8) * BATCH];
    let (mut position, mut next) = (None::<u32>, 0u32);
    loop {
        let mut attr = empty();
        attr.batch.map_fd = map.as_raw_fd() as u32;
        attr.batch.in_batch = position
            .as_ref()
            .map_or(0, |position| std::ptr::from_ref(position) as u64);
        attr.batch.out_batch = std::ptr::from_mut(&mut next) as u64;
        attr.batch.keys = keys.as_mut_ptr() as u64;
        attr.batch.values = values.as_mut_ptr() as u64;
        attr.batch.count = BATCH as u32;
        let done = match call(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        // SAFETY: the kernel has written the number of entries there; all of the union's bytes are initialised.
        let found = unsafe { attr.batch.count } as usize;
        for index in 0..found.min(BATCH) {
            each(
                &keys[index * key_size..][..key_size],
                &values[index * value_size..][..value_size],
            )?;
        }
        if done {
            return Ok(());
        }
        position = Some(next);
    }
}

/// How many entries a hash map has. The kernel copies them out to be counted: tens of milliseconds for a hundred
/// thousand, so ask seldom.
pub(crate) fn count(map: BorrowedFd<'_>) -> io::Result<usize> {
    let mut entries = 0;
    for_each(map, |_, _| {
        entries += 1;
        Ok(())
    })?;
    Ok(entries)
}

/// What to do with a key that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Existing {
    Replace,
    Keep,
}

/// Writes an entry. Returns false if it was there and stays, or if there is no room.
pub(crate) fn update(
    map: BorrowedFd<'_>,
    key: &[u8],
    value: &[u8],
    existing: Existing,
) -> io::Result<bool> {
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
    attr.__bindgen_anon_2.key = key.as_ptr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_ptr() as u64;
    // BPF_ANY and BPF_NOEXIST of linux/bpf.h.
    attr.__bindgen_anon_2.flags = u64::from(existing == Existing::Keep);
    match call(bpf_cmd::BPF_MAP_UPDATE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) => match error.raw_os_error() {
            Some(libc::EEXIST | libc::E2BIG) => Ok(false),
            _ => Err(error),
        },
    }
}

/// The value of a key, if it is there.
pub(crate) fn lookup(map: BorrowedFd<'_>, key: &[u8], size: usize) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0u8; size.next_multiple_of(8)];
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
    attr.__bindgen_anon_2.key = key.as_ptr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = value.as_mut_ptr() as u64;
    match call(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => {
            value.truncate(size);
            Ok(Some(value))
        }
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// As [`lookup`], into a buffer of the caller's that is large enough: for what is asked once per connection.
pub(crate) fn lookup_into(map: BorrowedFd<'_>, key: &[u8], buffer: &mut [u8]) -> io::Result<bool> {
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
    attr.__bindgen_anon_2.key = key.as_ptr() as u64;
    attr.__bindgen_anon_2.__bindgen_anon_1.value = buffer.as_mut_ptr() as u64;
    match call(bpf_cmd::BPF_MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes an entry. Returns whether it was there.
pub(crate) fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    let mut attr = empty();
    attr.__bindgen_anon_2.map_fd = map.as_raw_fd() as u32;
    attr.__bindgen_anon_2.key = key.as_ptr() as u64;
    match call(bpf_cmd::BPF_MAP_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr: bpf_attr = empty();
    attr.info.bpf_fd = object.as_raw_fd() as u32;
    attr.info.info_len = size_of::<T>() as u32;
    attr.info.info = std::ptr::from_mut(info) as u64;
    call(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}
