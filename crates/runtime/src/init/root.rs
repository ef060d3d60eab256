//! The container's root filesystem: the machine's programs to see, nothing of the machine to change.
//!
//! An overlay over `/` takes all writes; other disks of the machine are bound read-only; `/proc`, `/sys`,
//! `/dev`, `/run` and `/tmp` are the container's own. There is no cgroupfs and no bpffs inside.
//! What is masked in `/proc` and `/sys` is what container engines mask (OCI runtime defaults).

use std::{
    fs::{self, create_dir_all},
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
};

use linux::mounts::{self, Mount};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sys::stat::{Mode, SFlag, makedev, mknod, umask},
    unistd::{chdir, fchdir, pivot_root},
};

use crate::{
    error::{During, Error},
    layout::IDENTITY_FOLDER,
};

/// Filesystems that hold files of the machine, as opposed to windows into its kernel.
const DISKS: &[&str] = &[
    "9p", "bcachefs", "btrfs", "cifs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "iso9660",
    "jfs", "nfs", "nfs4", "reiserfs", "squashfs", "ubifs", "vfat", "virtiofs", "xfs", "zfs",
];
/// Folders that the container has for itself.
const OWN: &[&str] = &["/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp"];
const READ_ONLY: &[&str] = &[
    "/proc/sys",
    "/proc/sysrq-trigger",
    "/proc/irq",
    "/proc/bus",
    "/proc/fs",
];
const MASKED: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/kernel/security",
    "/sys/devices/virtual/powercap",
];
/// Name, major and minor number (the kernel's Documentation/admin-guide/devices.txt).
const DEVICES: &[(&str, u64, u64)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const DEVICE_LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Builds the root below `scratch` and makes it the root of this process; of the machine's folders with
/// sockets it shows `identity` alone. The mount namespace must be new.
pub(super) fn build(scratch: &Path, identity: Option<&Path>) -> Result<(), Error> {
    // Modes are given in full below.
    umask(Mode::empty());
    // First of all: nothing done here may travel back to the machine.
    mount_at(
        None,
        Path::new("/"),
        None,
        MsFlags::MS_REC | MsFlags::MS_PRIVATE,
        "",
    )?;
    let disks: Vec<Mount> = mounts::list()
        .during(|| "list mounts".into())?
        .into_iter()
        .filter(is_other_disk)
        .collect();
    let root = overlay(scratch)?;
    for disk in disks {
        let inside = root.join(disk.target.strip_prefix("/").unwrap_or(&disk.target));
        if inside.is_dir() || disk.target.is_file() {
            bind_read_only(&disk.target, &inside)?;
        }
    }
    run_folder(&root, identity)?;
    enter(&root)?;
    kernel_windows()?;
    devices()?;
    for folder in ["/tmp", "/var/tmp"] {
        own_tmpfs(
            folder,
            "mode=1777,size=25%",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        )?;
    }
    umask(Mode::from_bits_truncate(0o022));
    Ok(())
}

/// Made before the machine's own is out of sight, because of what it shows of it. It is bound as a folder, so that the
/// socket of an agent that starts later, or anew, appears in it.
fn run_folder(root: &Path, identity: Option<&Path>) -> Result<(), Error> {
    let run = root.join("run");
    let failed = || "build /run".into();
    create_dir_all(&run).during(failed)?;
    mount_at(
        Some("tmpfs"),
        &run,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        "mode=755,size=25%",
    )?;
    let folder = |path: &Path, mode| {
        create_dir_all(path)
            .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)))
            .during(failed)
    };
    folder(&run.join("lock"), 0o1777)?;
    let Some(identity) = identity else {
        return Ok(());
    };
    let target = root.join(IDENTITY_FOLDER.trim_start_matches('/'));
    let made: Vec<&Path> = target
        .ancestors()
        .take_while(|above| *above != run)
        .collect();
    for path in made.into_iter().rev() {
        folder(path, 0o755)?;
    }
    bind_read_only(identity, &target)
}

fn is_other_disk(mount: &Mount) -> bool {
    DISKS.contains(&mount.filesystem.as_str())
        && mount.target != Path::new("/")
        && !OWN.iter().any(|folder| mount.target.starts_with(folder))
}

