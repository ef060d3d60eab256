//! How much room the kernel's maps have: part of a node's configuration ([`crate::node_config`]), and what
//! `heddle up --map-size NAME=N` sets. What each map is for stands in crate `kernel`.

use std::{fmt, ops::RangeInclusive, str::FromStr};

use serde::{Deserialize, Serialize};

/// Room in the maps, in entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
    /// Spliced connections.
    pub splices: u32,
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
            splices: 16_384,
            flow_bytes: 4 << 20,
        }
    }
}

/// One size.
struct Limit {
    name: &'static str,
    /// What the kernel can give, and what the maps derived from it can hold.
    bounds: RangeInclusive<u32>,
    field: fn(&mut MapSizes) -> &mut u32,
}

/// In the order of the fields.
const LIMITS: [Limit; 10] = [
    Limit {
        name: "workloads",
        bounds: 1..=65_536,
        field: |sizes| &mut sizes.workloads,
    },
    Limit {
        name: "addresses",
        bounds: 1..=16_777_216,
        field: |sizes| &mut sizes.addresses,
    },
    Limit {
        name: "services",
        bounds: 1..=16_777_216,
        field: |sizes| &mut sizes.services,
    },
    Limit {
        name: "endpoints",
        bounds: 1..=16_777_216,
        field: |sizes| &mut sizes.endpoints,
    },
    Limit {
        name: "verdicts",
        bounds: 1..=16_777_216,
        field: |sizes| &mut sizes.verdicts,
    },
    Limit {
        name: "handshakes",
        bounds: 1..=4_194_304,
        field: |sizes| &mut sizes.handshakes,
    },
    Limit {
        name: "datagrams",
        bounds: 1..=4_194_304,
        field: |sizes| &mut sizes.datagrams,
    },
    Limit {
        name: "affinity",
        bounds: 1..=4_194_304,
        field: |sizes| &mut sizes.affinity,
    },
    Limit {
        name: "splices",
        bounds: 1..=1_048_576,
        field: |sizes| &mut sizes.splices,
    },
    Limit {
        name: FLOW_BYTES,
        bounds: 65_536..=1_073_741_824,
        field: |sizes| &mut sizes.flow_bytes,
    },
];

const FLOW_BYTES: &str = "flow_bytes";

/// One size as a user gives it, within its bounds: `NAME=N`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapSize {
    name: &'static str,
    size: u32,
}

impl MapSizes {
    /// Takes over sizes that a user gave; of several for one map the last counts.
    pub fn set<'a>(&mut self, sizes: impl IntoIterator<Item = &'a MapSize>) {
        for size in sizes {
            for limit in LIMITS.iter().filter(|limit| limit.name == size.name) {
                *(limit.field)(self) = size.size;
            }
        }
    }

    /// Checks sizes that came from a file.
    ///
    /// # Errors
    /// Names the size that is out of its bounds.
    pub fn check(&self) -> Result<(), String> {
        let mut sizes = self.clone();
        for limit in &LIMITS {
            limit.check(*(limit.field)(&mut sizes))?;
        }
        Ok(())
    }
}

impl Limit {
    fn check(&self, size: u32) -> Result<(), String> {
        let (name, bounds) = (self.name, &self.bounds);
        if !bounds.contains(&size) {
            return Err(format!(
                "map size {name}={size} is out of bounds: it must be from {} to {}",
                bounds.start(),
                bounds.end()
            ));
        }
        if name == FLOW_BYTES && !size.is_power_of_two() {
            return Err(format!(
                "map size {name}={size} is no power of two: {} is the next",
                size.next_power_of_two()
            ));
        }
        Ok(())
    }
}

impl FromStr for MapSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let choices = || {
            let name = |limit: &Limit| {
                format!(
                    "{} ({} to {})",
                    limit.name,
                    limit.bounds.start(),
                    limit.bounds.end()
                )
            };
            LIMITS.iter().map(name).collect::<Vec<_>>().join(", ")
        };
        let (name, size) = text.split_once('=').ok_or_else(|| {
            format!(
                "`{text}` is no map size: write NAME=N with one of {}",
                choices()
            )
        })?;
        let limit = LIMITS
            .iter()
            .find(|limit| limit.name == name)
            .ok_or_else(|| format!("there is no map size `{name}`: choose from {}", choices()))?;
        let size = size.parse().map_err(|_| {
            format!(
                "`{size}` is no size of {name}: write a number from {} to {}",
                limit.bounds.start(),
                limit.bounds.end()
            )
        })?;
        limit.check(size)?;
        Ok(Self {
            name: limit.name,
            size,
        })
    }
}

impl fmt::Display for MapSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_set_by_its_name() {
        let mut sizes = MapSizes::default();
        let given = ["verdicts=7", "flow_bytes=131072", "verdicts=9"]
            .map(|text| text.parse::<MapSize>().unwrap());
        sizes.set(&given);
        let expected = MapSizes {
            verdicts: 9,
            flow_bytes: 131_072,
            ..MapSizes::default()
        };
        assert_eq!(sizes, expected);
        assert_eq!(given[0].to_string(), "verdicts=7");
    }

    #[test]
    fn every_field_can_be_set() {
        let serde_json::Value::Object(fields) = serde_json::to_value(MapSizes::default()).unwrap()
        else {
            panic!("a struct is an object");
        };
        assert_eq!(fields.len(), LIMITS.len());
        for name in fields.keys() {
            let size: MapSize = format!("{name}=65536").parse().unwrap();
            let mut sizes = MapSizes::default();
            sizes.set([&size]);
            let set = serde_json::to_value(&sizes).unwrap();
            assert_eq!(set[name], 65_536, "{name}");
        }
        assert_eq!(MapSizes::default().check(), Ok(()));
    }

    #[test]
    fn mistakes_name_the_choices_and_the_bounds() {
        for (text, expected) in [
            ("verdict=7", "verdicts (1 to 16777216)"),
            ("verdicts", "NAME=N"),
            ("verdicts=0", "from 1 to"),
            ("verdicts=many", "a number from 1"),
            ("flow_bytes=100000", "131072 is the next"),
            ("handshakes=99999999", "to 4194304"),
        ] {
            let error = text.parse::<MapSize>().unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        let sizes = MapSizes {
            endpoints: 0,
            ..MapSizes::default()
        };
        assert!(sizes.check().unwrap_err().contains("endpoints=0"));
    }
}
