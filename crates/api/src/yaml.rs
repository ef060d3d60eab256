//! YAML (and so JSON) text to value trees that know where every value stands.
//!
//! [`load`] cuts a file at its document markers and builds each document on its own, so that one broken
//! document hides no other. Scalars follow the YAML 1.2 core schema (`yes` and `on` are strings).
//! Anchors and aliases work within a document; merge keys (`<<`, YAML 1.1) and tags outside the core
//! schema are errors. What the values mean is the business of `objects`.
//!
//! Bounds: [`MAX_FILE_BYTES`], [`MAX_DEPTH`], and [`MAX_NODES`] per document after aliases are expanded.

mod build;
mod glimpse;
mod path;
mod scalar;
mod split;

use std::fmt;

pub use glimpse::Glimpse;
pub(crate) use path::{element, member};
use serde::{Deserialize, Serialize};

/// Largest file that is read, in bytes. A larger one is refused as a whole.
pub const MAX_FILE_BYTES: usize = 4 << 20;
/// Deepest nesting of mappings and sequences. A deeper document is refused.
pub const MAX_DEPTH: usize = 64;
/// Most values in one document, each anchor and each alias counted with all that it stands for. A document with more is refused.
pub const MAX_NODES: usize = 250_000;

/// A place in a file. Both count from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column, in characters.
    pub column: usize,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A value and where it begins.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Where the value begins; for an alias, where the alias stands.
    pub position: Position,
    /// The value.
    pub value: Value,
}

/// What a [`Node`] holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`, `~` or nothing at all.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A number, as it is written: whether it is whole or fits is for the reader of the field to say.
    Number(String),
    /// Any other scalar.
    String(String),
    /// A list.
    Sequence(Vec<Node>),
    /// Members in the order of the file, keys unique.
    Mapping(Vec<Member>),
}

/// One member of a mapping.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// The key. A scalar that is not a string (`8080:`) is taken as it is written.
    pub key: String,
    /// Where the key begins.
    pub key_position: Position,
    /// The value.
    pub value: Node,
}

/// One document of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    /// Where its first value begins (for a broken one, its first line).
    pub start: Position,
    /// The tree, unless the text is not YAML or exceeds a bound.
    pub root: Option<Node>,
    /// Why there is no tree, or what is wrong in it.
    pub faults: Vec<Fault>,
    /// What can still be read of a document without a tree.
    pub glimpse: Glimpse,
}

/// Something wrong with the text of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub position: Position,
    /// Path of the field, empty if it is not known.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What would be right.
    pub expected: Option<String>,
}

/// Reads every document of `text`. Empty documents are left out. Never fails: what is wrong is in each document's faults.
#[must_use]
pub fn load(text: &str) -> Vec<Document> {
    if text.len() > MAX_FILE_BYTES {
        let start = Position { line: 1, column: 1 };
        return vec![Document {
            start,
            root: None,
            faults: vec![Fault {
                position: start,
                field: String::new(),
                message: format!("the file has {} bytes", text.len()),
                expected: Some(format!(
                    "at most {MAX_FILE_BYTES} bytes: split it into several files"
                )),
            }],
            glimpse: Glimpse::default(),
        }];
    }
    split::documents(text)
        .into_iter()
        .filter_map(|chunk| build::document(&chunk))
        .collect()
}

