//! A workload in a namespace of its own, programs of each class in it, and a host outside of the node that it is joined to
//! by a veth pair. The workload of another node is only an address; the host outside has it, to see whether anything gets out.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::IpAddr,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use kernel::{
    Action, Address, AddressEntry, CaptureKey, CaptureKind, CgroupEntry, EndpointEntry, FlowReader,
    Grant, Kernel, KernelConfig, MapSizes, Reason, ServiceEntry, ServiceKey, SlotEntry, SlotKey,
    SocketClass, VerdictEntry, VerdictKey, WorkloadEntry, ports,
};
use linux::{place::Placement, seqpacket};

use crate::{
    ground::{Ground, count},
    namespaces::{Namespace, ip},
};

const PROGRAMS: &str = include_str!("programs.py");
const PATIENCE: Duration = Duration::from_secs(20);
const TCP: u8 = 6;

/// The node's workload.
pub(crate) const OWN: [&str; 2] = ["10.78.1.1", "fd78:1::1"];
/// A host that is in no mesh.
pub(crate) const OUTSIDE: [&str; 2] = ["10.78.1.2", "fd78:1::2"];
/// A workload of another node.
pub(crate) const REMOTE: [&str; 2] = ["10.78.9.9", "fd78:9::9"];
/// The service that leads to it, from port 80 to 8080.
pub(crate) const SERVICE: [&str; 2] = ["10.96.0.1", "fd96::1"];

pub(crate) const OWN_ID: u32 = 1;
pub(crate) const REMOTE_ID: u32 = 9;
pub(crate) const SERVICE_IDS: [u32; 2] = [30, 31];
pub(crate) const SOURCE: u32 = 10;
pub(crate) const OWN_SET: u32 = 21;
pub(crate) const REMOTE_SET: u32 = 29;

/// Dropping it removes all of it.
pub(crate) struct World {
    ground: Ground,
    pub(crate) own: Namespace,
    outside: Namespace,
}

impl World {
    pub(crate) fn new(name: &str) -> Self {
        let name = format!("hdc-{name}-{}", std::process::id());
        let ground = Ground::new(&name);
        for class in ["app", "l7", "agent"] {
            fs::create_dir(ground.cgroup().join(class)).unwrap();
        }
        let [own, outside] = ["w", "o"].map(|end| Namespace::new(format!("{name}-{end}")));
        ip(&[
            "link",
            "add",
            "e0",
            "netns",
            &own.name,
            "type",
            "veth",
            "peer",
            "name",
            "e0",
            "netns",
            &outside.name,
        ]);
        for (namespace, addresses) in [
            (&own.name, vec![OWN]),
            (&outside.name, vec![OUTSIDE, REMOTE]),
        ] {
            for [v4, v6] in addresses {
                let (v4, v6) = (format!("{v4}/24"), format!("{v6}/64"));
                ip(&["-n", namespace, "address", "add", &v4, "dev", "e0"]);
                ip(&["-n", namespace, "address", "add", &v6, "dev", "e0", "nodad"]);
            }
            for device in ["lo", "e0"] {
                ip(&["-n", namespace, "link", "set", device, "up"]);
            }
            for version in ["-4", "-6"] {
                ip(&[
                    "-n", namespace, version, "route", "add", "default", "dev", "e0",
                ]);
            }
        }
        Self {
            ground,
            own,
            outside,
        }
    }

    /// The routes and the setting that a delivery needs (`kernel::DELIVERY_MARK`).
    pub(crate) fn route_deliveries(&self) {
        let namespace = self.own.name.as_str();
        for version in ["-4", "-6"] {
            ip(&[
                "-n",
                namespace,
                version,
                "rule",
                "add",
                "fwmark",
                "0xc0000000/0xc0000000",
                "lookup",
                "100",
            ]);
            ip(&[
                "-n", namespace, version, "route", "add", "local", "default", "dev", "lo", "table",
                "100",
            ]);
        }
        let set = || {
            for name in [
                "ipv4/tcp_fwmark_accept",
                "ipv4/fwmark_reflect",
                "ipv6/fwmark_reflect",
            ] {
                fs::write(format!("/proc/sys/net/{name}"), "1").unwrap();
            }
        };
        self.own.netns.run(set).unwrap();
    }

