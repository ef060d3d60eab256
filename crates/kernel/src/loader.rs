//! Loads the object, opens (or reuses) the pinned maps and keeps the attachments of one node.
//!
//! Order matters: maps first ([`Kernel::open`]), then the caller fills them, then [`Kernel::attach`] puts the
//! programs in place. A restarted agent therefore never shows its programs half-filled tables; and one whose
//! map layout is new fills new maps while the old programs still run on the old ones.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{HashMap as BpfHashMap, MapData, PerCpuArray, RingBuf},
    programs::{Program, ProgramError, ProgramFd},
};

use crate::{
    AddressEntry, AttachedProgram, CaptureKey, CgroupEntry, Datagrams, DeviceEntry, EndpointEntry,
    FlowReader, KernelError, Reason, ServiceEntry, ServiceKey, SlotEntry, SlotKey, Table,
    VerdictEntry, VerdictKey, WorkloadEntry, attach, probe, types::Address,
};

const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/heddle.bpf.o"));
const LAYOUT: &str = env!("HEDDLE_MAP_LAYOUT");

/// Where one node's kernel state lives.
#[derive(Debug, Clone)]
pub struct KernelConfig {
    /// Folder on a bpffs, this node's alone.
    pub pin_dir: PathBuf,
    /// The node's cgroup: everything below it is under the programs.
    pub cgroup: PathBuf,
    /// Room in the maps.
    pub sizes: MapSizes,
}

/// Room in the maps, in entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapSizes {
    /// Workloads of this node.
    pub workloads: u32,
    /// Workload addresses of the mesh.
    pub addresses: u32,
    /// Service addresses times ports.
    pub services: u32,
    /// Endpoints of all services, summed.
    pub endpoints: u32,
    /// Local identities times local policy sets times named ports.
    pub verdicts: u32,
    /// Connections between SYN and accept.
    pub handshakes: u32,
    /// Pairs of datagram sockets with a record of what went between them.
    pub datagrams: u32,
    /// Clients times services with session affinity (the least recently used is forgotten).
    pub affinity: u32,
    /// Flow records, in bytes; a power of two.
    pub flow_bytes: u32,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            workloads: 1024,
            addresses: 65_536,
            services: 65_536,
            endpoints: 131_072,
            verdicts: 262_144,
            handshakes: 32_768,
            datagrams: 65_536,
            affinity: 65_536,
            flow_bytes: 4 << 20,
        }
    }
}

