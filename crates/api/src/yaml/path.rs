//! Field paths: `spec.ports[0].port`, `metadata.labels["app.kubernetes.io/name"]`.

use super::{Node, Position, Value};

/// The path of member `key` of the mapping at `parent`.
pub(crate) fn member(parent: &str, key: &str) -> String {
    let simple = !key.is_empty()
        && key
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
    match (simple, parent.is_empty()) {
        (true, true) => key.to_owned(),
        (true, false) => format!("{parent}.{key}"),
        (false, _) => format!("{parent}[{key:?}]"),
    }
}

/// The path of the item `index` of the sequence at `parent`.
pub(crate) fn element(parent: &str, index: usize) -> String {
    format!("{parent}[{index}]")
}

impl Node {
    /// Where the value at `path` begins; the root's path is empty.
    #[must_use]
    pub fn position_of(&self, path: &str) -> Option<Position> {
        match self.walk(path) {
            (node, true) => Some(node.position),
            (_, false) => None,
        }
    }

    /// Where the value at `path` begins, or else the innermost value on the way there.
    #[must_use]
    pub fn nearest(&self, path: &str) -> Position {
        self.walk(path).0.position
    }

    /// The innermost value on the way to `path`, and whether it is the one at `path`.
    fn walk(&self, path: &str) -> (&Self, bool) {
        let mut node = self;
        let mut rest = path;
        while !rest.is_empty() {
            let found = node.step(rest);
            let Some((next, after)) = found else {
                return (node, false);
            };
            (node, rest) = (next, after);
        }
        (node, true)
    }

    /// The child that `path` leads to first, and the rest of the path.
    fn step<'a, 'p>(&'a self, path: &'p str) -> Option<(&'a Self, &'p str)> {
        match &self.value {
            Value::Sequence(items) => {
                let (index, rest) = path.strip_prefix('[')?.split_once(']')?;
                Some((items.get(index.parse::<usize>().ok()?)?, rest))
            }
            // Comparing with each key's own rendering leaves no quoting to undo.
            Value::Mapping(members) => members.iter().find_map(|entry| {
                let rest = path
                    .strip_prefix('.')
                    .unwrap_or(path)
                    .strip_prefix(member("", &entry.key).as_str())?;
                let ends = rest.is_empty() || rest.starts_with(['.', '[']);
                ends.then_some((&entry.value, rest))
            }),
            _ => None,
        }
    }
}
