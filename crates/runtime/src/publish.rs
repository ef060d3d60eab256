//! Published ports: a port of the host's loopback that leads to a service of the mesh.
//!
//! The work is split so that a published connection obeys policy like any other. `heddle up` owns the
//! listening sockets, which belong to the host's namespace ([`listeners`]). The relay runs inside an
//! ordinary replica with an identity of its own, accepts from them, and connects from its own namespace
//! ([`relay`]). Between the two is a `SOCK_SEQPACKET` pair that carries the messages below, so that
//! ports come and go, and relays are replaced, while the listening sockets stay.
//!
//! Which ports are published and where they lead is the caller's business.

pub mod listeners;
pub mod relay;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use api::pod::{PodSpec, Resources, RestartPolicy};
use serde::{Deserialize, Serialize};

/// Most ports that one mesh publishes.
pub const MAX_PORTS: usize = 256;

/// The binary's hidden subcommand for the relay; its control socket is [`linux::place::inherited`] number 0.
pub const SUBCOMMAND: &str = "publish-relay";
/// The relay's pod.
pub const RELAY_UID: &str = "heddle-system/publish";

/// Namespace of Heddle's own pods.
pub const NAMESPACE: &str = "heddle-system";

/// One port to publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedPort {
    /// Port on 127.0.0.1 and `::1` of the host.
    pub host_port: u16,
    /// Where connections lead: a service's virtual address, or a replica's address.
    pub target: SocketAddr,
}

/// The relay's pod: replaced by no workload's, since the namespace is Heddle's own.
#[must_use]
pub fn relay_pod(node: &str) -> PodSpec {
    PodSpec {
        uid: RELAY_UID.into(),
        name: "publish".into(),
        namespace: NAMESPACE.into(),
        workload: "publish".into(),
        service_account: "publish".into(),
        node: node.into(),
        labels: BTreeMap::from([("app".into(), "publish".into())]),
        // Init is this program as well, so that this is the file it runs from, wherever that is.
        command: vec!["/proc/self/exe".into(), SUBCOMMAND.into()],
        env: BTreeMap::new(),
        user: Some("65534".into()),
        working_dir: None,
        files: BTreeMap::new(),
        ports: Vec::new(),
        readiness: None,
        liveness: None,
        resources: Resources::default(),
        restart_policy: RestartPolicy::Always,
        termination_grace: Duration::from_secs(1),
        template_hash: env!("CARGO_PKG_VERSION").into(),
    }
}

/// What `up` tells the relay.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Accept from the listening sockets beside this message; replaces what was said of the port before.
    Add { host_port: u16, target: SocketAddr },
    /// Accept no more. Connections that are open go on.
    Remove { host_port: u16 },
}

#[cfg(test)]
mod tests {
    use linux::netns::Netns;
    use rtnetlink::LinkUnspec;

    /// Index of the loopback interface in every namespace.
    const LOOPBACK: u32 = 1;

    /// Runs a test in a namespace of its own, where every port is free.
    pub(super) fn in_own_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send) {
        let body = || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                tokio::spawn(connection);
                let up = LinkUnspec::new_with_index(LOOPBACK).up().build();
                handle.link().change(up).execute().await.unwrap();
                test().await;
            });
        };
        Netns::create().unwrap().run(body).unwrap();
    }
}