impl MapSizes {
    /// Slots and endpoints exist twice while a service switches tables.
    fn of(&self) -> [(&'static str, u32); 13] {
        [
            ("cgroups", self.workloads * 2 + 2),
            ("workloads", self.workloads),
            ("addresses", self.addresses),
            ("services", self.services),
            ("slots", self.endpoints * 2),
            ("endpoints", self.endpoints * 2),
            ("verdicts", self.verdicts),
            ("capture", self.workloads * 4),
            ("devices", self.workloads),
            ("handshakes", self.handshakes),
            ("datagrams", self.datagrams),
            ("affinity", self.affinity),
            ("flows", self.flow_bytes),
        ]
    }
}

/// The maps that policy fills.
#[derive(Debug)]
pub struct Tables {
    /// Cgroup id to workload and class.
    pub cgroups: Table<u64, CgroupEntry>,
    /// Workload id to its rules.
    pub workloads: Table<u32, WorkloadEntry>,
    /// Address to workload.
    pub addresses: Table<Address, AddressEntry>,
    /// Service address and port to its live table.
    pub services: Table<ServiceKey, ServiceEntry>,
    /// The tables' columns.
    pub slots: Table<SlotKey, SlotEntry>,
    /// Endpoint id to address.
    pub endpoints: Table<u32, EndpointEntry>,
    /// Who may.
    pub verdicts: Table<VerdictKey, VerdictEntry>,
    /// In-pod listeners.
    pub capture: Table<CaptureKey, u32>,
    /// Allowed source addresses by device index.
    pub devices: Table<u32, DeviceEntry>,
}

/// One node's programs and maps.
pub struct Kernel {
    /// The maps that policy fills.
    pub tables: Tables,
    config: KernelConfig,
    object: Ebpf,
    reasons: PerCpuArray<MapData, u64>,
    attached: Vec<AttachedProgram>,
}

impl Kernel {
    /// Loads the programs and opens the node's maps, reusing pinned ones of the same layout.
    /// Nothing is attached yet.
    ///
    /// # Errors
    /// Says which program, map or folder the kernel refused.
    pub fn open(config: KernelConfig) -> Result<(Self, FlowReader), KernelError> {
        let maps = config
            .pin_dir
            .join(format!("maps-{}", layout_name(&config.sizes)));
        for folder in [&maps, &links_dir(&config)] {
            fs::create_dir_all(folder).map_err(|source| KernelError::PinFolder {
                path: folder.clone(),
                source,
            })?;
        }
        let has_set_retval = u32::from(probe::has_set_retval());
        let mut loader = EbpfLoader::new();
        loader.override_global("has_set_retval", &has_set_retval, true);
        for (name, entries) in config.sizes.of() {
            loader.map_max_entries(name, entries);
        }
        for name in config
            .sizes
            .of()
            .map(|(name, _)| name)
            .into_iter()
            .chain(["sockets", "peers", "reasons"])
        {
            loader.map_pin_path(name, maps.join(name));
        }
        let mut object = loader.load(OBJECT)?;
        for (name, program) in object.programs_mut() {
            load(program).map_err(|source| KernelError::Program {
                program: name.to_owned(),
                source: Box::new(source),
            })?;
        }
        let sizes = &config.sizes;
        let tables = Tables {
            cgroups: table(&mut object, sizes, "cgroups")?,
            workloads: table(&mut object, sizes, "workloads")?,
            addresses: table(&mut object, sizes, "addresses")?,
            services: table(&mut object, sizes, "services")?,
            slots: table(&mut object, sizes, "slots")?,
            endpoints: table(&mut object, sizes, "endpoints")?,
            verdicts: table(&mut object, sizes, "verdicts")?,
            capture: table(&mut object, sizes, "capture")?,
            devices: table(&mut object, sizes, "devices")?,
        };
        let reasons = PerCpuArray::try_from(take_map(&mut object, "reasons")?)
            .map_err(|source| KernelError::map("reasons", source))?;
        let ring = RingBuf::try_from(take_map(&mut object, "flows")?)
            .map_err(|source| KernelError::map("flows", source))?;
        let datagrams = BpfHashMap::try_from(take_map(&mut object, "datagrams")?)
            .map_err(|source| KernelError::map("datagrams", source))?;
        let kernel = Self {
            tables,
            config,
            object,
            reasons,
            attached: Vec::new(),
        };
        Ok((kernel, FlowReader::new(ring, Datagrams::new(datagrams))))
    }

    /// Whether an earlier agent left programs attached to this node.
    #[must_use]
    pub fn has_predecessor(&self) -> bool {
        links_dir(&self.config).join("heddle_connect4").exists()
    }

    /// Puts the programs in place, replacing an earlier agent's one by one, and drops maps of other layouts.
    ///
    /// # Errors
    /// Says which program could not be attached; those before it are in place.
    pub fn attach(&mut self) -> Result<(), KernelError> {
        let links = links_dir(&self.config);
        let cgroup = File::open(&self.config.cgroup).map_err(|source| KernelError::Attach {
            action: "open the cgroup for",
            program: self.config.cgroup.display().to_string(),
            source,
        })?;
        self.attached.clear();
        for device in attach::devices(&links).map_err(|source| self.pin_folder(source))? {
            self.attach_device(device)?;
        }
        for (name, kind) in attach::CGROUP_PROGRAMS {
            let program = program(&self.object, name)?;
            let attached = attach::to_cgroup(&links, name, *kind, program.as_fd(), cgroup.as_fd())?;
            self.attached.push(attached);
        }
        self.drop_other_layouts()
            .map_err(|source| self.pin_folder(source))
    }

