//! Builds one document's tree from the parser's events.
//!
//! The parser is driven event by event and the tree grows on a stack of our own, so that no depth of
//! input can overflow the call stack and every bound is met before memory is spent.

use std::collections::HashMap;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Span, Tag};

use super::{
    Document, Fault, Glimpse, MAX_DEPTH, MAX_NODES, Member, Node, Position, Value, element, member,
    scalar,
    split::{self, Chunk},
};

/// Most faults kept for one document.
const MAX_FAULTS: usize = 100;

/// The document in `chunk`, `None` if there is nothing in it.
pub(super) fn document(chunk: &Chunk<'_>) -> Option<Document> {
    let mut builder = Builder::new(chunk);
    let outcome = match control_character(chunk) {
        Some(fault) => Err(fault),
        None => builder.run(chunk.text),
    };
    match outcome {
        Ok(()) => {
            let root = builder.root?;
            if root.value == Value::Null && builder.faults.is_empty() {
                return None;
            }
            Some(Document {
                start: root.position,
                glimpse: Glimpse::of_tree(&root),
                root: Some(root),
                faults: builder.faults,
            })
        }
        Err(fault) => {
            let seen = builder.unwind().map(|root| Glimpse::of_tree(&root));
            let glimpse = seen.unwrap_or_default().or(Glimpse::of_text(chunk.text));
            let mut faults = builder.faults;
            faults.push(fault);
            Some(Document {
                start: first_content(chunk),
                root: None,
                faults,
                glimpse,
            })
        }
    }
}

/// A collection that is not closed yet.
struct Open {
    position: Position,
    anchor: usize,
    content: Content,
}

enum Content {
    Sequence(Vec<Node>),
    Mapping {
        members: Vec<Member>,
        /// Keys so far and where they stand.
        seen: HashMap<String, Position>,
        /// A key whose value comes next.
        key: Option<(String, Position)>,
    },
}

struct Builder {
    line_offset: usize,
    /// Characters in each line. The parser can point past them: after the end of the text, and in directives.
    widths: Vec<usize>,
    stack: Vec<Open>,
    root: Option<Node>,
    /// By the parser's anchor number: the value and how many nodes it counts.
    anchors: HashMap<usize, (Node, usize)>,
    nodes: usize,
    faults: Vec<Fault>,
}

impl Builder {
    fn new(chunk: &Chunk<'_>) -> Self {
        Self {
            line_offset: chunk.first_line - 1,
            widths: widths(chunk.text),
            stack: Vec::new(),
            root: None,
            anchors: HashMap::new(),
            nodes: 0,
            faults: Vec::new(),
        }
    }

    /// Takes every event; `Err` is a fault after which the rest makes no sense.
    fn run(&mut self, text: &str) -> Result<(), Fault> {
        let mut parser = Parser::new_from_str(text);
        while let Some(next) = parser.next_event() {
            let (event, span) = next.map_err(|error| {
                fault(
                    self.position(*error.marker()),
                    "",
                    format!("not valid YAML: {}", error.info()),
                )
            })?;
            self.event(event, span)?;
        }
        Ok(())
    }

    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Fault> {
        let position = self.position(span.start);
        match event {
            Event::DocumentStart(_) if self.root.is_some() => Err(fault(
                position,
                "",
                "a second document begins here without a `---` line".into(),
            )),
            Event::Scalar(text, style, anchor, tag) => {
                self.scalar(&text, style, anchor, tag.as_deref(), position)
            }
            Event::SequenceStart(anchor, tag) => self.open(
                position,
                anchor,
                tag.as_deref(),
                Content::Sequence(Vec::new()),
            ),
            Event::MappingStart(anchor, tag) => {
                let content = Content::Mapping {
                    members: Vec::new(),
                    seen: HashMap::new(),
                    key: None,
                };
                self.open(position, anchor, tag.as_deref(), content)
            }
            Event::SequenceEnd | Event::MappingEnd => self.close(),
            Event::Alias(anchor) => {
                let Some((mut node, size)) = self.anchors.get(&anchor).cloned() else {
                    let message = "this alias stands inside of what it refers to".into();
                    return Err(fault(position, &self.path(), message));
                };
                node.position = position;
                self.count(size, position)?;
                self.add(node, 0, 0)
            }
            _ => Ok(()),
        }
    }

