//! How full the maps are, and the one kind of entry that nobody else would ever remove: a handshake whose client and
//! server both went away in odd ways between SYN and accept.

use std::{io, os::fd::AsFd, time::Duration};

use nix::time::ClockId;

use crate::{
    Kernel, KernelError,
    maps::{self, Keep, Place},
    raw, sys,
};

/// How full a map is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapUse {
    /// Map name.
    pub map: &'static str,
    /// Entries; `None` for what cannot be counted (state kept in sockets, a ring buffer).
    pub entries: Option<usize>,
    /// Room for so many (bytes for a ring buffer); `None` if memory is the only bound.
    pub capacity: Option<u32>,
    /// The size that a user sets for it.
    pub setting: Option<&'static str>,
    /// What happens when there is no room; `None` where being full is how it should be.
    pub without_room: Option<&'static str>,
}

impl MapUse {
    fn of(place: &Place, entries: Option<usize>) -> Self {
        Self {
            map: place.spec.name,
            entries,
            capacity: (place.entries > 0).then_some(place.entries),
            setting: place.spec.setting,
            without_room: match place.spec.keep {
                Keep::Lru => None,
                Keep::Left => Some("connections that find no room go over TCP"),
                Keep::Cache => Some("records that find no room are lost"),
                _ => Some("what finds no room is refused"),
            },
        }
    }
}

impl Kernel {
    /// The maps that the agent fills. Costs nothing: their mirrors know.
    #[must_use]
    pub fn table_uses(&self) -> Vec<MapUse> {
        let tables = &self.tables;
        let lengths = [
            (tables.cgroups.name(), tables.cgroups.len()),
            (tables.workloads.name(), tables.workloads.len()),
            (tables.addresses.name(), tables.addresses.len()),
            (tables.services.name(), tables.services.len()),
            (tables.slots.name(), tables.slots.len()),
            (tables.endpoints.name(), tables.endpoints.len()),
            (tables.verdicts.name(), tables.verdicts.len()),
            (tables.capture.name(), tables.capture.len()),
            (tables.devices.name(), tables.devices.len()),
            (maps::INBOUND, self.steering.len()),
        ];
        let places = self.places().iter();
        places
            .filter_map(|place| {
                let (_, length) = lengths.iter().find(|(name, _)| *name == place.spec.name)?;
                Some(MapUse::of(place, Some(*length)))
            })
            .collect()
    }

    /// Maps that programs write, and how full they are. The kernel copies such a map out to be counted (microseconds
    /// when it is nearly empty, tens of milliseconds for a hundred thousand entries): ask now and then, not per question.
    ///
    /// # Errors
    /// Fails if the kernel refuses the read.
    pub fn count_live_maps(&self) -> Result<Vec<MapUse>, KernelError> {
        let mut uses = Vec::new();
        for place in self.places() {
            let entries = match place.spec.keep {
                Keep::Copied | Keep::Listeners => continue,
                Keep::Sockets | Keep::Forgotten | Keep::Ring | Keep::Counters => None,
                // A map of sockets cannot be read; the pairs have as many entries as there are connections.
                Keep::Left if place.spec.name != maps::SPLICE_PAIRS => None,
                Keep::Cache | Keep::Lru | Keep::Handshakes | Keep::Left => {
                    let map = sys::open_pin(&place.path).map_err(failed(place))?;
                    Some(raw::count(map.as_fd()).map_err(failed(place))?)
                }
            };
            uses.push(MapUse::of(place, entries));
        }
        Ok(uses)
    }

    /// Removes handshakes that began longer ago than `age`, which must be longer than TCP tries. Returns how many.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn sweep_handshakes(&self, age: Duration) -> Result<usize, KernelError> {
        let Some(place) = self
            .places()
            .iter()
            .find(|place| place.spec.name == maps::HANDSHAKES)
        else {
            return Ok(0);
        };
        let now = nix::time::clock_gettime(ClockId::CLOCK_MONOTONIC)
            .map(Duration::from)
            .map_err(|error| failed(place)(error.into()))?;
        let before = now.saturating_sub(age).as_nanos();
        sweep(place, before).map_err(failed(place))
    }
}

fn sweep(place: &Place, before: u128) -> io::Result<usize> {
    let Some(at) = place.start_offset else {
        return Ok(0);
    };
    let started = |value: &[u8]| {
        let bytes = value.get(at..at + 8)?.try_into().ok()?;
        Some(u128::from(u64::from_ne_bytes(bytes)))
    };
    let is_stale = |value: &[u8]| started(value).is_some_and(|start| start < before);
    let map = sys::open_pin(&place.path)?;
    let value_size = raw::shape(map.as_fd())?.value_size;
    let mut stale = Vec::new();
    raw::for_each(map.as_fd(), |key, value| {
        if is_stale(value) {
            stale.push(key.to_vec());
        }
        Ok(())
    })?;
    let mut removed = 0;
    for key in stale {
        // The same addresses and ports may have come up again since.
        let still = raw::lookup(map.as_fd(), &key, value_size)?;
        if still.is_some_and(|value| is_stale(&value)) && raw::delete(map.as_fd(), &key)? {
            removed += 1;
        }
    }
    Ok(removed)
}

fn failed(place: &Place) -> impl FnOnce(io::Error) -> KernelError + use<> {
    let map = place.spec.name;
    move |source| KernelError::Migration {
        map,
        action: "look through",
        source,
    }
}
