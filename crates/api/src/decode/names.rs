//! Texts that Kubernetes restricts: names, labels.
//!
//! Sources: <https://kubernetes.io/docs/concepts/overview/working-with-objects/names/> and
//! <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/>.

use std::collections::BTreeMap;

use super::{Cursor, shorten};

/// What kind of name a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    /// RFC 1123 label: one part of a DNS name.
    Label,
    /// RFC 1035 label: as above, but begins with a letter (names of services).
    ServiceLabel,
    /// RFC 1123 subdomain: labels joined by dots.
    Subdomain,
    /// RFC 6335 service name (names of a program's ports).
    Port,
}

impl Name {
    /// Whether `text` is such a name.
    pub(crate) fn fits(self, text: &str) -> bool {
        match self {
            Self::Label => is_label(text),
            Self::ServiceLabel => is_label(text) && !text.starts_with(|c: char| c.is_ascii_digit()),
            Self::Subdomain => text.len() <= 253 && text.split('.').all(is_label),
            Self::Port => {
                is_label(text)
                    && text.len() <= 15
                    && !text.contains("--")
                    && text.bytes().any(|byte| byte.is_ascii_lowercase())
            }
        }
    }

    fn expected(self) -> &'static str {
        match self {
            Self::Label => {
                "at most 63 of a-z, 0-9 and `-`, beginning and ending with a letter or digit"
            }
            Self::ServiceLabel => {
                "at most 63 of a-z, 0-9 and `-`, beginning with a letter, ending with a letter or digit"
            }
            Self::Subdomain => {
                "at most 253 of a-z, 0-9, `-` and `.`, every part beginning and ending with a letter or digit"
            }
            Self::Port => {
                "at most 15 of a-z, 0-9 and `-`, with a letter, beginning and ending with a letter or digit"
            }
        }
    }
}

impl Cursor<'_> {
    /// A name of the given kind.
    pub(crate) fn name(&self, kind: Name) -> String {
        let Some(text) = self.text() else {
            return String::new();
        };
        if !kind.fits(text) {
            let found = shorten(text);
            self.error(format!("{found} is not a valid name"), kind.expected());
        }
        text.to_owned()
    }

    /// Labels: keys and values as Kubernetes allows them.
    pub(crate) fn labels(&self) -> BTreeMap<String, String> {
        for (key, place, _) in self.entries() {
            place.check_label_key(key);
        }
        for (_, _, value) in self.entries() {
            let Some(text) = value.node.as_str() else {
                continue;
            };
            if !(text.is_empty() || is_qualified_part(text)) {
                let found = shorten(text);
                let expected = "at most 63 letters, digits, `-`, `_` and `.`, beginning and ending with a letter or digit";
                value.error(format!("{found} is not a valid label value"), expected);
            }
        }
        self.string_map()
    }

    /// Annotations: keys as of labels, values free.
    pub(crate) fn annotations(&self) -> BTreeMap<String, String> {
        for (key, place, _) in self.entries() {
            place.check_label_key(key);
        }
        self.string_map()
    }

    fn check_label_key(&self, key: &str) {
        let fits = match key.split_once('/') {
            Some((prefix, name)) => Name::Subdomain.fits(prefix) && is_qualified_part(name),
            None => is_qualified_part(key),
        };
        if !fits {
            let found = shorten(key);
            let expected =
                "a name such as `app`, or with a domain before it, such as `example.org/app`";
            self.error(format!("{found} is not a valid key"), expected);
        }
    }
}

fn is_label(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len())
        && text.bytes().all(allowed)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// The name part of a label's key, or a label's value.
fn is_qualified_part(text: &str) -> bool {
    let outer = |byte: &u8| byte.is_ascii_alphanumeric();
    let bytes = text.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes
            .iter()
            .all(|byte| outer(byte) || b"-_.".contains(byte))
        && bytes.first().is_some_and(outer)
        && bytes.last().is_some_and(outer)
}
