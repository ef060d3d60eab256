//! Node-local numbers for identities, policies and workloads, kept over restarts.
//!
//! Sockets and pinned maps outlive the agent and hold these numbers, so a number must never come to mean
//! something else: they only grow, and the file reserves them in blocks before they are used.

use std::{
    collections::{BTreeMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Numbers reserved by one write of the file.
const BLOCK: u32 = 4096;

/// Hands out numbers.
#[derive(Debug)]
pub(crate) struct Ids {
    path: PathBuf,
    next: u32,
    dirty: bool,
    state: State,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    /// Every number below this may be in use somewhere.
    reserved: u32,
    /// Names that keep their number while they are needed.
    names: BTreeMap<String, u32>,
}

impl Ids {
    /// Opens the file, or starts a new one. Number 0 is never given out.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let state: State = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "{} is damaged ({error}): remove it and the node's pins",
                        path.display()
                    ),
                )
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => State::default(),
            Err(error) => return Err(error),
        };
        Ok(Self {
            path: path.to_owned(),
            next: state.reserved.max(1),
            dirty: true,
            state,
        })
    }

    /// A number that was never given out before and has no name.
    pub(crate) fn fresh(&mut self) -> io::Result<u32> {
        if self.next >= self.state.reserved {
            self.state.reserved = self.next.checked_add(BLOCK).ok_or_else(|| {
                io::Error::other(
                    "the node has used up all identity numbers: restart it with empty state",
                )
            })?;
            self.write()?;
        }
        let id = self.next;
        self.next += 1;
        Ok(id)
    }

    /// The number of `name`, given out now if it has none. Durable after [`Ids::save`].
    pub(crate) fn named(&mut self, name: &str) -> io::Result<u32> {
        if let Some(id) = self.state.names.get(name) {
            return Ok(*id);
        }
        let id = self.fresh()?;
        self.state.names.insert(name.to_owned(), id);
        self.dirty = true;
        Ok(id)
    }

    /// Forgets names of one kind (the part before the first `:`) that are no longer used.
    pub(crate) fn forget_unused(&mut self, kind: &str, used: &HashSet<u32>) {
        let before = self.state.names.len();
        self.state.names.retain(|name, id| {
            name.split_once(':').is_none_or(|(other, _)| other != kind) || used.contains(id)
        });
        self.dirty |= self.state.names.len() != before;
    }

    /// Writes the names, if they changed. Must happen before the kernel sees a new one.
    pub(crate) fn save(&mut self) -> io::Result<()> {
        if self.dirty { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> io::Result<()> {
        let temporary = self.path.with_extension("new");
        let bytes = serde_json::to_vec(&self.state).map_err(io::Error::other)?;
        fs::write(&temporary, bytes)?;
        fs::rename(&temporary, &self.path)?;
        self.dirty = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_a_restart_and_are_never_reused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        let mut ids = Ids::open(&path).unwrap();
        let api = ids.named("source:api").unwrap();
        let gone = ids.named("source:gone").unwrap();
        let unnamed = ids.fresh().unwrap();
        assert!(api > 0 && api != gone);
        ids.forget_unused("source", &HashSet::from([api]));
        ids.save().unwrap();

        let mut ids = Ids::open(&path).unwrap();
        assert_eq!(ids.named("source:api").unwrap(), api);
        let again = ids.named("source:gone").unwrap();
        assert!(again > unnamed, "{again} may still be meant by a socket");
    }

    #[test]
    fn other_kinds_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut ids = Ids::open(&dir.path().join("ids.json")).unwrap();
        let policy = ids.named("policy:a/b").unwrap();
        ids.forget_unused("source", &HashSet::new());
        assert_eq!(ids.named("policy:a/b").unwrap(), policy);
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        fs::write(&path, "{").unwrap();
        assert!(
            Ids::open(&path)
                .unwrap_err()
                .to_string()
                .contains("damaged")
        );
    }
}
