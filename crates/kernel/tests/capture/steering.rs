//! What arrives from outside of the node: which connections go to the agent's listener, and that a successor takes over
//! without refusing one.

use std::os::fd::AsFd;

use kernel::{Action, Kernel, KernelConfig, KernelError, Reason, SOURCE_ANONYMOUS, delivery_mark};

use crate::world::{
    Agent, OUTSIDE, OWN, OWN_ID, OWN_SET, Program, REMOTE, World, other_version, until,
};

/// A port that the agent must look at.
const ASKED: u16 = 8080;
/// One that anybody may use.
const OPEN: u16 = 8081;
/// One that nobody may.
const SHUT: u16 = 8082;

/// The agent's listener, and the program's on every port.
fn listen(world: &World, agent: &mut Agent) -> (Program, Program) {
    rules(agent);
    let mut app = world.run("app");
    for port in [ASKED, OPEN, SHUT] {
        app.ok(&format!("listen({port}, '::', {port})"));
    }
    let mut listener = world.run("agent");
    listener.ok("listen('in', '::', 15006, shared=True)");
    steer(world, agent, &mut listener, "in");
    (listener, app)
}

fn rules(agent: &mut Agent) {
    agent.verdict(SOURCE_ANONYMOUS, OWN_SET, ASKED, Action::Agent);
    agent.verdict(SOURCE_ANONYMOUS, OWN_SET, OPEN, Action::Direct);
    agent.verdict(SOURCE_ANONYMOUS, OWN_SET, SHUT, Action::Deny);
}

fn steer(world: &World, agent: &mut Agent, listener: &mut Program, name: &str) {
    let socket = listener.hand(name);
    let kernel = &mut agent.kernel;
    kernel
        .steer(OWN_ID, world.own.netns.as_fd(), socket.as_fd())
        .unwrap();
}

fn taken(listener: &mut Program) -> u32 {
    listener.ask("taken('in')").parse().unwrap()
}

fn dial(own: &str, port: u16) -> String {
    format!("connect('one', '{own}', {port})")
}

#[test]
fn what_policy_wants_looked_at_goes_to_the_agents_listener() {
    let world = World::new("steer");
    let mut agent = world.start();
    let (mut listener, mut app) = listen(&world, &mut agent);
    assert_eq!(agent.kernel.steered().unwrap(), [OWN_ID]);
    let mut outside = world.run_outside();
    for (own, stranger) in OWN.into_iter().zip(OUTSIDE) {
        let seen = outside.ask(&dial(own, ASKED));
        assert!(seen.ends_with(&format!(" {own} {ASKED}")), "{seen}");
        // Both addresses are the real ones.
        let seen = listener.ask("accept('one', 'in')");
        assert!(seen.starts_with(&format!("{stranger} ")), "{seen}");
        assert!(seen.ends_with(&format!(" {own} {ASKED}")), "{seen}");
        assert_eq!(agent.grant(&mut listener, "one"), None);
        outside.ok("send('one', 'hello')");
        assert_eq!(listener.ask("receive('one')"), "hello");

        outside.ask(&dial(own, OPEN));
        let seen = app.ask(&format!("accept('one', {OPEN})"));
        assert!(seen.starts_with(&format!("{stranger} ")), "{seen}");

        let denied = agent.count(Reason::PolicyDeny);
        let call = format!("begin('two', '{own}', {SHUT})");
        assert_eq!(outside.ask(&call), "EINPROGRESS");
        until("refused", || agent.count(Reason::PolicyDeny) > denied);

        // Its own port is the agent's in any case.
        outside.ask(&dial(own, 15006));
        let seen = listener.ask("accept('one', 'in')");
        assert!(seen.ends_with(&format!(" {own} 15006")), "{seen}");
    }
    // Whom the program itself calls within the workload is its own.
    for own in [OWN[0], OWN[1], "127.0.0.1", "::1"] {
        app.ask(&dial(own, ASKED));
        let seen = app.ask(&format!("accept('two', {ASKED})"));
        assert!(seen.starts_with(&format!("{own} ")), "{seen}");
    }
    assert_eq!(listener.ask("waiting('in')"), "[0]");
    assert_eq!(
        app.ask(&format!("waiting({ASKED}, {OPEN}, {SHUT})")),
        "[0, 0, 0]"
    );
    assert_eq!(agent.count(Reason::NoCaptureTarget), 0);
}

