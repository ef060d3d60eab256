//! Loads the object, opens (or reuses) the pinned maps and keeps the attachments of one node.
//!
//! Order matters: maps first ([`Kernel::open`]), then the caller fills them, then [`Kernel::attach`] puts the
//! programs in place. A restarted agent therefore never shows its programs half-filled tables; and one that wants
//! maps of another layout or size fills new ones while the old programs still run on the old ones (`maps` says
//! which pins there are, `migrate` moves what is in them).

use std::{
    borrow::Cow,
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use api::map_sizes::MapSizes;
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::{HashMap as BpfHashMap, Map, MapData, RingBuf},
    programs::{Program, ProgramError, ProgramFd},
};

use crate::{
    AddressEntry, AttachedProgram, CaptureKey, CgroupEntry, Datagrams, DeviceEntry, EndpointEntry,
    FlowReader, KernelError, KernelView, Reason, ServiceEntry, ServiceKey, SlotEntry, SlotKey,
    Table, VerdictEntry, VerdictKey, WorkloadEntry, attach,
    btf::{Layout, Types},
    counters::Counters,
    events::EarlierRing,
    maps::{self, Place},
    migrate, probe, raw,
    steer::{self, Steering},
    sys,
    types::Address,
};

const OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/heddle.bpf.o"));

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
    /// What the programs are loaded from.
    image: Cow<'static, [u8]>,
    pub(crate) object: Ebpf,
    pub(crate) steering: Steering,
    counters: Counters,
    places: Vec<Place>,
    view: Arc<KernelView>,
    pub(crate) attached: Vec<AttachedProgram>,
}

impl Kernel {
    /// Loads the programs and opens the node's maps. A map that an earlier agent made is used again if layout and
    /// size are the same; otherwise a new one takes over what is in it. Nothing is attached yet.
    ///
    /// # Errors
    /// Says which program, map or folder the kernel refused. What an earlier agent attached stays as it is.
    pub fn open(config: KernelConfig) -> Result<(Self, FlowReader), KernelError> {
        Self::open_object(config, OBJECT)
    }

    /// As [`Kernel::open`], with programs of another version: for tests of upgrades.
    ///
    /// # Errors
    /// As [`Kernel::open`].
    #[doc(hidden)]
    pub fn open_object(
        config: KernelConfig,
        object: impl Into<Cow<'static, [u8]>>,
    ) -> Result<(Self, FlowReader), KernelError> {
        let staging = maps::staging_dir(&config.pin_dir);
        let outcome = prepare(&config).and_then(|()| open(config, object.into()));
        if outcome.is_err() {
            // The next agent does the same; the maps need not stay in memory until then.
            drop(fs::remove_dir_all(staging));
        }
        outcome
    }

    /// The maps as the kernel has them at any moment, for readers outside of the agent's loop.
    #[must_use]
    pub fn view(&self) -> Arc<KernelView> {
        Arc::clone(&self.view)
    }

    /// Whether an earlier agent left programs attached to this node.
    #[must_use]
    pub fn has_predecessor(&self) -> bool {
        links_dir(&self.config).join(PREDECESSOR).exists()
    }

    /// Puts the programs in place, replacing an earlier agent's one by one, and drops maps that are not used any
    /// more.
    ///
    /// # Errors
    /// Says which program could not be attached; those before it are in place.
    pub fn attach(&mut self) -> Result<(), KernelError> {
        let upgraded = self.places.iter().any(|place| !place.earlier.is_empty());
        self.attach_links(usize::MAX)?;
        self.counters.take_over()?;
        migrate::finish(&mut self.places)?;
        if upgraded {
            // These programs hold the earlier maps, and step around the earlier programs: those that follow need
            // do neither.
            self.object = load_object(&self.image, &self.places, Links::Ours)?;
            self.attach_links(usize::MAX)?;
        }
        self.steering.in_place();
        Ok(())
    }

