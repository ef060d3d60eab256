//! Virtual addresses of services.
//!
//! An address that a service asks for is honoured if it is free. Others are found from a hash of the service's name, so
//! that a mesh that is started anew hands out the same addresses, and kept as long as the service is there. The network's
//! own address, the last one, and the mesh's DNS address are never given out.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use api::mesh::MeshConfig;
use sha2::{Digest, Sha256};

/// Addresses tried per family; a range that is larger is used only so far.
const MAX_TRIES: u128 = 1 << 20;

/// Addresses and the services (`NAMESPACE/NAME`) that have them.
#[derive(Debug)]
pub(crate) struct VirtualAddresses {
    v4: Range,
    v6: Range,
    owners: BTreeMap<IpAddr, String>,
    held: BTreeMap<String, Vec<IpAddr>>,
}

/// What a service asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wish {
    /// One address of each of these families, in this order.
    Any {
        /// Families, true for IPv6.
        ipv6: Vec<bool>,
    },
    /// These, and no others.
    These(Vec<IpAddr>),
}

/// Why a service gets no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VipError {
    #[error(
        "no free address is left in {range}: remove services, or start the mesh with a larger service range"
    )]
    Exhausted { range: String },
    #[error("{address} is outside of the service ranges {v4} and {v6}")]
    OutOfRange {
        address: IpAddr,
        v4: String,
        v6: String,
    },
    #[error("{address} is reserved by the mesh itself")]
    Reserved { address: IpAddr },
    #[error("{address} belongs to Service {owner} already")]
    Taken { address: IpAddr, owner: String },
}

/// A range as numbers: `first` is the network's own address.
#[derive(Debug)]
struct Range {
    name: String,
    ipv6: bool,
    first: u128,
    last: u128,
    dns: u128,
}

impl VirtualAddresses {
    pub(crate) fn new(mesh: &MeshConfig) -> Self {
        let (v4, v6) = (mesh.service_cidr_v4, mesh.service_cidr_v6);
        Self {
            v4: Range {
                name: v4.to_string(),
                ipv6: false,
                first: u32::from(v4.network()).into(),
                last: u32::from(v4.broadcast()).into(),
                dns: u32::from(mesh.dns_v4()).into(),
            },
            v6: Range {
                name: v6.to_string(),
                ipv6: true,
                first: v6.network().into(),
                last: v6.broadcast().into(),
                dns: mesh.dns_v6().into(),
            },
            owners: BTreeMap::new(),
            held: BTreeMap::new(),
        }
    }

    /// Gives every service its addresses and takes those of services that are gone. Addresses asked for come
    /// first, so that none of them is given to a service that would take any. A service whose new wish cannot be
    /// granted keeps what it had ([`Self::held`]), if nobody else asks for that.
    pub(crate) fn assign(
        &mut self,
        wishes: &BTreeMap<String, Wish>,
    ) -> BTreeMap<String, Result<Vec<IpAddr>, VipError>> {
        let before = self.release_unwanted(wishes);
        let is_fixed = |wish: &Wish| matches!(wish, Wish::These(_));
        let (fixed, any): (Vec<_>, Vec<_>) = wishes.iter().partition(|(_, wish)| is_fixed(wish));
        fixed
            .into_iter()
            .chain(any)
            .map(|(service, wish)| {
                (
                    service.clone(),
                    self.one(service, wish, before.get(service)),
                )
            })
            .collect()
    }

    fn one(
        &mut self,
        service: &str,
        wish: &Wish,
        before: Option<&Vec<IpAddr>>,
    ) -> Result<Vec<IpAddr>, VipError> {
        if let Some(held) = self.held.get(service) {
            return Ok(held.clone());
        }
        let found: Result<Vec<IpAddr>, VipError> = match wish {
            Wish::These(addresses) => addresses
                .iter()
                .map(|address| self.check(*address).map(|()| *address))
                .collect(),
            Wish::Any { ipv6 } => ipv6
                .iter()
                .map(|ipv6| self.find(service, *ipv6, before))
                .collect(),
        };
        let is_free = |address: &IpAddr| !self.owners.contains_key(address);
        let kept = match &found {
            Ok(addresses) => addresses.clone(),
            Err(_) => before
                .filter(|before| before.iter().all(is_free))
                .cloned()
                .unwrap_or_default(),
        };
        if !kept.is_empty() {
            for address in &kept {
                self.owners.insert(*address, service.to_owned());
            }
            self.held.insert(service.to_owned(), kept);
        }
        found
    }

