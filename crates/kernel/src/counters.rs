//! How often each reason came up, summed over CPUs, and over maps that took each other's place.
//!
//! The lower half of the map is the programs'. The upper half is ours: what earlier maps had counted when the last
//! program stopped using them. Until that is written, their counts are read from themselves.

use aya::maps::{Map, MapData, MapError, PerCpuArray, PerCpuValues};

use crate::{KernelError, Reason, maps::Place};

/// The node's counters.
pub(crate) struct Counters {
    /// The map in force, and those that it took the place of, the newest first.
    maps: Vec<Counted>,
}

struct Counted {
    map: PerCpuArray<MapData, u64>,
    /// Where the upper half begins.
    half: u32,
}

impl Counters {
    pub(crate) fn open(map: Map, place: &Place) -> Result<Self, KernelError> {
        let earlier = place.earlier.iter().map(|earlier| {
            let data = MapData::from_pin(&earlier.path)?;
            Counted::new(Map::from_map_data(data)?)
        });
        let maps = std::iter::once(Counted::new(map)).chain(earlier);
        Ok(Self {
            maps: maps.collect::<Result<_, _>>().map_err(failed)?,
        })
    }

    /// The count of every reason since the node's first maps were made.
    pub(crate) fn read(&self) -> Result<Vec<(Reason, u64)>, KernelError> {
        Reason::ALL
            .iter()
            .map(|reason| {
                let count = total(&self.maps, u32::from(*reason as u16)).map_err(failed)?;
                Ok((*reason, count))
            })
            .collect()
    }

    /// Takes the counts of earlier maps over: no program uses them any more.
    pub(crate) fn take_over(&mut self) -> Result<(), KernelError> {
        let [current, earlier @ ..] = self.maps.as_mut_slice() else {
            return Ok(());
        };
        for reason in Reason::ALL {
            let index = u32::from(*reason as u16);
            let count = total(earlier, index).map_err(failed)?;
            if count > 0 && current.upper(index).map_err(failed)? == 0 {
                current.set_upper(index, count).map_err(failed)?;
            }
        }
        self.maps.truncate(1);
        Ok(())
    }
}

/// Counts of a map and, unless it has taken them over, of those before it.
fn total(maps: &[Counted], index: u32) -> Result<u64, MapError> {
    let Some((map, earlier)) = maps.split_first() else {
        return Ok(0);
    };
    // A reason that an earlier version did not know yet.
    if index >= map.half {
        return Ok(0);
    }
    let taken_over = match map.upper(index)? {
        0 => total(earlier, index)?,
        count => count,
    };
    Ok(map.sum(index)? + taken_over)
}

impl Counted {
    fn new(map: Map) -> Result<Self, MapError> {
        let map = PerCpuArray::try_from(map)?;
        let half = map.len() / 2;
        Ok(Self { map, half })
    }

    fn sum(&self, index: u32) -> Result<u64, MapError> {
        Ok(self.map.get(&index, 0)?.iter().sum())
    }

    fn upper(&self, index: u32) -> Result<u64, MapError> {
        self.sum(self.half + index)
    }

    fn set_upper(&mut self, index: u32, count: u64) -> Result<(), MapError> {
        let mut values: Vec<u64> = vec![0; self.map.get(&index, 0)?.len()];
        if let Some(first) = values.first_mut() {
            *first = count;
        }
        let values = PerCpuValues::try_from(values).map_err(MapError::IoError)?;
        self.map.set(self.half + index, values, 0)
    }
}

fn failed(source: MapError) -> KernelError {
    KernelError::map("reasons", source)
}
