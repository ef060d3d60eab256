//! The node's maps, one line each: how large they are, and what becomes of their contents when a version of
//! Heddle wants another size or layout. The copying itself is in `migrate`.
//!
//! Each map has a pin of its own, `maps/NAME-LAYOUT-ENTRIES-NUMBER`. LAYOUT is a hash over the fields of key and
//! value; the highest NUMBER is the one in force. A map that fits is used again. One that does not is made anew
//! under `staging/` and comes into `maps/` when everything in it is complete, before the first program uses it;
//! the earlier one goes when no program uses it any more. So an agent may die at any point: what is in `staging/`
//! is thrown away by the next one, and what is in `maps/` is complete.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use api::map_sizes::MapSizes;
use aya_obj::Object;

use crate::{
    KernelError, Reason,
    btf::{Layout, Types},
    raw, sys,
};

/// A map of the object.
#[derive(Debug)]
pub(crate) struct MapSpec {
    pub(crate) name: &'static str,
    pub(crate) keep: Keep,
    /// The size that a user sets for it; `None` where there is nothing to set.
    pub(crate) setting: Option<&'static str>,
    pub(crate) entries: fn(&MapSizes) -> u32,
}

/// What becomes of a map's contents when another takes its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    /// Written by the agent alone: copied into the new map, which the agent then brings up to date.
    Copied,
    /// Written by programs, and losing an entry changes no decision: copied before the links are switched, and once
    /// more afterwards.
    Cache,
    /// As [`Keep::Cache`], and where there is no room the least recently used is forgotten.
    Lru,
    /// Kept in the sockets themselves, and begun anew with another layout: what is lost is asked for again.
    Forgotten,
    /// Written by programs for open connections, whose sockets keep the programs that they began under, and with
    /// them this map: they go on in it, and only new ones enter the new map (a map of sockets cannot be copied).
    Left,
    /// The agent's own listening sockets, which it enters anew: a map of sockets cannot be copied.
    Listeners,
    /// Written by programs, and nothing may be lost: the new programs look into the earlier map as well (`carry.h`),
    /// and what is still in it when all links are switched is copied.
    Handshakes,
    /// Kept in the sockets themselves: the new programs look for what earlier ones left (`carry.h`), as long as
    /// there may be sockets that have nothing else.
    Sockets,
    /// Counters per CPU; the upper half takes those of the earlier map.
    Counters,
    /// Records, read from both maps until the earlier one is empty.
    Ring,
}

/// Every map. What a program of ours declares is here, or loading fails.
pub(crate) const MAPS: &[MapSpec] = {
    use Keep::{
        Cache, Copied, Counters, Forgotten, Handshakes, Left, Listeners, Lru, Ring, Sockets,
    };
    const fn of(
        name: &'static str,
        keep: Keep,
        setting: Option<&'static str>,
        entries: fn(&MapSizes) -> u32,
    ) -> MapSpec {
        MapSpec {
            name,
            keep,
            setting,
            entries,
        }
    }
    // Slots and endpoints exist twice while a service switches tables.
    &[
        of("cgroups", Copied, Some("workloads"), |s| {
            s.workloads * 2 + 2
        }),
        of("workloads", Copied, Some("workloads"), |s| s.workloads),
        of("addresses", Copied, Some("addresses"), |s| s.addresses),
        of("services", Copied, Some("services"), |s| s.services),
        of("slots", Copied, Some("endpoints"), |s| s.endpoints * 2),
        of("endpoints", Copied, Some("endpoints"), |s| s.endpoints * 2),
        of("verdicts", Copied, Some("verdicts"), |s| s.verdicts),
        of("capture", Copied, Some("workloads"), |s| s.workloads * 4),
        of("devices", Copied, Some("workloads"), |s| s.workloads),
        of(INBOUND, Listeners, Some("workloads"), |s| s.workloads),
        of("affinity", Lru, Some("affinity"), |s| s.affinity),
        of("datagrams", Cache, Some("datagrams"), |s| s.datagrams),
        // Whom datagram sockets have asked.
        of("peers", Forgotten, None, |_| 0),
        of(HANDSHAKES, Handshakes, Some(HANDSHAKES), |s| s.handshakes),
        of(SOCKETS, Sockets, None, |_| 0),
        of(SPLICE_PAIRS, Left, Some("splices"), |s| s.splices),
        of("splice_sockets", Left, Some("splices"), |s| s.splices * 2),
        of(SPLICES, Left, None, |_| 0),
        of("reasons", Counters, None, |_| Reason::ALL.len() as u32 * 2),
        of("flows", Ring, Some("flow_bytes"), |s| s.flow_bytes),
    ]
};