    /// The first half of [`Kernel::attach`], up to so many links: for tests that end there, as a crash would.
    ///
    /// # Errors
    /// As [`Kernel::attach`].
    #[doc(hidden)]
    pub fn attach_links(&mut self, limit: usize) -> Result<(), KernelError> {
        let links = links_dir(&self.config);
        let cgroup = File::open(&self.config.cgroup).map_err(|source| KernelError::Attach {
            action: "open the cgroup for",
            program: self.config.cgroup.display().to_string(),
            source,
        })?;
        migrate::publish(&mut self.places)?;
        self.attached.clear();
        // Before the programs that let sockets into its map.
        let splice = self.attach_splice()?;
        for device in attach::devices(&links).map_err(|source| self.pin_folder(source))? {
            self.attach_device(device)?;
        }
        // They look into handshakes: before the programs that write these.
        self.attach_steering()?;
        for (name, kind) in attach::CGROUP_PROGRAMS.iter().take(limit) {
            let program = program(&self.object, name)?;
            let attached = attach::to_cgroup(&links, name, *kind, program.as_fd(), cgroup.as_fd())?;
            self.attached.push(attached);
        }
        attach::forget_other_splices(&links, &splice).map_err(|source| self.pin_folder(source))
    }

    /// Returns the link's pin.
    fn attach_splice(&mut self) -> Result<PathBuf, KernelError> {
        let program = program(&self.object, attach::SPLICE_PROGRAM)?;
        let Some(Map::SockHash(map)) = self.object.map(attach::SPLICE_MAP) else {
            return Err(KernelError::Missing {
                kind: "map",
                name: attach::SPLICE_MAP.into(),
            });
        };
        let id = map
            .info()
            .map_err(|source| KernelError::map(attach::SPLICE_MAP, source))?
            .id();
        let attached = attach::to_splice_map(
            &links_dir(&self.config),
            program.as_fd(),
            map.fd().as_fd(),
            id,
        )?;
        let pin = attached.pin.clone();
        self.attached.push(attached);
        Ok(pin)
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

    /// How often each reason came up since the node's first maps were made.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn reason_counts(&self) -> Result<Vec<(Reason, u64)>, KernelError> {
        self.counters.read()
    }

    /// Every map.
    pub(crate) fn places(&self) -> &[Place] {
        &self.places
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

/// The folders of the pins. What an agent left half done is thrown away.
fn prepare(config: &KernelConfig) -> Result<(), KernelError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| KernelError::PinFolder { path, source }
    };
    require_bpffs(&config.pin_dir).map_err(failed(&config.pin_dir))?;
    let staging = maps::staging_dir(&config.pin_dir);
    match fs::remove_dir_all(&staging) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed(&staging)(error));
        }
        _ => {}
    }
    for folder in [staging, maps::maps_dir(&config.pin_dir), links_dir(config)] {
        fs::create_dir_all(&folder).map_err(failed(&folder))?;
    }
    Ok(())
}

/// On any other file system there would be no pins, and no way to see that an earlier agent's programs run.
fn require_bpffs(pin_dir: &Path) -> io::Result<()> {
    let existing = pin_dir.ancestors().find(|folder| folder.exists());
    let kind = nix::sys::statfs::statfs(existing.unwrap_or(pin_dir))?.filesystem_type();
    if kind == nix::sys::statfs::BPF_FS_MAGIC {
        Ok(())
    } else {
        Err(io::Error::other("no bpffs is mounted there"))
    }
}