    fn scalar(
        &mut self,
        text: &str,
        style: ScalarStyle,
        anchor: usize,
        tag: Option<&Tag>,
        position: Position,
    ) -> Result<(), Fault> {
        self.count(1, position)?;
        if let Some(Open {
            content: Content::Mapping {
                key: key @ None, ..
            },
            ..
        }) = self.stack.last_mut()
        {
            *key = Some((text.to_owned(), position));
            let node = Node {
                position,
                value: Value::String(text.to_owned()),
            };
            self.check_key(text, style, position);
            return self.remember(anchor, &node, 1);
        }
        let value = scalar::resolve(text, style, tag).unwrap_or_else(|message| {
            let expected = "only the tags of YAML's core schema, such as !!str".to_owned();
            let path = self.path();
            self.report(Fault {
                position,
                field: path,
                message,
                expected: Some(expected),
            });
            Value::String(text.to_owned())
        });
        self.add(Node { position, value }, anchor, 1)
    }

    /// Reports a key that was there before, and a merge key.
    fn check_key(&mut self, key: &str, style: ScalarStyle, position: Position) {
        if key == "<<" && style == ScalarStyle::Plain {
            let field = self.path();
            let message = "merge keys (`<<`) belong to YAML 1.1 and are not supported".into();
            self.report(Fault {
                position,
                field,
                message,
                expected: Some("the fields themselves".into()),
            });
        }
        let Some(Open {
            content: Content::Mapping { seen, .. },
            ..
        }) = self.stack.last_mut()
        else {
            return;
        };
        if let Some(first) = seen.get(key) {
            let message = format!("the key `{key}` is given twice (first at {first})");
            self.report(fault(position, &self.path(), message));
        } else {
            seen.insert(key.to_owned(), position);
        }
    }

    fn open(
        &mut self,
        position: Position,
        anchor: usize,
        tag: Option<&Tag>,
        content: Content,
    ) -> Result<(), Fault> {
        self.count(1, position)?;
        if self.stack.len() >= MAX_DEPTH {
            let message = format!("nested deeper than {MAX_DEPTH} levels");
            return Err(fault(position, "", message));
        }
        if let Some(Open {
            content: Content::Mapping { key: None, .. },
            ..
        }) = self.stack.last()
        {
            return Err(fault(
                position,
                &self.path(),
                "a key must be a plain or quoted text".into(),
            ));
        }
        let plain = tag.is_none_or(|tag| {
            tag.is_yaml_core_schema() && matches!(tag.suffix.as_str(), "map" | "seq")
        });
        if let (false, Some(tag)) = (plain, tag) {
            self.faults
                .push(fault(position, &self.path(), scalar::unsupported(tag)));
        }
        self.stack.push(Open {
            position,
            anchor,
            content,
        });
        Ok(())
    }

    fn close(&mut self) -> Result<(), Fault> {
        let Some(open) = self.stack.pop() else {
            return Ok(());
        };
        let anchor = open.anchor;
        let node = open.into_node();
        let size = if anchor == 0 { 0 } else { size_of_tree(&node) };
        self.add(node, anchor, size)
    }

    /// Puts a finished value where it belongs.
    fn add(&mut self, node: Node, anchor: usize, size: usize) -> Result<(), Fault> {
        self.remember(anchor, &node, size)?;
        match self.stack.last_mut().map(|open| &mut open.content) {
            None => self.root = Some(node),
            Some(Content::Sequence(items)) => items.push(node),
            Some(Content::Mapping { members, key, seen }) => match (key.take(), node.value) {
                (Some((key, key_position)), value) => {
                    let value = Node {
                        position: node.position,
                        value,
                    };
                    // A repeated key has been reported; the first one counts.
                    if seen.get(&key) == Some(&key_position) {
                        members.push(Member {
                            key,
                            key_position,
                            value,
                        });
                    }
                }
                // An alias in the place of a key.
                (None, Value::String(text)) => {
                    *key = Some((text.clone(), node.position));
                    self.check_key(&text, ScalarStyle::Plain, node.position);
                }
                (None, _) => {
                    let message = "a key must be a plain or quoted text".into();
                    return Err(fault(node.position, &self.path(), message));
                }
            },
        }
        Ok(())
    }

    /// Keeps what an anchor names. The copy counts too: nested anchors copy the same values over and over.
    fn remember(&mut self, anchor: usize, node: &Node, size: usize) -> Result<(), Fault> {
        if anchor > 0 {
            self.count(size, node.position)?;
            self.anchors.insert(anchor, (node.clone(), size));
        }
        Ok(())
    }

