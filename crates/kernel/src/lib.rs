//! eBPF programs, their loader, typed maps and flow events: the only crate that knows BPF.