fn open(
    config: KernelConfig,
    image: Cow<'static, [u8]>,
) -> Result<(Kernel, FlowReader), KernelError> {
    let definitions = maps::definitions(&image)?;
    let places = maps::places(&config.pin_dir, &config.sizes, &definitions)?;
    let mut object = load_object(&image, &places, Links::Earlier)?;
    migrate::fill(&places)?;
    let view = Arc::new(KernelView::of(&object, &places)?);
    let mut opener = Opener {
        object: &mut object,
        places: &places,
    };
    let tables = Tables {
        cgroups: opener.table("cgroups")?,
        workloads: opener.table("workloads")?,
        addresses: opener.table("addresses")?,
        services: opener.table("services")?,
        slots: opener.table("slots")?,
        endpoints: opener.table("endpoints")?,
        verdicts: opener.table("verdicts")?,
        capture: opener.table("capture")?,
        devices: opener.table("devices")?,
    };
    let counters = Counters::open(opener.map("reasons")?, opener.place("reasons")?)?;
    let ring = RingBuf::try_from(opener.map("flows")?)
        .map_err(|source| KernelError::map("flows", source))?;
    let earlier = earlier_rings(&config, opener.place("flows")?, &definitions["flows"].value)?;
    let datagrams = BpfHashMap::try_from(opener.map("datagrams")?)
        .map_err(|source| KernelError::map("datagrams", source))?;
    let Map::SockHash(inbound) = opener.map(maps::INBOUND)? else {
        return Err(KernelError::Missing {
            kind: "map of sockets",
            name: maps::INBOUND.into(),
        });
    };
    let steering = Steering::new(
        steer::duplicate(&inbound)?,
        opener.place(maps::INBOUND)?,
        links_dir(&config),
    );
    let kernel = Kernel {
        tables,
        config,
        image,
        object,
        steering,
        counters,
        places,
        view,
        attached: Vec::new(),
    };
    Ok((
        kernel,
        FlowReader::new(ring, earlier, Datagrams::new(datagrams)),
    ))
}

/// Makes the maps that are not there yet, and has the verifier look at the programs.
fn load_object(bytes: &[u8], places: &[Place], links: Links) -> Result<Ebpf, KernelError> {
    let carried = Carried::of(places, links)?;
    let has_set_retval = u32::from(probe::has_set_retval());
    let mut loader = EbpfLoader::new();
    loader.override_global("has_set_retval", &has_set_retval, true);
    carried.tell(&mut loader);
    for place in places {
        if place.entries > 0 {
            loader.map_max_entries(place.spec.name, place.entries);
        }
        loader.map_pin_path(place.spec.name, &place.path);
    }
    for (name, path) in &carried.maps {
        match path {
            Some(path) => loader.map_pin_path(name, *path),
            // A socket storage has no size.
            None if maps::HANDSHAKES_BEFORE.contains(name) => loader.map_max_entries(name, 1),
            None => &mut loader,
        };
    }
    let mut object = loader.load(bytes)?;
    for (name, program) in object.programs_mut() {
        load(program).map_err(|source| KernelError::program(name, source))?;
    }
    Ok(object)
}

/// Whose programs are attached while new ones run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Links {
    /// An earlier agent's, perhaps of another version.
    Earlier,
    /// All of them are of this version.
    Ours,
}

/// What programs are told of earlier versions' maps (`bpf/carry.h`).
struct Carried<'a> {
    carries: u32,
    plans: [(&'static str, Vec<u16>); 4],
    /// Without an earlier one a map of that name is made that no program looks into.
    maps: Vec<(&'static str, Option<&'a Path>)>,
}

/// As in `bpf/carry.h`.
const CARRY_BYTES: usize = 256;
const PLANS: [&str; 4] = [
    "carry_sockets",
    "carry_sockets_2",
    "carry_grant",
    "carry_grant_2",
];
const SETTLED: u32 = 16;

impl<'a> Carried<'a> {
    fn of(places: &'a [Place], links: Links) -> Result<Self, KernelError> {
        let mut carried = Self {
            carries: 0,
            plans: PLANS.map(|name| (name, vec![0; CARRY_BYTES])),
            maps: Vec::new(),
        };
        let ([socket, socket_2], [grant, grant_2]) =
            (maps::SOCKETS_BEFORE, maps::HANDSHAKES_BEFORE);
        for (index, (map, place, before)) in [
            (maps::SOCKETS, 0, socket),
            (maps::SOCKETS, 1, socket_2),
            (maps::HANDSHAKES, 0, grant),
            (maps::HANDSHAKES, 1, grant_2),
        ]
        .into_iter()
        .enumerate()
        {
            let own = find(places, map)?;
            let usable = |earlier: &&maps::Earlier| {
                let plans = earlier.plans.as_ref();
                plans.is_some_and(|plans| plans.same_keys)
            };
            match own.earlier.get(place).filter(usable) {
                Some(earlier) => {
                    carried.carries |= 1 << index;
                    carried.maps.push((before, Some(&earlier.path)));
                    let plan = earlier.plans.iter().flat_map(|plans| &plans.value);
                    for (to, from) in carried.plans[index].1.iter_mut().zip(plan) {
                        *to = from.map_or(0, |at| u16::try_from(at + 1).unwrap_or(0));
                    }
                }
                None => carried.maps.push((before, None)),
            }
        }
        if links == Links::Ours {
            carried.carries |= SETTLED;
        }
        Ok(carried)
    }

    fn tell<'b>(&'b self, loader: &mut EbpfLoader<'b>) {
        loader.override_global("carries", &self.carries, true);
        for (name, plan) in &self.plans {
            loader.override_global(name, plan.as_slice(), true);
        }
    }
}

