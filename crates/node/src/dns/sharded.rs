//! A hash map that is cheap to copy and change: the copy shares all shards but the one that changes.
//!
//! [`super::zone`] publishes a new snapshot per change of a mesh with tens of thousands of names; copying
//! every name each time would cost more than all look-ups.

use std::{
    borrow::Borrow,
    collections::{HashMap, hash_map::RandomState},
    hash::{BuildHasher, Hash},
    sync::Arc,
};

/// With 10,000 entries a change copies about 40 of them, and a copy costs 256 reference counts.
const SHARDS: usize = 256;

/// See the module's text.
#[derive(Debug, Clone)]
pub(super) struct Sharded<K, V> {
    shards: Vec<Arc<HashMap<K, V>>>,
    hasher: RandomState,
}

impl<K: Hash + Eq + Clone, V: Clone> Sharded<K, V> {
    pub(super) fn get<Q>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.shards[self.shard_of(key)].get(key)
    }

    pub(super) fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.shard_mut(&key).insert(key, value)
    }

    pub(super) fn remove<Q>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        // A miss must not copy the shard.
        self.get(key)?;
        self.shard_mut(key).remove(key)
    }

    fn shard_mut<Q: Hash + ?Sized>(&mut self, key: &Q) -> &mut HashMap<K, V> {
        let shard = self.shard_of(key);
        Arc::make_mut(&mut self.shards[shard])
    }

    fn shard_of<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // The remainder is below SHARDS, which fits a usize on every target.
        (self.hasher.hash_one(key) % SHARDS as u64) as usize
    }
}

/// Many values per key, kept in the order in which they came.
impl<K: Hash + Eq + Clone, V: Clone> Sharded<K, Vec<V>> {
    pub(super) fn add<Q>(&mut self, key: &Q, value: V)
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ToOwned<Owned = K> + ?Sized,
    {
        self.shard_mut(key)
            .entry(key.to_owned())
            .or_default()
            .push(value);
    }

    pub(super) fn all<Q>(&self, key: &Q) -> &[V]
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        self.get(key).map_or(&[], Vec::as_slice)
    }

    /// Removes the values of `key` for which `gone` is true, and the key with its last value.
    pub(super) fn subtract<Q>(&mut self, key: &Q, gone: impl Fn(&V) -> bool)
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        if !self.all(key).iter().any(&gone) {
            return;
        }
        let shard = self.shard_mut(key);
        if let Some(values) = shard.get_mut(key) {
            values.retain(|value| !gone(value));
            if values.is_empty() {
                shard.remove(key);
            }
        }
    }
}

impl<K, V> Default for Sharded<K, V> {
    fn default() -> Self {
        Self {
            shards: vec![Arc::default(); SHARDS],
            hasher: RandomState::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_does_not_see_later_changes() {
        let mut first: Sharded<String, u32> = Sharded::default();
        for index in 0..1000 {
            first.insert(index.to_string(), index);
        }
        let mut second = first.clone();
        assert_eq!(second.remove("7"), Some(7));
        assert_eq!(second.remove("7"), None);
        second.insert("8".to_owned(), 80);
        assert_eq!((first.get("7"), first.get("8")), (Some(&7), Some(&8)));
        assert_eq!((second.get("7"), second.get("8")), (None, Some(&80)));
        let shared = first
            .shards
            .iter()
            .zip(&second.shards)
            .filter(|(one, other)| Arc::ptr_eq(one, other))
            .count();
        assert!(shared >= SHARDS - 2, "{shared} shards are still shared");
    }

    #[test]
    fn groups_lose_their_key_with_the_last_value() {
        let mut groups: Sharded<String, Vec<u32>> = Sharded::default();
        groups.add("a", 1);
        groups.add("a", 2);
        assert_eq!(groups.all("a"), [1, 2]);
        groups.subtract("a", |value| *value == 1);
        assert_eq!(groups.all("a"), [2]);
        groups.subtract("a", |_| true);
        assert!(groups.get("a").is_none());
        assert!(groups.all("b").is_empty());
    }
}
