//! What the kernel decides by, read for somebody who asks outside of the agent's loop: handles of its own on the maps,
//! so that the answer is the one that a connection would get at this moment.

use std::{
    collections::{HashMap, HashSet},
    hash::Hash,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use aya::{
    Ebpf, Pod,
    maps::{HashMap as BpfHashMap, Map, MapData, MapError},
};

use crate::{
    Address, AddressEntry, CgroupEntry, DatagramFlow, Datagrams, EndpointEntry, Grant, KernelError,
    ServiceEntry, ServiceKey, SlotEntry, SlotKey, SocketClass, SocketState, SpliceConnection,
    SplicePair, Tuple, VerdictEntry, VerdictKey, WorkloadEntry, btf,
    maps::{self, Place},
    raw,
};

/// How often a table that is switched while it is read is read again.
const ATTEMPTS: usize = 3;

/// Reads the maps. May be used from any thread, while the agent writes.
#[derive(Debug)]
pub struct KernelView {
    cgroups: BpfHashMap<MapData, u64, CgroupEntry>,
    addresses: BpfHashMap<MapData, Address, AddressEntry>,
    workloads: BpfHashMap<MapData, u32, WorkloadEntry>,
    verdicts: BpfHashMap<MapData, VerdictKey, VerdictEntry>,
    services: BpfHashMap<MapData, ServiceKey, ServiceEntry>,
    slots: BpfHashMap<MapData, SlotKey, SlotEntry>,
    endpoints: BpfHashMap<MapData, u32, EndpointEntry>,
    datagrams: Datagrams,
    splice_pairs: BpfHashMap<MapData, SpliceConnection, SplicePair>,
    sockets: Storage,
    /// The newest first; see `carry.h`.
    earlier_sockets: Vec<EarlierStorage>,
    splices: Storage,
}

/// A map whose values are kept in sockets.
#[derive(Debug)]
struct Storage {
    map: MapData,
    id: u32,
    value_size: usize,
}

/// An earlier version's, with how its values become ours.
#[derive(Debug)]
struct EarlierStorage {
    map: OwnedFd,
    value_size: usize,
    plan: Vec<Option<u32>>,
}

/// More than a socket's state takes in any version (`CARRY_BYTES` in `carry.h`).
const STATE_BYTES: usize = 256;

/// The endpoints that a service's port leads to now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceTargets {
    /// Service id.
    pub service: u32,
    /// Address and port of each.
    pub targets: HashSet<(Address, u16)>,
}

impl KernelView {
    pub(crate) fn of(object: &Ebpf, places: &[Place]) -> Result<Self, KernelError> {
        Ok(Self {
            cgroups: hash_map(object, "cgroups")?,
            addresses: hash_map(object, "addresses")?,
            workloads: hash_map(object, "workloads")?,
            verdicts: hash_map(object, "verdicts")?,
            services: hash_map(object, "services")?,
            slots: hash_map(object, "slots")?,
            endpoints: hash_map(object, "endpoints")?,
            datagrams: Datagrams::new(hash_map(object, "datagrams")?),
            splice_pairs: hash_map(object, maps::SPLICE_PAIRS)?,
            sockets: Storage::of(object, maps::SOCKETS)?,
            earlier_sockets: earlier_sockets(places)?,
            splices: Storage::of(object, maps::SPLICES)?,
        })
    }