fn find<'a>(places: &'a [Place], name: &str) -> Result<&'a Place, KernelError> {
    let found = places.iter().find(|place| place.spec.name == name);
    found.ok_or_else(|| KernelError::Missing {
        kind: "map",
        name: name.into(),
    })
}

/// The rings that an earlier agent's programs may have written to.
fn earlier_rings(
    config: &KernelConfig,
    place: &Place,
    record: &Layout,
) -> Result<Vec<EarlierRing>, KernelError> {
    let mut rings = Vec::new();
    for earlier in &place.earlier {
        let ring = MapData::from_pin(&earlier.path)
            .and_then(Map::from_map_data)
            .and_then(RingBuf::try_from)
            .map_err(|source| KernelError::map("flows", source))?;
        // A ring does not know its types; the programs that write to it do.
        let written = earlier_record(config).unwrap_or_else(|| record.clone());
        rings.push(EarlierRing {
            ring,
            record: written.size(),
            plan: record.plan_from(&written),
        });
    }
    Ok(rings)
}

fn earlier_record(config: &KernelConfig) -> Option<Layout> {
    let pin = links_dir(config).join(PREDECESSOR);
    let link: OwnedFd = sys::open_pin(&pin).ok()?;
    let types = raw::types_of_link(link.as_fd()).ok()??;
    Types::parse(&types)?.layout_of("flow_event")
}

/// The last link that is made, and the last that is switched: while it is an earlier agent's, so are the rules.
const PREDECESSOR: &str = "heddle_sock_create";

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::SkMsg(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        other => unreachable!(
            "heddle.bpf.c has no program of type {:?}",
            other.prog_type()
        ),
    }
}

pub(crate) fn program<'a>(object: &'a Ebpf, name: &str) -> Result<&'a ProgramFd, KernelError> {
    object
        .program(name)
        .ok_or_else(|| KernelError::Missing {
            kind: "program",
            name: name.into(),
        })?
        .fd()
        .map_err(|source| KernelError::program(name, source))
}

/// Takes maps out of the object, in the types that this crate knows them by.
struct Opener<'a> {
    object: &'a mut Ebpf,
    places: &'a [Place],
}

impl<'a> Opener<'a> {
    fn place(&self, name: &str) -> Result<&'a Place, KernelError> {
        find(self.places, name)
    }

    fn map(&mut self, name: &str) -> Result<Map, KernelError> {
        self.object
            .take_map(name)
            .ok_or_else(|| KernelError::Missing {
                kind: "map",
                name: name.into(),
            })
    }

    fn table<K, V>(&mut self, name: &'static str) -> Result<Table<K, V>, KernelError>
    where
        K: Pod + Eq + std::hash::Hash,
        V: Pod + PartialEq,
    {
        let map = self.map(name)?;
        Table::open(name, self.place(name)?.entries, map)
    }
}
