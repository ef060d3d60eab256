//! Spliced connections under the real programs, without an agent: two workloads in namespaces of their own. What
//! the map of spliced sockets does when it is full, replaced by a successor, or left behind by one; and that no
//! other than a spliced connection has anything to do with it. What a program sees is tested end to end.

#![allow(clippy::unwrap_used)] // A test ends at the first thing that fails.

#[path = "common/ground.rs"]
mod ground;
#[path = "common/namespaces.rs"]
mod namespaces;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::MetadataExt,
    process::{Child, Command, Output, Stdio},
};

use kernel::{
    Action, Address, AddressEntry, CgroupEntry, FlowEvent, FlowKind, FlowReader, Kernel,
    KernelConfig, MapSizes, Reason, SocketClass, VerdictEntry, VerdictKey, WorkloadEntry,
};

use crate::{
    ground::{Ground, count},
    namespaces::{Namespace, ip},
};

const PROGRAM: &str = include_str!("../../../tests/e2e/programs/splice.py");
const PORT: &str = "7000";
const SERVER: &str = "10.77.1.2";

#[test]
fn connections_are_spliced_if_both_ends_ask() {
    let world = World::new("both");
    let (mut kernel, mut flows) = world.start(16, [true, true]);
    let _server = world.serve();
    world.exact("echo");
    let spliced = closed(&mut flows);
    assert!(spliced.iter().all(FlowEvent::spliced), "{spliced:#?}");
    assert_eq!(count(&kernel, Reason::NotSpliced), 0);

    for asking in [[true, false], [false, true], [false, false]] {
        world.fill(&mut kernel, asking);
        world.exact("echo");
        let plain = closed(&mut flows);
        assert!(
            !plain.iter().any(FlowEvent::spliced),
            "{asking:?}: {plain:#?}"
        );
    }
    // TCP and splice together count each byte once, whichever way it went.
    let bytes = |events: &[FlowEvent]| {
        let all = events
            .iter()
            .map(|event| (event.bytes_sent, event.bytes_received));
        all.max().unwrap()
    };
    let plain = {
        world.exact("echo");
        closed(&mut flows)
    };
    assert_eq!(bytes(&spliced), bytes(&plain));
}

#[test]
fn bytes_from_before_the_connection_are_not_overtaken() {
    let world = World::new("early");
    let (_kernel, mut flows) = world.start(16, [true, true]);
    let _server = world.serve();
    world.exact("early_send");
    world.exact("fast_open");
    // The server's side of such a connection is spliced all the same; so are the others.
    assert!(closed(&mut flows).iter().any(FlowEvent::spliced));
}

#[test]
fn what_finds_no_room_goes_over_tcp() {
    let world = World::new("full");
    let (kernel, mut flows) = world.start(1, [true, true]);
    let _server = world.serve();
    drop(closed(&mut flows));
    let before = count(&kernel, Reason::NotSpliced);
    let mut held = world.hold();
    held.exchange();
    assert_eq!(count(&kernel, Reason::NotSpliced), before);
    // The one place is taken.
    world.exact("echo");
    world.exact("half_close");
    let events = closed(&mut flows);
    assert!(!events.iter().any(FlowEvent::spliced), "{events:#?}");
    assert!(count(&kernel, Reason::NotSpliced) > before);
    held.exchange();
    held.end();
    // And free again: no connection leaves anything behind.
    for _ in 0..5 {
        world.exact("reconnect");
    }
    drop(closed(&mut flows));
    world.exact("echo");
    assert!(closed(&mut flows).iter().any(FlowEvent::spliced));
}

#[test]
fn successors_take_nothing_from_open_connections() {
    let world = World::new("next");
    let (kernel, mut flows) = world.start(16, [true, true]);
    let _server = world.serve();
    let mut held = vec![world.hold()];
    held[0].exchange();
    drop((kernel, flows));
    held[0].exchange();

    // The same maps, and maps of another size: what is open stays in the earlier map.
    for splices in [16, 32] {
        (_, flows) = {
            let (kernel, flows) = world.start(splices, [true, true]);
            for one in &mut held {
                one.exchange();
            }
            let links = fs::read_dir(world.ground.pin_dir().join("links")).unwrap();
            let of_splice = links
                .filter(|link| {
                    let name = link.as_ref().unwrap().file_name();
                    name.to_string_lossy().starts_with("heddle_splice")
                })
                .count();
            assert_eq!(of_splice, 1, "one program, on one map");
            world.exact("echo");
            assert_eq!(count(&kernel, Reason::NotSpliced), 0);
            (kernel, flows)
        };
        let events = closed(&mut flows);
        assert!(events.iter().any(FlowEvent::spliced), "{events:#?}");
        held.push(world.hold());
    }
    for mut one in held {
        one.exchange();
        one.end();
    }
}

/// Records of connections that stood and have ended: a client may knock before its server listens.
fn closed(flows: &mut FlowReader) -> Vec<FlowEvent> {
    let closed = |event: &FlowEvent| event.kind() == Some(FlowKind::Closed) && event.established();
    let events: Vec<FlowEvent> = flows.filter(closed).collect();
    assert!(!events.is_empty());
    events
}

/// A node with two workloads, a client's and a server's. Dropping it removes all of it.
struct World {
    ground: Ground,
    ends: [Namespace; 2],
}

