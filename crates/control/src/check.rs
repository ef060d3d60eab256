//! `heddle check`: what is wrong with a folder's objects, without running anything.

use std::path::Path;

use api::{
    check::cross_check,
    mesh::MeshConfig,
    objects::ObjectRef,
    problem::{Problem, Severity},
};
use serde::{Deserialize, Serialize};

use crate::{source, store::Store};

/// What a folder holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckReport {
    /// Files read.
    pub files: usize,
    /// Objects without errors of their own, sorted.
    pub objects: Vec<ObjectRef>,
    /// Everything that is wrong or doubtful, by file and line.
    pub problems: Vec<Problem>,
}

impl CheckReport {
    /// Number of problems that are errors.
    #[must_use]
    pub fn errors(&self) -> usize {
        self.problems
            .iter()
            .filter(|problem| problem.severity == Severity::Error)
            .count()
    }
}

/// Reads and checks every object below `folder`. A folder that cannot be read is among the problems.
#[must_use]
pub fn check(folder: &Path, mesh: &MeshConfig) -> CheckReport {
    let scan = source::scan(folder);
    let mut store = Store::default();
    store.apply(&scan);
    CheckReport {
        files: scan.files.len(),
        objects: store.effective().keys().cloned().collect(),
        problems: all_problems(&store, mesh),
    }
}

/// What is wrong with objects by themselves and with each other, by file and line.
pub(crate) fn all_problems(store: &Store, mesh: &MeshConfig) -> Vec<Problem> {
    let is_stale = |problem: &Problem| {
        let object = problem.object.as_ref();
        object
            .and_then(|object| store.effective().get(object))
            .is_some_and(|effective| effective.is_stale)
    };
    let between = cross_check(&store.all_located(), mesh);
    let mut problems = store.problems();
    // A last good version is judged by what is in effect, but its lines are no longer in the file.
    problems.extend(between.into_iter().filter(|problem| !is_stale(problem)));
    sort(&mut problems);
    problems
}

/// By file, line and column.
pub(crate) fn sort(problems: &mut [Problem]) {
    problems.sort_by(|one, other| {
        (&one.file, one.line, one.column).cmp(&(&other.file, other.line, other.column))
    });
}
