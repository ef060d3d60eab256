//! Node-local numbers for identities, policies and workloads, kept over restarts.
//!
//! Sockets and pinned maps outlive the agent and hold these numbers, so a number must never come to mean
//! something else: they only grow, and the file reserves them in blocks before they are used.
//!
//! The file's first line is everything at one time, every further line one change since, so that a change costs no
//! more than itself; when the changes outgrow the whole, the file is written anew. A last line without an
//! end was being written when the agent was killed: nothing has seen its number yet.

use std::{
    collections::{BTreeMap, HashSet},
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Numbers reserved by one write of the file.
const BLOCK: u32 = 4096;
/// Bytes of changes that are worth no new file.
const SMALL: usize = 64 << 10;

/// Hands out numbers.
#[derive(Debug)]
pub(crate) struct Ids {
    path: PathBuf,
    next: u32,
    state: State,
    /// Not in the file yet.
    pending: Vec<Change>,
    /// Open for changes; `None` before the file was written by this process, or after it could not be.
    file: Option<File>,
    /// Bytes of the first line, and of the changes after it.
    sizes: (usize, usize),
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct State {
    /// Every number below this may be in use somewhere.
    reserved: u32,
    /// Names that keep their number while they are needed.
    names: BTreeMap<String, u32>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Change {
    Reserved(u32),
    Named(String, u32),
    Forgotten(String),
}

impl State {
    fn read(bytes: &[u8]) -> serde_json::Result<Self> {
        let mut lines = bytes.split_inclusive(|byte| *byte == b'\n');
        let mut state: Self = serde_json::from_slice(lines.next().unwrap_or_default())?;
        for line in lines.filter(|line| line.ends_with(b"\n")) {
            state.change(serde_json::from_slice(line)?);
        }
        Ok(state)
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Reserved(reserved) => self.reserved = reserved,
            Change::Named(name, id) => drop(self.names.insert(name, id)),
            Change::Forgotten(name) => drop(self.names.remove(&name)),
        }
    }
}

impl Ids {
    /// Opens the file, or starts a new one. Number 0 is never given out.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let state = match fs::read(path) {
            Ok(bytes) => State::read(&bytes).map_err(|error| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "{} is damaged ({error}), so that the numbers in the kernel cannot be told any more: the \
                         last policy stays in force; start the mesh anew (heddle down, heddle up)",
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
            state,
            pending: Vec::new(),
            file: None,
            sizes: (0, 0),
        })
    }

    /// Whether this is a new file: no number was ever given out.
    pub(crate) fn is_new(&self) -> bool {
        self.state.reserved == 0
    }

    /// A number that was never given out before and has no name.
    pub(crate) fn fresh(&mut self) -> io::Result<u32> {
        if self.next >= self.state.reserved {
            let reserved = self.next.checked_add(BLOCK).ok_or_else(|| {
                io::Error::other(
                    "the node has used up all identity numbers: restart it with empty state",
                )
            })?;
            self.state.reserved = reserved;
            self.pending.push(Change::Reserved(reserved));
            self.save()?;
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
        self.pending.push(Change::Named(name.to_owned(), id));
        Ok(id)
    }

    /// Forgets names of one kind (the part before the first `:`) that are no longer used.
    pub(crate) fn forget_unused(&mut self, kind: &str, used: &HashSet<u32>) {
        // `;` comes right after `:`.
        let of_kind = self
            .state
            .names
            .range(format!("{kind}:")..format!("{kind};"));
        let unused: Vec<String> = of_kind
            .filter(|(_, id)| !used.contains(id))
            .map(|(name, _)| name.clone())
            .collect();
        for name in unused {
            self.state.names.remove(&name);
            self.pending.push(Change::Forgotten(name));
        }
    }

    /// Writes what changed. Must happen before the kernel sees a new number.
    pub(crate) fn save(&mut self) -> io::Result<()> {
        let outgrown = self.sizes.1 > self.sizes.0.max(SMALL);
        let outcome = match self.file.take() {
            Some(file) if self.pending.is_empty() => {
                self.file = Some(file);
                return Ok(());
            }
            Some(file) if !outgrown => self.append(file),
            _ => self.write(),
        };
        if outcome.is_ok() {
            self.pending.clear();
        }
        outcome
    }

    fn append(&mut self, mut file: File) -> io::Result<()> {
        let mut bytes = Vec::new();
        for change in &self.pending {
            serde_json::to_writer(&mut bytes, change)?;
            bytes.push(b'\n');
        }
        // After a failure the file may end anywhere: it is not added to, but written anew.
        file.write_all(&bytes)?;
        self.sizes.1 += bytes.len();
        self.file = Some(file);
        Ok(())
    }

    fn write(&mut self) -> io::Result<()> {
        let temporary = self.path.with_extension("new");
        let mut bytes = serde_json::to_vec(&self.state)?;
        bytes.push(b'\n');
        fs::write(&temporary, &bytes)?;
        let file = OpenOptions::new().append(true).open(&temporary)?;
        fs::rename(&temporary, &self.path)?;
        self.sizes = (bytes.len(), 0);
        self.file = Some(file);
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
    fn changes_are_added_and_a_torn_one_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        let mut ids = Ids::open(&path).unwrap();
        let first = ids.named("source:first").unwrap();
        ids.save().unwrap();
        let whole = fs::read(&path).unwrap();
        let second = ids.named("source:second").unwrap();
        ids.save().unwrap();
        let gone = ids.named("set:gone").unwrap();
        ids.forget_unused("set", &HashSet::new());
        ids.save().unwrap();
        let added = fs::read(&path).unwrap();
        assert!(added.starts_with(&whole) && added.len() > whole.len());

        let torn = [added.as_slice(), br#"{"named":["source:torn",7"#].concat();
        fs::write(&path, torn).unwrap();
        let mut ids = Ids::open(&path).unwrap();
        assert_eq!(ids.named("source:first").unwrap(), first);
        assert_eq!(ids.named("source:second").unwrap(), second);
        assert!(ids.named("set:gone").unwrap() > gone);
        assert!(ids.named("source:torn").unwrap() > gone);
    }

    #[test]
    fn the_file_does_not_grow_with_every_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        let mut ids = Ids::open(&path).unwrap();
        for round in 0..10_000 {
            ids.named(&format!("set:{round}")).unwrap();
            ids.forget_unused("set", &HashSet::new());
            ids.save().unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() < 2 * SMALL as u64);
        let kept = ids.named("source:kept").unwrap();
        ids.save().unwrap();
        let mut ids = Ids::open(&path).unwrap();
        assert_eq!(ids.named("source:kept").unwrap(), kept);
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ids.json");
        for damaged in ["{", "", "{\"reserved\":1,\"names\":{}}\n?\n"] {
            fs::write(&path, damaged).unwrap();
            let error = Ids::open(&path).unwrap_err().to_string();
            assert!(error.contains("damaged"), "{error}");
        }
    }
}