impl Node {
    /// The value of member `key`, if this is a mapping that has it.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Self> {
        let Value::Mapping(members) = &self.value else {
            return None;
        };
        members
            .iter()
            .find(|member| member.key == key)
            .map(|member| &member.value)
    }

    /// The text, if this is a string.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only(text: &str) -> Document {
        let mut documents = load(text);
        assert_eq!(documents.len(), 1, "{documents:?}");
        documents.remove(0)
    }

    fn position(document: &Document, path: &str) -> String {
        let root = document.root.as_ref().unwrap();
        root.position_of(path).unwrap().to_string()
    }

    #[test]
    fn every_value_knows_its_place() {
        let text = "# comment\nkind: Service\nspec:\n  ports:\n  - name: http\n    port: 80\n  labels: {a.b/c: 'x', ü: \"y\"}\n";
        let document = only(text);
        assert_eq!(position(&document, ""), "2:1");
        assert_eq!(position(&document, "kind"), "2:7");
        assert_eq!(position(&document, "spec.ports[0]"), "5:5");
        assert_eq!(position(&document, "spec.ports[0].port"), "6:11");
        assert_eq!(position(&document, "spec.labels[\"a.b/c\"]"), "7:19");
        assert_eq!(position(&document, "spec.labels[\"ü\"]"), "7:27");
        assert_eq!(position(&only("a: {b: 1}\nc: [2]\n"), "a"), "1:4");
        assert_eq!(position(&only("a: {b: 1}\nc: [2]\n"), "c"), "2:4");
        let root = document.root.unwrap();
        assert_eq!(root.position_of("spec.ports[1]"), None);
        assert_eq!(root.nearest("spec.ports[1].port").to_string(), "5:5");
    }

    #[test]
    fn json_is_yaml() {
        let document =
            only("{\n\t\"kind\": \"Service\",\n\t\"spec\": {\"on\": [1, true, null]}\n}\n");
        assert_eq!(document.faults, []);
        assert_eq!(position(&document, "spec.on[1]"), "3:21");
    }

    #[test]
    fn broken_documents_leave_the_others() {
        let text = "a: 1\n---\nkind: Service\nmetadata:\n  name: web\n  namespace: shop\nspec: [1, 2\n--- # third\nb: 2\n...\n---\nc: |\n  x\n  --- y\n";
        let documents = load(text);
        assert_eq!(documents.len(), 4);
        assert_eq!(
            documents
                .iter()
                .map(|d| d.root.is_some())
                .collect::<Vec<_>>(),
            [true, false, true, true]
        );
        assert_eq!(documents[1].glimpse.kind.as_deref(), Some("Service"));
        assert_eq!(documents[1].glimpse.name.as_deref(), Some("web"));
        assert_eq!(documents[1].glimpse.namespace.as_deref(), Some("shop"));
        assert_eq!(documents[2].start.to_string(), "9:1");
        assert_eq!(position(&documents[3], "c"), "13:3");
    }

    #[test]
    fn line_ends_of_every_kind_count() {
        for end in ["\n", "\r\n", "\r"] {
            let text = ["a: 1", "---", "b: 2", "c: [", "---", "d: 4"].join(end);
            let documents = load(&text);
            assert_eq!(documents.len(), 3, "{end:?}");
            assert_eq!(documents[1].start.line, 3, "{end:?}");
            assert_eq!(documents[2].start.to_string(), "6:1", "{end:?}");
        }
    }

    #[test]
    fn scalars_follow_the_core_schema() {
        let document = only("[yes, true, 0o17, 1.5, 1e3, ~, '1', !!str 2, 1.2.3, 0x1F, .5]");
        let Value::Sequence(items) = document.root.unwrap().value else {
            panic!("not a sequence");
        };
        let values: Vec<Value> = items.into_iter().map(|item| item.value).collect();
        let string = |text: &str| Value::String(text.into());
        let number = |text: &str| Value::Number(text.into());
        assert_eq!(
            values,
            [
                string("yes"),
                Value::Bool(true),
                number("0o17"),
                number("1.5"),
                number("1e3"),
                Value::Null,
                string("1"),
                string("2"),
                string("1.2.3"),
                number("0x1F"),
                number(".5"),
            ]
        );
    }

    #[test]
    fn aliases_expand_within_bounds() {
        let document = only("a: &x {k: [1]}\nb: *x\n");
        assert_eq!(position(&document, "b"), "2:4");
        assert_eq!(position(&document, "b.k"), "1:11");

        let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..12 {
            let previous = format!("*a{},", level - 1).repeat(10);
            bomb.push_str(&format!("a{level}: &a{level} [{previous}]\n"));
        }
        let document = only(&bomb);
        assert!(document.root.is_none());
        assert!(
            document.faults[0].message.contains("250000"),
            "{:?}",
            document.faults
        );
    }

    #[test]
    fn faults_are_precise() {
        let cases = [
            (
                "a: 1\nb: 2\na: 3\n",
                "3:1",
                "a",
                "the key `a` is given twice (first at 1:1)",
            ),
            (
                "a:\n  - b: 1\n    b: 2\n",
                "3:5",
                "a[0].b",
                "the key `b` is given twice (first at 2:5)",
            ),
            ("a: !foo 1\n", "1:4", "a", "the tag !foo is not supported"),
            (
                "a: &x {b: 1}\nc:\n  <<: *x\n",
                "3:3",
                "c[\"<<\"]",
                "merge keys (`<<`) belong to YAML 1.1",
            ),
            (
                "? [a]\n: 1\n",
                "1:3",
                "",
                "a key must be a plain or quoted text",
            ),
            ("a: \u{1}\n", "1:4", "", "the control character U+0001"),
            ("a: *nope\n", "1:4", "", "unknown anchor"),
            ("a: !!int x\n", "1:4", "a", "`x` is not an int"),
        ];
        for (text, position, field, message) in cases {
            let document = only(text);
            let fault = &document.faults[0];
            assert!(fault.message.contains(message), "{text:?}: {fault:?}");
            assert_eq!(fault.position.to_string(), position, "{text:?}: {fault:?}");
            assert_eq!(fault.field, field, "{text:?}");
        }
        for depth in [MAX_DEPTH + 1, 100_000] {
            let deep = only(&"[".repeat(depth));
            assert!(deep.root.is_none());
            let message = &deep.faults[0].message;
            assert!(
                message.contains("64 levels") || message.contains("recursion limit"),
                "{message}"
            );
        }
        let large = only(&" ".repeat(MAX_FILE_BYTES + 1));
        assert!(large.faults[0].message.contains("bytes"));
    }

    #[test]
    fn nothing_in_nothing_out() {
        for text in [
            "",
            "\n\n",
            "# only a comment\n",
            "---\n---\n# x\n...\n",
            "%YAML 1.2\n---\n",
        ] {
            assert_eq!(load(text), [], "{text:?}");
        }
        assert_eq!(load("%YAML 1.2\n---\na: 1\n").len(), 1);
        assert_eq!(load("\u{feff}a: 1\n")[0].start.line, 1);
    }
}
