//! The node agent: workload registry, policy compilation into the kernel, DNS, agent API.

pub mod dns;
