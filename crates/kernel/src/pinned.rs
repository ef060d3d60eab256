//! A node's pinned maps as another process sees them: what stands in them now, and what memory they take.
//! For measuring and tests; the node's agent, which writes them, has [`crate::Tables`].

use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use aya::{
    Pod,
    maps::{HashMap as BpfHashMap, Map, MapData},
};

use crate::{
    Address, AddressEntry, KernelError, ServiceEntry, ServiceKey, WorkloadEntry, maps, sys,
};

/// The live maps of one node.
#[derive(Debug)]
pub struct PinnedMaps {
    folder: PathBuf,
    /// By name.
    pins: BTreeMap<String, PathBuf>,
    services: BpfHashMap<MapData, ServiceKey, ServiceEntry>,
    addresses: BpfHashMap<MapData, Address, AddressEntry>,
    workloads: BpfHashMap<MapData, u32, WorkloadEntry>,
}

/// What one map takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapMemory {
    /// Its name.
    pub map: String,
    /// Most entries that it can hold (bytes, for the ring buffer).
    pub capacity: u64,
    /// Memory in bytes, as the kernel counts it.
    pub bytes: u64,
}

impl PinnedMaps {
    /// Opens the maps that an agent has pinned below `pin_dir` ([`crate::KernelConfig::pin_dir`]).
    ///
    /// # Errors
    /// There are none.
    pub fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        let failed = |source| KernelError::PinFolder {
            path: pin_dir.to_owned(),
            source,
        };
        let pins = maps::newest(pin_dir).map_err(failed)?;
        Ok(Self {
            services: open(&pins, "services")?,
            addresses: open(&pins, "addresses")?,
            workloads: open(&pins, "workloads")?,
            folder: pin_dir.to_owned(),
            pins,
        })
    }

    /// The live table of a service's address and port.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<ServiceEntry> {
        self.services.get(key, 0).ok()
    }

    /// Whose address it is.
    #[must_use]
    pub fn address(&self, address: Address) -> Option<AddressEntry> {
        self.addresses.get(&address, 0).ok()
    }

    /// The rules in force for a workload of the node.
    #[must_use]
    pub fn workload(&self, id: u32) -> Option<WorkloadEntry> {
        self.workloads.get(&id, 0).ok()
    }

    /// What each map takes, by name.
    ///
    /// # Errors
    /// A pin cannot be opened.
    pub fn memory(&self) -> Result<Vec<MapMemory>, KernelError> {
        let read = || -> io::Result<Vec<MapMemory>> {
            let mut maps = Vec::new();
            for (name, pin) in &self.pins {
                maps.push(memory_of(name.clone(), &sys::open_pin(pin)?)?);
            }
            Ok(maps)
        };
        read().map_err(|source| KernelError::PinFolder {
            path: self.folder.clone(),
            source,
        })
    }
}

fn open<K: Pod, V: Pod>(
    pins: &BTreeMap<String, PathBuf>,
    name: &'static str,
) -> Result<BpfHashMap<MapData, K, V>, KernelError> {
    let pin = pins.get(name).ok_or_else(|| KernelError::Missing {
        kind: "pinned map",
        name: name.into(),
    })?;
    MapData::from_pin(pin)
        .and_then(|data| BpfHashMap::try_from(Map::HashMap(data)))
        .map_err(|source| KernelError::map(name, source))
}

/// `/proc/self/fdinfo` has what bpf(2) does not tell: the memory that a map is charged for.
fn memory_of(map: String, fd: &OwnedFd) -> io::Result<MapMemory> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let field = |name: &str| {
        let mut values = text.lines().filter_map(|line| line.strip_prefix(name));
        let value = values.next().and_then(|value| value.trim().parse().ok());
        value.ok_or_else(|| io::Error::other(format!("the kernel does not tell {name} of {map}")))
    };
    Ok(MapMemory {
        capacity: field("max_entries:")?,
        bytes: field("memlock:")?,
        map,
    })
}
