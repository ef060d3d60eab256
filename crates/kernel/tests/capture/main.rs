//! What the kernel does for the agent's tunnel, under the real programs: connections that are led to the agent and what it
//! learns of them, those that it delivers to a program under a client's address, and the ports that are its own. What is
//! steered to it is in `steering`.

#![allow(clippy::unwrap_used)] // A test ends at the first thing that fails.

#[path = "../common/ground.rs"]
mod ground;
#[path = "../common/namespaces.rs"]
mod namespaces;
mod steering;
mod world;

use std::net::IpAddr;

use kernel::{
    Action, CaptureKey, CaptureKind, FlowKind, Grant, Kernel, Reason, delivery_mark, ports,
};

use crate::world::{
    Agent, OWN, OWN_ID, Program, REMOTE, REMOTE_ID, REMOTE_SET, SERVICE, SERVICE_IDS, SOURCE,
    World, address, other_version, until,
};

/// The agent's listener for captured connections.
fn listen(world: &World) -> Program {
    let mut agent = world.run("agent");
    agent.ok("listen('out', '::', 15001)");
    agent
}

/// What the agent learns must be what the program asked for.
#[track_caller]
fn expect_capture(
    agent: &Agent,
    listener: &mut Program,
    asked: (&str, u16),
    led: (&str, u16),
    service: u32,
) {
    let seen = listener.ask("accept('in', 'out')");
    let own = if led.0.contains(':') { OWN[1] } else { OWN[0] };
    assert!(seen.starts_with(&format!("{own} ")), "{seen}");
    assert!(seen.ends_with(&format!(" {own} 15001")), "{seen}");
    let grant = agent.grant(listener, "in").expect("a grant");
    let expected = Grant {
        start_ns: grant.start_ns,
        original: address(asked.0),
        original_port: asked.1,
        target: address(led.0),
        target_port: led.1,
        source_workload: OWN_ID,
        source_identity: SOURCE,
        destination_workload: REMOTE_ID,
        service,
        ..Grant::default()
    };
    assert_eq!(grant, expected);
    assert_ne!(grant.start_ns, 0);
}

#[test]
fn the_agent_learns_what_a_captured_connection_asked_for() {
    let world = World::new("capture");
    let agent = world.start();
    let mut listener = listen(&world);
    let mut app = world.run("app");
    for index in 0..2 {
        let (service, remote, own) = (SERVICE[index], REMOTE[index], OWN[index]);
        let seen = app.ask(&format!("connect('one', '{service}', 80)"));
        assert!(seen.starts_with(&format!("{own} ")), "{seen}");
        assert!(seen.ends_with(&format!(" {service} 80")), "{seen}");
        let id = SERVICE_IDS[index];
        expect_capture(&agent, &mut listener, (service, 80), (remote, 8080), id);

        // The address itself, without waiting; and bytes in both directions.
        assert_eq!(
            app.ask(&format!("begin('two', '{remote}', 7000)")),
            "EINPROGRESS"
        );
        assert_eq!(app.ask("finish('two')"), "ok");
        expect_capture(&agent, &mut listener, (remote, 7000), (remote, 7000), 0);
        app.ok("send('two', 'hello')");
        assert_eq!(listener.ask("receive('in')"), "hello");
        listener.ok("send('in', 'world')");
        assert_eq!(app.ask("receive('two')"), "world");
    }
    // An IPv4 address at an IPv6 socket.
    let mapped = format!("::ffff:{}", SERVICE[0]);
    let seen = app.ask(&format!("connect('mapped', '{mapped}', 80)"));
    assert!(seen.ends_with(" 10.96.0.1 80"), "{seen}");
    let (service, remote) = ((SERVICE[0], 80), (REMOTE[0], 8080));
    expect_capture(&agent, &mut listener, service, remote, SERVICE_IDS[0]);

    // One that is closed before it is accepted tells as much.
    let call = format!("connect('short', '{}', 80)", SERVICE[0]);
    app.ask(&call);
    app.ok("send('short', 'bye')");
    app.ok("close('short')");
    expect_capture(&agent, &mut listener, service, remote, SERVICE_IDS[0]);
    assert_eq!(listener.ask("receive('in')"), "bye");
    agent.expect_no_handshakes();
    assert_eq!(agent.flows.count(), 0, "the agent makes the records");
}