    fn check(&self, address: IpAddr) -> Result<(), VipError> {
        let range = self.range(address.is_ipv6());
        let number = number(address);
        if number < range.first || number > range.last {
            return Err(VipError::OutOfRange {
                address,
                v4: self.v4.name.clone(),
                v6: self.v6.name.clone(),
            });
        }
        if range.is_reserved(number) {
            return Err(VipError::Reserved { address });
        }
        match self.owners.get(&address) {
            Some(owner) => Err(VipError::Taken {
                address,
                owner: owner.clone(),
            }),
            None => Ok(()),
        }
    }

    fn find(
        &self,
        service: &str,
        ipv6: bool,
        before: Option<&Vec<IpAddr>>,
    ) -> Result<IpAddr, VipError> {
        let range = self.range(ipv6);
        let same = before
            .into_iter()
            .flatten()
            .find(|address| address.is_ipv6() == ipv6);
        if let Some(same) = same.filter(|address| !self.owners.contains_key(address)) {
            return Ok(*same);
        }
        let size = (range.last - range.first).saturating_add(1).min(MAX_TRIES);
        let start = hash(service) % size;
        (0..size)
            .map(|step| range.first + (start + step) % size)
            .filter(|number| !range.is_reserved(*number))
            .map(|number| range.address(number))
            .find(|address| !self.owners.contains_key(address))
            .ok_or_else(|| VipError::Exhausted {
                range: range.name.clone(),
            })
    }

    /// Returns what services had that now ask for something else.
    fn release_unwanted(
        &mut self,
        wishes: &BTreeMap<String, Wish>,
    ) -> BTreeMap<String, Vec<IpAddr>> {
        let mut released = BTreeMap::new();
        let owners = &mut self.owners;
        self.held.retain(|service, addresses| {
            let wish = wishes.get(service);
            let stays = match wish {
                None => false,
                Some(Wish::These(wanted)) => wanted == addresses,
                Some(Wish::Any { ipv6 }) => addresses
                    .iter()
                    .map(IpAddr::is_ipv6)
                    .eq(ipv6.iter().copied()),
            };
            if !stays {
                for address in addresses.iter() {
                    owners.remove(address);
                }
                if wish.is_some() {
                    released.insert(service.clone(), addresses.clone());
                }
            }
            stays
        });
        released
    }

    /// The addresses that a service has, whether or not they are those that it asks for.
    pub(crate) fn held(&self, service: &str) -> Option<&Vec<IpAddr>> {
        self.held.get(service)
    }

    fn range(&self, ipv6: bool) -> &Range {
        if ipv6 { &self.v6 } else { &self.v4 }
    }
}

impl Range {
    fn is_reserved(&self, number: u128) -> bool {
        number == self.first || number == self.last || number == self.dns
    }

