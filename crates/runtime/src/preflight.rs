//! What the machine must offer before a mesh can be brought up, and how to get what is missing.
//!
//! Each facility is tried for real where that leaves nothing behind: mounts in a mount namespace that
//! vanishes with its thread, a cgroup that is removed at once. Whether the kernel takes Heddle's BPF programs is
//! found out by crate `kernel` when it loads them.

use std::{
    fmt, fs, io,
    net::{Ipv6Addr, UdpSocket},
    path::{Path, PathBuf},
    thread,
};

use caps::{CapSet, Capability};
use linux::{
    cgroup::{self, Cgroup},
    netns::Netns,
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};

/// Since when the kernel has all BPF hooks that connections are decided by, but for TCX.
const KERNEL: (u32, u32) = (5, 15);
/// Since when the kernel has TCX, which keeps workloads from forging addresses.
const KERNEL_WITH_TCX: (u32, u32) = (6, 6);

/// Something that the machine does not offer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The facility.
    pub what: String,
    /// What was found instead, or what the kernel answered, and what the facility is for.
    pub why: String,
    /// What to do.
    pub how_to_fix: String,
}

impl Missing {
    fn new(what: impl Into<String>, why: impl Into<String>, how_to_fix: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            why: why.into(),
            how_to_fix: how_to_fix.into(),
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.what, self.why, self.how_to_fix)
    }
}

/// Everything that is missing, most basic first; empty if a mesh can be brought up. Takes some milliseconds.
/// The answer is about the calling thread, whose capabilities and namespaces count.
#[must_use]
pub fn check() -> Vec<Missing> {
    let mut missing = Vec::new();
    if !geteuid().is_root() {
        missing.push(Missing::new(
            "root",
            format!("running as user {}", geteuid()),
            "run it with sudo, or as root",
        ));
    }
    missing.extend(capabilities(|capability| {
        caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
    }));
    missing.extend(kernel(&release()));
    missing.extend(network());
    missing.extend(private_mounts());
    missing
}

fn capabilities(has: impl Fn(Capability) -> bool) -> Vec<Missing> {
    use Capability::{CAP_BPF, CAP_NET_ADMIN, CAP_SETGID, CAP_SETPCAP, CAP_SETUID, CAP_SYS_ADMIN};
    let needed: [(&[Capability], &str); 6] = [
        (
            &[CAP_SYS_ADMIN],
            "to make namespaces and mounts for workloads",
        ),
        (
            &[CAP_NET_ADMIN],
            "to join workloads by virtual links, and to attach BPF programs",
        ),
        (&[CAP_BPF, CAP_SYS_ADMIN], "to load BPF programs"),
        (&[CAP_SETPCAP], "to take capabilities away from workloads"),
        (&[CAP_SETUID], "to run workloads under their own user"),
        (&[CAP_SETGID], "to run workloads under their own groups"),
    ];
    needed
        .into_iter()
        .filter(|(any_of, _)| !any_of.iter().any(|capability| has(*capability)))
        .map(|(any_of, purpose)| {
            let name = any_of[0].to_string();
            Missing::new(
                &name,
                format!("not among this process's effective capabilities; needed {purpose}"),
                format!(
                    "run as root outside of a container, or grant it (`docker run --privileged`, `capsh`, systemd: `AmbientCapabilities={name}`)"
                ),
            )
        })
        .collect()
}

fn release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| String::new(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

fn kernel(release: &str) -> Option<Missing> {
    let version = version(release).unwrap_or_default();
    let (wanted, purpose) = if version < KERNEL {
        (KERNEL, "the BPF hooks that connections are decided by")
    } else if version < KERNEL_WITH_TCX {
        (
            KERNEL_WITH_TCX,
            "TCX, which keeps workloads from forging addresses",
        )
    } else {
        return None;
    };
    let (major, minor) = wanted;
    let (tcx_major, tcx_minor) = KERNEL_WITH_TCX;
    Some(Missing::new(
        format!("Linux {major}.{minor}"),
        format!("the kernel is {release:?}; a newer one is needed for {purpose}"),
        format!(
            "boot a kernel from {tcx_major}.{tcx_minor} on (Debian 12: linux-image-amd64 from bookworm-backports; Debian 13 has one)"
        ),
    ))
}

/// `6.18.44-amd64` is 6.18.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|character: char| !character.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn network() -> Vec<Missing> {
    let tried = Netns::create().and_then(|netns| {
        netns.cookie()?;
        netns.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)))
    });
    match tried {
        Err(error) => vec![Missing::new(
            "network namespaces",
            format!("making one failed: {error}"),
            advice(
                &error,
                "CONFIG_NET_NS",
                "raise `sysctl user.max_net_namespaces`",
            ),
        )],
        Ok(Err(error)) => vec![Missing::new(
            "IPv6",
            format!(
                "a socket in a new namespace failed: {error}; replicas have an IPv6 address each"
            ),
            "boot without `ipv6.disable=1`, with CONFIG_IPV6",
        )],
        Ok(Ok(_)) => Vec::new(),
    }
}

