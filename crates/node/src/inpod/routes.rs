//! Routes and settings in a workload's namespace for connections that the agent makes there in a client's name: they
//! come from an address that is not the workload's, and what is answered must come back to the agent's socket.
//!
//! The socket carries a mark, which the accepted socket takes over (`tcp_fwmark_accept`); a rule sends what has the mark
//! to a table in which every address is local. Packets lose the mark where they leave the namespace.

use std::{fs, io, net::IpAddr};

use futures::TryStreamExt as _;
use kernel::{DELIVERY_MARK, DELIVERY_MASK};
use linux::netns::Netns;
use rtnetlink::{
    Handle, IpVersion, RouteMessageBuilder,
    packet_route::{
        route::{RouteScope, RouteType},
        rule::{RuleAction, RuleAttribute},
    },
};

/// The table's number: nobody else makes tables in a workload's namespace.
const TABLE: u32 = 100;
/// Before the main table's rule (32766), so that it is asked first.
const PRIORITY: u32 = 100;
const LOOPBACK_INDEX: u32 = 1;
/// Accepted sockets take the mark over, and so do resets where nobody listens.
const SYSCTLS: [&str; 3] = [
    "ipv4/tcp_fwmark_accept",
    "ipv4/fwmark_reflect",
    "ipv6/fwmark_reflect",
];

/// Sets everything up; what is there already stays. Needs a tokio runtime.
pub(crate) async fn prepare(netns: &Netns, addresses: &[IpAddr]) -> io::Result<()> {
    let runtime = tokio::runtime::Handle::current();
    let (connection, handle, _) = netns.run(|| {
        for name in SYSCTLS {
            match fs::write(format!("/proc/sys/net/{name}"), "1") {
                // A machine without IPv6.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome?,
            }
        }
        let _entered = runtime.enter();
        rtnetlink::new_connection()
    })??;
    let driver = tokio::spawn(connection);
    let mut outcome = Ok(());
    for version in [IpVersion::V4, IpVersion::V6] {
        let is_v6 = version == IpVersion::V6;
        if outcome.is_ok() && addresses.iter().any(|address| address.is_ipv6() == is_v6) {
            outcome = prepare_family(&handle, version).await;
        }
    }
    driver.abort();
    outcome.map_err(io::Error::other)
}

async fn prepare_family(handle: &Handle, version: IpVersion) -> Result<(), rtnetlink::Error> {
    let everything_local = match version {
        IpVersion::V4 => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .table_id(TABLE)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .output_interface(LOOPBACK_INDEX)
            .build(),
        IpVersion::V6 => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .table_id(TABLE)
            .kind(RouteType::Local)
            .scope(RouteScope::Host)
            .output_interface(LOOPBACK_INDEX)
            .build(),
    };
    handle
        .route()
        .add(everything_local)
        .replace()
        .execute()
        .await?;

    // Rules are not replaced but added once more.
    let mut rules = handle.rule().get(version.clone()).execute();
    let mut known = false;
    while let Some(rule) = rules.try_next().await? {
        known |= rule.attributes.contains(&RuleAttribute::Priority(PRIORITY));
    }
    if known {
        return Ok(());
    }
    let rule = handle
        .rule()
        .add()
        .table_id(TABLE)
        .priority(PRIORITY)
        .fw_mark(DELIVERY_MARK)
        .action(RuleAction::ToTable);
    let mask = RuleAttribute::FwMask(DELIVERY_MASK);
    match version {
        IpVersion::V4 => {
            let mut rule = rule.v4();
            rule.message_mut().attributes.push(mask);
            rule.execute().await
        }
        IpVersion::V6 => {
            let mut rule = rule.v6();
            rule.message_mut().attributes.push(mask);
            rule.execute().await
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{SocketAddr, TcpListener},
        process::Command,
    };

    use socket2::{Domain, Socket, Type};

    use super::*;

    /// Its own loopback serves as the workload's addresses.
    async fn namespace() -> Netns {
        let netns = Netns::create().unwrap();
        netns
            .run(|| {
                for arguments in [
                    "link set lo up",
                    "address add 10.1.1.2/32 dev lo",
                    "address add fd00::2/128 dev lo nodad",
                ] {
                    let status = Command::new("ip").args(arguments.split(' ')).status();
                    assert!(status.unwrap().success(), "ip {arguments}");
                }
            })
            .unwrap();
        netns
    }

    #[tokio::test]
    async fn strangers_addresses_can_be_connected_from() {
        let netns = namespace().await;
        let addresses: [IpAddr; 2] = ["10.1.1.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        // Twice: as a restarted agent does.
        for _ in 0..2 {
            prepare(&netns, &addresses).await.unwrap();
        }
        let strangers: [SocketAddr; 2] = [
            "10.9.9.9:4000".parse().unwrap(),
            "[fd09::9]:4000".parse().unwrap(),
        ];
        for (own, stranger) in addresses.into_iter().zip(strangers) {
            let (seen, text) = netns
                .run(|| {
                    let listener = TcpListener::bind((own, 0)).unwrap();
                    let domain = Domain::for_address(stranger);
                    let socket = Socket::new(domain, Type::STREAM, None).unwrap();
                    socket.set_ip_transparent_v4(true).unwrap();
                    socket.set_mark(DELIVERY_MARK | 7).unwrap();
                    socket.bind(&stranger.into()).unwrap();
                    socket
                        .connect(&listener.local_addr().unwrap().into())
                        .unwrap();
                    let (mut accepted, seen) = listener.accept().unwrap();
                    accepted.write_all(b"back").unwrap();
                    drop(accepted);
                    let mut text = String::new();
                    (&socket).read_to_string(&mut text).unwrap();
                    (seen, text)
                })
                .unwrap();
            assert_eq!(seen, stranger);
            assert_eq!(text, "back");
        }
    }
}
