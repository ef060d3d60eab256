//! Network namespaces by name, for tests that join some by veth pairs.

use std::process::Command;

use linux::netns::Netns;

/// A namespace that `ip` knows by name. Dropping it removes it.
pub(crate) struct Namespace {
    pub(crate) name: String,
    pub(crate) netns: Netns,
}

impl Namespace {
    pub(crate) fn new(name: String) -> Self {
        ip(&["netns", "add", &name]);
        let netns = Netns::open(format!("/run/netns/{name}")).unwrap();
        Self { name, netns }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(
            Command::new("ip")
                .args(["netns", "delete", &self.name])
                .output(),
        );
    }
}

/// Runs `ip`.
#[track_caller]
pub(crate) fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "ip {arguments:?}: {output:?}");
}
