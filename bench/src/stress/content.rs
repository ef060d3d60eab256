//! What the bytes of a stress connection are: a pseudo-random stream that both ends can compute at any offset.
//!
//! A byte is told by (seed, connection, direction, offset) alone, so the receiver needs nothing from the sender to
//! find a byte that is wrong, missing, doubled or in another's place. [`Mixer`] is the generator below, which the
//! plans draw from, too.

use std::fmt;

/// Bytes that are made and compared at a time.
const BLOCK: usize = 4096;
/// How far around a wrong byte is looked for the place that the bytes do belong to.
const SEARCH: u64 = 1 << 20;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    ToServer,
    ToClient,
}

/// The bytes of one direction of one connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Content {
    key: u64,
}

/// A byte that is not what was sent.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Mismatch {
    /// Where in the stream, counted from 0.
    pub(super) offset: u64,
    expected: u8,
    found: u8,
    /// Where the bytes from there on do belong, if it is near.
    belongs_at: Option<u64>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            offset,
            expected,
            found,
            belongs_at,
        } = self;
        write!(
            formatter,
            "wrong byte at offset {offset}: {found:#04x} instead of {expected:#04x}"
        )?;
        match belongs_at {
            Some(place) => write!(formatter, "; what came belongs at offset {place}"),
            None => Ok(()),
        }
    }
}

impl Content {
    pub(super) fn new(seed: u64, connection: u64, direction: Direction) -> Self {
        let mut mixer = Mixer::new(seed, connection);
        let [to_server, to_client] = [mixer.next(), mixer.next()];
        Self {
            key: match direction {
                Direction::ToServer => to_server,
                Direction::ToClient => to_client,
            },
        }
    }

    /// Makes the bytes from `offset` on.
    pub(super) fn fill(&self, offset: u64, buffer: &mut [u8]) {
        let head = (offset % 8) as usize;
        let mut word = offset / 8;
        let mut rest = buffer;
        if head != 0 {
            let count = rest.len().min(8 - head);
            rest[..count].copy_from_slice(&self.word(word)[head..head + count]);
            rest = &mut rest[count..];
            word += 1;
        }
        let (words, tail) = rest.as_chunks_mut::<8>();
        for (place, word) in words.iter_mut().zip(word..) {
            *place = self.word(word);
        }
        let last = self.word(word + words.len() as u64);
        tail.copy_from_slice(&last[..tail.len()]);
    }

    /// Compares what came with what belongs at `offset`.
    pub(super) fn check(&self, offset: u64, bytes: &[u8]) -> Result<(), Mismatch> {
        let mut expected = [0; BLOCK];
        for (index, block) in bytes.chunks(BLOCK).enumerate() {
            let start = index * BLOCK;
            let expected = &mut expected[..block.len()];
            self.fill(offset + start as u64, expected);
            if expected == block {
                continue;
            }
            let differs = expected.iter().zip(block).position(|(one, two)| one != two);
            let at = differs.unwrap_or_default();
            let place = offset + (start + at) as u64;
            return Err(Mismatch {
                offset: place,
                expected: expected[at],
                found: block[at],
                belongs_at: self.find(place, &bytes[start + at..]),
            });
        }
        Ok(())
    }

    /// Where near `offset` these bytes are, for whoever has to find out what went wrong.
    fn find(&self, offset: u64, bytes: &[u8]) -> Option<u64> {
        // Fewer than eight would be found by chance.
        let wanted: [u8; 8] = *bytes.first_chunk()?;
        let first = offset.saturating_sub(SEARCH);
        let mut near = vec![0; (offset + SEARCH - first) as usize];
        self.fill(first, &mut near);
        let found = near.windows(8).position(|window| window == wanted);
        found.map(|index| first + index as u64)
    }

    fn word(&self, index: u64) -> [u8; 8] {
        mix(self.key.wrapping_add(index.wrapping_mul(GOLDEN))).to_le_bytes()
    }
}

/// Numbers that are told by a seed and a place.
#[derive(Debug)]
pub(super) struct Mixer {
    state: u64,
}

