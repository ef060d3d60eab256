//! Which places of a node's /24 are taken. The same place names the IPv4 and the IPv6 address.

/// The first place: 0 is the network, 1 the node's gateway.
const FIRST: u8 = 2;
/// The last place: 255 is IPv4's broadcast.
const LAST: u8 = 254;

/// Hands places out in turn, so that one just given back is used again as late as possible: caches in
/// programs and tables that still know an old address do not meet its new owner.
#[derive(Debug)]
pub(super) struct Ipam {
    taken: [bool; 256],
    next: u8,
}

impl Ipam {
    pub(super) fn new() -> Self {
        Self {
            taken: [false; 256],
            next: FIRST,
        }
    }

    /// A free place, `None` if there is none.
    pub(super) fn take(&mut self) -> Option<u8> {
        let place = (self.next..=LAST)
            .chain(FIRST..self.next)
            .find(|place| !self.taken[usize::from(*place)])?;
        self.taken[usize::from(place)] = true;
        self.next = if place == LAST { FIRST } else { place + 1 };
        Some(place)
    }

    pub(super) fn give_back(&mut self, place: u8) {
        self.taken[usize::from(place)] = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_used_again_only_after_release_and_late() {
        let mut ipam = Ipam::new();
        assert_eq!(ipam.take(), Some(2));
        assert_eq!(ipam.take(), Some(3));
        ipam.give_back(2);
        assert_eq!(ipam.take(), Some(4));
        for place in 5..=254 {
            assert_eq!(ipam.take(), Some(place));
        }
        assert_eq!(ipam.take(), Some(2));
        assert_eq!(ipam.take(), None);
        ipam.give_back(100);
        assert_eq!(ipam.take(), Some(100));
        assert_eq!(ipam.take(), None);
    }
}
