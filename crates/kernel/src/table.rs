//! A BPF hash map with a mirror in user space: writes that change nothing cost nothing, and after a restart
//! the mirror starts from what the kernel still holds.

use std::{
    collections::{HashMap, hash_map},
    hash::Hash,
};

use aya::{
    Pod,
    maps::{HashMap as BpfHashMap, MapData, MapError},
};

use crate::KernelError;

/// One typed map.
#[derive(Debug)]
pub struct Table<K: Pod, V: Pod> {
    name: &'static str,
    capacity: u32,
    map: BpfHashMap<MapData, K, V>,
    mirror: HashMap<K, V>,
}

impl<K: Pod + Eq + Hash, V: Pod + PartialEq> Table<K, V> {
    pub(crate) fn open(
        name: &'static str,
        capacity: u32,
        map: BpfHashMap<MapData, K, V>,
    ) -> Result<Self, KernelError> {
        let mirror = map
            .iter()
            .collect::<Result<_, _>>()
            .map_err(|source| KernelError::map(name, source))?;
        Ok(Self {
            name,
            capacity,
            map,
            mirror,
        })
    }

    /// Writes an entry. Returns whether the kernel's map changed.
    ///
    /// # Errors
    /// [`KernelError::Full`] if there is no room; the data path refuses what misses its entry.
    pub fn set(&mut self, key: K, value: V) -> Result<bool, KernelError> {
        if self.mirror.get(&key) == Some(&value) {
            return Ok(false);
        }
        self.map
            .insert(key, value, 0)
            .map_err(|source| match source {
                MapError::SyscallError(ref error)
                    if error.io_error.raw_os_error() == Some(nix::libc::E2BIG) =>
                {
                    KernelError::Full {
                        table: self.name,
                        capacity: self.capacity,
                    }
                }
                source => KernelError::map(self.name, source),
            })?;
        self.mirror.insert(key, value);
        Ok(true)
    }

    /// Removes an entry. Returns whether it was there.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn remove(&mut self, key: &K) -> Result<bool, KernelError> {
        if self.mirror.remove(key).is_none() {
            return Ok(false);
        }
        match self.map.remove(key) {
            Ok(()) | Err(MapError::KeyNotFound) => Ok(true),
            Err(MapError::SyscallError(error))
                if error.io_error.raw_os_error() == Some(nix::libc::ENOENT) =>
            {
                Ok(true)
            }
            Err(source) => Err(KernelError::map(self.name, source)),
        }
    }

    /// The entry as last written.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<&V> {
        self.mirror.get(key)
    }

    /// The entry as the kernel has it now.
    #[must_use]
    pub fn read(&self, key: &K) -> Option<V> {
        self.map.get(key, 0).ok()
    }

    /// All entries as last written.
    pub fn iter(&self) -> hash_map::Iter<'_, K, V> {
        self.mirror.iter()
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.mirror.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mirror.is_empty()
    }

    /// How many entries there is room for.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// The map's name.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Removes every entry whose key does not pass.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(&K) -> bool) -> Result<(), KernelError> {
        let stale: Vec<K> = self
            .mirror
            .keys()
            .filter(|key| !keep(key))
            .copied()
            .collect();
        for key in &stale {
            self.remove(key)?;
        }
        Ok(())
    }
}
