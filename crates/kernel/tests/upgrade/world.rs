//! Two workloads in namespaces and cgroups of their own, joined by a veth pair, with a server in one and a client
//! in the other; and versions of the kernel object to run them under.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::MetadataExt,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use kernel::{
    Action, AddressEntry, CgroupEntry, EndpointEntry, Kernel, KernelConfig, MapSizes, Reason,
    ServiceEntry, ServiceKey, SlotEntry, SlotKey, SocketClass, Tables, VerdictEntry, VerdictKey,
    WorkloadEntry,
};

use crate::{
    ground::Ground,
    namespaces::{Namespace, ip},
};

const PROGRAMS: &str = include_str!("programs.py");
const TCP: u8 = 6;
const CLIENT: [u8; 4] = [10, 77, 0, 1];
const SERVER: [u8; 4] = [10, 77, 0, 2];
const VIRTUAL: [u8; 4] = [10, 96, 0, 1];
const CLIENT_ID: u32 = 1;
const SERVER_ID: u32 = 2;
const SERVICE: u32 = 30;

/// The versions there are.
pub(crate) struct Versions {
    dir: tempfile::TempDir,
}

impl Versions {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    /// The programs of this version, compiled with a definition.
    pub(crate) fn compile(&self, define: &str) -> Vec<u8> {
        let object = self.dir.path().join(format!("{define}.o"));
        let mut clang = Command::new("clang");
        clang.args(["-O2", "-g", "-target", "bpf", "-Wall", "-Werror"]);
        clang.args([
            "-I/usr/include/x86_64-linux-gnu",
            "-I/usr/include/aarch64-linux-gnu",
        ]);
        clang.arg(format!("-D{define}"));
        clang.args(["-c", "bpf/heddle.bpf.c", "-o"]).arg(&object);
        assert!(clang.status().unwrap().success());
        fs::read(object).unwrap()
    }

    /// This version's programs and one more, given as C.
    pub(crate) fn compile_with(&self, program: &str) -> Vec<u8> {
        let source = self.dir.path().join("with.c");
        fs::write(&source, format!("#include \"heddle.bpf.c\"\n{program}")).unwrap();
        let object = source.with_extension("o");
        let mut clang = Command::new("clang");
        clang.args(["-O2", "-g", "-target", "bpf", "-Ibpf"]);
        clang.args([
            "-I/usr/include/x86_64-linux-gnu",
            "-I/usr/include/aarch64-linux-gnu",
        ]);
        clang.arg("-c").arg(&source).arg("-o").arg(&object);
        assert!(clang.status().unwrap().success());
        fs::read(object).unwrap()
    }
}

/// A node with two workloads. Dropping it removes all of it.
pub(crate) struct World {
    ground: Ground,
    /// The client's and the server's.
    namespaces: [Namespace; 2],
}

impl World {
    pub(crate) fn new(name: &str) -> Self {
        let name = format!("hdl-{name}-{}", std::process::id());
        let ground = Ground::new(&name);
        let namespaces = ["c", "s"].map(|suffix| Namespace::new(format!("{name}-{suffix}")));
        for namespace in &namespaces {
            fs::create_dir(ground.cgroup().join(&namespace.name)).unwrap();
        }
        let [client, server] = namespaces
            .each_ref()
            .map(|namespace| namespace.name.as_str());
        ip(&[
            "link", "add", "e0", "netns", client, "type", "veth", "peer", "name", "e0", "netns",
            server,
        ]);
        for (namespace, address) in [(client, "10.77.0.1/24"), (server, "10.77.0.2/24")] {
            ip(&["-n", namespace, "address", "add", address, "dev", "e0"]);
            for device in ["lo", "e0"] {
                ip(&["-n", namespace, "link", "set", device, "up"]);
            }
            // Addresses of services are led elsewhere in connect(); it only asks that there is a route.
            ip(&["-n", namespace, "route", "add", "default", "dev", "e0"]);
        }
        Self { ground, namespaces }
    }

    pub(crate) fn config(&self) -> KernelConfig {
        KernelConfig {
            pin_dir: self.ground.pin_dir(),
            cgroup: self.ground.cgroup().to_owned(),
            sizes: MapSizes {
                workloads: 8,
                verdicts: 64,
                services: 64,
                endpoints: 64,
                addresses: 64,
                handshakes: 1024,
                datagrams: 64,
                splices: 64,
                affinity: 64,
                // Nobody reads while versions follow each other, which takes long on a busy machine.
                flow_bytes: 4 << 20,
            },
        }
    }

    /// Names of the pins of complete maps, as NAME and number.
    pub(crate) fn pins(&self) -> Vec<(String, u32)> {
        let entries = fs::read_dir(self.ground.pin_dir().join("maps")).unwrap();
        let mut pins: Vec<_> = entries
            .map(|entry| {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let parts: Vec<&str> = name.split('-').collect();
                (parts[0].to_owned(), parts[3].parse().unwrap())
            })
            .collect();
        pins.sort();
        pins
    }

