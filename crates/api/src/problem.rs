//! What is wrong with an object, said so that its writer can mend it: place, object, field, what was expected.

use std::{fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::objects::ObjectRef;

/// How bad a [`Problem`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The object is not taken; its last good version, if any, stays.
    Error,
    /// The object is taken, but may not do what its writer means.
    Warning,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Warning => "warning",
        })
    }
}

/// One thing wrong with one object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// Whether the object is still taken.
    pub severity: Severity,
    /// The file.
    pub file: PathBuf,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The object, if the document says which it is.
    pub object: Option<ObjectRef>,
    /// Path of the field (`spec.ports[0].port`), empty for the document as a whole.
    pub field: String,
    /// What is wrong.
    pub message: String,
    /// What would be right, where that can be said.
    pub expected: Option<String>,
}

/// `FILE:LINE:COLUMN: error: KIND NAMESPACE/NAME: FIELD: MESSAGE (expected …)`.
impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        write!(
            f,
            "{file}:{}:{}: {}: ",
            self.line, self.column, self.severity
        )?;
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)?;
        match &self.expected {
            Some(expected) => write!(f, " (expected {expected})"),
            None => Ok(()),
        }
    }
}
