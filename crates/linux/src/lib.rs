//! Safe wrappers of the Linux facilities that the runtime and the node agent share.
//!
//! - [`netns`]: network namespaces held by descriptor.
//! - [`cgroup`]: cgroup v2 folders, killing all that is in them, CPU and memory limits on v2 or v1.
//! - [`seqpacket`]: JSON messages with descriptors beside them, over Unix sockets by path.
//! - [`place`]: start a child process in a cgroup and a namespace without a moment outside of them.
//! - [`peer`]: who is at the other end of a Unix socket.
//! - [`pidfd`]: signals that cannot hit a stranger who got the same process id.
//! - [`readable`]: waiting for a descriptor of any kind.
//! - [`mounts`]: what is mounted where.
//! - [`sock_diag`]: the sockets of a network namespace, listed and ended.
//!
//! Nothing here knows of meshes, workloads or policies. The few unsafe calls are in the private module
//! `sys` and in [`place`].

pub mod cgroup;
pub mod mounts;
pub mod netns;
pub mod peer;
pub mod pidfd;
pub mod place;
pub mod readable;
pub mod seqpacket;
pub mod sock_diag;
mod sys;
