//! From a value tree to typed fields, collecting everything that is wrong on the way.
//!
//! A [`Cursor`] is a value with its path; [`Fields`] takes a mapping's members one by one and in the end
//! reports those that nobody asked for. Decoding never stops: a wrong value is reported to the [`Sink`] and
//! a stand-in returned, and whoever started the decoding drops the object if the sink holds an error.
//! `scalars` reads single values, `names` those that Kubernetes restricts.

mod names;
mod scalars;

use std::{cell::RefCell, collections::BTreeMap};

pub(crate) use names::Name;
pub(crate) use scalars::port;

use crate::{
    problem::Severity,
    yaml::{Member, Node, Position, Value, element, member},
};

/// Most findings kept for one document; the rest is counted.
const MAX_FINDINGS: usize = 100;

/// Something found in a document, before it is known which object and file that is.
#[derive(Debug, Clone)]
pub(crate) struct Finding {
    pub(crate) severity: Severity,
    pub(crate) position: Position,
    pub(crate) field: String,
    pub(crate) message: String,
    pub(crate) expected: Option<String>,
}

/// Collects the findings of one document.
#[derive(Debug, Default)]
pub(crate) struct Sink {
    findings: RefCell<Vec<Finding>>,
    beyond_bound: RefCell<usize>,
}

impl Sink {
    pub(crate) fn report(&self, finding: Finding) {
        let mut findings = self.findings.borrow_mut();
        // An error always gets in: without it a wrong object would be taken.
        let first_error = finding.severity == Severity::Error
            && findings
                .iter()
                .all(|known| known.severity == Severity::Warning);
        if findings.len() < MAX_FINDINGS || first_error {
            findings.push(finding);
        } else {
            *self.beyond_bound.borrow_mut() += 1;
        }
    }

    /// Whether further findings are only counted, so that no effort need go into their words.
    fn is_full(&self) -> bool {
        self.findings.borrow().len() >= MAX_FINDINGS
    }

    /// All findings in the order of the file.
    pub(crate) fn into_findings(self) -> Vec<Finding> {
        let mut findings = self.findings.into_inner();
        findings.sort_by_key(|finding| finding.position);
        let more = self.beyond_bound.into_inner();
        if let (1.., Some(last)) = (more, findings.last_mut()) {
            last.message
                .push_str(&format!(" (and {more} more problems in this object)"));
        }
        findings
    }
}

/// A value on its way to become a field.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    node: &'a Node,
    /// Where findings are shown: the value, or its key where that is what is wrong.
    position: Position,
    path: String,
    sink: &'a Sink,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(root: &'a Node, sink: &'a Sink) -> Self {
        Self {
            node: root,
            position: root.position,
            path: String::new(),
            sink,
        }
    }

    pub(crate) fn node(&self) -> &'a Node {
        self.node
    }

    /// Reports an error at this value.
    pub(crate) fn error(&self, message: impl Into<String>, expected: impl Into<String>) {
        self.report(Severity::Error, message.into(), Some(expected.into()));
    }

    /// Reports a warning at this value.
    pub(crate) fn warn(&self, message: impl Into<String>) {
        self.report(Severity::Warning, message.into(), None);
    }

    fn report(&self, severity: Severity, message: String, expected: Option<String>) {
        self.sink.report(Finding {
            severity,
            position: self.position,
            field: self.path.clone(),
            message,
            expected,
        });
    }

    /// Reports that this value has another type than the field.
    fn mismatch(&self, expected: &str) {
        let found = match &self.node.value {
            Value::Null => "nothing (null)".to_owned(),
            Value::Bool(value) => format!("the boolean {value}"),
            Value::Number(text) => format!("the number {text}"),
            Value::String(text) => format!("the string {}", shorten(text)),
            Value::Sequence(_) => "a list".to_owned(),
            Value::Mapping(_) => "a mapping".to_owned(),
        };
        self.error(format!("found {found}"), expected);
    }

    /// The members of this mapping. Whoever takes them ends with [`Fields::finish`].
    pub(crate) fn fields(&self) -> Fields<'a> {
        let members: &[Member] = match &self.node.value {
            Value::Mapping(members) => members,
            // `spec:` with nothing below it is an empty mapping in Kubernetes.
            Value::Null => &[],
            _ => {
                self.mismatch("a mapping");
                &[]
            }
        };
        Fields {
            at: self.clone(),
            members,
            known: Vec::new(),
        }
    }

    /// The items of this list.
    pub(crate) fn items(&self) -> Vec<Self> {
        let Value::Sequence(items) = &self.node.value else {
            self.mismatch("a list");
            return Vec::new();
        };
        let item = |(index, node)| Self {
            node,
            position: node.position,
            path: element(&self.path, index),
            sink: self.sink,
        };
        items.iter().enumerate().map(item).collect()
    }

    /// The members of this mapping with free keys: the key, its place (for what is wrong with the key), the value.
    pub(crate) fn entries(&self) -> Vec<(&'a str, Self, Self)> {
        let Value::Mapping(members) = &self.node.value else {
            self.mismatch("a mapping");
            return Vec::new();
        };
        let entry = |entry: &'a Member| {
            let value = self.member(entry);
            let place = Self {
                position: entry.key_position,
                ..value.clone()
            };
            (entry.key.as_str(), place, value)
        };
        members.iter().map(entry).collect()
    }

    fn member(&self, entry: &'a Member) -> Self {
        Self {
            node: &entry.value,
            position: entry.value.position,
            path: member(&self.path, &entry.key),
            sink: self.sink,
        }
    }

    /// A list of whatever `read` makes of an item.
    pub(crate) fn list<T>(&self, read: impl Fn(&Self) -> T) -> Vec<T> {
        self.items().iter().map(read).collect()
    }

    /// A mapping of text to text.
    pub(crate) fn string_map(&self) -> BTreeMap<String, String> {
        self.entries()
            .into_iter()
            .map(|(key, _, value)| (key.to_owned(), value.string()))
            .collect()
    }
}

