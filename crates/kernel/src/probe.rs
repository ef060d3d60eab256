//! What the running kernel can do, asked by trying: version numbers lie where features are back-ported.

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_program_supported},
};

/// Whether a program can choose the error that a refused call returns (Linux 5.18).
pub(crate) fn has_set_retval() -> bool {
    is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval)
        .unwrap_or(false)
}

/// What the kernel lacks for Heddle, each line with the option that brings it. Empty if nothing is missing.
#[must_use]
pub fn missing_features() -> Vec<String> {
    let needed = [
        (
            ProgramType::CgroupSock,
            "cgroup/sock_create",
            "CONFIG_CGROUP_BPF",
        ),
        (
            ProgramType::CgroupSockAddr,
            "cgroup/connect",
            "CONFIG_CGROUP_BPF",
        ),
        (ProgramType::CgroupSkb, "cgroup_skb", "CONFIG_CGROUP_BPF"),
        (
            ProgramType::SockOps,
            "sockops",
            "CONFIG_CGROUP_BPF and CONFIG_NET",
        ),
        (ProgramType::SkMsg, "sk_msg", "CONFIG_NET_SOCK_MSG"),
        (
            ProgramType::SkLookup,
            "sk_lookup",
            "CONFIG_NET (and Linux 5.9)",
        ),
        (
            ProgramType::SchedClassifier,
            "tc",
            "CONFIG_NET_CLS_ACT (and Linux 6.6 for TCX links)",
        ),
    ];
    needed
        .into_iter()
        .filter_map(|(kind, name, option)| match is_program_supported(kind) {
            Ok(true) => None,
            Ok(false) => Some(format!(
                "BPF programs of type {name}: the kernel must be built with CONFIG_BPF_SYSCALL, {option}"
            )),
            Err(error) => Some(format!(
                "BPF programs of type {name} cannot be loaded ({error}): run as root with CAP_BPF and CAP_NET_ADMIN"
            )),
        })
        .collect()
}
