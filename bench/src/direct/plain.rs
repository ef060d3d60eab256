//! The bare baseline: a server and a client namespace, each with a veth on the bridge of a third. That is how a
//! node joins its workloads, without any of Heddle's code, cgroups or eBPF.

use std::{
    io::{BufRead, BufReader},
    net::{IpAddr, Ipv4Addr},
    os::fd::{AsFd, AsRawFd},
    process::{Child, Command, Output, Stdio},
};

use anyhow::{Context, ensure};
use futures::TryStreamExt;
use linux::netns::Netns;
use rtnetlink::{Handle, LinkBridge, LinkUnspec, LinkVeth};

use super::Side;
use crate::scenario::{Ends, PORT};

pub(crate) const SERVER_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const CLIENT_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const PREFIX_LENGTH: u8 = 24;

/// The namespaces; they go with their last descriptors.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) server: Netns,
    pub(crate) client: Netns,
    // Held for the bridge in it.
    _switch: Netns,
}

impl Network {
    pub(crate) fn create() -> anyhow::Result<Self> {
        let create = || Netns::create().context("cannot make a network namespace");
        let (switch, server, client) = (create()?, create()?, create()?);
        switch.run(|| {
            with_netlink(async |netlink| build_switch(&netlink, &[&server, &client]).await)
        })??;
        for (namespace, address) in [(&server, SERVER_ADDRESS), (&client, CLIENT_ADDRESS)] {
            namespace.run(|| with_netlink(async |netlink| bring_up(&netlink, address).await))??;
        }
        Ok(Self {
            server,
            client,
            _switch: switch,
        })
    }
}

/// The running baseline. Dropping it ends the server.
pub(super) struct Plain {
    network: Network,
    server_process: Child,
    ends: Ends,
}

impl Plain {
    /// Makes the namespaces and starts the server.
    pub(super) fn start(ends: &Ends) -> anyhow::Result<Self> {
        let network = Network::create()?;
        let server_process = network.server.run(|| start_server(ends))??;
        Ok(Self {
            network,
            server_process,
            ends: ends.clone(),
        })
    }
}

impl Side for Plain {
    fn client(&self, arguments: &[String]) -> anyhow::Result<Output> {
        self.network.client.run(|| {
            Command::new(&self.ends.program)
                .args(arguments)
                .output()
                .context("cannot start the client of the baseline")
        })?
    }

    fn target(&self) -> String {
        format!("{SERVER_ADDRESS}:{PORT}")
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        // It can only have ended already, which is as good.
        let _ = self.server_process.kill();
        let _ = self.server_process.wait();
    }
}

/// Starts the server where the calling thread is, and returns when it listens.
pub(crate) fn start_server(ends: &Ends) -> anyhow::Result<Child> {
    let mut process = Command::new(&ends.program)
        .args(ends.server_arguments())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the server of the baseline")?;
    let mut line = String::new();
    if let Some(output) = process.stdout.take() {
        BufReader::new(output).read_line(&mut line)?;
    }
    ensure!(
        line.starts_with("listening"),
        "the server of the baseline did not start"
    );
    Ok(process)
}

/// Runs `body` with a netlink socket of the namespace that the calling thread is in.
fn with_netlink<T>(body: impl AsyncFnOnce(Handle) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("cannot open a netlink socket")?;
        let connection = tokio::spawn(connection);
        let result = body(handle).await;
        connection.abort();
        result
    })
}

/// A bridge, and for each endpoint a veth whose other side, `eth0`, is in the endpoint's namespace.
async fn build_switch(netlink: &Handle, endpoints: &[&Netns]) -> anyhow::Result<()> {
    let bridge = LinkBridge::new("bridge").up().build();
    netlink.link().add(bridge).execute().await?;
    let bridge = link_index(netlink, "bridge").await?;
    for (number, endpoint) in endpoints.iter().enumerate() {
        let name = format!("port{number}");
        let veth = LinkVeth::new(&name, "eth0").build();
        netlink.link().add(veth).execute().await?;
        let moved = LinkUnspec::new_with_index(link_index(netlink, "eth0").await?)
            .setns_by_fd(endpoint.as_fd().as_raw_fd())
            .build();
        netlink.link().set(moved).execute().await?;
        let joined = LinkUnspec::new_with_index(link_index(netlink, &name).await?)
            .controller(bridge)
            .up()
            .build();
        netlink.link().set(joined).execute().await?;
    }
    Ok(())
}

async fn bring_up(netlink: &Handle, address: Ipv4Addr) -> anyhow::Result<()> {
    let eth0 = link_index(netlink, "eth0").await?;
    netlink
        .address()
        .add(eth0, IpAddr::V4(address), PREFIX_LENGTH)
        .execute()
        .await?;
    for link in [link_index(netlink, "lo").await?, eth0] {
        let up = LinkUnspec::new_with_index(link).up().build();
        netlink.link().set(up).execute().await?;
    }
    Ok(())
}

async fn link_index(netlink: &Handle, name: &str) -> anyhow::Result<u32> {
    let mut links = netlink.link().get().match_name(name.to_owned()).execute();
    let link = links
        .try_next()
        .await?
        .with_context(|| format!("the link {name} is missing"))?;
    Ok(link.header.index)
}
