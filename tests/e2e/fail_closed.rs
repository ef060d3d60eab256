//! What is full, missing or broken: it is decided (docs/failures.md), told by `heddle status`, and nothing that is in
//! force changes. When there is room again, it heals by itself.

use std::{collections::BTreeMap, fs, path::PathBuf, process::Command};

use linux::pidfd::PidFd;
use nix::{
    mount::{MntFlags, umount2},
    sys::signal::Signal,
};
use serde_json::Value;

use crate::harness::{
    Mesh, Outcome, PATIENCE, heddle, leftovers,
    objects::{allow, client, namespace, policy, server, service},
    until,
};

const NODE: &str = "node-1";
const REFUSED: &str = "ECONNREFUSED";
const MAPS: [&str; 20] = [
    "addresses",
    "affinity",
    "capture",
    "cgroups",
    "datagrams",
    "devices",
    "endpoints",
    "flows",
    "handshakes",
    "inbound",
    "peers",
    "reasons",
    "services",
    "slots",
    "sockets",
    "splice_pairs",
    "splice_sockets",
    "splices",
    "verdicts",
    "workloads",
];

/// alice may talk to web, bob may not.
fn shop() -> String {
    [
        namespace("shop"),
        client("shop/alice", ""),
        client("shop/bob", ""),
        server("shop/web", &[8000], "  replicas: 2\n"),
        service("shop/web", &[(80, 8000)]),
        policy("shop/web", "web", &allow(&["shop/alice"])),
    ]
    .concat()
}

/// A mesh and what it must go on doing while the test does its worst.
struct Shop {
    mesh: Mesh,
    web: String,
}

impl Shop {
    fn start(topic: &str, arguments: &[&str]) -> Self {
        let mesh = Mesh::start_with(topic, &[("shop.yaml", &shop())], arguments);
        let web = mesh.virtual_address("alice", "web");
        Self { mesh, web }
    }

    /// What was allowed is, what was not is not.
    #[track_caller]
    fn holds(&self) {
        self.mesh.connect("alice", &self.web, 80).greeting();
        self.mesh.connect("bob", &self.web, 80).failed(REFUSED);
    }

    fn node_dir(&self) -> PathBuf {
        leftovers::run_dir(self.mesh.name())
            .join("nodes")
            .join(NODE)
    }

    fn kill_agent(&self, signal: Signal) -> u32 {
        let pid = self.mesh.node(NODE).pid;
        PidFd::open(pid).unwrap().signal(signal).unwrap();
        pid
    }

    /// Waits for another agent than `old`, with all that is to be enrolled.
    fn until_taken_over(&self, old: u32) {
        self.mesh
            .until_status("another agent has taken over", |status| {
                status.nodes[0].status.as_ref().is_some_and(|agent| {
                    agent.pid != old && agent.synced && agent.enrolled.len() >= 4
                })
            });
    }

    /// Waits until the agent cannot start, and returns what status says of it.
    fn until_away(&self, words: &str) -> String {
        until(words, PATIENCE, || {
            let error = self.mesh.status().nodes[0].error.clone();
            let error = error.unwrap_or_default();
            if error.contains(words) {
                Ok(error)
            } else {
                Err(error)
            }
        })
    }

    /// Gives the node's agent other map sizes, and kills it: the next one has them.
    fn resize(&self, sizes: &BTreeMap<&str, u64>) {
        let path = self.node_dir().join("agent.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (name, size) in sizes {
            assert!(config["maps"][name].is_u64(), "{config:#}");
            config["maps"][name] = (*size).into();
        }
        fs::write(&path, serde_json::to_vec(&config).unwrap()).unwrap();
        let old = self.kill_agent(Signal::SIGKILL);
        self.until_taken_over(old);
    }

    /// Entries and room of each map.
    fn maps(&self) -> BTreeMap<String, (Option<usize>, Option<u32>)> {
        let maps = self.mesh.node(NODE).maps.into_iter();
        maps.map(|map| (map.map, (map.entries, map.capacity)))
            .collect()
    }

    fn entries(&self, map: &str) -> u64 {
        self.maps()[map].0.unwrap() as u64
    }

    /// Waits for a problem with these words.
    fn until_problem(&self, words: &[&str]) {
        self.mesh
            .until_status(&format!("problem: {words:?}"), |status| {
                let problems = status.all_problems();
                problems
                    .iter()
                    .any(|problem| words.iter().all(|word| problem.contains(word)))
            });
    }

    fn until_no_problem(&self, words: &str) {
        self.mesh
            .until_status(&format!("no problem: {words}"), |status| {
                let problems = status.all_problems();
                !problems.iter().any(|problem| problem.contains(words))
            });
    }
}

