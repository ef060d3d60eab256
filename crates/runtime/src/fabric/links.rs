//! Netlink in one namespace: bridges, veth pairs, addresses, routes.
//!
//! A netlink socket belongs to the namespace it was made in, so it is made on a thread that has entered
//! that namespace and then driven by the common tokio runtime.

use std::{
    net::IpAddr,
    os::fd::{AsFd, AsRawFd},
};

use ipnet::IpNet;
use linux::netns::Netns;
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        address::AddressHeaderFlags,
        link::{BridgeStpState, InfoBridge, InfoData, InfoVeth, LinkAttribute},
    },
};
use tokio::task::AbortHandle;

use crate::error::{During, Error};

/// A connection to the kernel's network configuration of one namespace.
#[derive(Debug)]
pub(super) struct Links {
    handle: Handle,
    driver: AbortHandle,
}

/// A veth pair whose one side joins a bridge here.
pub(super) struct Veth<'a> {
    pub(super) name: String,
    pub(super) index: u32,
    pub(super) controller: u32,
    pub(super) mac: [u8; 6],
    pub(super) peer: VethEnd<'a>,
}

/// The side that lies in another namespace.
pub(super) struct VethEnd<'a> {
    pub(super) name: &'static str,
    pub(super) index: u32,
    pub(super) mac: [u8; 6],
    pub(super) netns: &'a Netns,
}

impl Links {
    pub(super) fn open(netns: &Netns) -> Result<Self, Error> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = netns
            .run(|| {
                let _entered = runtime.enter();
                rtnetlink::new_connection()
            })
            .and_then(|opened| opened)
            .during(|| "open a netlink socket".into())?;
        let driver = tokio::spawn(connection).abort_handle();
        Ok(Self { handle, driver })
    }

    pub(super) async fn up(&self, index: u32) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).up().build();
        let changed = self.handle.link().change(message).execute().await;
        changed.during(|| format!("set interface {index} up"))
    }

    /// Ports forward at once (no spanning tree), and neighbour discovery is not subject to multicast snooping.
    pub(super) async fn bridge(&self, name: &str, index: u32, mac: [u8; 6]) -> Result<(), Error> {
        let message = LinkBridge::new(name)
            .index(index)
            .address(mac.to_vec())
            .stp_state(BridgeStpState::Disabled)
            .forward_delay(0)
            .append_info_data(InfoBridge::MulticastSnooping(false))
            .build();
        let added = self.handle.link().add(message).execute().await;
        added.during(|| format!("create bridge {name}"))
    }

    /// The side here is up; the other cannot be before the pair exists.
    pub(super) async fn veth(&self, veth: &Veth<'_>) -> Result<(), Error> {
        let mut peer = LinkMessageBuilder::<LinkUnspec>::default()
            .name(veth.peer.name)
            .index(veth.peer.index)
            .address(veth.peer.mac.to_vec())
            .build();
        let netns = veth.peer.netns.as_fd().as_raw_fd();
        peer.attributes.push(LinkAttribute::NetNsFd(netns));
        let message = LinkVeth::new(&veth.name, veth.peer.name)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .index(veth.index)
            .address(veth.mac.to_vec())
            .controller(veth.controller)
            .up()
            .build();
        let added = self.handle.link().add(message).execute().await;
        added.during(|| {
            format!(
                "create the interface pair {} and {}",
                veth.name, veth.peer.name
            )
        })
    }

    pub(super) async fn delete(&self, index: u32) -> Result<(), Error> {
        let deleted = self.handle.link().del(index).execute().await;
        deleted.during(|| format!("delete interface {index}"))
    }

    /// The address can be bound when this returns. Without the flag an IPv6 address is tentative until the kernel
    /// has come round to see that duplicates are not to be looked for.
    pub(super) async fn address(
        &self,
        index: u32,
        address: IpAddr,
        prefix: u8,
    ) -> Result<(), Error> {
        let mut request = self.handle.address().add(index, address, prefix);
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        let added = request.execute().await;
        added.during(|| format!("add address {address}/{prefix} to interface {index}"))
    }

    pub(super) async fn route(&self, to: IpNet, via: IpAddr) -> Result<(), Error> {
        let failed = || format!("add a route to {to} via {via}");
        let message = RouteMessageBuilder::<IpAddr>::new()
            .destination_prefix(to.addr(), to.prefix_len())
            .and_then(|message| message.gateway(via))
            .map_err(|error| Error::Io {
                what: failed(),
                source: std::io::Error::new(std::io::ErrorKind::InvalidInput, error),
            })?
            .build();
        let added = self.handle.route().add(message).execute().await;
        added.during(failed)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.driver.abort();
    }
}