#[test]
fn nobody_vouches_for_a_stranger() {
    let world = World::new("stranger");
    let agent = world.start();
    let mut listener = listen(&world);
    let mut app = world.run("app");
    listener.ok("listen('hbone', '::', 15008)");
    for own in [OWN[0], OWN[1], "127.0.0.1", "::1"] {
        for port in [ports::OUTBOUND, ports::INBOUND] {
            let seen = app.ask(&format!("connect('one', '{own}', {port})"));
            assert_eq!(seen, "ECONNREFUSED", "{own}");
        }
        app.ask(&format!("connect('one', '{own}', 15008)"));
        listener.ask("accept('in', 'hbone')");
        assert_eq!(agent.grant(&mut listener, "in"), None, "{own}");
    }
    assert_eq!(agent.count(Reason::ReservedPort), 8);
    let mut outside = world.run_outside();
    for own in OWN {
        let before = agent.count(Reason::PeerNotAttested);
        outside.ask(&format!("begin('one', '{own}', 15001)"));
        until("dropped", || agent.count(Reason::PeerNotAttested) > before);
        outside.ok("close('one')");
        outside.ask(&format!("connect('one', '{own}', 15008)"));
        listener.ask("accept('in', 'hbone')");
        assert_eq!(agent.grant(&mut listener, "in"), None, "{own}");
    }
    assert_eq!(listener.ask("accept('in', 'out', 0)"), "nothing");
    // A socket that reuses a number has nothing of the one before.
    app.ask(&format!("connect('two', '{}', 80)", SERVICE[0]));
    listener.ask("accept('in', 'out')");
    assert!(agent.grant(&mut listener, "in").is_some());
}

#[test]
fn without_an_agent_nothing_gets_out() {
    let world = World::new("away");
    let mut agent = world.start();
    let mut outside = world.run_outside();
    outside.ok("listen('all', '::', 7000)");
    let mut app = world.run("app");
    for remote in REMOTE {
        let call = format!("connect('one', '{remote}', 7000)");
        assert_eq!(app.ask(&call), "ECONNREFUSED");
    }
    assert_eq!(agent.count(Reason::NoTunnel), 0);
    let key = CaptureKey {
        workload: OWN_ID,
        kind: CaptureKind::Agent as u32,
    };
    agent.kernel.tables.capture.remove(&key).unwrap();
    for remote in REMOTE {
        let call = format!("connect('one', '{remote}', 7000)");
        assert_eq!(app.ask(&call), "ECONNREFUSED");
    }
    assert_eq!(agent.count(Reason::NoTunnel), 2);
    assert_eq!(outside.ask("accept('one', 'all', 0.2)"), "nothing");
    agent.expect_no_handshakes();
}

#[test]
fn a_known_refusal_is_told_at_once_with_its_policy() {
    let world = World::new("refusal");
    let mut agent = world.start();
    let mut listener = listen(&world);
    let mut app = world.run("app");
    agent.verdict(SOURCE, REMOTE_SET, 8080, Action::Deny);
    agent.verdict(SOURCE, REMOTE_SET, 7000, Action::Direct);
    for (index, service) in SERVICE.into_iter().enumerate() {
        let call = format!("connect('one', '{service}', 80)");
        assert_eq!(app.ask(&call), "ECONNREFUSED");
        let told: Vec<_> = agent.flows.by_ref().collect();
        assert_eq!(told.len(), 1, "{told:#?}");
        assert_eq!(told[0].kind(), Some(FlowKind::RefusedConnect));
        assert_eq!(told[0].policy, 77);
        assert_eq!(told[0].reason, Reason::PolicyDeny as u16);
        assert_eq!(told[0].destination, address(REMOTE[index]));
        assert_eq!(told[0].destination_workload, REMOTE_ID);
        assert_eq!(told[0].original, address(service));
    }
    assert_eq!(listener.ask("accept('in', 'out', 0.2)"), "nothing");
    // What is allowed and what is not known are the other node's to decide.
    for port in [7000, 7001] {
        app.ask(&format!("connect('one', '{}', {port})", REMOTE[0]));
        let led = (REMOTE[0], port);
        expect_capture(&agent, &mut listener, led, led, 0);
    }
}