#[test]
fn what_the_agent_delivers_is_not_led_back_to_it() {
    let world = World::new("back");
    world.route_deliveries();
    let mut agent = world.start();
    let (mut listener, mut app) = listen(&world, &mut agent);
    let mark = delivery_mark(OWN_ID).unwrap();
    for (own, remote) in OWN.into_iter().zip(REMOTE) {
        let call = format!("deliver('one', '{remote}', '{own}', {ASKED}, {mark})");
        let sent = listener.ask(&call);
        let seen = app.ask(&format!("accept('one', {ASKED})"));
        assert_eq!(seen, format!("{sent} {own} {ASKED}"));
        listener.ok("send('one', 'hello')");
        assert_eq!(app.ask("receive('one')"), "hello");
    }
    assert_eq!(listener.ask("waiting('in')"), "[0]");
    agent.expect_no_handshakes();
}

#[test]
fn connections_are_spread_over_listeners_that_share_a_port() {
    let world = World::new("group");
    let mut agent = world.start();
    let (mut listener, _app) = listen(&world, &mut agent);
    listener.ok("listen('other', '::', 15006, shared=True)");
    let mut outside = world.run_outside();
    for own in OWN {
        for number in 0..32 {
            outside.ask(&format!("connect({number}, '{own}', {ASKED})"));
        }
        let counts = listener.ask("waiting('in', 'other')");
        let counts: Vec<u32> = counts
            .trim_matches(['[', ']'])
            .split(", ")
            .map(|count| count.parse().unwrap())
            .collect();
        assert_eq!(counts.iter().sum::<u32>(), 32, "{counts:?}");
        assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    }
}

#[test]
fn without_a_listener_what_would_be_steered_is_refused() {
    let world = World::new("gone");
    let mut agent = world.start();
    let (mut listener, mut app) = listen(&world, &mut agent);
    let mut outside = world.run_outside();
    listener.ok("close('in')");
    assert_eq!(outside.ask(&dial(OWN[0], ASKED)), "ECONNREFUSED");
    assert_eq!(outside.ask(&dial(OWN[1], ASKED)), "ECONNREFUSED");
    assert!(agent.count(Reason::NoCaptureTarget) >= 2);

    // Without steering the program's side refuses, as it does for all that is not plainly allowed.
    agent.kernel.unsteer(OWN_ID).unwrap();
    agent.kernel.unsteer(OWN_ID).unwrap();
    assert!(agent.kernel.steered().unwrap().is_empty());
    let attached = agent.kernel.attached().iter();
    assert!(
        !attached
            .into_iter()
            .any(|one| one.program == "heddle_steer")
    );
    until("refused by ingress", || {
        outside.ask(&format!("begin('two', '{}', {ASKED})", OWN[0]));
        outside.ok("close('two')");
        agent.count(Reason::NeedsAgent) > 0
    });
    assert_eq!(app.ask(&format!("waiting({ASKED})")), "[0]");

    // And it can begin again.
    listener.ok("listen('in', '::', 15006)");
    steer(&world, &mut agent, &mut listener, "in");
    outside.ask(&dial(OWN[0], ASKED));
    assert_ne!(listener.ask("accept('one', 'in')"), "nothing");
}

#[test]
fn what_does_not_listen_cannot_be_steered_to() {
    let world = World::new("closed");
    let mut agent = world.start();
    let mut program = world.run("agent");
    program.ok("held.__setitem__('in', socket.socket())");
    let socket = program.hand("in");
    let outcome = agent
        .kernel
        .steer(OWN_ID, world.own.netns.as_fd(), socket.as_fd());
    assert!(
        matches!(
            outcome,
            Err(KernelError::Batch {
                table: "inbound",
                ..
            })
        ),
        "{outcome:?}"
    );
    assert!(agent.kernel.steered().unwrap().is_empty());

    // Room for one workload each, and no more.
    program.ok("listen('in', '::', 15006)");
    let socket = program.hand("in");
    let mut steer = |workload| {
        let kernel = &mut agent.kernel;
        kernel.steer(workload, world.own.netns.as_fd(), socket.as_fd())
    };
    for workload in (1..=8).chain(1..=8) {
        steer(workload).unwrap();
    }
    let outcome = steer(9);
    assert!(
        matches!(
            outcome,
            Err(KernelError::Full {
                table: "inbound",
                capacity: 8,
                ..
            })
        ),
        "{outcome:?}"
    );
}

