//! Upgrades under real connections: another version's programs and maps take over link by link, and nobody notices:
//! open connections go on, new ones are made all the while, nothing is refused and no peer becomes anonymous. An
//! agent that dies at any step leaves something that works and that the next one completes.

#![allow(clippy::unwrap_used)] // A test ends at the first thing that fails.

#[path = "../common/ground.rs"]
mod ground;
#[path = "../common/namespaces.rs"]
mod namespaces;
mod refusals;
mod world;

use kernel::{FlowEvent, FlowKind, FlowReader, Kernel, KernelConfig, MapSizes};

use crate::world::{Versions, World, nothing_refused};

/// Links that a node has.
const LINKS: usize = 13;
const OPEN: u32 = 20;

fn larger(config: &KernelConfig) -> KernelConfig {
    let sizes = &config.sizes;
    KernelConfig {
        sizes: MapSizes {
            workloads: sizes.workloads * 2,
            addresses: sizes.addresses * 2,
            services: sizes.services * 2,
            endpoints: sizes.endpoints * 2,
            verdicts: sizes.verdicts * 2,
            handshakes: sizes.handshakes * 2,
            datagrams: sizes.datagrams * 2,
            splices: sizes.splices * 2,
            affinity: sizes.affinity * 2,
            flow_bytes: sizes.flow_bytes * 2,
        },
        ..config.clone()
    }
}

/// Every connection is known by its client, on both sides.
fn check_flows(flows: &mut FlowReader) -> Vec<FlowEvent> {
    let events: Vec<FlowEvent> = flows.collect();
    for event in &events {
        assert!(
            matches!(event.kind(), Some(FlowKind::Opened | FlowKind::Closed)),
            "{event:?}"
        );
        assert!(event.established(), "{event:?}");
        assert_eq!((event.source_workload, event.policy), (1, 7), "{event:?}");
        assert_eq!(event.service, 30, "{event:?}");
    }
    events
}

/// The configuration that a version runs with.
type Sizing = fn(&KernelConfig) -> KernelConfig;

/// Goes through versions one after the other, with connections of every one of them open and new ones being made.
fn upgrade(name: &str, versions: &[(&[u8], Sizing)]) {
    let world = World::new(name);
    let mut agents = versions.iter().map(|(object, config)| {
        let (mut kernel, flows) =
            Kernel::open_object(config(&world.config()), object.to_vec()).unwrap();
        world.fill(&mut kernel.tables);
        (kernel, flows)
    });
    let (mut first, flows) = agents.next().unwrap();
    first.attach().unwrap();
    drop((first, flows));
    let mut server = world.serve();
    let mut client = world.client();
    client.ok(&format!("open {OPEN}"));
    client.ok("loop 4");
    for (mut kernel, mut flows) in agents {
        client.ok("exchange");
        kernel.attach().unwrap();
        nothing_refused(&kernel);
        client.ok("exchange");
        client.ok(&format!("open {OPEN}"));
        client.ok("exchange");
        check_flows(&mut flows);
    }
    let answer = client.ask("stop");
    let total: u64 = answer.strip_prefix("ok ").expect(&answer).parse().unwrap();
    assert!(total > 100, "{total}");
    // A server made before the upgrades serves on.
    let _ = &mut server;
    let numbers: Vec<_> = world.pins();
    for name in ["verdicts", "handshakes", "flows", "reasons", "affinity"] {
        let pins = numbers.iter().filter(|(map, _)| map == name);
        assert_eq!(pins.count(), 1, "{numbers:?}");
    }
}

#[test]
fn maps_of_another_size_take_over_under_load() {
    let object = Versions::new().compile("HEDDLE_SAME");
    let same: Sizing = KernelConfig::clone;
    upgrade(
        "size",
        &[
            (&object, same),
            (&object, larger),
            (&object, same),
            (&object, larger),
        ],
    );
}

#[test]
fn another_layout_takes_over_under_load_and_back() {
    let versions = Versions::new();
    let (this, other) = (
        versions.compile("HEDDLE_SAME"),
        versions.compile("HEDDLE_TEST_LAYOUT"),
    );
    let same: Sizing = KernelConfig::clone;
    upgrade(
        "layout",
        &[
            (&this, same),
            (&other, same),
            (&this, larger),
            (&this, larger),
        ],
    );
}