/// The agent takes one connection and no SYN beyond it.
fn stall(world: &World) -> Program {
    let mut agent = world.run("agent");
    agent.ok("listen('out', '::', 15001, backlog=0)");
    agent
}

fn begin(app: &mut Program, count: usize) {
    for number in 0..count {
        let call = format!("begin('c{number}', '{}', 80)", SERVICE[0]);
        assert_eq!(app.ask(&call), "EINPROGRESS");
    }
}

#[test]
fn grants_of_connections_that_were_given_up_are_forgotten() {
    let world = World::new("giveup");
    let agent = world.start();
    let _listener = stall(&world);
    let mut app = world.run("app");
    begin(&mut app, 6);
    assert!(agent.handshakes() >= 4, "{}", agent.handshakes());
    for number in 0..6 {
        app.ok(&format!("close('c{number}')"));
    }
    agent.expect_no_handshakes();
}

/// As for direct connections: the next SYN tries again.
#[test]
fn captured_connections_without_room_for_grants_wait() {
    let world = World::new("wait");
    let mut config = world.config();
    config.sizes.handshakes = 2;
    let agent = world.start_with(config);
    let mut listener = stall(&world);
    let mut app = world.run("app");
    begin(&mut app, 6);
    until("no room", || agent.count(Reason::HandshakesFull) > 2);
    listener.ok("held['out'].listen(64)");
    for number in 0..6 {
        let name = format!("in{number}");
        let seen = listener.ask(&format!("accept('{name}', 'out', 60)"));
        assert_ne!(seen, "nothing");
        let grant = agent.grant(&mut listener, &name).unwrap();
        assert_eq!(grant.original, address(SERVICE[0]));
        assert_eq!(app.ask(&format!("finish('c{number}')")), "ok");
    }
    agent.expect_no_handshakes();
}

#[test]
fn without_room_for_grants_nothing_goes_astray_and_all_heals() {
    let world = World::new("full");
    world.route_deliveries();
    let mut config = world.config();
    config.sizes.handshakes = 2;
    let mut agent = world.start_with(config);
    let mut listener = stall(&world);
    listener.ok("listen('steered', '::', 15006)");
    // What finds no grant on this port would be the agent's.
    agent.verdict(kernel::SOURCE_ANONYMOUS, world::OWN_SET, 0, Action::Agent);
    let steered = listener.hand("steered");
    agent
        .kernel
        .steer(OWN_ID, as_fd(&world.own.netns), as_fd(&steered))
        .unwrap();
    let mut app = world.run("app");
    app.ok("listen('server', '::', 9000)");
    begin(&mut app, 6);
    until("no room", || agent.count(Reason::HandshakesFull) > 0);

    let full = agent.count(Reason::HandshakesFull);
    let mark = delivery_mark(OWN_ID).unwrap();
    let call = format!(
        "deliver('d', '{}', '{}', 9000, {mark}, wait=False)",
        REMOTE[0], OWN[0]
    );
    listener.ask(&call);
    until("not delivered", || {
        agent.count(Reason::HandshakesFull) > full
    });
    assert_eq!(listener.ask("accept('x', 'steered', 0.3)"), "nothing");
    assert_eq!(app.ask("accept('x', 'server', 0)"), "nothing");

    for number in 0..6 {
        app.ok(&format!("close('c{number}')"));
    }
    assert_eq!(listener.ask("finish('d')"), "ok");
    let seen = app.ask("accept('x', 'server')");
    assert!(seen.starts_with(&format!("{} ", REMOTE[0])), "{seen}");
    assert_eq!(listener.ask("accept('x', 'steered', 0)"), "nothing");
    agent.expect_no_handshakes();
}