    fn address(&self, number: u128) -> IpAddr {
        if self.ipv6 {
            Ipv6Addr::from(number).into()
        } else {
            // Both ends of an IPv4 range have 32 bits, and so has all between them.
            Ipv4Addr::from(number as u32).into()
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}

fn hash(service: &str) -> u128 {
    let digest = Sha256::digest(service.as_bytes());
    digest[..8]
        .iter()
        .fold(0, |number, byte| number << 8 | u128::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mesh(v4: &str) -> MeshConfig {
        MeshConfig {
            service_cidr_v4: v4.parse().unwrap(),
            ..MeshConfig::default()
        }
    }

    fn wishes(list: &[(&str, Wish)]) -> BTreeMap<String, Wish> {
        list.iter()
            .map(|(name, wish)| ((*name).to_owned(), wish.clone()))
            .collect()
    }

    fn dual() -> Wish {
        Wish::Any {
            ipv6: vec![false, true],
        }
    }

    fn fixed(address: &str) -> Wish {
        Wish::These(vec![address.parse().unwrap()])
    }

    #[test]
    fn addresses_are_stable_while_the_service_is_there_and_over_restarts() {
        let mesh = MeshConfig::default();
        let mut first = VirtualAddresses::new(&mesh);
        let alone = first.assign(&wishes(&[("d/a", dual())]));
        let both = first.assign(&wishes(&[("d/a", dual()), ("d/0", dual())]));
        assert_eq!(alone["d/a"], both["d/a"]);
        let addresses = both["d/a"].as_ref().unwrap();
        assert!(
            addresses
                .iter()
                .all(|address| mesh.is_service_address(*address))
        );
        assert!(addresses[0].is_ipv4() && addresses[1].is_ipv6());
        assert_eq!(
            VirtualAddresses::new(&mesh).assign(&wishes(&[("d/a", dual())]))["d/a"],
            both["d/a"]
        );
    }

    #[test]
    fn a_range_is_used_to_its_last_free_address() {
        // 16 addresses, of which the first, the last and the DNS's tenth are not given out.
        let mut vips = VirtualAddresses::new(&mesh("10.0.0.0/28"));
        let names: Vec<String> = (0..14).map(|index| format!("d/s{index}")).collect();
        let wanted = |count: usize| -> BTreeMap<String, Wish> {
            names[..count]
                .iter()
                .map(|name| (name.clone(), Wish::Any { ipv6: vec![false] }))
                .collect()
        };
        let assigned = vips.assign(&wanted(13));
        let unique: std::collections::BTreeSet<_> = assigned.values().flatten().flatten().collect();
        assert_eq!(unique.len(), 13);
        for reserved in ["10.0.0.0", "10.0.0.10", "10.0.0.15"] {
            assert!(!unique.contains(&reserved.parse::<IpAddr>().unwrap()));
        }
        let assigned = vips.assign(&wanted(14));
        let failed: Vec<_> = assigned.values().filter(|result| result.is_err()).collect();
        assert_eq!(
            failed,
            [&Err(VipError::Exhausted {
                range: "10.0.0.0/28".into()
            })],
            "those that have one keep it"
        );
    }

    #[test]
    fn addresses_asked_for_are_honoured_or_refused_with_the_reason() {
        let mut vips = VirtualAddresses::new(&mesh("10.0.0.0/24"));
        let assigned = vips.assign(&wishes(&[
            ("d/any", dual()),
            ("d/fixed", fixed("10.0.0.77")),
            ("d/same", fixed("10.0.0.77")),
            ("d/out", fixed("10.1.0.1")),
            ("d/dns", fixed("10.0.0.10")),
        ]));
        assert_eq!(assigned["d/fixed"], Ok(vec!["10.0.0.77".parse().unwrap()]));
        assert!(
            matches!(&assigned["d/same"], Err(VipError::Taken { owner, .. }) if owner == "d/fixed")
        );
        assert!(matches!(
            assigned["d/out"],
            Err(VipError::OutOfRange { .. })
        ));
        assert!(matches!(assigned["d/dns"], Err(VipError::Reserved { .. })));
        // A wish that cannot be granted leaves the service what it had.
        let any = assigned["d/any"].as_ref().unwrap().clone();
        let refused = vips.assign(&wishes(&[
            ("d/any", fixed("10.0.0.77")),
            ("d/fixed", fixed("10.0.0.77")),
        ]));
        assert!(refused["d/any"].is_err());
        assert_eq!(vips.held("d/any"), Some(&any));
        // One family less, and the other address stays.
        let single = vips.assign(&wishes(&[("d/any", Wish::Any { ipv6: vec![true] })]));
        assert_eq!(single["d/any"], Ok(vec![any[1]]));
        // Once the owner is gone, the address is free.
        let assigned = vips.assign(&wishes(&[("d/same", fixed("10.0.0.77"))]));
        assert!(assigned["d/same"].is_ok());
    }
}