fn larger(config: KernelConfig) -> KernelConfig {
    let mut larger = config;
    larger.sizes.workloads *= 2;
    larger.sizes.handshakes *= 2;
    larger
}

/// Connections come in all the while, and each is taken by one of the listeners.
#[test]
fn a_successor_takes_over_without_refusing_one() {
    let world = World::new("next");
    world.route_deliveries();
    let mut agent = world.start();
    let (listener, mut app) = listen(&world, &mut agent);
    let mut listeners = vec![listener];
    let mut callers = [world.run_outside(), world.run_outside()];
    for (caller, own) in callers.iter_mut().zip(OWN) {
        caller.ok(&format!("call_always('{own}', {ASKED})"));
    }
    listeners[0].ok("take_always('in')");
    let other = other_version();
    let same: fn(KernelConfig) -> KernelConfig = |config| config;
    for (port, object, config) in [
        (15016, None, same),
        (15026, None, larger),
        (15036, Some(other.clone()), larger),
        (15046, None, same),
    ] {
        drop(agent);
        let config = config(world.config());
        let opened = match object {
            Some(object) => Kernel::open_object(config, object),
            None => Kernel::open(config),
        };
        agent = world.open(opened.unwrap());
        rules(&mut agent);
        let mut next = world.run("agent");
        next.ok(&format!("listen('in', '::', {port})"));
        next.ok("take_always('in')");
        steer(&world, &mut agent, &mut next, "in");
        agent.kernel.attach().unwrap();
        assert_eq!(agent.kernel.steered().unwrap(), [OWN_ID]);
        let steering = agent.kernel.attached().iter();
        let steering = steering.filter(|one| one.program == "heddle_steer");
        assert_eq!(steering.count(), 1);
        let mark = delivery_mark(OWN_ID).unwrap();
        let call = format!(
            "deliver('one', '{}', '{}', {ASKED}, {mark})",
            REMOTE[0], OWN[0]
        );
        let sent = next.ask(&call);
        let seen = app.ask(&format!("accept('one', {ASKED})"));
        assert_eq!(seen, format!("{sent} {} {ASKED}", OWN[0]));
        // The successor is alone from now on.
        let before: Vec<u32> = listeners.iter_mut().map(taken).collect();
        until("the successor is asked", || taken(&mut next) > 100);
        let after: Vec<u32> = listeners.iter_mut().map(taken).collect();
        let late = |(before, after): (&u32, &u32)| after - before;
        // What was on its way.
        assert!(before.iter().zip(&after).map(late).sum::<u32>() < 8);
        listeners.push(next);
    }
    for caller in &mut callers {
        let called = caller.ask("stop_calling()");
        let calls: u32 = called.strip_prefix("ok ").expect(&called).parse().unwrap();
        assert!(calls > 100, "{calls}");
    }
    assert_eq!(agent.count(Reason::NoCaptureTarget), 0);
    assert_eq!(app.ask(&format!("waiting({ASKED})")), "[0]");
}

#[test]
fn a_namespace_that_is_gone_is_forgotten() {
    let world = World::new("dead");
    let mut agent = world.start();
    let (listener, app) = listen(&world, &mut agent);
    drop((listener, app, agent));
    let elsewhere = World::new("dead-2");
    // The number has come to another namespace.
    let mut agent = elsewhere.open(Kernel::open(world.config()).unwrap());
    rules(&mut agent);
    let mut listener = elsewhere.run("agent");
    listener.ok("listen('in', '::', 15006)");
    let socket = listener.hand("in");
    let netns = elsewhere.own.netns.as_fd();
    agent.kernel.steer(OWN_ID, netns, socket.as_fd()).unwrap();
    agent.kernel.attach().unwrap();
    let mut outside = elsewhere.run_outside();
    outside.ask(&dial(OWN[0], ASKED));
    assert_ne!(listener.ask("accept('one', 'in')"), "nothing");
    drop((listener, outside, agent, socket));

    drop(elsewhere);
    let mut agent = world.start();
    until("the link of no namespace is gone", || {
        agent.kernel.attach().unwrap();
        agent.kernel.steered().unwrap().is_empty()
    });
}
