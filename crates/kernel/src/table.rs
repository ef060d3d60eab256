//! A BPF hash map with a mirror in user space: writes that change nothing cost nothing, and after a restart
//! the mirror starts from what the kernel still holds.

use std::{
    collections::{HashMap, hash_map},
    hash::Hash,
    io,
    os::fd::{AsFd, OwnedFd},
};

use aya::{
    Pod,
    maps::{HashMap as BpfHashMap, Map, MapData, MapError},
};
use nix::libc;

use crate::{KernelError, maps, sys};

/// Entries per batched call: what the kernel copies in at a time stays small.
const BATCH: usize = 4096;

/// One typed map.
#[derive(Debug)]
pub struct Table<K: Pod, V: Pod> {
    name: &'static str,
    capacity: u32,
    map: BpfHashMap<MapData, K, V>,
    /// The same map, for the calls that the loader library lacks.
    fd: OwnedFd,
    mirror: HashMap<K, V>,
}

impl<K: Pod + Eq + Hash, V: Pod + PartialEq> Table<K, V> {
    pub(crate) fn open(name: &'static str, capacity: u32, map: Map) -> Result<Self, KernelError> {
        let failed = |source| KernelError::map(name, source);
        let fd = match &map {
            Map::HashMap(data) => data.fd().as_fd().try_clone_to_owned(),
            _ => Err(io::Error::other("it is no hash map")),
        };
        let fd = fd.map_err(|source| KernelError::Batch {
            table: name,
            source,
        })?;
        let map = BpfHashMap::try_from(map).map_err(failed)?;
        let mirror = map.iter().collect::<Result<_, _>>().map_err(failed)?;
        Ok(Self {
            name,
            capacity,
            map,
            fd,
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
                    if error.io_error.raw_os_error() == Some(libc::E2BIG) =>
                {
                    self.full()
                }
                source => KernelError::map(self.name, source),
            })?;
        self.mirror.insert(key, value);
        Ok(true)
    }

    /// Writes many entries in order. What is not written after an error is left as it was.
    ///
    /// # Errors
    /// As [`Table::set`].
    pub fn set_all(
        &mut self,
        entries: impl IntoIterator<Item = (K, V)>,
    ) -> Result<(), KernelError> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (key, value) in entries {
            if self.mirror.get(&key) == Some(&value) {
                continue;
            }
            keys.push(key);
            values.push(value);
            if keys.len() == BATCH {
                self.write(&keys, &values)?;
                keys.clear();
                values.clear();
            }
        }
        self.write(&keys, &values)
    }

    fn write(&mut self, keys: &[K], values: &[V]) -> Result<(), KernelError> {
        if keys.is_empty() {
            return Ok(());
        }
        let outcome = sys::update_batch(self.fd.as_fd(), keys, values);
        let written = outcome
            .as_ref()
            .map_or_else(|(done, _)| *done, |()| keys.len());
        let pairs = keys.iter().copied().zip(values.iter().copied());
        self.mirror.extend(pairs.take(written));
        outcome.map_err(|(_, source)| {
            if source.raw_os_error() == Some(libc::E2BIG) {
                self.full()
            } else {
                self.batch_error(source)
            }
        })
    }

    /// Removes many entries, in order. Those that are not there are passed over.
    ///
    /// # Errors
    /// Fails if the kernel refuses.
    pub fn remove_all(&mut self, keys: impl IntoIterator<Item = K>) -> Result<(), KernelError> {
        let keys: Vec<K> = keys
            .into_iter()
            .filter(|key| self.mirror.contains_key(key))
            .collect();
        for chunk in keys.chunks(BATCH) {
            let mut left = chunk;
            while !left.is_empty() {
                let outcome = sys::delete_batch(self.fd.as_fd(), left);
                let (mut done, error) = match outcome {
                    Ok(()) => (left.len(), None),
                    Err((done, error)) => (done, Some(error)),
                };
                let is_gone = |error: &io::Error| error.raw_os_error() == Some(libc::ENOENT);
                // One that is gone already is what was asked for.
                done += usize::from(error.as_ref().is_some_and(is_gone));
                let (removed, rest) = left.split_at(done.min(left.len()));
                for key in removed {
                    self.mirror.remove(key);
                }
                if let Some(error) = error.filter(|error| !is_gone(error)) {
                    return Err(self.batch_error(error));
                }
                left = rest;
            }
        }
        Ok(())
    }

    fn full(&self) -> KernelError {
        KernelError::Full {
            table: self.name,
            capacity: self.capacity,
            setting: setting(self.name),
        }
    }

    fn batch_error(&self, source: io::Error) -> KernelError {
        KernelError::Batch {
            table: self.name,
            source,
        }
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
                if error.io_error.raw_os_error() == Some(libc::ENOENT) =>
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
        self.remove_all(stale)
    }
}

/// What a user sets to make a map larger.
fn setting(map: &'static str) -> &'static str {
    maps::spec(map).and_then(|spec| spec.setting).unwrap_or(map)
}