/// Each map that policy fills is made exactly as large as what is in it: what there is goes on, what comes is refused
/// and told, and is put into effect as soon as something else has gone, or the map has grown.
#[test]
fn full_maps_refuse_what_is_new_and_keep_what_there_is() {
    let shop = Shop::start("full", &[]);
    assert_eq!(shop.maps().into_keys().collect::<Vec<_>>(), MAPS);
    let mut held = shop.mesh.hold("alice", &shop.web, 80);
    let allowed = shop.mesh.request_loop("alice", &shop.web, 80);
    let denied = shop.mesh.request_loop("bob", &shop.web, 80);

    let half = |map: &str| shop.entries(map).div_ceil(2);
    let sizes = BTreeMap::from([
        ("workloads", shop.entries("workloads")),
        ("addresses", shop.entries("addresses")),
        ("services", shop.entries("services")),
        ("endpoints", half("endpoints").max(half("slots"))),
        ("verdicts", shop.entries("verdicts")),
    ]);
    shop.resize(&sizes);
    held.exchange("small");
    shop.holds();
    for (map, room) in shop.maps() {
        if let Some(size) = sizes.get(map.as_str()) {
            let expected = if map == "endpoints" { size * 2 } else { *size };
            assert_eq!(u64::from(room.1.unwrap()), expected, "{map}");
        }
    }
    for map in ["workloads", "addresses", "services", "verdicts", "devices"] {
        shop.until_problem(&[&format!("map {map} is 100 % full"), "--map-size"]);
    }

    // A service more than there is room for.
    let mesh = &shop.mesh;
    mesh.write("more.yaml", &service("shop/more", &[(80, 8000)]));
    shop.until_problem(&["map services is full", "--map-size services=N"]);
    shop.holds();
    fs::remove_file(mesh.folder().join("more.yaml")).unwrap();
    shop.until_no_problem("map services is full");

    // Another policy for the servers: its verdicts replace those that are there, and need room beside them.
    let stricter = policy("shop/bobs", "bob", &allow(&["shop/alice"]));
    mesh.write("bob.yaml", &stricter);
    shop.until_problem(&["map verdicts is full", "--map-size verdicts=N"]);
    shop.holds();
    fs::remove_file(mesh.folder().join("bob.yaml")).unwrap();
    shop.until_no_problem("map verdicts is full");

    // A workload: it does not start, since it could not be guarded.
    mesh.write("carol.yaml", &client("shop/carol", ""));
    shop.until_problem(&["shop/carol-0", "is full", "--map-size workloads=N"]);
    assert!(!mesh.replica("shop/carol-0").status.ready);
    held.exchange("full");
    shop.holds();

    // With room, all comes into effect by itself.
    shop.resize(&BTreeMap::from([
        ("workloads", 64),
        ("addresses", 64),
        ("services", 64),
        ("endpoints", 64),
        ("verdicts", 4096),
    ]));
    mesh.until_replica("shop/carol-0", "is ready", |replica| replica.status.ready);
    mesh.connect("carol", &shop.web, 80).failed(REFUSED);
    shop.until_no_problem("full");
    shop.holds();
    held.exchange("grown");
    allowed.finish().all_succeeded();
    denied.finish().all_failed(REFUSED);
}

/// Sizes change back and forth under load, each time in a restart that nobody announces.
#[test]
fn a_restart_with_other_sizes_fails_no_request() {
    let shop = Shop::start("resize", &["--map-size", "handshakes=512"]);
    assert_eq!(shop.maps()["handshakes"].1, Some(512));
    let mut held = shop.mesh.hold("alice", &shop.web, 80);
    let allowed = shop.mesh.request_loop("alice", &shop.web, 80);
    let denied = shop.mesh.request_loop("bob", &shop.web, 80);
    let before = shop.mesh.count(NODE, "no-allow-matched");
    for round in 1..=4u64 {
        shop.resize(&BTreeMap::from([
            ("workloads", 32 * round),
            ("addresses", 128 * round),
            ("services", 128 * round),
            ("endpoints", 128 * round),
            ("verdicts", 1024 * round),
            ("handshakes", 1024 * round),
            ("affinity", 1024 * round),
            ("flow_bytes", 65_536 << round),
        ]));
        held.exchange(&format!("round {round}"));
        shop.holds();
    }
    assert!(
        shop.mesh.count(NODE, "no-allow-matched") > before,
        "counters go on"
    );
    assert_eq!(shop.mesh.count(NODE, "peer-not-attested"), 0);
    allowed.finish().all_succeeded();
    denied.finish().all_failed(REFUSED);
}

#[test]
fn a_size_that_cannot_be_is_refused_with_the_choices() {
    for (size, words) in [
        ("verdict=7", "verdicts (1 to 16777216)"),
        ("flow_bytes=1000000", "1048576 is the next"),
    ] {
        let mut command = Command::new(heddle());
        let outcome = Outcome::of(command.args(["up", "/tmp", "--map-size", size]));
        assert_eq!(outcome.code, 2, "{outcome:#?}");
        assert!(outcome.stderr.contains(words), "{outcome:#?}");
    }
}

