//! The objects in effect: for each, the last version without errors.
//!
//! A mistake keeps to itself. A document that says which object it is and is wrong keeps that object's last
//! good version; one that does not even say that keeps everything that its file held. A file that is gone, or a
//! document that is gone from a file without such a mistake, takes its objects with it. If two files hold the same object, the
//! one that was first in effect stays.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::Arc,
};

use api::{
    Located,
    objects::{Object, ObjectRef},
    problem::{Problem, Severity},
};

use crate::source::Scan;

/// All that files have said.
#[derive(Debug, Default)]
pub(crate) struct Store {
    files: BTreeMap<PathBuf, FileState>,
    /// Problems with the folder as such.
    folder_problems: Vec<Problem>,
    effective: BTreeMap<ObjectRef, Effective>,
}

/// An object in effect.
#[derive(Debug, Clone)]
pub(crate) struct Effective {
    pub(crate) located: Arc<Located>,
    /// The file now says something else, which is wrong.
    pub(crate) is_stale: bool,
    file: PathBuf,
}

#[derive(Debug, Default)]
struct FileState {
    /// `None` if it could not be read.
    text: Option<String>,
    objects: BTreeMap<ObjectRef, Arc<Located>>,
    /// Those of `objects` that are kept from an earlier text.
    stale: BTreeSet<ObjectRef>,
    /// Good objects that the file holds a second time.
    duplicates: Vec<Arc<Located>>,
    problems: Vec<Problem>,
}

impl Store {
    /// Takes in what the folder holds now. Returns whether the objects or their problems may have changed.
    pub(crate) fn apply(&mut self, scan: &Scan) -> bool {
        let mut changed = false;
        if scan.incomplete.is_empty() {
            let before = self.files.len();
            self.files.retain(|path, _| scan.files.contains_key(path));
            changed |= self.files.len() != before;
        }
        for (path, text) in &scan.files {
            let state = self.files.entry(path.clone()).or_default();
            changed |= state.apply(path, text);
        }
        let folder_problems: Vec<Problem> = scan
            .incomplete
            .iter()
            .map(|(path, message)| file_problem(path, message))
            .collect();
        changed |= folder_problems != self.folder_problems;
        self.folder_problems = folder_problems;
        if changed {
            self.choose();
        }
        changed
    }

    /// The objects in effect.
    pub(crate) fn effective(&self) -> &BTreeMap<ObjectRef, Effective> {
        &self.effective
    }

    /// Objects in effect of one kind.
    pub(crate) fn iter<'a, T: 'a>(
        &'a self,
        pick: impl Fn(&'a Object) -> Option<&'a T> + 'a,
    ) -> impl Iterator<Item = (&'a Arc<Located>, &'a T)> {
        self.effective.values().filter_map(move |effective| {
            Some((&effective.located, pick(&effective.located.object)?))
        })
    }

    /// Every object that any file holds, those that lost to another of the same name too.
    pub(crate) fn all_located(&self) -> Vec<Located> {
        self.files
            .values()
            .flat_map(|state| state.objects.values().chain(&state.duplicates))
            .map(|located| Located::clone(located))
            .collect()
    }

    /// What is wrong with single files and documents.
    pub(crate) fn problems(&self) -> Vec<Problem> {
        self.folder_problems
            .iter()
            .chain(self.files.values().flat_map(|state| &state.problems))
            .cloned()
            .collect()
    }

    fn choose(&mut self) {
        let mut chosen: BTreeMap<ObjectRef, Effective> = BTreeMap::new();
        for (path, state) in &self.files {
            for (reference, located) in &state.objects {
                let owner = self
                    .effective
                    .get(reference)
                    .map(|effective| &effective.file);
                if chosen.contains_key(reference) && owner != Some(path) {
                    continue;
                }
                chosen.insert(
                    reference.clone(),
                    Effective {
                        located: Arc::clone(located),
                        is_stale: state.stale.contains(reference),
                        file: path.clone(),
                    },
                );
            }
        }
        self.effective = chosen;
    }
}

impl FileState {
    fn apply(&mut self, path: &Path, text: &Result<String, String>) -> bool {
        let text = match text {
            Ok(text) if self.text.as_ref() == Some(text) => {
                return false;
            }
            Ok(text) => text,
            Err(message) => {
                let problems = vec![file_problem(path, message)];
                let changed = self.problems != problems;
                self.problems = problems;
                self.stale = self.objects.keys().cloned().collect();
                // So that the same text as before counts as new once it can be read again.
                self.text = None;
                return changed;
            }
        };
        let parsed = api::parse(path, text);
        let is_error = |problem: &&Problem| problem.severity == Severity::Error;
        let errors = || parsed.problems.iter().filter(is_error);
        let wrong: BTreeSet<&ObjectRef> = errors()
            .filter_map(|problem| problem.object.as_ref())
            .collect();
        let keeps_all = errors().any(|problem| problem.object.is_none());
        let mut objects = BTreeMap::new();
        let mut duplicates = Vec::new();
        for located in parsed.objects {
            let located = Arc::new(located);
            let reference = located.object.reference();
            match objects.entry(reference) {
                std::collections::btree_map::Entry::Vacant(entry) => {
                    entry.insert(located);
                }
                std::collections::btree_map::Entry::Occupied(_) => duplicates.push(located),
            }
        }
        let mut stale = BTreeSet::new();
        for (reference, located) in &self.objects {
            if !objects.contains_key(reference) && (keeps_all || wrong.contains(reference)) {
                objects.insert(reference.clone(), Arc::clone(located));
                stale.insert(reference.clone());
            }
        }
        *self = Self {
            text: Some(text.clone()),
            objects,
            stale,
            duplicates,
            problems: parsed.problems,
        };
        true
    }
}

fn file_problem(path: &Path, message: &str) -> Problem {
    Problem {
        severity: Severity::Error,
        file: path.to_owned(),
        line: 1,
        column: 1,
        object: None,
        field: String::new(),
        message: message.to_owned(),
        expected: None,
    }
}

#[cfg(test)]
mod tests;
