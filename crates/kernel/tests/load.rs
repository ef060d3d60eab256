//! Every program through the real verifier, attached to a cgroup of the test's own: refusal by default,
//! take-over of pinned links and maps, and the bound of a table.

#![allow(clippy::unwrap_used)] // A test ends at the first thing that fails.

#[path = "common/ground.rs"]
mod ground;

use std::{fs, os::unix::fs::MetadataExt, process::Command};

use kernel::{
    AddressEntry, CgroupEntry, Kernel, KernelConfig, KernelError, MapSizes, Reason, SocketClass,
};

use crate::ground::{Ground, count};

/// Where the programs run, and what they are asked there.
struct Place(Ground);

impl Place {
    fn new(name: &str) -> Self {
        Self(Ground::new(&format!(
            "heddle.test-{name}-{}",
            std::process::id()
        )))
    }

    fn config(&self) -> KernelConfig {
        KernelConfig {
            pin_dir: self.0.pin_dir(),
            cgroup: self.0.cgroup().to_owned(),
            sizes: MapSizes {
                workloads: 8,
                ..MapSizes::default()
            },
        }
    }

    fn cgroup_id(&self) -> u64 {
        fs::metadata(self.0.cgroup()).unwrap().ino()
    }

    /// What a program inside the cgroup gets when it asks for sockets: `ok` or an errno each.
    fn run_inside(&self) -> String {
        let output = Command::new("/bin/sh")
            .arg("-c")
            .arg("echo $$ > \"$CGROUP/cgroup.procs\" && exec python3 -c \"$PROGRAM\"")
            .env("CGROUP", self.0.cgroup())
            .env("PROGRAM", ASK_FOR_SOCKETS)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

const ASK_FOR_SOCKETS: &str = r#"
import socket
for name, kind in (("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM), ("raw", socket.SOCK_RAW)):
    try:
        socket.socket(socket.AF_INET, kind, 17 if name == "raw" else 0)
        print(f"{name}=ok")
    except OSError as error:
        print(f"{name}={error.errno}")
"#;

#[test]
fn a_process_without_identity_gets_no_socket() {
    let ground = Place::new("identity");
    let (mut kernel, _flows) = Kernel::open(ground.config()).unwrap();
    kernel.attach().unwrap();

    let seen = ground.run_inside();
    assert!(seen.contains("tcp=13") && seen.contains("udp=13"), "{seen}");
    assert!(count(&kernel, Reason::NoIdentity) == 2);
}

#[test]
fn the_agent_passes_and_an_app_in_a_foreign_namespace_does_not() {
    let ground = Place::new("class");
    let (mut kernel, _flows) = Kernel::open(ground.config()).unwrap();
    kernel.attach().unwrap();
    let entry = |class| CgroupEntry {
        workload: 1,
        socket_class: class as u32,
    };
    kernel
        .tables
        .cgroups
        .set(ground.cgroup_id(), entry(SocketClass::Agent))
        .unwrap();
    let seen = ground.run_inside();
    assert!(seen.contains("tcp=ok") && seen.contains("udp=ok"), "{seen}");

    // The workload's namespace is unknown to the maps, so the same process is nobody.
    kernel
        .tables
        .cgroups
        .set(ground.cgroup_id(), entry(SocketClass::App))
        .unwrap();
    let seen = ground.run_inside();
    assert!(seen.contains("tcp=13"), "{seen}");
}

#[test]
fn a_successor_takes_links_and_maps_over() {
    let ground = Place::new("successor");
    let links = || {
        let mut names: Vec<_> = fs::read_dir(ground.0.pin_dir().join("links"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        names
    };
    let (mut first, _flows) = Kernel::open(ground.config()).unwrap();
    assert!(!first.has_predecessor());
    first.attach().unwrap();
    first
        .tables
        .addresses
        .set(
            std::net::Ipv4Addr::LOCALHOST.into(),
            AddressEntry {
                workload: 7,
                ..AddressEntry::default()
            },
        )
        .unwrap();
    let before = links();
    drop((first, _flows));

    // Nobody holds a descriptor now: the pins alone keep policy in force.
    let seen = ground.run_inside();
    assert!(seen.contains("tcp=13"), "{seen}");

    let (mut second, _flows) = Kernel::open(ground.config()).unwrap();
    assert!(second.has_predecessor());
    assert_eq!(
        second.tables.addresses.len(),
        1,
        "the map's content was taken over"
    );
    let counted = count(&second, Reason::NoIdentity);
    assert!(counted > 0, "and its counters");
    second.attach().unwrap();
    assert_eq!(links(), before, "each link replaced, none added");
    ground.run_inside();
    let sockets = count(&second, Reason::NoIdentity) - counted;
    assert_eq!(sockets, 2, "each socket was seen by one program, not two");
}

#[test]
fn maps_of_another_size_replace_the_old_ones() {
    let ground = Place::new("resize");
    let (mut first, _flows) = Kernel::open(ground.config()).unwrap();
    first.attach().unwrap();
    drop((first, _flows));
    let mut config = ground.config();
    config.sizes.workloads = 16;
    let (mut second, _flows) = Kernel::open(config).unwrap();
    second.attach().unwrap();
    let maps = fs::read_dir(ground.0.pin_dir().join("maps")).unwrap();
    let workloads: Vec<String> = maps
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("workloads-"))
        .collect();
    assert_eq!(
        workloads.len(),
        1,
        "the old size's pin is gone: {workloads:?}"
    );
    assert!(workloads[0].ends_with("-16-2"), "{workloads:?}");
}

#[test]
fn a_full_table_says_so_and_keeps_what_it_has() {
    let ground = Place::new("full");
    let (mut kernel, _flows) = Kernel::open(ground.config()).unwrap();
    let devices = &mut kernel.tables.devices;
    for index in 0..devices.capacity() {
        devices.set(index, kernel::DeviceEntry::default()).unwrap();
    }
    let error = devices
        .set(9999, kernel::DeviceEntry::default())
        .unwrap_err();
    assert!(
        matches!(
            error,
            KernelError::Full {
                table: "devices",
                capacity: 8,
                setting: "workloads",
            }
        ),
        "{error}"
    );
    assert_eq!(devices.len(), 8);
    assert!(devices.remove(&0).unwrap());
    devices.set(9999, kernel::DeviceEntry::default()).unwrap();
}

#[test]
fn a_pin_folder_outside_a_bpffs_is_a_clear_error() {
    let ground = Place::new("nobpffs");
    let elsewhere = tempfile::tempdir().unwrap();
    let mut config = ground.config();
    config.pin_dir = elsewhere.path().to_owned();
    let error = Kernel::open(config).map(drop).unwrap_err().to_string();
    assert!(error.contains("no bpffs is mounted there"), "{error}");
    let left = fs::read_dir(elsewhere.path()).unwrap().count();
    assert_eq!(left, 0, "and nothing is made there");
}

#[test]
fn this_kernel_has_what_is_needed() {
    assert_eq!(kernel::missing_features(), Vec::<String>::new());
}

#[test]
fn many_entries_at_once_are_what_one_by_one_makes() {
    let ground = Place::new("batch");
    let (mut kernel, _flows) = Kernel::open(ground.config()).unwrap();
    let addresses = &mut kernel.tables.addresses;
    let key = |number: u32| kernel::Address::from(std::net::Ipv4Addr::from(number));
    let entry = |workload| AddressEntry {
        workload,
        ..AddressEntry::default()
    };
    // More than one call takes, and one key twice: the later value stays.
    let all = (0..10_000).map(|number| (key(number), entry(number)));
    addresses
        .set_all(all.chain([(key(7), entry(70_000))]))
        .unwrap();
    assert_eq!(addresses.len(), 10_000);
    for (number, workload) in [
        (0, 0),
        (7, 70_000),
        (4095, 4095),
        (4096, 4096),
        (9999, 9999),
    ] {
        assert_eq!(addresses.read(&key(number)), Some(entry(workload)));
    }
    // What another has removed meanwhile, or was never there, is passed over.
    let (mut other, _flows) = Kernel::open(ground.config()).unwrap();
    other.tables.addresses.remove(&key(100)).unwrap();
    let gone = (0..5000).chain([123_456]);
    addresses.remove_all(gone.map(key)).unwrap();
    assert_eq!(addresses.len(), 5000);
    let (fresh, _flows) = Kernel::open(ground.config()).unwrap();
    assert_eq!(fresh.tables.addresses.len(), 5000);
    assert_eq!(fresh.tables.addresses.read(&key(4999)), None);
    assert_eq!(fresh.tables.addresses.read(&key(5000)), Some(entry(5000)));
}

#[test]
fn many_entries_without_room_say_so_and_are_known_as_far_as_they_came() {
    let ground = Place::new("batch-full");
    let (mut kernel, _flows) = Kernel::open(ground.config()).unwrap();
    let devices = &mut kernel.tables.devices;
    let entry = |index: u32| (index, kernel::DeviceEntry::default());
    let error = devices.set_all((0..20).map(entry)).unwrap_err();
    assert!(
        matches!(error, KernelError::Full { capacity: 8, .. }),
        "{error}"
    );
    assert_eq!(devices.len(), 8);
    assert!((0..8).all(|index| devices.read(&index).is_some()));
    devices.remove_all(0..8).unwrap();
    devices.set_all((100..108).map(entry)).unwrap();
}

#[test]
fn pinned_maps_show_what_the_agent_wrote_and_what_it_takes() {
    let ground = Place::new("pinned");
    let (mut kernel, _flows) = Kernel::open(ground.config()).unwrap();
    let maps = kernel::PinnedMaps::open(&ground.config().pin_dir).unwrap();
    let address = kernel::Address::from(std::net::Ipv4Addr::LOCALHOST);
    assert_eq!(maps.address(address), None);
    let entry = AddressEntry {
        workload: 7,
        ..AddressEntry::default()
    };
    kernel.tables.addresses.set(address, entry).unwrap();
    assert_eq!(maps.address(address), Some(entry));
    let memory = maps.memory().unwrap();
    let workloads = memory.iter().find(|map| map.map == "workloads").unwrap();
    assert_eq!(workloads.capacity, 8);
    assert!(
        memory
            .iter()
            .all(|map| map.map == "sockets" || map.map == "peers" || map.bytes > 0)
    );
    let elsewhere = tempfile::tempdir().unwrap();
    assert!(kernel::PinnedMaps::open(elsewhere.path()).is_err());
}
