//! The standalone runtime: fabric, node and workload namespaces, cgroups, processes, probes, logs.
