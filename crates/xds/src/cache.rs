//! What the server serves: per type, named resources with a version that is a hash of their content.
//!
//! Every change of a resource gets the next number of one sequence, and a type remembers for each name only its
//! latest number. A subscriber that was last at number N asks for everything after N: the work is
//! proportional to what changed, however many changes of one resource were skipped on the way.
//! Removed names stay as tombstones for that; their number is bounded, and a subscriber that fell
//! behind the oldest gets the whole type to compare with ([`Changes::Everything`]).
//!
//! Who subscribes and what they hold is known by [`crate::server`], not here.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::watch;

/// How many removed names a type remembers, so that a subscriber only slightly behind stays cheap.
const MAX_TOMBSTONES: usize = 4096;

/// A resource as served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Name, unique within its type.
    pub name: Arc<str>,
    /// Hash of the content, in hexadecimal.
    pub version: Arc<str>,
    /// The encoded message.
    pub body: Bytes,
}

/// One change of one resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Type of the resource.
    pub type_url: String,
    /// Name of the resource.
    pub name: String,
    /// The encoded message, or `None` to remove the resource.
    pub body: Option<Bytes>,
}

/// Resources of all types. Clones share one state.
#[derive(Debug, Clone)]
pub struct Cache {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    generation: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    generation: u64,
    sequence: u64,
    types: HashMap<String, TypeState>,
}

#[derive(Debug, Default)]
struct TypeState {
    entries: HashMap<Arc<str>, Entry>,
    /// Sequence number of each name's latest change. Holds every name of `entries` exactly once.
    order: BTreeMap<u64, Arc<str>>,
    tombstones: BTreeMap<u64, Arc<str>>,
    /// Changes up to this number may have been forgotten.
    forgotten: u64,
}

#[derive(Debug)]
struct Entry {
    changed_at: u64,
    /// `None` once removed.
    content: Option<(Arc<str>, Bytes)>,
}

/// What changed in a type since a subscriber last looked.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pub(crate) changes: Changes,
    /// To be passed to the next [`Cache::changes_since`].
    pub(crate) sequence: u64,
    pub(crate) generation: u64,
}

#[derive(Debug)]
pub(crate) enum Changes {
    /// Exactly these changed or were removed.
    Some {
        changed: Vec<Resource>,
        removed: Vec<Arc<str>>,
    },
    /// The whole type; whatever the subscriber holds beyond it is gone.
    Everything(Vec<Resource>),
}

impl Default for Cache {
    fn default() -> Self {
        Self::new()
    }
}

