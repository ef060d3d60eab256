//! From the text of a file to objects and problems.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    decode::{Cursor, Finding, Sink},
    objects::{self, DEFAULT_NAMESPACE, Object, ObjectRef},
    problem::{Problem, Severity},
    yaml::{self, Document, Fault, Glimpse, Node, Position, Value},
};

/// What a file holds.
#[derive(Debug, Clone, Default)]
pub struct Parsed {
    /// The objects without errors, in the order of the file.
    pub objects: Vec<Located>,
    /// All problems, in the order of the file. One that names an object and is an error says that this object is not among `objects`.
    pub problems: Vec<Problem>,
}

/// An object and where it was written.
#[derive(Debug, Clone)]
pub struct Located {
    /// The object.
    pub object: Object,
    /// Where it begins.
    pub source: Source,
    root: Arc<Node>,
}

/// Where an object begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The file.
    pub file: PathBuf,
    /// Line, from 1, of the object's first field.
    pub line: usize,
}

impl Located {
    /// Where the field at `path` (`spec.ports[0].port`) was written; `None` if it was not.
    #[must_use]
    pub fn position(&self, path: &str) -> Option<Position> {
        self.root.position_of(path)
    }

    /// Where the field at `path` was written, or else the innermost field around it.
    #[must_use]
    pub fn nearest(&self, path: &str) -> Position {
        self.root.nearest(path)
    }

    /// A problem of this object at the field `path`.
    #[must_use]
    pub fn problem(&self, severity: Severity, path: &str, message: String) -> Problem {
        let position = self.nearest(path);
        Problem {
            severity,
            file: self.source.file.clone(),
            line: position.line,
            column: position.column,
            object: Some(self.object.reference()),
            field: path.to_owned(),
            message,
            expected: None,
        }
    }
}

/// Reads every object of a file's text (YAML documents or JSON; `kind: List` stands for its items).
///
/// Never fails as a whole: what is wrong with one object is among the problems and touches no other.
/// Objects that are wrong with each other are [`crate::check`]'s to find.
#[must_use]
pub fn parse(file: &Path, text: &str) -> Parsed {
    let mut parsed = Parsed::default();
    for document in yaml::load(text) {
        parsed.document(file, document);
    }
    parsed
}

impl Parsed {
    fn document(&mut self, file: &Path, document: Document) {
        let readable = document.faults.is_empty();
        let reference = reference(&document.glimpse);
        let faults = document.faults.into_iter();
        self.problems
            .extend(faults.map(|fault| from_fault(file, reference.clone(), fault)));
        match document.root {
            Some(root) if readable => self.tree(file, root),
            _ => {}
        }
    }

    fn tree(&mut self, file: &Path, mut root: Node) {
        let is_list = root.get("kind").and_then(Node::as_str) == Some("List");
        if let (true, Some(items)) = (is_list, take_items(&mut root)) {
            for item in items {
                self.object(file, item);
            }
        } else {
            self.object(file, root);
        }
    }

    fn object(&mut self, file: &Path, root: Node) {
        let sink = Sink::default();
        let object = objects::decode(&Cursor::new(&root, &sink));
        let reference = reference(&Glimpse::of_tree(&root));
        let findings = sink.into_findings();
        let wrong = findings
            .iter()
            .any(|finding| finding.severity == Severity::Error);
        self.problems.extend(
            findings
                .into_iter()
                .map(|finding| from_finding(file, reference.clone(), finding)),
        );
        if let (false, Some(object)) = (wrong, object) {
            self.objects.push(Located {
                object,
                source: Source {
                    file: file.to_owned(),
                    line: root.position.line,
                },
                root: Arc::new(root),
            });
        }
    }
}

/// The items of a `kind: List`, as `kubectl get -o yaml` prints it.
fn take_items(root: &mut Node) -> Option<Vec<Node>> {
    let Value::Mapping(members) = &mut root.value else {
        return None;
    };
    let items = members.iter_mut().find(|member| member.key == "items")?;
    match std::mem::replace(&mut items.value.value, Value::Null) {
        Value::Sequence(items) => Some(items),
        _ => None,
    }
}

fn reference(glimpse: &Glimpse) -> Option<ObjectRef> {
    let kind = glimpse.kind.as_deref()?;
    let namespace = match &glimpse.namespace {
        _ if !objects::is_namespaced(kind) => "",
        Some(namespace) => namespace,
        None => DEFAULT_NAMESPACE,
    };
    Some(ObjectRef::new(kind, namespace, glimpse.name.as_deref()?))
}

fn from_fault(file: &Path, object: Option<ObjectRef>, fault: Fault) -> Problem {
    Problem {
        severity: Severity::Error,
        file: file.to_owned(),
        line: fault.position.line,
        column: fault.position.column,
        object,
        field: fault.field,
        message: fault.message,
        expected: fault.expected,
    }
}

fn from_finding(file: &Path, object: Option<ObjectRef>, finding: Finding) -> Problem {
    Problem {
        severity: finding.severity,
        file: file.to_owned(),
        line: finding.position.line,
        column: finding.position.column,
        object,
        field: finding.field,
        message: finding.message,
        expected: finding.expected,
    }
}