    pub(crate) fn config(&self) -> KernelConfig {
        KernelConfig {
            pin_dir: self.ground.pin_dir(),
            cgroup: self.ground.cgroup().to_owned(),
            sizes: MapSizes {
                workloads: 8,
                ..MapSizes::default()
            },
        }
    }

    pub(crate) fn start(&self) -> Agent {
        self.start_with(self.config())
    }

    /// An agent's start, without listeners.
    pub(crate) fn start_with(&self, config: KernelConfig) -> Agent {
        let mut agent = self.open(Kernel::open(config).unwrap());
        agent.kernel.attach().unwrap();
        agent
    }

    /// Fills the maps of an agent that has begun.
    pub(crate) fn open(&self, (kernel, flows): (Kernel, FlowReader)) -> Agent {
        let mut agent = Agent { kernel, flows };
        self.fill(&mut agent.kernel);
        agent
    }

    fn fill(&self, kernel: &mut Kernel) {
        let tables = &mut kernel.tables;
        for (class, workload, socket_class) in [
            ("app", OWN_ID, SocketClass::App),
            ("l7", OWN_ID, SocketClass::L7),
            ("agent", 0, SocketClass::Agent),
        ] {
            let cgroup = fs::metadata(self.ground.cgroup().join(class))
                .unwrap()
                .ino();
            let entry = CgroupEntry {
                workload,
                socket_class: socket_class as u32,
            };
            tables.cgroups.set(cgroup, entry).unwrap();
        }
        let entry = WorkloadEntry {
            netns: self.own.netns.cookie().unwrap(),
            source: [SOURCE; 2],
            policy_set: [OWN_SET; 2],
            v4: address(OWN[0]),
            v6: address(OWN[1]),
            // The agent's connections are not spliced, whatever the workload asks for.
            flags: WorkloadEntry::SPLICE,
            ..WorkloadEntry::default()
        };
        tables.workloads.set(OWN_ID, entry).unwrap();
        for (own, remote) in OWN.into_iter().zip(REMOTE) {
            let entry = AddressEntry {
                workload: OWN_ID,
                flags: AddressEntry::LOCAL,
                policy_set: 0,
            };
            tables.addresses.set(address(own), entry).unwrap();
            let entry = AddressEntry {
                workload: REMOTE_ID,
                flags: 0,
                policy_set: REMOTE_SET,
            };
            tables.addresses.set(address(remote), entry).unwrap();
        }
        for (index, service) in SERVICE_IDS.into_iter().enumerate() {
            let endpoint = EndpointEntry {
                address: address(REMOTE[index]),
                service,
                port: 8080,
                padding: 0,
            };
            tables.endpoints.set(service, endpoint).unwrap();
            let slot = SlotKey {
                service,
                ..SlotKey::default()
            };
            let column = SlotEntry {
                endpoint: service,
                alias: service,
                threshold: u32::MAX,
            };
            tables.slots.set(slot, column).unwrap();
            let key = ServiceKey {
                address: address(SERVICE[index]),
                port: 80,
                protocol: TCP,
                padding: 0,
            };
            let entry = ServiceEntry {
                service,
                slots: 1,
                ..ServiceEntry::default()
            };
            tables.services.set(key, entry).unwrap();
        }
        let key = CaptureKey {
            workload: OWN_ID,
            kind: CaptureKind::Agent as u32,
        };
        tables.capture.set(key, ports::OUTBOUND.into()).unwrap();
    }

    /// A program in the workload's namespace: `app`, `l7` or `agent`.
    pub(crate) fn run(&self, class: &str) -> Program {
        let place = Placement::new()
            .cgroup(&self.ground.cgroup().join(class))
            .unwrap();
        Program::start(place.netns(&self.own.netns))
    }