impl Cache {
    /// An empty cache, at generation 0.
    #[must_use]
    pub fn new() -> Self {
        Self {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                generation: watch::Sender::new(0),
            }),
        }
    }

    /// Applies changes as one step and returns the generation that has them. Content equal to what is
    /// already there is no change; if nothing changed, the generation stays.
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) -> u64 {
        let mut state = self.lock();
        let mut changed = false;
        for change in changes {
            changed |= state.apply_one(&change.type_url, &change.name, change.body);
        }
        self.publish(state, changed)
    }

    /// Makes the given resources all there is of their types, as one step, and returns the generation that
    /// has them. Types that are not given stay as they are.
    pub fn replace(
        &self,
        types: impl IntoIterator<Item = (&'static str, Vec<(String, Bytes)>)>,
    ) -> u64 {
        let mut state = self.lock();
        let mut changed = false;
        for (type_url, resources) in types {
            let of_type = state.types.entry(type_url.to_owned()).or_default();
            let mut gone: HashSet<Arc<str>> = of_type.live_names().collect();
            for (name, body) in resources {
                gone.remove(name.as_str());
                changed |= state.apply_one(type_url, &name, Some(body));
            }
            for name in gone {
                changed |= state.apply_one(type_url, &name, None);
            }
        }
        self.publish(state, changed)
    }

    /// The number of states that the cache has been in. Grows with every change.
    #[must_use]
    pub fn generation(&self) -> u64 {
        *self.shared.generation.borrow()
    }

    /// Notifies of every new generation.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    /// The resource of this name, if there is one.
    #[must_use]
    pub fn get(&self, type_url: &str, name: &str) -> Option<Resource> {
        self.lock().types.get(type_url)?.get(name)
    }

    /// Names of all resources of a type, in no order.
    #[must_use]
    pub fn names(&self, type_url: &str) -> Vec<Arc<str>> {
        self.lock()
            .types
            .get(type_url)
            .map(|of_type| of_type.live_names().collect())
            .unwrap_or_default()
    }

    /// What a subscriber that has seen everything up to `sequence` has missed. 0 asks for everything.
    pub(crate) fn changes_since(&self, type_url: &str, sequence: u64) -> Snapshot {
        let state = self.lock();
        let changes = match state.types.get(type_url) {
            None => Changes::Everything(Vec::new()),
            Some(of_type) if sequence == 0 || sequence < of_type.forgotten => Changes::Everything(
                of_type
                    .live_names()
                    .filter_map(|name| of_type.get(&name))
                    .collect(),
            ),
            Some(of_type) => of_type.changes_after(sequence),
        };
        Snapshot {
            changes,
            // Never 0, which stands for "has seen nothing".
            sequence: state.sequence.max(1),
            generation: state.generation,
        }
    }

    fn publish(&self, mut state: MutexGuard<'_, State>, changed: bool) -> u64 {
        if changed {
            state.generation += 1;
            // Under the lock, so that generations are announced in order.
            self.shared.generation.send_replace(state.generation);
        }
        state.generation
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that runs under this lock leaves the state half changed, so a panic elsewhere is no reason to stop.
        self.shared
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns whether anything changed.
    fn apply_one(&mut self, type_url: &str, name: &str, body: Option<Bytes>) -> bool {
        if !self.types.contains_key(type_url) {
            self.types.insert(type_url.to_owned(), TypeState::default());
        }
        let Some(of_type) = self.types.get_mut(type_url) else {
            return false;
        };
        let known = of_type.entries.get(name);
        let before = known.and_then(|entry| entry.content.as_ref());
        // Compared before hashed: most of what is applied is what is already there.
        if body.as_ref() == before.map(|(_, body)| body) {
            return false;
        }
        let content = body.map(|body| (content_version(&body), body));
        // Sequence 1 is where a subscriber of an empty cache stands.
        self.sequence = self.sequence.max(1) + 1;
        let name: Arc<str> = match of_type.entries.get_key_value(name) {
            Some((name, entry)) => {
                of_type.order.remove(&entry.changed_at);
                of_type.tombstones.remove(&entry.changed_at);
                Arc::clone(name)
            }
            None => Arc::from(name),
        };
        of_type.order.insert(self.sequence, Arc::clone(&name));
        if content.is_none() {
            of_type.tombstones.insert(self.sequence, Arc::clone(&name));
        }
        let changed_at = self.sequence;
        of_type.entries.insert(
            name,
            Entry {
                changed_at,
                content,
            },
        );
        of_type.forget_old_tombstones();
        true
    }
}

impl TypeState {
    fn live_names(&self) -> impl Iterator<Item = Arc<str>> {
        self.entries
            .iter()
            .filter(|(_, entry)| entry.content.is_some())
            .map(|(name, _)| Arc::clone(name))
    }

    fn get(&self, name: &str) -> Option<Resource> {
        let (name, entry) = self.entries.get_key_value(name)?;
        let (version, body) = entry.content.as_ref()?;
        Some(Resource {
            name: Arc::clone(name),
            version: Arc::clone(version),
            body: body.clone(),
        })
    }

    fn changes_after(&self, sequence: u64) -> Changes {
        let mut changed = Vec::new();
        let mut removed = Vec::new();
        for name in self.order.range(sequence + 1..).map(|(_, name)| name) {
            match self.get(name) {
                Some(resource) => changed.push(resource),
                None => removed.push(Arc::clone(name)),
            }
        }
        Changes::Some { changed, removed }
    }

    fn forget_old_tombstones(&mut self) {
        while self.tombstones.len() > MAX_TOMBSTONES {
            let Some((sequence, name)) = self.tombstones.pop_first() else {
                return;
            };
            self.order.remove(&sequence);
            self.entries.remove(&name);
            self.forgotten = sequence;
        }
    }
}

/// 128 bits of SHA-256: no two contents share it by accident, and equal contents share it always.
fn content_version(body: &[u8]) -> Arc<str> {
    let digest = Sha256::digest(body);
    let hex: String = digest[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Arc::from(hex)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TYPE: &str = "type.googleapis.com/test";

    fn change(name: &str, body: Option<&'static str>) -> Change {
        Change {
            type_url: TYPE.into(),
            name: name.into(),
            body: body.map(|body| Bytes::from_static(body.as_bytes())),
        }
    }

    fn since(cache: &Cache, sequence: u64) -> (Vec<String>, Vec<String>, u64) {
        let snapshot = cache.changes_since(TYPE, sequence);
        let Changes::Some { changed, removed } = snapshot.changes else {
            panic!("expected an increment");
        };
        (
            changed.iter().map(|r| r.name.to_string()).collect(),
            removed.iter().map(ToString::to_string).collect(),
            snapshot.sequence,
        )
    }

    #[test]
    fn equal_content_is_no_change() {
        let cache = Cache::new();
        assert_eq!(cache.apply([change("a", Some("1"))]), 1);
        assert_eq!(cache.apply([change("a", Some("1"))]), 1);
        assert_eq!(cache.apply([change("missing", None)]), 1);
        assert_eq!(cache.apply([change("a", Some("2"))]), 2);
        assert_eq!(cache.generation(), 2);
    }

    #[test]
    fn changes_of_one_name_are_coalesced() {
        let cache = Cache::new();
        cache.apply([change("a", Some("1")), change("b", Some("1"))]);
        let seen = cache.changes_since(TYPE, 0).sequence;
        for body in ["2", "3", "4"] {
            cache.apply([change("a", Some(body))]);
        }
        cache.apply([change("b", None)]);
        let (changed, removed, sequence) = since(&cache, seen);
        assert_eq!((changed, removed), (vec!["a".into()], vec!["b".into()]));
        assert_eq!(since(&cache, sequence), (vec![], vec![], sequence));
    }

    #[test]
    fn replace_removes_what_is_not_named() {
        let cache = Cache::new();
        let resource = |name: &str| (name.to_owned(), Bytes::new());
        cache.replace([(TYPE, vec![resource("a"), resource("b")])]);
        let seen = cache.changes_since(TYPE, 0).sequence;
        cache.replace([(TYPE, vec![resource("b")])]);
        let (changed, removed, _) = since(&cache, seen);
        assert_eq!((changed, removed), (vec![], vec!["a".to_owned()]));
        assert_eq!(cache.names(TYPE), [Arc::from("b")]);
    }

    #[test]
    fn a_subscriber_behind_the_oldest_tombstone_compares_everything() {
        let cache = Cache::new();
        cache.apply([change("stays", Some("1"))]);
        let seen = cache.changes_since(TYPE, 0).sequence;
        for index in 0..=MAX_TOMBSTONES {
            let name = format!("n{index}");
            cache.apply([change(&name, Some("1"))]);
            cache.apply([change(&name, None)]);
        }
        let Changes::Everything(all) = cache.changes_since(TYPE, seen).changes else {
            panic!("expected the whole type");
        };
        assert_eq!(all.len(), 1);
        let state = cache.lock();
        assert!(state.types[TYPE].entries.len() <= MAX_TOMBSTONES + 1);
        assert_eq!(
            state.types[TYPE].order.len(),
            state.types[TYPE].entries.len()
        );
    }

    #[test]
    fn a_subscriber_of_an_empty_cache_misses_nothing() {
        let cache = Cache::new();
        let seen = cache.changes_since(TYPE, 0).sequence;
        cache.apply([change("a", Some("1"))]);
        assert!(matches!(
            cache.changes_since(TYPE, seen).changes,
            Changes::Some { changed, .. } if changed.len() == 1
        ));
    }
}
