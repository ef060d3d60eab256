//! The ports of a Workload: the list `ports`, and the shorthand `publish: ["8080:80"]`.

use crate::{
    decode::{Cursor, Name, port as parse_port, shorten},
    objects::service::protocol,
    pod::{PodPort, Protocol},
};

/// Most ports of one workload, and most of its published ports. What is beyond is refused: every port is compared with every other.
const MAX_PORTS: usize = 256;

/// Reads both fields into one list: a `publish` adds to the port that it names, or a port.
pub(super) fn decode(ports: Option<Cursor<'_>>, publish: Option<Cursor<'_>>) -> Vec<PodPort> {
    let mut list: Vec<PodPort> = Vec::new();
    for item in bounded_items(ports) {
        let port = decode_port(&item);
        if list.iter().any(|other| same_port(other, &port)) {
            let message = format!("port {} is given twice", port.port);
            item.error(message, "every port once per protocol");
        }
        if let Some(name) = &port.name {
            let twice = list.iter().any(|other| other.name.as_ref() == Some(name));
            if twice {
                item.error(
                    format!("the name `{name}` is given to two ports"),
                    "a name of its own",
                );
            }
        }
        check_host_port(&item, &list, &port);
        list.push(port);
    }
    for item in bounded_items(publish) {
        let Some(published) = decode_shorthand(&item) else {
            continue;
        };
        check_host_port(&item, &list, &published);
        match list.iter_mut().find(|known| same_port(known, &published)) {
            Some(known) if known.publish.is_some() => {
                let message = format!("port {} is published already", known.port);
                item.error(message, "one host port for each port");
            }
            Some(known) => known.publish = published.publish,
            None => list.push(published),
        }
    }
    list
}

fn bounded_items(list: Option<Cursor<'_>>) -> Vec<Cursor<'_>> {
    let Some(list) = list else {
        return Vec::new();
    };
    let mut items = list.items();
    if items.len() > MAX_PORTS {
        let message = format!("has {} items", items.len());
        list.error(message, format!("at most {MAX_PORTS}"));
        items.truncate(MAX_PORTS);
    }
    items
}

fn decode_port(cursor: &Cursor<'_>) -> PodPort {
    let mut fields = cursor.fields();
    let name = fields.get("name").map(|name| name.name(Name::Port));
    let port = fields.require("port", "the port that the program listens on");
    let protocol = fields.get("protocol").map(|value| protocol(&value));
    let publish = fields.get("publish").map(|publish| publish.port());
    fields.unsupported(
        "containerPort",
        "the port that the program listens on is named `port` here",
        "`port`",
    );
    fields.finish();
    PodPort {
        name,
        port: port.map_or(0, |port| port.port()),
        protocol: protocol.unwrap_or_default(),
        publish,
    }
}

/// `HOST:PORT`, with `/tcp` or `/udp` after it if wanted.
fn decode_shorthand(cursor: &Cursor<'_>) -> Option<PodPort> {
    let text = cursor.text()?;
    let (ports, protocol) = match text.split_once('/') {
        None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Some(Protocol::Tcp)),
        Some((ports, "udp")) => (ports, Some(Protocol::Udp)),
        Some(_) => (text, None),
    };
    let read = || {
        let (host, port) = ports.split_once(':')?;
        Some(PodPort {
            name: None,
            port: parse_port(port)?,
            protocol: protocol?,
            publish: Some(parse_port(host)?),
        })
    };
    let published = read();
    if published.is_none() {
        let found = shorten(text);
        let expected = "HOST:PORT with ports from 1 to 65535, such as 8080:80 or 5353:53/udp";
        cursor.error(format!("{found} is not a published port"), expected);
    }
    published
}

/// Whether both name the same port of the program; one that could not be read is 0 and equals none.
fn same_port(one: &PodPort, other: &PodPort) -> bool {
    one.port != 0 && one.port == other.port && one.protocol == other.protocol
}

fn check_host_port(cursor: &Cursor<'_>, list: &[PodPort], port: &PodPort) {
    let taken = |other: &&PodPort| other.publish == port.publish && other.protocol == port.protocol;
    if let (Some(host_port @ 1..), Some(other)) = (port.publish, list.iter().find(taken)) {
        let message = format!("host port {host_port} already leads to port {}", other.port);
        cursor.error(message, "every host port once");
    }
}