    /// A program outside of the node.
    pub(crate) fn run_outside(&self) -> Program {
        Program::start(Placement::new().netns(&self.outside.netns))
    }
}

/// The kernel's side of an agent.
pub(crate) struct Agent {
    pub(crate) kernel: Kernel,
    pub(crate) flows: FlowReader,
}

impl Agent {
    pub(crate) fn verdict(&mut self, source: u32, policy_set: u32, port: u16, action: Action) {
        let key = VerdictKey {
            source,
            policy_set,
            port,
            socket_class: SocketClass::App as u8,
            padding: 0,
        };
        let reason = match action {
            Action::Deny => Reason::PolicyDeny,
            Action::Agent => Reason::NeedsAgent,
            _ => Reason::PolicyAllow,
        };
        let entry = VerdictEntry {
            policy: 77,
            reason: reason as u16,
            action: action as u8,
            padding: 0,
        };
        self.kernel.tables.verdicts.set(key, entry).unwrap();
    }

    /// Of the accepted socket of a program.
    pub(crate) fn grant(&self, program: &mut Program, name: &str) -> Option<Grant> {
        let socket = program.hand(name);
        let view = self.kernel.view();
        view.accepted_grant(socket.as_fd()).unwrap()
    }

    pub(crate) fn count(&self, reason: Reason) -> u64 {
        count(&self.kernel, reason)
    }

    pub(crate) fn handshakes(&self) -> usize {
        let uses = self.kernel.count_live_maps().unwrap();
        let used = uses.iter().find(|used| used.map == "handshakes");
        used.unwrap().entries.unwrap()
    }

    /// No grant is left over.
    #[track_caller]
    pub(crate) fn expect_no_handshakes(&self) {
        until("no handshakes", || self.handshakes() == 0);
    }
}

#[track_caller]
pub(crate) fn until(what: &str, mut reached: impl FnMut() -> bool) {
    let start = Instant::now();
    while !reached() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A process that evaluates what it is sent. Dropping it ends it.
pub(crate) struct Program {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    descriptors: OwnedFd,
}

impl Program {
    fn start(place: Placement) -> Self {
        let (descriptors, theirs) = seqpacket::pair().unwrap();
        let mut command = Command::new("python3");
        command
            .args(["-c", PROGRAMS])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        place.inherit(vec![theirs]).unwrap().apply(&mut command);
        let mut child = command.spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut program = Self {
            child,
            input,
            output,
            descriptors,
        };
        assert_eq!(program.hear(), "ready");
        program
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// What a call answers.
    pub(crate) fn ask(&mut self, call: &str) -> String {
        writeln!(self.input, "{call}").unwrap();
        self.hear()
    }

    /// A call that must succeed.
    #[track_caller]
    pub(crate) fn ok(&mut self, call: &str) {
        assert_eq!(self.ask(call), "ok", "{call}");
    }

    pub(crate) fn hand(&mut self, name: &str) -> OwnedFd {
        self.ok(&format!("hand('{name}')"));
        let received = seqpacket::recv_blocking::<String>(self.descriptors.as_fd());
        let (said, mut descriptors) = received.unwrap().unwrap();
        assert_eq!(said, name);
        descriptors.remove(0)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

pub(crate) fn address(text: &str) -> Address {
    text.parse::<IpAddr>().unwrap().into()
}

/// The programs of this version as another one lays structs out.
pub(crate) fn other_version() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let object = dir.path().join("other.o");
    let mut clang = Command::new("clang");
    clang.args(["-O2", "-g", "-target", "bpf", "-DHEDDLE_TEST_LAYOUT"]);
    for machine in ["x86_64", "aarch64"] {
        clang.arg(format!("-I/usr/include/{machine}-linux-gnu"));
    }
    clang.args(["-c", "bpf/heddle.bpf.c", "-o"]).arg(&object);
    assert!(clang.status().unwrap().success());
    fs::read(object).unwrap()
}
