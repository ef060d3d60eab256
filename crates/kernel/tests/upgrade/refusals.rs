//! What the kernel has no room for, or refuses: connections that wait for room, handshakes that nobody finishes,
//! programs that the verifier does not like.

use std::time::{Duration, Instant};

use kernel::{Kernel, KernelConfig, KernelError, Reason};

use crate::{
    ground,
    world::{Talk, Versions, World, nothing_refused},
};

const HANDSHAKES: u32 = 4;
const BEGUN: u32 = 12;
const PATIENCE: Duration = Duration::from_secs(60);

/// A world whose map of handshakes is full: the server takes one connection and lets the others wait.
struct Full {
    world: World,
    kernel: Kernel,
    server: Talk,
    client: Talk,
}

impl Full {
    fn new(name: &str) -> Self {
        let world = World::new(name);
        let mut config = world.config();
        config.sizes.handshakes = HANDSHAKES;
        let (mut kernel, _flows) = Kernel::open(config).unwrap();
        world.fill(&mut kernel.tables);
        kernel.attach().unwrap();
        let server = world.stall();
        let mut client = world.client();
        client.ok("begin 1");
        wait(
            "the first one is taken",
            || client.ask("connected"),
            "1 of 1, 0 failed",
        );
        client.ok(&format!("begin {BEGUN}"));
        Self {
            world,
            kernel,
            server,
            client,
        }
    }

    fn handshakes(&self) -> Option<usize> {
        let uses = self.kernel.count_live_maps().unwrap();
        uses.iter().find(|used| used.map == "handshakes")?.entries
    }

    fn count(&self, reason: Reason) -> u64 {
        ground::count(&self.kernel, reason)
    }
}

fn wait(what: &str, mut look: impl FnMut() -> String, wanted: &str) {
    let start = Instant::now();
    loop {
        let seen = look();
        if seen == wanted {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{what}: {seen}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A connection without room waits, and its next SYN tries again: when there is room, all get through.
#[test]
fn handshakes_without_room_are_refused_counted_and_heal() {
    let mut full = Full::new("handshakes");
    assert_eq!(full.handshakes(), Some(HANDSHAKES as usize));
    assert!(full.count(Reason::HandshakesFull) >= u64::from(BEGUN - HANDSHAKES));
    assert_eq!(full.client.ask("connected"), "1 of 13, 0 failed");
    full.server.tell("accept");
    let client = &mut full.client;
    wait(
        "all are connected",
        || client.ask("connected"),
        "13 of 13, 0 failed",
    );
    wait(
        "nothing is left over",
        || format!("{:?}", full.handshakes()),
        "Some(0)",
    );
    drop(full.world);
}

#[test]
fn handshakes_that_nobody_finishes_are_swept() {
    let full = Full::new("sweep");
    let hour = Duration::from_secs(3600);
    assert_eq!(full.kernel.sweep_handshakes(hour).unwrap(), 0);
    assert_eq!(full.handshakes(), Some(HANDSHAKES as usize));
    let swept = full.kernel.sweep_handshakes(Duration::ZERO).unwrap();
    assert_eq!(swept, HANDSHAKES as usize);
    assert_eq!(full.handshakes(), Some(0));
}

/// The verifier's no leaves everything as it was, and its words are in the error.
#[test]
fn a_program_that_the_verifier_refuses_changes_nothing() {
    let refused = Versions::new().compile_with(
        "SEC(\"cgroup/getpeername4\") int heddle_reads_too_far(struct bpf_sock_addr *ctx)
         { __u32 id = 1; struct workload_entry *w = bpf_map_lookup_elem(&workloads, &id); return w->netns & 1; }",
    );
    let world = World::new("verifier");
    let (mut kernel, flows) = Kernel::open(world.config()).unwrap();
    world.fill(&mut kernel.tables);
    kernel.attach().unwrap();
    drop((kernel, flows));
    let _server = world.serve();
    let mut client = world.client();
    client.ok("open 3");
    let before = world.pins();
    let larger = KernelConfig {
        sizes: kernel::MapSizes {
            verdicts: 128,
            ..world.config().sizes
        },
        ..world.config()
    };
    let error = Kernel::open_object(larger, refused).map(drop).unwrap_err();
    assert!(
        matches!(&error, KernelError::Program { program, words, .. }
            if program == "heddle_reads_too_far" && words.contains("invalid mem access 'map_value_or_null'")),
        "{error}"
    );
    assert_eq!(world.pins(), before);
    client.ok("exchange");
    client.ok("open 3");
    client.ok("exchange");
    let (kernel, _flows) = Kernel::open(world.config()).unwrap();
    assert!(kernel.has_predecessor());
    nothing_refused(&kernel);
}
