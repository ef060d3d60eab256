//! Giving up rights for good, before a program of a user's runs: capabilities, new privileges, system calls, limits.
//!
//! What is kept is what container engines keep, less what would undermine the mesh: no raw sockets, no
//! network administration, no tracing of strangers, no BPF, no device nodes, no user namespaces, and no
//! socket families or protocols that the mesh's policy does not see.

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use crate::error::{During, Error};

/// The capabilities that root keeps inside of a container.
const KEPT: &[Capability] = &[
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_KILL,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_SETPCAP,
    Capability::CAP_SETFCAP,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SYS_CHROOT,
    Capability::CAP_AUDIT_WRITE,
];
/// Open files: enough for servers, and far from what a single program could exhaust the machine with.
const OPEN_FILES: (u64, u64) = (65_536, 1_048_576);

/// Socket families that a program may use.
const FAMILIES: [i32; 4] = [
    libc::AF_UNIX,
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_NETLINK,
];
/// Protocols over IPv4 and IPv6: those that policy covers, and ICMP, for which no raw socket can be made anyway.
const PROTOCOLS: [i32; 6] = [
    0,
    libc::IPPROTO_ICMP,
    libc::IPPROTO_TCP,
    libc::IPPROTO_UDP,
    libc::IPPROTO_ICMPV6,
    libc::IPPROTO_MPTCP,
];
/// System calls that fail with EPERM: ways out of the container, or into the kernel's less trodden parts.
const REFUSED: &[i64] = &[
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_request_key,
    libc::SYS_setns,
    libc::SYS_userfaultfd,
];

/// Confines this process and all that it starts. The process must have one thread.
///
/// # Errors
/// A right cannot be given up: then no program may run.
pub(crate) fn apply() -> Result<(), Error> {
    limits()?;
    // Compiled before rights go, applied after: a failure to compile must not leave us half-way.
    let filters = filters()?;
    capabilities()?;
    prctl::set_no_new_privs().during(|| "set no_new_privs".into())?;
    for filter in filters {
        seccompiler::apply_filter(&filter).map_err(|error| {
            Error::Container(format!("cannot apply the system call filter: {error}"))
        })?;
    }
    Ok(())
}

fn limits() -> Result<(), Error> {
    let (soft, hard) = OPEN_FILES;
    let (_, machine) =
        getrlimit(Resource::RLIMIT_NOFILE).during(|| "read the limit of open files".into())?;
    let hard = machine.min(hard);
    setrlimit(Resource::RLIMIT_NOFILE, soft.min(hard), hard)
        .during(|| "limit open files".into())?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).during(|| "forbid core dumps".into())
}

fn capabilities() -> Result<(), Error> {
    let failed = |error: caps::errors::CapsError| {
        Error::Container(format!("cannot drop capabilities: {error}"))
    };
    let kept: CapsHashSet = KEPT.iter().copied().collect();
    for capability in caps::runtime::thread_all_supported() {
        if !kept.contains(&capability) {
            caps::drop(None, CapSet::Bounding, capability).map_err(failed)?;
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(failed)?;
    caps::clear(None, CapSet::Inheritable).map_err(failed)?;
    let held = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let kept: CapsHashSet = kept.intersection(&held).copied().collect();
    caps::set(None, CapSet::Effective, &kept).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed)
}

/// One filter per answer. Where several match, the kernel takes the strictest, and all of these are errors.
fn filters() -> Result<Vec<BpfProgram>, Error> {
    let new_user_namespace = |argument| {
        one(
            argument,
            Compare::MaskedEq(libc::CLONE_NEWUSER as u64),
            libc::CLONE_NEWUSER,
        )
    };
    let mut refused: Vec<(i64, Vec<SeccompRule>)> =
        REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    refused.push((libc::SYS_clone, vec![new_user_namespace(0)?]));
    refused.push((libc::SYS_unshare, vec![new_user_namespace(0)?]));

    // Its flags are behind a pointer, where a filter cannot look. The C library then uses clone.
    let absent = vec![(libc::SYS_clone3, Vec::new())];

    let other_family = FAMILIES
        .iter()
        .map(|family| condition(0, Compare::Ne, *family))
        .collect::<Result<Vec<_>, _>>()?;
    let mut rules = vec![rule(other_family)?];
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut other_protocol = vec![condition(0, Compare::Eq, family)?];
        for protocol in PROTOCOLS {
            other_protocol.push(condition(2, Compare::Ne, protocol)?);
        }
        rules.push(rule(other_protocol)?);
    }
    let sockets = vec![(libc::SYS_socket, rules)];

    [
        (refused, libc::EPERM),
        (absent, libc::ENOSYS),
        (sockets, libc::EAFNOSUPPORT),
    ]
    .into_iter()
    .map(|(rules, errno)| compile(rules, errno))
    .collect()
}

fn compile(rules: Vec<(i64, Vec<SeccompRule>)>, errno: i32) -> Result<BpfProgram, Error> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(bad_filter)?;
    SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.cast_unsigned()),
        architecture,
    )
    .and_then(TryInto::try_into)
    .map_err(bad_filter)
}

fn one(argument: u8, compare: Compare, value: i32) -> Result<SeccompRule, Error> {
    rule(vec![condition(argument, compare, value)?])
}

fn rule(conditions: Vec<SeccompCondition>) -> Result<SeccompRule, Error> {
    SeccompRule::new(conditions).map_err(bad_filter)
}

fn condition(argument: u8, compare: Compare, value: i32) -> Result<SeccompCondition, Error> {
    SeccompCondition::new(
        argument,
        Length::Dword,
        compare,
        u64::from(value.cast_unsigned()),
    )
    .map_err(bad_filter)
}

fn bad_filter(error: seccompiler::BackendError) -> Error {
    Error::Container(format!("cannot compile the system call filter: {error}"))
}
