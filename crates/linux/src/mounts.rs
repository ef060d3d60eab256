//! What is mounted where, from `/proc/self/mountinfo` (format: proc_pid_mountinfo(5)).

use std::{
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

/// One mount of the calling process's mount namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Where.
    pub target: PathBuf,
    /// The part of the filesystem that is seen there; `/` for all of it.
    pub root: PathBuf,
    /// Type, such as `ext4`.
    pub filesystem: String,
    /// Options of the filesystem, comma-separated; for cgroup v1 they name the controllers.
    pub super_options: String,
}

/// All mounts, in the order in which they were made.
///
/// # Errors
/// `/proc` is not mounted.
pub fn list() -> io::Result<Vec<Mount>> {
    let text = fs::read("/proc/self/mountinfo")?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(parse)
        .collect())
}

/// Whether a filesystem of type `filesystem` is mounted exactly at `target`.
///
/// # Errors
/// As [`list`].
pub fn is_mounted(target: &Path, filesystem: &str) -> io::Result<bool> {
    Ok(list()?
        .iter()
        .any(|mount| mount.target == target && mount.filesystem == filesystem))
}

/// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let root = path(fields.nth(3)?);
    let target = path(fields.next()?);
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let filesystem = String::from_utf8_lossy(rest.next()?).into_owned();
    let super_options = String::from_utf8_lossy(rest.nth(1)?).into_owned();
    Some(Mount {
        target,
        root,
        filesystem,
        super_options,
    })
}

/// Undoes the octal escapes of blanks, tabs, newlines and backslashes.
fn path(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let Some(byte) = escaped {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_and_without_optional_fields() {
        let mount =
            parse(b"36 35 98:0 /a /b rw master:1 propagate_from:2 - ext3 /dev/root rw,x").unwrap();
        assert_eq!(mount.target, Path::new("/b"));
        assert_eq!(mount.root, Path::new("/a"));
        assert_eq!(mount.filesystem, "ext3");
        assert_eq!(mount.super_options, "rw,x");
        let mount = parse(br"36 35 0:5 / /with\040blank\134 rw - tmpfs none rw").unwrap();
        assert_eq!(mount.target, Path::new("/with blank\\"));
        assert_eq!(parse(b""), None);
        assert_eq!(parse(b"36 35 0:5 / /x rw"), None);
    }

    #[test]
    fn the_machine_has_a_proc() {
        assert!(is_mounted(Path::new("/proc"), "proc").unwrap());
        assert!(!is_mounted(Path::new("/proc"), "tmpfs").unwrap());
    }
}