#[test]
fn what_is_delivered_comes_from_the_clients_address() {
    let world = World::new("deliver");
    world.route_deliveries();
    let mut agent = world.start();
    let mut sender = world.run("agent");
    let mut app = world.run("app");
    app.ok("listen('server', '::', 8080)");
    let mark = delivery_mark(OWN_ID).unwrap();
    for (own, remote) in OWN.into_iter().zip(REMOTE) {
        let sent = sender.ask(&format!("deliver('d', '{remote}', '{own}', 8080, {mark})"));
        assert!(sent.starts_with(&format!("{remote} ")), "{sent}");
        assert_eq!(
            app.ask("accept('in', 'server')"),
            format!("{sent} {own} 8080")
        );
        sender.ok("send('d', 'hello')");
        assert_eq!(app.ask("receive('in')"), "hello");
        app.ok("send('in', 'world')");
        assert_eq!(sender.ask("receive('d')"), "world");

        let grant = agent.grant(&mut app, "in").unwrap();
        assert_eq!(grant.reason, Reason::Delivered as u16);
        assert_eq!(
            (grant.source_workload, grant.destination_workload),
            (0, OWN_ID)
        );
        assert_eq!(IpAddr::from(grant.original).to_string(), own);
        sender.ok("close('d')");
        assert_eq!(app.ask("receive('in')"), "closed");
        app.ok("close('in')");
    }
    agent.expect_no_handshakes();
    assert_eq!(
        agent.flows.by_ref().count(),
        0,
        "the agent makes the records"
    );
    assert_eq!(agent.count(Reason::NotSpliced), 0);

    // Nobody listens there.
    for (own, remote) in OWN.into_iter().zip(REMOTE) {
        let call = format!("deliver('d', '{remote}', '{own}', 8081, {mark})");
        assert_eq!(sender.ask(&call), "ECONNREFUSED");
    }
    agent.expect_no_handshakes();
}

#[test]
fn without_its_mark_or_for_another_workload_nothing_is_delivered() {
    let world = World::new("unmarked");
    world.route_deliveries();
    let agent = world.start();
    let mut sender = world.run("agent");
    let mut app = world.run("app");
    app.ok("listen('server', '::', 8080)");
    for (mark, reason) in [
        // An anonymous peer, about whom there is no verdict.
        (0, Reason::NoVerdict),
        (delivery_mark(OWN_ID + 1).unwrap(), Reason::PeerNotAttested),
    ] {
        for (own, remote) in OWN.into_iter().zip(REMOTE) {
            let before = agent.count(reason);
            sender.ask(&format!(
                "deliver('d', '{remote}', '{own}', 8080, {mark}, wait=False)"
            ));
            until("refused", || agent.count(reason) > before);
            sender.ok("close('d')");
        }
    }
    assert_eq!(app.ask("accept('in', 'server', 0)"), "nothing");
    agent.expect_no_handshakes();
    // A program that could set marks would gain nothing.
    let (before, mark) = (
        agent.count(Reason::NoVerdict),
        delivery_mark(OWN_ID).unwrap(),
    );
    let mut other = world.run("app");
    let call = format!(
        "deliver('d', '{}', '{}', 8080, {mark}, wait=False)",
        REMOTE[0], OWN[0]
    );
    assert_eq!(other.ask(&call), "EINPROGRESS");
    until("refused", || agent.count(Reason::NoVerdict) > before);
    assert_eq!(app.ask("accept('in', 'server', 0)"), "nothing");
}

