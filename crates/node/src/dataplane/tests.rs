//! The tables themselves, in real maps: what the agent tells the kernel, read back.

mod services;
mod verdicts;

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::Arc,
};

use api::mesh::MeshConfig;
use kernel::{Kernel, KernelConfig, MapSizes};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prost::Message;
use xds::{
    client::Upsert,
    proto::{
        ADDRESS_TYPE, address_to_bytes,
        workload::{Address, NetworkAddress, Port, PortList, Service, Workload, address::Type},
    },
};

use super::*;
use crate::ids::Ids;

const NODE: &str = "one";

/// A bpffs of the test's own, gone at the end.
struct Ground(tempfile::TempDir);

impl Ground {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let none = None::<&str>;
        mount(Some("bpf"), dir.path(), Some("bpf"), MsFlags::empty(), none)
            .expect("mounting a bpffs needs root");
        Self(dir)
    }

    /// An agent's data plane, as at its start.
    fn open(&self, state_dir: &Path, sizes: MapSizes) -> DataPlane {
        open(self.0.path(), state_dir, sizes)
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn open(bpffs: &Path, state_dir: &Path, sizes: MapSizes) -> DataPlane {
    let (kernel, _flows) = Kernel::open(KernelConfig {
        pin_dir: bpffs.join("node"),
        cgroup: bpffs.into(),
        sizes,
    })
    .unwrap();
    let ids = Ids::open(&state_dir.join("ids.json")).unwrap();
    let names = Arc::new(NameBook::default());
    DataPlane::new(kernel, ids, MeshConfig::default(), NODE.into(), names)
}

/// Tells the state of it, and puts it into effect.
fn apply(plane: &mut DataPlane, state: &mut MeshState, type_url: &str, upserts: &[Upsert]) {
    let mut changes = Changes::default();
    state.take(type_url, upserts, &[], &mut changes).unwrap();
    plane.apply(state, &changes);
}

fn remove(plane: &mut DataPlane, state: &mut MeshState, type_url: &str, name: String) {
    let mut changes = Changes::default();
    state.take(type_url, &[], &[name], &mut changes).unwrap();
    plane.apply(state, &changes);
}

fn vip() -> IpAddr {
    Ipv4Addr::new(10, 96, 0, 1).into()
}

fn service(affinity: u32) -> Upsert {
    let options = xds::proto::heddle::ServiceOptions {
        session_affinity_seconds: affinity,
        ..Default::default()
    };
    let extension = xds::proto::workload::Extension::pack(xds::proto::SERVICE_OPTIONS, &options);
    upsert(
        SERVICE.into(),
        Type::Service(Service {
            name: "svc".into(),
            namespace: "ns".into(),
            addresses: vec![NetworkAddress {
                address: address_to_bytes(vip()),
                ..NetworkAddress::default()
            }],
            ports: vec![port()],
            extensions: vec![extension],
            ..Service::default()
        }),
    )
}

const SERVICE: &str = "ns/svc.ns.svc.cluster.local";

fn port() -> Port {
    Port {
        service_port: 80,
        target_port: 8080,
        ..Port::default()
    }
}

fn replica_name(number: u32) -> String {
    format!("Kubernetes//Pod/ns/pod-{number}")
}

fn replica_address(number: u32) -> IpAddr {
    Ipv4Addr::from(0x0af4_0000 + number).into()
}

fn replica(number: u32, weight: u32, node: &str) -> Upsert {
    let ports = PortList {
        ports: vec![port()],
    };
    upsert(
        replica_name(number),
        Type::Workload(Workload {
            name: format!("pod-{number}"),
            namespace: "ns".into(),
            node: node.into(),
            addresses: vec![address_to_bytes(replica_address(number))],
            services: [(SERVICE.to_owned(), ports)].into_iter().collect(),
            capacity: Some(weight),
            ..Workload::default()
        }),
    )
}

fn upsert(name: String, of: Type) -> Upsert {
    let address = Address { r#type: Some(of) };
    Upsert {
        name,
        body: address.encode_to_vec().into(),
    }
}

fn add(plane: &mut DataPlane, state: &mut MeshState, upserts: &[Upsert]) {
    apply(plane, state, ADDRESS_TYPE, upserts);
}