    /// Keeps a fault, up to a bound: a document with one is not read further anyway.
    fn report(&mut self, fault: Fault) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        }
    }

    /// Counts `more` nodes against the bound.
    fn count(&mut self, more: usize, position: Position) -> Result<(), Fault> {
        self.nodes = self.nodes.saturating_add(more);
        if self.nodes <= MAX_NODES {
            return Ok(());
        }
        let message = format!("the document has more than {MAX_NODES} values, aliases expanded");
        Err(fault(position, "", message))
    }

    /// The path of the value or key that comes next.
    fn path(&self) -> String {
        self.stack
            .iter()
            .fold(String::new(), |path, open| match &open.content {
                Content::Sequence(items) => element(&path, items.len()),
                Content::Mapping {
                    key: Some((key, _)),
                    ..
                } => member(&path, key),
                Content::Mapping { .. } => path,
            })
    }

    /// The place in the file, kept inside of the document's text.
    fn position(&self, marker: Marker) -> Position {
        let line = marker.line().clamp(1, self.widths.len());
        let width = self.widths[line - 1];
        let column = if line < marker.line() {
            width
        } else {
            marker.col().min(width)
        };
        Position {
            line: line + self.line_offset,
            column: column + 1,
        }
    }

    /// What was built before a fault, its open collections closed.
    fn unwind(&mut self) -> Option<Node> {
        while let Some(open) = self.stack.pop() {
            let node = open.into_node();
            match self.stack.last_mut().map(|open| &mut open.content) {
                Some(Content::Mapping { members, key, .. }) => {
                    if let Some((key, key_position)) = key.take() {
                        members.push(Member {
                            key,
                            key_position,
                            value: node,
                        });
                    }
                }
                Some(Content::Sequence(items)) => items.push(node),
                None => self.root = Some(node),
            }
        }
        self.root.take()
    }
}

impl Open {
    fn into_node(self) -> Node {
        let value = match self.content {
            Content::Sequence(items) => Value::Sequence(items),
            Content::Mapping { members, .. } => Value::Mapping(members),
        };
        Node {
            position: self.position,
            value,
        }
    }
}

fn size_of_tree(node: &Node) -> usize {
    1 + match &node.value {
        Value::Sequence(items) => items.iter().map(size_of_tree).sum(),
        Value::Mapping(members) => members
            .iter()
            .map(|member| 1 + size_of_tree(&member.value))
            .sum(),
        _ => 0,
    }
}

fn fault(position: Position, field: &str, message: String) -> Fault {
    Fault {
        position,
        field: field.to_owned(),
        message,
        expected: None,
    }
}

/// The first character that YAML forbids (and at which the parser would take the text to end).
fn control_character(chunk: &Chunk<'_>) -> Option<Fault> {
    for (index, line) in split::lines(chunk.text).enumerate() {
        let forbidden = |c: char| c.is_ascii_control() && !matches!(c, '\t' | '\n' | '\r');
        if let Some((column, found)) = line.chars().enumerate().find(|(_, c)| forbidden(*c)) {
            let position = Position {
                line: chunk.first_line + index,
                column: column + 1,
            };
            let code = u32::from(found);
            let message = format!("the control character U+{code:04X} may not stand here");
            let expected = Some("its escape in a double-quoted text".into());
            return Some(Fault {
                position,
                field: String::new(),
                message,
                expected,
            });
        }
    }
    None
}

/// The first line of `chunk` that says something.
fn first_content(chunk: &Chunk<'_>) -> Position {
    let says_something = |line: &str| {
        let content = line.trim();
        !content.is_empty() && !content.starts_with(['#', '%']) && content != "---"
    };
    let skipped = split::lines(chunk.text)
        .position(says_something)
        .unwrap_or(0);
    Position {
        line: chunk.first_line + skipped,
        column: 1,
    }
}

/// How many characters each line has without its end. Never empty; after a last line end comes one more line.
fn widths(text: &str) -> Vec<usize> {
    let width = |line: &str| line.trim_end_matches(['\n', '\r']).chars().count();
    let mut widths: Vec<usize> = split::lines(text).map(width).collect();
    if text.is_empty() || text.ends_with(['\n', '\r']) {
        widths.push(0);
    }
    widths
}