/// Tries what needs mounts, on a thread with a mount namespace of its own.
fn private_mounts() -> Vec<Missing> {
    let no_thread = |error: &dyn fmt::Display| {
        vec![Missing::new(
            "threads",
            format!("starting one failed: {error}"),
            "raise the limit of processes (`ulimit -u`, pids.max of this cgroup)",
        )]
    };
    let tried = thread::Builder::new()
        .name("preflight".into())
        .spawn(try_mounts);
    match tried.map(thread::JoinHandle::join) {
        Ok(Ok(missing)) => missing,
        Ok(Err(_)) => no_thread(&"it panicked"),
        Err(error) => no_thread(&error),
    }
}

fn try_mounts() -> Vec<Missing> {
    if let Err(error) = unshare_for_containers() {
        return vec![Missing::new(
            "mount, PID, IPC, UTS and cgroup namespaces",
            format!("making them failed: {error}; workloads are contained by them"),
            advice(
                &error,
                "CONFIG_NAMESPACES, CONFIG_PID_NS, CONFIG_IPC_NS, CONFIG_UTS_NS and CONFIG_CGROUPS",
                "raise `sysctl user.max_mnt_namespaces user.max_pid_namespaces`",
            ),
        )];
    }
    let mut missing = Vec::new();
    // Before anything covers the folders where cgroup2 may be mounted.
    let cgroup2 = cgroup::find_mount();
    // The only folder that is there for sure and that nothing below needs.
    let scratch = Path::new("/tmp");
    if let Err(error) = mount_at(scratch, "tmpfs", None) {
        missing.push(no_filesystem("tmpfs", "CONFIG_TMPFS", &error));
        return missing;
    }
    let filesystems: [(&str, &str); 2] = [
        ("bpf", "CONFIG_BPF_SYSCALL; Heddle mounts one for its pins"),
        ("proc", "CONFIG_PROC_FS; every workload has one"),
    ];
    for (filesystem, option) in filesystems {
        if let Err(error) = mount_in(scratch, filesystem, None) {
            missing.push(no_filesystem(filesystem, option, &error));
        }
    }
    if let Err(error) = overlay(scratch) {
        missing.push(no_filesystem(
            "overlay",
            "CONFIG_OVERLAY_FS (`modprobe overlay`); workloads see the machine's programs through it",
            &error,
        ));
    }
    missing.extend(cgroup_child(cgroup2, scratch));
    missing
}

fn unshare_for_containers() -> io::Result<()> {
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWCGROUP,
    )?;
    let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
    Ok(mount(
        None::<&str>,
        "/",
        None::<&str>,
        private,
        None::<&str>,
    )?)
}

fn mount_in(scratch: &Path, filesystem: &str, options: Option<&str>) -> io::Result<PathBuf> {
    let target = scratch.join(filesystem);
    fs::create_dir_all(&target)?;
    mount_at(&target, filesystem, options)?;
    Ok(target)
}

fn mount_at(target: &Path, filesystem: &str, options: Option<&str>) -> io::Result<()> {
    Ok(mount(
        Some(filesystem),
        target,
        Some(filesystem),
        MsFlags::empty(),
        options,
    )?)
}

/// As workloads get theirs: over the machine's root, with changes on a tmpfs.
fn overlay(scratch: &Path) -> io::Result<()> {
    for name in ["upper", "work"] {
        fs::create_dir_all(scratch.join(name))?;
    }
    let upper = scratch.join("upper");
    let work = scratch.join("work");
    let options = format!(
        "lowerdir=/,upperdir={},workdir={}",
        upper.display(),
        work.display()
    );
    mount_in(scratch, "overlay", Some(&options)).map(drop)
}