    /// Guards a device (an index in the caller's network namespace) against spoofed sources.
    /// Until [`Tables::devices`] names its addresses, nothing passes.
    ///
    /// # Errors
    /// Fails if the device is not there or the kernel has no TCX (Linux 6.6).
    pub fn attach_device(&mut self, index: u32) -> Result<(), KernelError> {
        let program = program(&self.object, attach::DEVICE_PROGRAM)?;
        let attached = attach::to_device(&links_dir(&self.config), index, program.as_fd())?;
        self.attached.retain(|other| other.pin != attached.pin);
        self.attached.push(attached);
        Ok(())
    }

    /// Forgets a device that is gone.
    ///
    /// # Errors
    /// Fails if the pin cannot be removed.
    pub fn detach_device(&mut self, index: u32) -> Result<(), KernelError> {
        self.attached
            .retain(|other| other.target != format!("device {index}"));
        attach::from_device(&links_dir(&self.config), index)
            .map_err(|source| self.pin_folder(source))
    }

    /// What is attached, for `heddle status`.
    #[must_use]
    pub fn attached(&self) -> &[AttachedProgram] {
        &self.attached
    }

    /// How often each reason came up since the maps were made.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn reason_counts(&self) -> Result<Vec<(Reason, u64)>, KernelError> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let cpus = self
                    .reasons
                    .get(&u32::from(*reason as u16), 0)
                    .map_err(|source| KernelError::map("reasons", source))?;
                Ok((*reason, cpus.iter().sum()))
            })
            .collect()
    }

    fn drop_other_layouts(&self) -> io::Result<()> {
        let current = format!("maps-{}", layout_name(&self.config.sizes));
        for entry in fs::read_dir(&self.config.pin_dir)? {
            let entry = entry?;
            let name = entry.file_name();
            if name
                .to_str()
                .is_some_and(|name| name.starts_with("maps-") && name != current)
            {
                fs::remove_dir_all(entry.path())?;
            }
        }
        Ok(())
    }

    fn pin_folder(&self, source: io::Error) -> KernelError {
        KernelError::PinFolder {
            path: self.config.pin_dir.clone(),
            source,
        }
    }
}

fn links_dir(config: &KernelConfig) -> PathBuf {
    Path::new(&config.pin_dir).join("links")
}

/// Maps can be shared by agents whose structs and sizes are the same.
fn layout_name(sizes: &MapSizes) -> String {
    let sizes = sizes
        .of()
        .map(|(_, entries)| format!("{entries:x}"))
        .join("-");
    format!("{LAYOUT}-{sizes}")
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        other => unreachable!(
            "heddle.bpf.c has no program of type {:?}",
            other.prog_type()
        ),
    }
}

fn program<'a>(object: &'a Ebpf, name: &str) -> Result<&'a ProgramFd, KernelError> {
    object
        .program(name)
        .ok_or_else(|| KernelError::Missing {
            kind: "program",
            name: name.into(),
        })?
        .fd()
        .map_err(|source| KernelError::Program {
            program: name.into(),
            source: Box::new(source),
        })
}

fn take_map(object: &mut Ebpf, name: &str) -> Result<aya::maps::Map, KernelError> {
    object.take_map(name).ok_or_else(|| KernelError::Missing {
        kind: "map",
        name: name.into(),
    })
}

fn table<K, V>(
    object: &mut Ebpf,
    sizes: &MapSizes,
    name: &'static str,
) -> Result<Table<K, V>, KernelError>
where
    K: Pod + Eq + std::hash::Hash,
    V: Pod + PartialEq,
{
    let map = take_map(object, name)?;
    let capacity = sizes
        .of()
        .iter()
        .find(|(other, _)| *other == name)
        .map_or(0, |(_, entries)| *entries);
    Table::open(name, capacity, map)
}