/// A connection on which nothing happens from one version to the one after the next still works there.
#[test]
fn idle_connections_survive_two_layouts() {
    let versions = Versions::new();
    let (this, other) = (
        versions.compile("HEDDLE_SAME"),
        versions.compile("HEDDLE_TEST_LAYOUT"),
    );
    let world = World::new("idle");
    let attach = |object: &[u8]| {
        let (mut kernel, flows) = Kernel::open_object(world.config(), object.to_vec()).unwrap();
        world.fill(&mut kernel.tables);
        kernel.attach().unwrap();
        (kernel, flows)
    };
    drop(attach(&this));
    let _server = world.serve();
    let mut client = world.client();
    client.ok("open 5");
    drop(attach(&other));
    drop(attach(&other));
    let (kernel, mut flows) = attach(&this);
    client.ok("exchange");
    client.ok("open 5");
    client.ok("exchange");
    nothing_refused(&kernel);
    drop(client);
    check_flows(&mut flows);
    let sockets: Vec<u32> = world
        .pins()
        .into_iter()
        .filter(|(map, _)| map == "sockets")
        .map(|(_, number)| number)
        .collect();
    assert_eq!(sockets, [1, 2, 3], "what sockets may still need is kept");
}

/// Every place where an agent can die in the middle of an upgrade.
#[test]
fn an_agent_that_dies_in_between_leaves_what_works() {
    let versions = Versions::new();
    let (this, other) = (
        versions.compile("HEDDLE_SAME"),
        versions.compile("HEDDLE_TEST_LAYOUT"),
    );
    let world = World::new("dies");
    let open = |object: &[u8], config: KernelConfig| {
        let (mut kernel, flows) = Kernel::open_object(config, object.to_vec()).unwrap();
        (world.fill(&mut kernel.tables), kernel, flows)
    };
    let (_, mut kernel, flows) = open(&this, world.config());
    kernel.attach().unwrap();
    drop((kernel, flows));
    let _server = world.serve();
    let mut client = world.client();
    client.ok(&format!("open {OPEN}"));
    client.ok("loop 2");

    // Before anything is published: the next one starts from the beginning.
    let before = world.pins();
    drop(open(&other, larger(&world.config())));
    assert_eq!(world.pins(), before);
    client.ok("exchange");

    for links in 0..=LINKS {
        let (_, mut kernel, flows) = open(&other, larger(&world.config()));
        kernel.attach_links(links).unwrap();
        drop((kernel, flows));
        client.ok("exchange");
        client.ok("open 1");
        client.ok("exchange");
    }
    let (_, mut kernel, mut flows) = open(&other, larger(&world.config()));
    kernel.attach().unwrap();
    client.ok("exchange");
    nothing_refused(&kernel);
    check_flows(&mut flows);

    // And when the upgrade is taken back halfway.
    for links in [3, 6, 9] {
        let (_, mut kernel, flows) = open(&this, world.config());
        kernel.attach_links(links).unwrap();
        drop((kernel, flows));
        client.ok("exchange");
        client.ok("open 1");
        let (_, mut kernel, flows) = open(&other, larger(&world.config()));
        kernel.attach().unwrap();
        nothing_refused(&kernel);
        drop((kernel, flows));
        client.ok("exchange");
    }
    let answer = client.ask("stop");
    assert!(answer.starts_with("ok "), "{answer}");
}

#[test]
fn counters_are_carried_over_exactly_once() {
    let versions = Versions::new();
    let objects = ["HEDDLE_SAME", "HEDDLE_TEST_LAYOUT"].map(|name| versions.compile(name));
    let world = World::new("counters");
    let open =
        |round: usize| Kernel::open_object(world.config(), objects[round % 2].clone()).unwrap();
    let refused = |kernel: &Kernel| -> u64 {
        let counts = kernel.reason_counts().unwrap();
        counts.iter().map(|(_, count)| count).sum()
    };
    let (mut first, flows) = open(0);
    first.attach().unwrap();
    // Nobody has an identity yet: each of the client's sockets is refused.
    let mut client = world.client();
    assert!(client.ask("open 1").contains("Permission"));
    let counted = refused(&first);
    assert!(counted > 0);
    drop((first, flows));
    for round in 1..=3 {
        // One that dies before it is done must not count twice.
        let (mut next, flows) = open(round);
        assert_eq!(refused(&next), counted, "round {round}, before");
        next.attach_links(round).unwrap();
        drop((next, flows));
        let (mut next, flows) = open(round);
        next.attach().unwrap();
        assert_eq!(refused(&next), counted, "round {round}");
        drop((next, flows));
    }
    let reasons = world.pins().into_iter().filter(|(map, _)| map == "reasons");
    assert_eq!(reasons.collect::<Vec<_>>(), [("reasons".into(), 4)]);
}