impl Mixer {
    pub(super) fn new(seed: u64, place: u64) -> Self {
        Self {
            state: mix(mix(seed ^ GOLDEN).wrapping_add(place)),
        }
    }

    pub(super) fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        mix(self.state)
    }

    /// A number in `0..bound`.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        // The high half of the product; its bias is far below what a test of transport could notice.
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }

    /// A number in `low..=high`, small ones as likely as large ones on a logarithmic scale.
    pub(super) fn size(&mut self, low: u64, high: u64) -> u64 {
        let bits = u64::from((high / low.max(1)).max(1).ilog2() + 1);
        let top = (low.max(1) << self.below(bits)).saturating_mul(2).min(high);
        (low + self.below((top - low).max(1) + 1)).min(high)
    }

    /// True in half of all cases.
    pub(super) fn coin(&mut self) -> bool {
        self.next() >> 63 == 1
    }
}

/// 2^64 divided by the golden ratio: the step of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators).
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finalizer.
pub(super) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content() -> Content {
        Content::new(1, 2, Direction::ToServer)
    }

    fn bytes(offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        content().fill(offset, &mut bytes);
        bytes
    }

    #[test]
    fn the_stream_is_the_same_in_any_pieces() {
        let whole = bytes(0, 10_000);
        for offset in [0, 1, 7, 8, 9, 4095, 4096, 9_990] {
            for length in [0, 1, 3, 7, 8, 9, 10] {
                let at = offset as usize;
                assert_eq!(
                    bytes(offset, length),
                    whole[at..at + length],
                    "{offset} {length}"
                );
            }
            let rest = &whole[offset as usize..];
            assert_eq!(content().check(offset, rest), Ok(()));
        }
    }

    #[test]
    fn every_flipped_bit_is_found_where_it_is() {
        for at in [0, 1, 8, 4095, 4096, 8190, 8191] {
            let mut spoiled = bytes(5, 8192);
            spoiled[at] ^= 1;
            let mismatch = content().check(5, &spoiled).unwrap_err();
            assert_eq!(mismatch.offset, 5 + at as u64);
        }
    }

    #[test]
    fn what_is_missing_doubled_or_swapped_is_found_and_placed() {
        let sent = bytes(0, 30_000);
        // A hole of 100 bytes.
        let holed = [&sent[..9000], &sent[9100..]].concat();
        let mismatch = content().check(0, &holed).unwrap_err();
        assert_eq!((mismatch.offset, mismatch.belongs_at), (9000, Some(9100)));
        // The same 100 bytes twice.
        let doubled = [&sent[..9100], &sent[9000..]].concat();
        let mismatch = content().check(0, &doubled).unwrap_err();
        assert_eq!((mismatch.offset, mismatch.belongs_at), (9100, Some(9000)));
        // A later segment before an earlier one.
        let swapped = [&sent[..1448], &sent[2896..4344], &sent[1448..2896]].concat();
        let mismatch = content().check(0, &swapped).unwrap_err();
        assert_eq!((mismatch.offset, mismatch.belongs_at), (1448, Some(2896)));
    }

    #[test]
    fn no_two_streams_are_alike() {
        let direction = Direction::ToServer;
        let mut firsts = std::collections::BTreeSet::new();
        for content in [
            Content::new(1, 2, direction),
            Content::new(1, 3, direction),
            Content::new(2, 2, direction),
            Content::new(1, 2, Direction::ToClient),
        ] {
            let mut first = [0; 8];
            content.fill(0, &mut first);
            firsts.insert(first);
        }
        assert_eq!(firsts.len(), 4);
    }

    #[test]
    fn numbers_stay_in_their_bounds_and_reach_them() {
        let mut mixer = Mixer::new(7, 0);
        let below: Vec<u64> = (0..1000).map(|_| mixer.below(3)).collect();
        assert!((0..3).all(|number| below.contains(&number)));
        assert!(below.iter().all(|number| *number < 3));
        let sizes: Vec<u64> = (0..10_000).map(|_| mixer.size(1, 4096)).collect();
        assert!(sizes.iter().all(|size| (1..=4096).contains(size)));
        assert!(sizes.iter().any(|size| *size < 4) && sizes.iter().any(|size| *size > 4000));
    }
}