/// An agent that does not read: connections do not wait for it, and every record is there or counted as lost.
#[test]
fn a_full_ring_buffer_loses_records_but_no_connection() {
    const CONNECTIONS: u32 = 600;
    let shop = Shop::start("ring", &["--map-size", "flow_bytes=65536"]);
    let web = shop.mesh.addresses("shop/web-0")[0].to_string();
    let agent = PidFd::open(shop.mesh.node(NODE).pid).unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    for attempt in shop.mesh.attempts("alice", "4", &web, 8000, CONNECTIONS) {
        attempt.greeting();
    }
    shop.holds();
    agent.signal(Signal::SIGCONT).unwrap();
    shop.until_problem(&["flow records were lost", "--map-size flow_bytes=N"]);
    let expected = u64::from(CONNECTIONS) * 2 + 3;
    until("every record is accounted for", PATIENCE, || {
        let flows = shop
            .mesh
            .flows(&["--from", "shop/alice", "--to", "shop/web"]);
        let denied = shop.mesh.flows(&["--from", "shop/bob", "--to", "shop/web"]);
        let (kept, lost) = (flows.len() + denied.len(), shop.mesh.node(NODE).flows_lost);
        if lost > 0 && kept as u64 + lost == expected {
            Ok(())
        } else {
            Err(format!("{kept} kept and {lost} lost of {expected}"))
        }
    });
}

/// Without its pins an agent must not start: it could not see what is attached. What is attached stays.
#[test]
fn without_its_bpffs_the_last_policy_stays_in_force() {
    let shop = Shop::start("bpffs", &[]);
    let mut held = shop.mesh.hold("alice", &shop.web, 80);
    let pins = leftovers::run_dir(shop.mesh.name()).join("bpf");
    umount2(&pins, MntFlags::MNT_DETACH).unwrap();
    // The running agent has what it needs, but cannot look at everything any more.
    shop.until_problem(&["look through"]);
    shop.holds();
    shop.kill_agent(Signal::SIGKILL);
    let error = shop.until_away("no bpffs is mounted there");
    assert!(error.contains(pins.to_str().unwrap()), "{error}");
    held.exchange("still");
    shop.holds();
    let left = fs::read_dir(&pins).unwrap().count();
    assert_eq!(left, 0, "nothing is made where pins cannot be");
}

/// Memory runs out in the middle of a large change: the agent dies, policy stays, the next one does it.
#[test]
fn an_agent_out_of_memory_leaves_policy_and_comes_back() {
    let shop = Shop::start("memory", &[]);
    let mut held = shop.mesh.hold("alice", &shop.web, 80);
    let allowed = shop.mesh.request_loop("alice", &shop.web, 80);
    let denied = shop.mesh.request_loop("bob", &shop.web, 80);
    let agent = shop.mesh.node(NODE).pid;
    // Not a byte more than it has. (A limit on all address space would let reserved space become data.)
    let limit = Command::new("prlimit")
        .args(["--pid", &agent.to_string(), "--data=1:1"])
        .status();
    assert!(limit.unwrap().success());
    let many: String = (0..2000)
        .map(|index| service(&format!("shop/many-{index}"), &[(80, 8000)]))
        .collect();
    shop.mesh.write("many.yaml", &many);
    shop.until_taken_over(agent);
    shop.mesh
        .until_explained("alice", "many-1999:80", "no-endpoint");
    held.exchange("after");
    shop.holds();
    allowed.finish().all_succeeded();
    denied.finish().all_failed(REFUSED);
}

/// Where numbers cannot be kept no agent begins, and the last policy stays.
#[test]
fn a_state_folder_that_cannot_be_written_is_told_and_heals() {
    let shop = Shop::start("state", &[]);
    // A folder where the file is to be written: no write can succeed.
    let blocked = shop.node_dir().join("state/ids.new");
    fs::create_dir(&blocked).unwrap();
    // An agent has the file open; one that has just begun writes a new one first.
    let old = shop.kill_agent(Signal::SIGKILL);
    shop.until_away("cannot use the node's state folder");
    shop.holds();
    fs::remove_dir(&blocked).unwrap();
    shop.until_taken_over(old);
    shop.holds();
}

/// Numbers in the kernel without their meaning: no agent may guess.
#[test]
fn damaged_or_missing_numbers_stop_the_agent_and_not_the_traffic() {
    let shop = Shop::start("numbers", &[]);
    let mut held = shop.mesh.hold("alice", &shop.web, 80);
    let ids = shop.node_dir().join("state/ids.json");
    let good = fs::read(&ids).unwrap();
    // Not its end: that is what a kill may cut off.
    fs::write(&ids, [b"{", good.as_slice()].concat()).unwrap();
    let old = shop.kill_agent(Signal::SIGKILL);
    let error = shop.until_away("is damaged");
    assert!(error.contains("heddle down, heddle up"), "{error}");
    held.exchange("damaged");
    shop.holds();
    fs::remove_file(&ids).unwrap();
    shop.until_away("ids.json is missing");
    shop.holds();
    fs::write(&ids, good).unwrap();
    shop.until_taken_over(old);
    held.exchange("mended");
    shop.holds();
}