/// Makes a child cgroup where cgroup2 is mounted, or else where it can be.
fn cgroup_child(
    mounted: Result<Option<PathBuf>, cgroup::Error>,
    scratch: &Path,
) -> Option<Missing> {
    let root = match mounted {
        Ok(Some(root)) => root,
        Ok(None) => match mount_in(scratch, "cgroup2", None) {
            Ok(root) => root,
            Err(error) => {
                return Some(no_filesystem(
                    "cgroup2",
                    "CONFIG_CGROUPS and CONFIG_CGROUP_BPF; not `cgroup_no_v1` is needed, v1 beside it is fine",
                    &error,
                ));
            }
        },
        Err(error) => {
            return Some(Missing::new(
                "cgroup2",
                error.to_string(),
                "mount /proc (`mount -t proc proc /proc`)",
            ));
        }
    };
    let child = root.join(format!("heddle.preflight-{}", std::process::id()));
    Cgroup::create(child)
        .and_then(|cgroup| cgroup.remove_tree())
        .err()
        .map(|error| {
            Missing::new(
                "a writable cgroup2",
                error.to_string(),
                "remount it with write access (`mount -o remount,rw DIR`), start the container with `--privileged --cgroupns=host`, or raise cgroup.max.descendants",
            )
        })
}

fn no_filesystem(filesystem: &str, option: &str, error: &io::Error) -> Missing {
    Missing::new(
        format!("filesystem {filesystem}"),
        format!("mounting one in a private namespace failed: {error}"),
        advice(
            error,
            option,
            "see the kernel's log (`dmesg`) for the reason",
        ),
    )
}

/// What to do by the kernel's answer.
fn advice(error: &io::Error, option: &str, otherwise: &str) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => "run as root with CAP_SYS_ADMIN; inside of a container that takes `--privileged` (seccomp and AppArmor may forbid it as well)".into(),
        Some(libc::ENODEV | libc::EINVAL | libc::ENOSYS | libc::ENOPROTOOPT) => format!("the kernel lacks it: it needs {option}"),
        _ => otherwise.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_that_can_run_the_tests_lacks_nothing_and_nothing_is_left_on_it() {
        assert_eq!(check(), []);
        let left = linux::mounts::list().unwrap();
        let left = left.iter().find(|mount| {
            let scratch = ["/tmp/bpf", "/tmp/proc", "/tmp/overlay"].map(Path::new);
            scratch.contains(&mount.target.as_path())
        });
        assert_eq!(left, None);
        let root = cgroup::find_mount().unwrap().unwrap();
        let name = format!("heddle.preflight-{}", std::process::id());
        assert!(!root.join(name).exists());
    }

    #[test]
    fn without_capabilities_each_missing_thing_is_named_with_its_cure() {
        // Capabilities are the thread's: no other test is affected.
        let missing = thread::spawn(|| {
            caps::clear(None, CapSet::Effective).unwrap();
            check()
        })
        .join()
        .unwrap();
        let names: Vec<_> = missing.iter().map(|one| one.what.as_str()).collect();
        assert_eq!(
            names,
            [
                "CAP_SYS_ADMIN",
                "CAP_NET_ADMIN",
                "CAP_BPF",
                "CAP_SETPCAP",
                "CAP_SETUID",
                "CAP_SETGID",
                "network namespaces",
                "mount, PID, IPC, UTS and cgroup namespaces",
            ]
        );
        assert!(missing[6].why.contains("Operation not permitted"));
        assert!(missing[6].how_to_fix.contains("CAP_SYS_ADMIN"));
    }

    #[test]
    fn bpf_is_had_by_sys_admin_too() {
        let missing = capabilities(|capability| capability == Capability::CAP_SYS_ADMIN);
        assert!(missing.iter().all(|one| one.what != "CAP_BPF"));
        let missing = capabilities(|capability| capability == Capability::CAP_BPF);
        assert_eq!(missing[0].what, "CAP_SYS_ADMIN");
        assert!(missing.iter().all(|one| one.what != "CAP_BPF"));
    }

    #[test]
    fn kernels_by_version() {
        assert_eq!(kernel("6.6.0"), None);
        assert_eq!(kernel("6.18.44-amd64"), None);
        assert_eq!(kernel("7.0-rc1"), None);
        assert!(kernel("6.1.0-28-amd64").unwrap().why.contains("TCX"));
        assert_eq!(kernel("5.10.0").unwrap().what, "Linux 5.15");
        assert_eq!(kernel("unknown").unwrap().what, "Linux 5.15");
    }
}