/// A grant lets in the agent's packets, and no stranger's under the same addresses and ports.
#[test]
fn a_delivery_cannot_be_joined_from_the_wire() {
    let world = World::new("forged");
    world.route_deliveries();
    let agent = world.start();
    let mut sender = world.run("agent");
    let mut app = world.run("app");
    app.ok("listen('server', '::', 8080, backlog=0)");
    let mark = delivery_mark(OWN_ID).unwrap();
    let mut outside = world.run_outside();
    for (own, remote) in OWN.into_iter().zip(REMOTE) {
        // The first one takes the only place: the second one's grant waits with its SYN.
        for name in ["first", "second"] {
            let call = format!("deliver('{name}', '{remote}', '{own}', 8080, {mark}, wait=False)");
            assert_eq!(sender.ask(&call), "EINPROGRESS");
        }
        assert_eq!(sender.ask("finish('first')"), "ok");
        assert_eq!(agent.handshakes(), 1);
        let port = sender.ask("held['second'].getsockname()[1]");
        let before = agent.count(Reason::PeerNotAttested);
        outside.ask(&format!(
            "begin('same', '{own}', 8080, ('{remote}', {port}))"
        ));
        until("refused", || agent.count(Reason::PeerNotAttested) > before);
        outside.ok("close('same')");
        assert_eq!(
            app.ask("accept('in', 'server')"),
            sender.ask("shown(held['first'].getsockname())") + &format!(" {own} 8080")
        );
        assert_eq!(sender.ask("finish('second')"), "ok");
        app.ask("accept('in', 'server')");
    }
    agent.expect_no_handshakes();
}

#[test]
fn the_agents_ports_are_its_own() {
    let world = World::new("ports");
    let agent = world.start();
    let mut refused = 0;
    for class in ["app", "l7"] {
        let mut program = world.run(class);
        for port in [ports::OUTBOUND, ports::INBOUND, ports::HBONE] {
            for address in [
                "0.0.0.0",
                "::",
                "127.0.0.1",
                "::1",
                OWN[0],
                OWN[1],
                "::ffff:127.0.0.1",
            ] {
                let call = format!("bind('{address}', {port})");
                assert_eq!(program.ask(&call), "EACCES", "{class}: {call}");
                let call = format!("bind('{address}', {port}, shared=True)");
                assert_eq!(program.ask(&call), "EACCES", "{class}: {call}");
                refused += 2;
                program.ok(&format!("bind('{address}', {port}, socket.SOCK_DGRAM)"));
            }
        }
        for port in [0, 15000, 15002, 8080] {
            program.ok(&format!("bind('::', {port})"));
            program.ok(&format!("bind('0.0.0.0', {port})"));
        }
    }
    assert_eq!(agent.count(Reason::ReservedPort), refused);
    let mut program = world.run("agent");
    for port in [ports::OUTBOUND, ports::INBOUND, ports::HBONE] {
        program.ok(&format!("bind('::', {port}, shared=True)"));
        program.ok(&format!("bind('0.0.0.0', {port})"));
    }
    assert_eq!(agent.count(Reason::ReservedPort), refused);
}

/// A connection that was accepted under one version is known under the next ones.
#[test]
fn a_successor_of_another_layout_knows_what_was_captured() {
    let world = World::new("layout");
    drop(world.start());
    let mut listener = listen(&world);
    let (mut kernel, flows) = Kernel::open_object(world.config(), other_version()).unwrap();
    drop(flows);
    kernel.attach().unwrap();
    let mut app = world.run("app");
    app.ask(&format!("connect('one', '{}', 80)", SERVICE[0]));
    let mut next = world.open(Kernel::open(world.config()).unwrap());
    let (asked, led) = ((SERVICE[0], 80), (REMOTE[0], 8080));
    expect_capture(&next, &mut listener, asked, led, SERVICE_IDS[0]);
    next.kernel.attach().unwrap();
    let grant = next.grant(&mut listener, "in").unwrap();
    assert_eq!(grant.target, address(REMOTE[0]));
    app.ask(&format!("connect('two', '{}', 80)", SERVICE[0]));
    expect_capture(&next, &mut listener, asked, led, SERVICE_IDS[0]);
    next.expect_no_handshakes();
}

fn as_fd(owner: &impl std::os::fd::AsFd) -> std::os::fd::BorrowedFd<'_> {
    owner.as_fd()
}