impl World {
    fn new(name: &str) -> Self {
        let name = format!("hds-{name}-{}", std::process::id());
        let ground = Ground::new(&name);
        let ends = ["c", "s"].map(|end| Namespace::new(format!("{name}-{end}")));
        for end in &ends {
            fs::create_dir(ground.cgroup().join(&end.name)).unwrap();
        }
        let world = Self { ground, ends };
        let [client, server] = world.ends.each_ref().map(|end| end.name.as_str());
        ip(&[
            "link", "add", "e0", "netns", client, "type", "veth", "peer", "name", "e0", "netns",
            server,
        ]);
        for (end, address) in [(client, "10.77.1.1/24"), (server, "10.77.1.2/24")] {
            ip(&["-n", end, "address", "add", address, "dev", "e0"]);
            for device in ["lo", "e0"] {
                ip(&["-n", end, "link", "set", device, "up"]);
            }
        }
        world
    }

    /// An agent's start; its maps have room for so many spliced connections.
    fn start(&self, splices: u32, asking: [bool; 2]) -> (Kernel, FlowReader) {
        let config = KernelConfig {
            pin_dir: self.ground.pin_dir(),
            cgroup: self.ground.cgroup().to_owned(),
            sizes: MapSizes {
                splices,
                ..MapSizes::default()
            },
        };
        let (mut kernel, flows) = Kernel::open(config).unwrap();
        self.fill(&mut kernel, asking);
        kernel.attach().unwrap();
        (kernel, flows)
    }

    /// Both workloads, and who may call whom: the client the server.
    fn fill(&self, kernel: &mut Kernel, asking: [bool; 2]) {
        let tables = &mut kernel.tables;
        for (index, end) in self.ends.iter().enumerate() {
            let id = index as u32 + 1;
            let address: Address = std::net::Ipv4Addr::new(10, 77, 1, id as u8).into();
            let cgroup = fs::metadata(self.ground.cgroup().join(&end.name))
                .unwrap()
                .ino();
            let entry = CgroupEntry {
                workload: id,
                socket_class: SocketClass::App as u32,
            };
            tables.cgroups.set(cgroup, entry).unwrap();
            let entry = WorkloadEntry {
                netns: end.netns.cookie().unwrap(),
                source: [10 + id; 2],
                policy_set: [20 + id; 2],
                v4: address,
                flags: if asking[index] {
                    WorkloadEntry::SPLICE
                } else {
                    0
                },
                ..WorkloadEntry::default()
            };
            tables.workloads.set(id, entry).unwrap();
            let entry = AddressEntry {
                workload: id,
                flags: AddressEntry::LOCAL,
                ..AddressEntry::default()
            };
            tables.addresses.set(address, entry).unwrap();
        }
        let key = VerdictKey {
            source: 11,
            policy_set: 22,
            socket_class: SocketClass::App as u8,
            ..VerdictKey::default()
        };
        let verdict = VerdictEntry {
            reason: Reason::NoPolicy as u16,
            action: Action::Direct as u8,
            ..VerdictEntry::default()
        };
        tables.verdicts.set(key, verdict).unwrap();
    }

    fn serve(&self) -> Talk {
        let server = Talk(self.command(1, &["serve", PORT]).spawn().unwrap());
        // It serves as soon as it answers.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !self.run("after_shutdown").status.success() {
            assert!(std::time::Instant::now() < deadline, "no server");
        }
        server
    }

    /// Runs a scenario to its end, which must be good.
    #[track_caller]
    fn exact(&self, scenario: &str) {
        let output = self.run(scenario);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{scenario}: {output:?}");
        assert!(
            !text.contains("false") && !text.contains("\"bad\": ["),
            "{scenario}: {text}"
        );
    }

    fn run(&self, scenario: &str) -> Output {
        self.command(0, &["run", scenario, SERVER, PORT, "4"])
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    fn hold(&self) -> Held {
        let mut child = self
            .command(0, &["run", "hold", SERVER, PORT, "4"])
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut held = Held {
            talk: Talk(child),
            output,
        };
        assert_eq!(held.hear(), "\"connected\"");
        held
    }

    /// `splice.py` in one of the workloads.
    fn command(&self, end: usize, arguments: &[&str]) -> Command {
        let mut command = Command::new("/bin/sh");
        // `ip netns exec` hides cgroups: first the one, then the other.
        command
            .args([
                "-c",
                "echo $$ > \"$CGROUP/cgroup.procs\" && exec ip netns exec \"$NAMESPACE\" python3 -c \"$PROGRAM\" \"$@\"",
                "sh",
            ])
            .args(arguments)
            .env("CGROUP", self.ground.cgroup().join(&self.ends[end].name))
            .env("NAMESPACE", &self.ends[end].name)
            .env("PROGRAM", PROGRAM)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }
}

/// A program. Dropping it ends it.
struct Talk(Child);

impl Drop for Talk {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A connection that is kept open.
struct Held {
    talk: Talk,
    output: BufReader<std::process::ChildStdout>,
}

impl Held {
    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Sends bytes and sees them come back.
    #[track_caller]
    fn exchange(&mut self) {
        writeln!(self.talk.0.stdin.as_ref().unwrap(), "go").unwrap();
        assert_eq!(self.hear(), "true");
    }

    /// Closes it.
    fn end(&mut self) {
        self.talk.0.stdin = None;
        assert_eq!(self.hear(), "{\"ended\": true}");
        self.talk.0.wait().unwrap();
    }
}
