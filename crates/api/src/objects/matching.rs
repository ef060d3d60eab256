//! What policies compare with: texts with a wildcard, service accounts, and values with exceptions.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::decode::{Cursor, Name, shorten};

/// A text to compare with, in Istio's notation: `abc`, `abc*`, `*abc` or `*` (anything but nothing).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// Begins so.
    Prefix(String),
    /// Ends so.
    Suffix(String),
    /// Not empty.
    Present,
}

impl StringMatch {
    /// Reads Istio's notation.
    #[must_use]
    pub fn new(text: &str) -> Self {
        if text == "*" {
            Self::Present
        } else if let Some(suffix) = text.strip_prefix('*') {
            Self::Suffix(suffix.to_owned())
        } else if let Some(prefix) = text.strip_suffix('*') {
            Self::Prefix(prefix.to_owned())
        } else {
            Self::Exact(text.to_owned())
        }
    }

    /// Whether `text` matches.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == exact,
            Self::Prefix(prefix) => text.starts_with(prefix.as_str()),
            Self::Suffix(suffix) => text.ends_with(suffix.as_str()),
            Self::Present => !text.is_empty(),
        }
    }

    pub(super) fn decode(cursor: &Cursor<'_>) -> Self {
        Self::new(
            cursor
                .non_empty("a text, with `*` at one end at most")
                .unwrap_or("*"),
        )
    }
}

/// Istio's notation.
impl fmt::Display for StringMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(exact) => f.write_str(exact),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
            Self::Present => f.write_str("*"),
        }
    }
}

/// A service account, without wildcards.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ServiceAccountMatch {
    /// Namespace; the policy's own if it was not written.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl ServiceAccountMatch {
    pub(super) fn decode(cursor: &Cursor<'_>, policy_namespace: &str) -> Self {
        let text = cursor.text().unwrap_or("default");
        let (namespace, name) = text.split_once('/').unwrap_or((policy_namespace, text));
        let namespace_fits = namespace == policy_namespace || Name::Label.fits(namespace);
        if !(namespace_fits && Name::Subdomain.fits(name)) {
            let found = shorten(text);
            let expected = "ACCOUNT or NAMESPACE/ACCOUNT, without wildcards";
            cursor.error(format!("{found} is not a service account"), expected);
        }
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

/// Values of which one must match (if there are any), and values of which none may.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Values<T> {
    /// One of these must match; empty: anything does.
    pub any_of: Vec<T>,
    /// None of these may match.
    pub none_of: Vec<T>,
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Self {
            any_of: Vec::new(),
            none_of: Vec::new(),
        }
    }
}

impl<T> Values<T> {
    /// Whether they say nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.any_of.is_empty() && self.none_of.is_empty()
    }

    /// Whether they let a value pass, given how a value is compared.
    pub fn matches(&self, mut is: impl FnMut(&T) -> bool) -> bool {
        (self.any_of.is_empty() || self.any_of.iter().any(&mut is))
            && !self.none_of.iter().any(&mut is)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_are_istios() {
        for (pattern, text, matches) in [
            ("a/b", "a/b", true),
            ("a/b", "a/bc", false),
            ("a/*", "a/b", true),
            ("a/*", "b/a/", false),
            ("*/b", "a/b", true),
            ("*", "x", true),
            ("*", "", false),
            // A star in the middle is a star.
            ("a*b", "axb", false),
        ] {
            let parsed = StringMatch::new(pattern);
            assert_eq!(parsed.matches(text), matches, "{pattern} {text}");
            assert_eq!(parsed.to_string(), pattern);
        }
    }

    #[test]
    fn exceptions_win() {
        let values = Values {
            any_of: vec![1, 2],
            none_of: vec![2],
        };
        assert!(values.matches(|value| *value == 1));
        assert!(!values.matches(|value| *value == 2));
        assert!(!values.matches(|value| *value == 3));
        assert!(Values::<u8>::default().matches(|_| false));
    }
}