/// The members of one mapping, taken by name.
pub(crate) struct Fields<'a> {
    at: Cursor<'a>,
    members: &'a [Member],
    known: Vec<&'static str>,
}

impl<'a> Fields<'a> {
    /// The member `key`, if it is given and not null.
    pub(crate) fn get(&mut self, key: &'static str) -> Option<Cursor<'a>> {
        self.known.push(key);
        let found = self.members.iter().find(|entry| entry.key == key)?;
        let value = self.at.member(found);
        (value.node.value != Value::Null).then_some(value)
    }

    /// The member `key`; if it is missing, that is reported where the mapping begins.
    pub(crate) fn require(&mut self, key: &'static str, expected: &str) -> Option<Cursor<'a>> {
        let found = self.get(key);
        if found.is_none() {
            self.at.sink.report(Finding {
                severity: Severity::Error,
                position: self.at.node.position,
                field: member(&self.at.path, key),
                message: format!("the required field `{key}` is missing"),
                expected: Some(expected.to_owned()),
            });
        }
        found
    }

    /// Accepts `keys` in silence.
    pub(crate) fn ignore(&mut self, keys: &[&'static str]) {
        self.known.extend(keys);
    }

    /// Accepts `keys`, and warns that they have no effect.
    pub(crate) fn inert(&mut self, keys: &[&'static str]) {
        for key in keys {
            if let Some(value) = self.get(key) {
                value.warn("has no effect in Heddle");
            }
        }
    }

    /// Refuses `key`, which is right elsewhere but not supported here, with the reason.
    pub(crate) fn unsupported(&mut self, key: &'static str, message: &str, expected: &str) {
        if let Some(value) = self.get(key) {
            value.error(message, expected);
        }
    }

    /// The mapping itself.
    pub(crate) fn at(&self) -> &Cursor<'a> {
        &self.at
    }

    /// Reports every member that nobody asked for.
    pub(crate) fn finish(self) {
        for entry in self.members {
            if self.known.contains(&entry.key.as_str()) {
                continue;
            }
            let mut message = format!("unknown field `{}`", entry.key);
            if !self.at.sink.is_full()
                && let Some(meant) = closest(&entry.key, &self.known)
            {
                message.push_str(&format!(", did you mean `{meant}`?"));
            }
            self.at.sink.report(Finding {
                severity: Severity::Error,
                position: entry.key_position,
                field: member(&self.at.path, &entry.key),
                message,
                expected: Some(one_of(&self.known)),
            });
        }
    }
}

/// `one of a, b, c`.
pub(crate) fn one_of(choices: &[&str]) -> String {
    match choices {
        [only] => format!("`{only}`"),
        _ => format!("one of {}", choices.join(", ")),
    }
}

/// The choice that `word` was probably meant to be.
pub(crate) fn closest<'c>(word: &str, choices: &[&'c str]) -> Option<&'c str> {
    // Long enough for every field; keeps the comparison's cost bounded.
    if word.len() > 64 {
        return None;
    }
    let lower = word.to_lowercase();
    let distance = |choice: &&str| strsim::damerau_levenshtein(&lower, &choice.to_lowercase());
    let best = choices
        .iter()
        .copied()
        .min_by_key(|choice| distance(choice))?;
    let allowed = (word.chars().count().max(best.len()) / 3).max(1);
    (distance(&best) <= allowed).then_some(best)
}

/// A text for a message: quoted, and cut after 40 characters.
pub(crate) fn shorten(text: &str) -> String {
    const LONGEST: usize = 40;
    if text.chars().count() <= LONGEST {
        return format!("{text:?}");
    }
    let start: String = text.chars().take(LONGEST).collect();
    format!("{start:?}…")
}
