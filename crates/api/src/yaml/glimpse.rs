//! What can be read of a document that is broken: enough to say which object it was meant to be.

use super::{Node, split};

/// The identity of an object, as far as it can be read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Glimpse {
    /// `kind`.
    pub kind: Option<String>,
    /// `metadata.namespace`.
    pub namespace: Option<String>,
    /// `metadata.name`.
    pub name: Option<String>,
}

impl Glimpse {
    /// Reads it from a tree, in part built or whole.
    pub(crate) fn of_tree(root: &Node) -> Self {
        let metadata = root.get("metadata");
        let text = |node: Option<&Node>| node.and_then(Node::as_str).map(str::to_owned);
        Self {
            kind: text(root.get("kind")),
            namespace: text(metadata.and_then(|metadata| metadata.get("namespace"))),
            name: text(metadata.and_then(|metadata| metadata.get("name"))),
        }
    }

    /// Reads it from the lines of a text that is not YAML: the outermost `kind:`, and the first level below the outermost `metadata:`.
    pub(super) fn of_text(text: &str) -> Self {
        let mut glimpse = Self::default();
        let mut outermost = None;
        let mut metadata_indent: Option<Option<usize>> = None;
        for line in split::lines(text) {
            let content = line.trim();
            let Some((key, value)) = content.split_once(':') else {
                continue;
            };
            let key = unquote(key);
            if key.starts_with('#') || key.contains(' ') {
                continue;
            }
            let indent = line.len() - line.trim_start().len();
            let outer = *outermost.get_or_insert(indent);
            if indent <= outer {
                metadata_indent = (key == "metadata").then_some(None);
                if key == "kind" {
                    glimpse.kind = scalar(value);
                }
                continue;
            }
            let Some(inner) = metadata_indent.as_mut() else {
                continue;
            };
            if indent == *inner.get_or_insert(indent) {
                match key {
                    "name" => glimpse.name = scalar(value),
                    "namespace" => glimpse.namespace = scalar(value),
                    _ => {}
                }
            }
        }
        glimpse
    }

    /// Fills what is missing from `other`.
    pub(super) fn or(self, other: Self) -> Self {
        Self {
            kind: self.kind.or(other.kind),
            namespace: self.namespace.or(other.namespace),
            name: self.name.or(other.name),
        }
    }
}

/// A value on a line: without comment, comma and quotes; `None` if that leaves nothing like a name.
fn scalar(value: &str) -> Option<String> {
    let value = value.split(" #").next().unwrap_or(value);
    let value = unquote(value.trim().trim_end_matches(','));
    let name_like = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    (!value.is_empty() && value.bytes().all(name_like)).then(|| value.to_owned())
}

fn unquote(text: &str) -> &str {
    text.trim().trim_matches(['"', '\''])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_yaml_and_json_lines() {
        let expected = Glimpse {
            kind: Some("Service".into()),
            namespace: Some("shop".into()),
            name: Some("web".into()),
        };
        let yaml = "# x: y\nkind: Service # c\nmetadata:\n  labels:\n    name: no\n  name: 'web'\n  namespace: shop\nspec:\n  name: other\n\tbroken";
        assert_eq!(Glimpse::of_text(yaml), expected);
        let json = "{\n  \"kind\": \"Service\",\n  \"metadata\": {\n    \"name\": \"web\",\n    \"namespace\": \"shop\"\n  },\n  \"spec\": {{\n";
        assert_eq!(Glimpse::of_text(json), expected);
    }
}