/// The line of a map.
pub(crate) fn spec(name: &str) -> Option<&'static MapSpec> {
    MAPS.iter().find(|spec| spec.name == name)
}

pub(crate) const HANDSHAKES: &str = "handshakes";
pub(crate) const SOCKETS: &str = "sockets";
/// The agent's listeners by workload.
pub(crate) const INBOUND: &str = "inbound";
/// One entry per spliced connection.
pub(crate) const SPLICE_PAIRS: &str = "splice_pairs";
/// State of spliced sockets.
pub(crate) const SPLICES: &str = "splices";
/// What programs call the earlier versions of [`SOCKETS`], the newest first, and of [`HANDSHAKES`].
pub(crate) const SOCKETS_BEFORE: [&str; 2] = ["sockets_before", "sockets_before_2"];
pub(crate) const HANDSHAKES_BEFORE: [&str; 2] = ["handshakes_before", "handshakes_before_2"];

/// How an object lays a map out.
#[derive(Debug)]
pub(crate) struct Definition {
    pub(crate) key: Layout,
    pub(crate) value: Layout,
    hash: u64,
}

/// How the object lays out each of [`MAPS`].
pub(crate) fn definitions(bytes: &[u8]) -> Result<HashMap<&'static str, Definition>, KernelError> {
    let object = Object::parse(bytes).map_err(|error| KernelError::Load(error.into()))?;
    let raw = object.btf.as_ref().map(aya_obj::btf::Btf::to_bytes);
    let types = raw.as_deref().and_then(Types::parse);
    let types = types.ok_or_else(|| missing("type information", "in BTF"))?;
    MAPS.iter()
        .map(|spec| {
            let Some(aya_obj::Map::Btf(map)) = object.maps.get(spec.name) else {
                return Err(missing("map", spec.name));
            };
            let layout = |id| match id {
                0 => Some(Layout::default()),
                id => types.layout(id),
            };
            let key = layout(map.def.btf_key_type_id);
            let value = layout(map.def.btf_value_type_id);
            let (Some(key), Some(value)) = (key, value) else {
                return Err(missing("layout of map", spec.name));
            };
            let map = &object.maps[spec.name];
            let mut text = format!("{} {} ", map.map_type(), map.map_flags());
            key.describe(&mut text);
            text.push('|');
            value.describe(&mut text);
            let hash = fnv(text.as_bytes());
            Ok((spec.name, Definition { key, value, hash }))
        })
        .collect()
}

fn missing(kind: &'static str, name: &str) -> KernelError {
    KernelError::Missing {
        kind,
        name: name.into(),
    }
}

/// FNV-1a: a hash that stays the same over versions of compilers and libraries.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// A map of the node: where its pin is, and what it takes over from.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) spec: &'static MapSpec,
    pub(crate) entries: u32,
    /// The pin; below `staging/` for a map that is to take the place of another.
    pub(crate) path: PathBuf,
    /// Where a new map's pin goes when it is complete.
    pub(crate) publish: Option<PathBuf>,
    /// Where a value says since when it is there, if it says so.
    pub(crate) start_offset: Option<usize>,
    /// The newest first.
    pub(crate) earlier: Vec<Earlier>,
}

/// A map that an earlier agent made with another layout or size.
#[derive(Debug)]
pub(crate) struct Earlier {
    pub(crate) path: PathBuf,
    pub(crate) map: OwnedFd,
    /// How bytes of its keys and values become those of the new map; `None` if the kernel does not know its types.
    pub(crate) plans: Option<Plans>,
}

#[derive(Debug)]
pub(crate) struct Plans {
    pub(crate) key: Vec<Option<u32>>,
    pub(crate) value: Vec<Option<u32>>,
    /// Keys are the same on both sides, byte by byte.
    pub(crate) same_keys: bool,
}

/// The folder of the pins that are complete.
pub(crate) fn maps_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join("maps")
}

/// The folder of the pins that are not.
pub(crate) fn staging_dir(pin_dir: &Path) -> PathBuf {
    pin_dir.join("staging")
}

