//! Safe wrappers of the Linux facilities that the runtime and the node agent share: namespaces, cgroup v2, fd passing.