fn overlay(scratch: &Path) -> Result<std::path::PathBuf, Error> {
    let [upper, work, root] = ["upper", "work", "root"].map(|name| scratch.join(name));
    for folder in [&upper, &work, &root] {
        create_dir_all(folder)
            .and_then(|()| fs::set_permissions(folder, fs::Permissions::from_mode(0o755)))
            .during(|| format!("create {}", folder.display()))?;
    }
    let options = format!(
        "lowerdir=/,upperdir={},workdir={}",
        upper.display(),
        work.display()
    );
    mount_at(
        Some("overlay"),
        &root,
        Some("overlay"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        &options,
    )?;
    Ok(root)
}

/// Old and new root are stacked at one place, and the old one is taken away from below (pivot_root(2)).
fn enter(root: &Path) -> Result<(), Error> {
    let old = fs::File::open("/").during(|| "open /".into())?;
    let failed = || format!("make {} the root", root.display());
    chdir(root).during(failed)?;
    pivot_root(".", ".").during(failed)?;
    fchdir(&old).during(failed)?;
    umount2(".", MntFlags::MNT_DETACH).during(failed)?;
    chdir("/").during(failed)
}

fn kernel_windows() -> Result<(), Error> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    for folder in ["/proc", "/sys"] {
        create_dir_all(folder).during(|| format!("create {folder}"))?;
    }
    mount_at(Some("proc"), Path::new("/proc"), Some("proc"), quiet, "")?;
    mount_at(
        Some("sysfs"),
        Path::new("/sys"),
        Some("sysfs"),
        quiet | MsFlags::MS_RDONLY,
        "",
    )?;
    for path in READ_ONLY.iter().map(Path::new).filter(|path| path.exists()) {
        bind_read_only(path, path)?;
    }
    for path in MASKED.iter().map(Path::new) {
        if path.is_dir() {
            mount_at(
                Some("tmpfs"),
                path,
                Some("tmpfs"),
                quiet | MsFlags::MS_RDONLY,
                "size=0",
            )?;
        } else if path.exists() {
            // An empty file of the overlay: /dev is not there yet.
            let empty = Path::new("/.empty");
            fs::write(empty, "").during(|| "create an empty file".into())?;
            bind_read_only(empty, path)?;
            fs::remove_file(empty).during(|| "remove an empty file".into())?;
        }
    }
    Ok(())
}

fn devices() -> Result<(), Error> {
    own_tmpfs(
        "/dev",
        "mode=755,size=64k",
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
    )?;
    for (name, major, minor) in DEVICES {
        let path = Path::new("/dev").join(name);
        let mode = Mode::from_bits_truncate(0o666);
        mknod(&path, SFlag::S_IFCHR, mode, makedev(*major, *minor))
            .during(|| format!("create {}", path.display()))?;
    }
    for (name, target) in DEVICE_LINKS {
        symlink(target, Path::new("/dev").join(name)).during(|| format!("create /dev/{name}"))?;
    }
    create_dir_all("/dev/pts").during(|| "create /dev/pts".into())?;
    mount_at(
        Some("devpts"),
        Path::new("/dev/pts"),
        Some("devpts"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        "newinstance,ptmxmode=0666,mode=620,gid=5",
    )?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    own_tmpfs("/dev/shm", "mode=1777,size=25%", flags)
}

fn own_tmpfs(folder: &str, options: &str, flags: MsFlags) -> Result<(), Error> {
    create_dir_all(folder).during(|| format!("create {folder}"))?;
    mount_at(
        Some("tmpfs"),
        Path::new(folder),
        Some("tmpfs"),
        flags,
        options,
    )
}

/// A bind takes the flags of its source; a second call sets its own.
fn bind_read_only(source: &Path, target: &Path) -> Result<(), Error> {
    mount(
        Some(source),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .during(|| format!("bind {} to {}", source.display(), target.display()))?;
    let flags = MsFlags::MS_BIND
        | MsFlags::MS_REMOUNT
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV;
    mount_at(None, target, None, flags, "")
}

fn mount_at(
    source: Option<&str>,
    target: &Path,
    filesystem: Option<&str>,
    flags: MsFlags,
    options: &str,
) -> Result<(), Error> {
    mount(source, target, filesystem, flags, Some(options)).during(|| {
        format!(
            "mount {} at {} ({options})",
            filesystem.unwrap_or("(flags)"),
            target.display()
        )
    })
}