    /// Who lives in a cgroup.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn cgroup(&self, id: u64) -> Result<Option<CgroupEntry>, KernelError> {
        find(&self.cgroups, "cgroups", &id)
    }

    /// Whose address it is.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn address(&self, address: Address) -> Result<Option<AddressEntry>, KernelError> {
        find(&self.addresses, "addresses", &address)
    }

    /// A local workload's rules; `None` if there is none of this number.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn workload(&self, id: u32) -> Result<Option<WorkloadEntry>, KernelError> {
        find(&self.workloads, "workloads", &id)
    }

    /// The verdict about an app's connection from `source` to a port of `policy_set`, as the programs look it up.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn verdict(
        &self,
        source: u32,
        policy_set: u32,
        port: u16,
    ) -> Result<Option<VerdictEntry>, KernelError> {
        let mut key = VerdictKey {
            source,
            policy_set,
            port,
            socket_class: SocketClass::App as u8,
            padding: 0,
        };
        let own = find(&self.verdicts, "verdicts", &key)?;
        if own.is_some() {
            return Ok(own);
        }
        key.port = 0;
        find(&self.verdicts, "verdicts", &key)
    }

    /// Where the services for datagrams are, by number. One that is switched to another table meanwhile may be missed.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn datagram_services(&self) -> Result<HashMap<u32, ServiceKey>, KernelError> {
        let mut services = HashMap::new();
        for entry in self.services.iter() {
            let (key, entry) = entry.map_err(|source| KernelError::map("services", source))?;
            if key.protocol == ServiceKey::UDP {
                services.insert(entry.service, key);
            }
        }
        Ok(services)
    }

    /// What goes between datagram sockets, as it stands.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn datagrams(&self) -> Result<Vec<(Tuple, DatagramFlow)>, KernelError> {
        self.datagrams.all()
    }

    /// Where a service's port leads.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn targets(&self, key: &ServiceKey) -> Result<Targets, KernelError> {
        for _ in 0..ATTEMPTS {
            let Some(entry) = find(&self.services, "services", key)? else {
                return Ok(Targets::NoService);
            };
            if let Some(targets) = self.table(&entry)? {
                let service = entry.service;
                return Ok(Targets::Known(ServiceTargets { service, targets }));
            }
        }
        Ok(Targets::Changing)
    }

    /// The map that keeps a [`crate::SocketState`] in every socket.
    #[must_use]
    pub fn sockets(&self) -> BorrowedFd<'_> {
        self.sockets.map.fd().as_fd()
    }

    /// That map's number.
    #[must_use]
    pub fn sockets_id(&self) -> u32 {
        self.sockets.id
    }

    /// What the programs know of a connection that the agent has accepted: for one that was led there, what its client asked
    /// for. `None` if nobody vouches for it. One call into the kernel.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read, or it is no socket.
    pub fn accepted_grant(&self, socket: BorrowedFd<'_>) -> Result<Option<Grant>, KernelError> {
        let state = self.state_of(socket).map_err(failed_on_sockets)?;
        Ok(state
            .map(|state| state.grant)
            .filter(|grant| grant.start_ns != 0))
    }

    fn state_of(&self, socket: BorrowedFd<'_>) -> io::Result<Option<SocketState>> {
        let key = socket.as_raw_fd().to_ne_bytes();
        let mut buffer = [0u8; STATE_BYTES];
        if raw::lookup_into(self.sockets(), &key, &mut buffer)? {
            return Ok(SocketState::from_bytes(&buffer[..self.sockets.value_size]));
        }
        for earlier in &self.earlier_sockets {
            if raw::lookup_into(earlier.map.as_fd(), &key, &mut buffer)? {
                let state = btf::convert(&earlier.plan, &buffer[..earlier.value_size]);
                return Ok(SocketState::from_bytes(&state));
            }
        }
        Ok(None)
    }

    /// The map that keeps a [`crate::SpliceState`] in every spliced socket.
    #[must_use]
    pub fn splices(&self) -> BorrowedFd<'_> {
        self.splices.map.fd().as_fd()
    }

    /// That map's number.
    #[must_use]
    pub fn splices_id(&self) -> u32 {
        self.splices.id
    }

    /// Bytes that the client and the server of a connection have spliced so far: TCP counts none of them. `None` once the
    /// client has closed.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn spliced(&self, connection: &SpliceConnection) -> Result<Option<[u64; 2]>, KernelError> {
        let pair = find(&self.splice_pairs, maps::SPLICE_PAIRS, connection)?;
        Ok(pair.map(|pair| pair.sent))
    }

    /// `None` if it is not there any more.
    fn table(&self, entry: &ServiceEntry) -> Result<Option<HashSet<(Address, u16)>>, KernelError> {
        let mut numbers = HashSet::new();
        for slot in 0..entry.slots {
            let key = SlotKey {
                service: entry.service,
                generation: entry.generation,
                slot,
            };
            let Some(slot) = find(&self.slots, "slots", &key)? else {
                return Ok(None);
            };
            numbers.extend([slot.endpoint, slot.alias]);
        }
        let mut targets = HashSet::new();
        for number in numbers {
            let Some(endpoint) = find(&self.endpoints, "endpoints", &number)? else {
                return Ok(None);
            };
            targets.insert((endpoint.address, endpoint.port));
        }
        Ok(Some(targets))
    }
}