/// The pins in force below `pin_dir`, by map.
pub(crate) fn newest(pin_dir: &Path) -> io::Result<BTreeMap<String, PathBuf>> {
    let folder = maps_dir(pin_dir);
    let mut newest: BTreeMap<String, Pin> = BTreeMap::new();
    for entry in fs::read_dir(&folder)? {
        let name = entry?.file_name();
        let Some(pin) = name.to_str().and_then(Pin::parse) else {
            continue;
        };
        let known = newest.get(&pin.map);
        if known.is_none_or(|known| known.number < pin.number) {
            newest.insert(pin.map.clone(), pin);
        }
    }
    let paths = newest.into_iter();
    Ok(paths
        .map(|(map, pin)| (map, folder.join(pin.file_name())))
        .collect())
}

/// Finds for every map the pin that fits, or where a new one goes.
pub(crate) fn places(
    pin_dir: &Path,
    sizes: &MapSizes,
    definitions: &HashMap<&'static str, Definition>,
) -> Result<Vec<Place>, KernelError> {
    let folder = maps_dir(pin_dir);
    let failed = |source| KernelError::PinFolder {
        path: folder.clone(),
        source,
    };
    let mut pins: HashMap<String, Vec<Pin>> = HashMap::new();
    for entry in fs::read_dir(&folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let Some(pin) = name.to_str().and_then(Pin::parse) {
            pins.entry(pin.map.clone()).or_default().push(pin);
        }
    }
    let mut places = Vec::new();
    for spec in MAPS {
        let definition = &definitions[spec.name];
        let entries = (spec.entries)(sizes);
        let mut known = pins.remove(spec.name).unwrap_or_default();
        known.sort_by_key(|pin| std::cmp::Reverse(pin.number));
        let fits = known
            .first()
            .is_some_and(|newest| newest.layout == definition.hash && newest.entries == entries);
        let (path, publish) = if fits {
            (folder.join(known.remove(0).file_name()), None)
        } else {
            let pin = Pin {
                map: spec.name.into(),
                layout: definition.hash,
                entries,
                number: known
                    .first()
                    .map_or(1, |newest| newest.number.saturating_add(1)),
            };
            let name = pin.file_name();
            if known.is_empty() {
                // Nothing is in force that a half-filled map could take the place of.
                (folder.join(name), None)
            } else {
                (staging_dir(pin_dir).join(&name), Some(folder.join(name)))
            }
        };
        let earlier = known
            .iter()
            .map(|pin| Earlier::open(folder.join(pin.file_name()), definition))
            .collect::<io::Result<_>>()
            .map_err(failed)?;
        places.push(Place {
            spec,
            entries,
            path,
            publish,
            start_offset: definition.value.offset_of("start_ns"),
            earlier,
        });
    }
    Ok(places)
}

impl Earlier {
    fn open(path: PathBuf, definition: &Definition) -> io::Result<Self> {
        let map = sys::open_pin(&path)?;
        let shape = raw::shape(map.as_fd())?;
        let types = match shape.btf {
            0 => None,
            id => Types::parse(&raw::types(id)?),
        };
        let plans = types.and_then(|types| {
            let key = types.layout(shape.key_type)?;
            let value = types.layout(shape.value_type)?;
            Some(Plans {
                key: definition.key.plan_from(&key),
                value: definition.value.plan_from(&value),
                same_keys: definition.key == key,
            })
        });
        Ok(Self { path, map, plans })
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Pin {
    map: String,
    layout: u64,
    entries: u32,
    number: u32,
}

impl Pin {
    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('-');
        let pin = Self {
            map: parts.next()?.into(),
            layout: u64::from_str_radix(parts.next()?, 16).ok()?,
            entries: parts.next()?.parse().ok()?,
            number: parts.next()?.parse().ok()?,
        };
        parts.next().is_none().then_some(pin)
    }

    fn file_name(&self) -> String {
        let Self {
            map,
            layout,
            entries,
            number,
        } = self;
        format!("{map}-{layout:016x}-{entries}-{number}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pins_name_says_what_it_is() {
        let pin = Pin {
            map: "verdicts".into(),
            layout: 0xab,
            entries: 4096,
            number: 3,
        };
        assert_eq!(pin.file_name(), "verdicts-00000000000000ab-4096-3");
        assert_eq!(Pin::parse(&pin.file_name()), Some(pin));
        for other in ["verdicts", "verdicts-xx-1-1", "verdicts-ab-1-1-1", ""] {
            assert_eq!(Pin::parse(other), None, "{other}");
        }
    }
}
