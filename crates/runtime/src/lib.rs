//! The standalone runtime: fabric, node and workload namespaces, cgroups, processes, probes, logs.
// SPLIT OF WORK (remove this line at the end): publish.rs, preflight.rs and cleanup.rs (with the guardian) are being written by another helper, using only crate `linux`, `api` and plain paths; whoever writes the rest of this crate declares them with `pub mod` and calls them.