impl Storage {
    fn of(object: &Ebpf, name: &'static str) -> Result<Self, KernelError> {
        let map = duplicate(object, name)?;
        let info = map.info();
        let id = info.map_err(|source| KernelError::map(name, source))?.id();
        let value_size = bounded(map.fd().as_fd())?;
        Ok(Self {
            map,
            id,
            value_size,
        })
    }
}

fn earlier_sockets(places: &[Place]) -> Result<Vec<EarlierStorage>, KernelError> {
    let place = places.iter().find(|place| place.spec.name == maps::SOCKETS);
    let mut storages = Vec::new();
    for earlier in place.iter().flat_map(|place| &place.earlier) {
        if let Some(plans) = &earlier.plans {
            storages.push(EarlierStorage {
                map: earlier.map.try_clone().map_err(failed_on_sockets)?,
                value_size: bounded(earlier.map.as_fd())?,
                plan: plans.value.clone(),
            });
        }
    }
    Ok(storages)
}

/// How large a storage's values are: no larger than the buffer that they are read into.
fn bounded(storage: BorrowedFd<'_>) -> Result<usize, KernelError> {
    let size = raw::shape(storage).map_err(failed_on_sockets)?.value_size;
    if size > STATE_BYTES {
        let error = io::Error::other(format!("values of {size} bytes are larger than any known"));
        return Err(failed_on_sockets(error));
    }
    Ok(size)
}

fn failed_on_sockets(source: io::Error) -> KernelError {
    KernelError::map(maps::SOCKETS, MapError::IoError(source))
}

/// The answer of [`KernelView::targets`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// These.
    Known(ServiceTargets),
    /// There is no such service port.
    NoService,
    /// The table was switched whenever it was read: ask again later.
    Changing,
}

fn hash_map<K: Pod, V: Pod>(
    object: &Ebpf,
    name: &'static str,
) -> Result<BpfHashMap<MapData, K, V>, KernelError> {
    BpfHashMap::try_from(Map::HashMap(duplicate(object, name)?))
        .map_err(|source| KernelError::map(name, source))
}

fn duplicate(object: &Ebpf, name: &'static str) -> Result<MapData, KernelError> {
    let (Map::HashMap(map) | Map::SkStorage(map)) =
        object.map(name).ok_or_else(|| KernelError::Missing {
            kind: "map",
            name: name.into(),
        })?
    else {
        return Err(KernelError::Missing {
            kind: "map of the expected type",
            name: name.into(),
        });
    };
    let copy = map
        .fd()
        .as_fd()
        .try_clone_to_owned()
        .map_err(|source| KernelError::map(name, MapError::IoError(source)))?;
    MapData::from_fd(copy).map_err(|source| KernelError::map(name, source))
}

fn find<K: Pod + Eq + Hash, V: Pod>(
    map: &BpfHashMap<MapData, K, V>,
    name: &'static str,
    key: &K,
) -> Result<Option<V>, KernelError> {
    match map.get(key, 0) {
        Ok(value) => Ok(Some(value)),
        Err(MapError::KeyNotFound) => Ok(None),
        Err(source) => Err(KernelError::map(name, source)),
    }
}
