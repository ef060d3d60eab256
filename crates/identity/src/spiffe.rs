//! SPIFFE ids as the mesh uses them, and where they stand in a certificate.
//!
//! A workload's is `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`, as in Istio. A node's agent has one under
//! `/heddle/node/`, where no workload's can be. Source: the SPIFFE-ID and X.509-SVID standards, spiffe.io.

use std::{fmt, str::FromStr};

use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

/// Longest id that is read (SPIFFE-ID, section 2.3, asks for this much).
const MAX_LENGTH: usize = 2048;
const SCHEME: &str = "spiffe://";
const NODE_PATH: &str = "/heddle/node/";

/// A SPIFFE id: trust domain and path, in the form that the standard calls normal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    text: String,
    /// Where the path begins in `text`.
    path: usize,
}

/// Why a text is no SPIFFE id, or a certificate has none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeError {
    /// The text does not follow the standard.
    #[error("`{id}` is no SPIFFE id: {reason}")]
    Malformed {
        /// The text, cut short.
        id: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The certificate cannot be read.
    #[error("the certificate cannot be read: {0}")]
    Certificate(String),
    /// The certificate names nobody, or more than one.
    #[error("the certificate has {count} URI names where an X.509-SVID has exactly one")]
    NotOneUri {
        /// How many there are.
        count: usize,
    },
}

impl SpiffeId {
    /// The id of workloads that run under a service account.
    ///
    /// # Errors
    /// A name has characters that an id cannot have.
    pub fn of_account(
        trust_domain: &str,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeError> {
        format!("{SCHEME}{trust_domain}/ns/{namespace}/sa/{service_account}").parse()
    }

    /// The id of a node's agent.
    ///
    /// # Errors
    /// A name has characters that an id cannot have.
    pub fn of_node(trust_domain: &str, node: &str) -> Result<Self, SpiffeError> {
        format!("{SCHEME}{trust_domain}{NODE_PATH}{node}").parse()
    }

    /// The one that a certificate (DER) is issued to.
    ///
    /// # Errors
    /// The certificate cannot be read, or has not exactly one URI name, or that is no SPIFFE id.
    pub fn of_certificate(certificate: &[u8]) -> Result<Self, SpiffeError> {
        let (_, certificate) = X509Certificate::from_der(certificate)
            .map_err(|error| SpiffeError::Certificate(error.to_string()))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|error| SpiffeError::Certificate(error.to_string()))?;
        let uris: Vec<&str> = names
            .iter()
            .flat_map(|names| &names.value.general_names)
            .filter_map(|name| match name {
                GeneralName::URI(uri) => Some(*uri),
                _ => None,
            })
            .collect();
        match uris[..] {
            [uri] => uri.parse(),
            _ => Err(SpiffeError::NotOneUri { count: uris.len() }),
        }
    }

    /// The whole id, with `spiffe://`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// As policies write it: without `spiffe://`.
    #[must_use]
    pub fn principal(&self) -> &str {
        &self.text[SCHEME.len()..]
    }

    /// The trust domain.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.path]
    }

    /// Everything after the trust domain, with the leading slash; empty for a trust domain's own id.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.text[self.path..]
    }

    /// Namespace and service account, if it is a workload's.
    #[must_use]
    pub fn account(&self) -> Option<(&str, &str)> {
        let (namespace, account) = self.path().strip_prefix("/ns/")?.split_once("/sa/")?;
        let one = |name: &str| !name.is_empty() && !name.contains('/');
        (one(namespace) && one(account)).then_some((namespace, account))
    }

    /// The node's name, if it is an agent's.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        let node = self.path().strip_prefix(NODE_PATH)?;
        (!node.contains('/')).then_some(node)
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        let malformed = |reason| SpiffeError::Malformed {
            id: text.chars().take(120).collect(),
            reason,
        };
        if text.len() > MAX_LENGTH {
            return Err(malformed("it is longer than 2048 bytes"));
        }
        let rest = text
            .strip_prefix(SCHEME)
            .ok_or_else(|| malformed("it does not begin with spiffe://"))?;
        let domain = rest.split('/').next().unwrap_or_default();
        if domain.is_empty() || domain.len() > 255 {
            return Err(malformed("a trust domain has 1 to 255 characters"));
        }
        if !domain.bytes().all(|byte| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte)
        }) {
            return Err(malformed("a trust domain has only a-z, 0-9, `.`, `-`, `_`"));
        }
        let path = &rest[domain.len()..];
        for segment in path.split('/').skip(1) {
            if matches!(segment, "" | "." | "..") {
                return Err(malformed("a part of its path is empty, `.` or `..`"));
            }
            if !segment
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
            {
                return Err(malformed("a path has only letters, digits, `.`, `-`, `_`"));
            }
        }
        Ok(Self {
            text: text.to_owned(),
            path: SCHEME.len() + domain.len(),
        })
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests;