    /// Writes what the two workloads need, as an agent would.
    pub(crate) fn fill(&self, tables: &mut Tables) {
        let ends = [(CLIENT_ID, CLIENT, 10u32), (SERVER_ID, SERVER, 11)];
        for (namespace, (id, address, source)) in self.namespaces.iter().zip(ends) {
            let path = self.ground.cgroup().join(&namespace.name);
            let entry = CgroupEntry {
                workload: id,
                socket_class: SocketClass::App as u32,
            };
            let cgroup = fs::metadata(path).unwrap().ino();
            tables.cgroups.set(cgroup, entry).unwrap();
            let entry = WorkloadEntry {
                netns: namespace.netns.cookie().unwrap(),
                source: [source; 2],
                policy_set: [20 + id; 2],
                v4: v4(address),
                ..WorkloadEntry::default()
            };
            tables.workloads.set(id, entry).unwrap();
            let entry = AddressEntry {
                workload: id,
                flags: AddressEntry::LOCAL,
                ..AddressEntry::default()
            };
            tables.addresses.set(v4(address), entry).unwrap();
        }
        self.allow(tables);
        let endpoint = EndpointEntry {
            address: v4(SERVER),
            service: SERVICE,
            port: 8000,
            padding: 0,
        };
        tables.endpoints.set(40, endpoint).unwrap();
        let slot = SlotKey {
            service: SERVICE,
            ..SlotKey::default()
        };
        let column = SlotEntry {
            endpoint: 40,
            alias: 40,
            threshold: u32::MAX,
        };
        tables.slots.set(slot, column).unwrap();
        let key = ServiceKey {
            address: v4(VIRTUAL),
            port: 80,
            protocol: TCP,
            padding: 0,
        };
        let entry = ServiceEntry {
            service: SERVICE,
            slots: 1,
            affinity_seconds: 60,
            ..ServiceEntry::default()
        };
        tables.services.set(key, entry).unwrap();
    }

    fn allow(&self, tables: &mut Tables) {
        let key = VerdictKey {
            source: 10,
            policy_set: 20 + SERVER_ID,
            port: 0,
            socket_class: SocketClass::App as u8,
            padding: 0,
        };
        let entry = VerdictEntry {
            policy: 7,
            reason: Reason::PolicyAllow as u16,
            action: Action::Direct as u8,
            padding: 0,
        };
        tables.verdicts.set(key, entry).unwrap();
    }

    /// A server that echoes.
    pub(crate) fn serve(&self) -> Talk {
        self.run(&self.namespaces[1], &["serve", "10.77.0.2", "8000"])
    }

    /// A server that accepts nothing until it is sent a line.
    pub(crate) fn stall(&self) -> Talk {
        self.run(&self.namespaces[1], &["stall", "10.77.0.2", "8000"])
    }

    /// A client that asks for the service's address.
    pub(crate) fn client(&self) -> Talk {
        self.run(&self.namespaces[0], &["connect", "10.96.0.1", "80"])
    }

    fn run(&self, namespace: &Namespace, arguments: &[&str]) -> Talk {
        let name = &namespace.name;
        // `ip netns exec` hides cgroups: first the one, then the other.
        let child = Command::new("/bin/sh")
            .args([
                "-c",
                "echo $$ > \"$CGROUP/cgroup.procs\" && exec ip netns exec \"$NAMESPACE\" python3 -c \"$PROGRAMS\" \"$@\"",
                "sh",
            ])
            .args(arguments)
            .env("CGROUP", self.ground.cgroup().join(name))
            .env("NAMESPACE", name)
            .env("PROGRAMS", PROGRAMS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut talk = Talk::with(child);
        assert_eq!(talk.hear(), "ready");
        talk
    }
}

/// A program that is spoken to in lines. Dropping it ends it.
pub(crate) struct Talk {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Talk {
    fn with(mut child: Child) -> Self {
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self {
            child,
            input,
            output,
        }
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// What it answers.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        writeln!(self.input, "{line}").unwrap();
        self.hear()
    }

    /// Says something that is not answered.
    pub(crate) fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    /// It must answer `ok`.
    #[track_caller]
    pub(crate) fn ok(&mut self, line: &str) {
        assert_eq!(self.ask(line), "ok", "{line}");
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// No connection was refused for any reason.
#[track_caller]
pub(crate) fn nothing_refused(kernel: &Kernel) {
    let refusals: Vec<_> = kernel
        .reason_counts()
        .unwrap()
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .collect();
    assert!(refusals.is_empty(), "{refusals:?}");
}

fn v4(address: [u8; 4]) -> kernel::Address {
    std::net::Ipv4Addr::from(address).into()
}
