//! Certificate requests (PKCS #10): read, and checked to be signed by the key that they ask a certificate for.
//!
//! Of what a request wishes, only its names are looked at: they must be none, or exactly the identity that is signed.

use rcgen::{PKCS_ECDSA_P256_SHA256, PublicKeyData as _, SubjectPublicKeyInfo};
use rustls::pki_types::{CertificateSigningRequestDer, pem::PemObject as _};
use x509_parser::{
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    prelude::{FromDer as _, GeneralName, ParsedExtension},
};

use super::SignError;
use crate::SpiffeId;

/// A P-256 request has a few hundred bytes.
const MAX_BYTES: usize = 16 * 1024;
/// Longest text of a request that is repeated in an error.
const MAX_TOLD: usize = 200;

/// A request whose signature is right.
#[derive(Debug)]
pub struct Request {
    pub(super) key: SubjectPublicKeyInfo,
    /// Subject alternative names; those that are no URI with their kind before them.
    names: Vec<String>,
}

impl Request {
    /// Reads a request in PEM.
    ///
    /// # Errors
    /// It is no request, its key is not P-256, or it is not signed by its key.
    pub fn from_pem(text: &str) -> Result<Self, SignError> {
        if text.len() > MAX_BYTES {
            return Err(too_long());
        }
        let der = CertificateSigningRequestDer::from_pem_slice(text.as_bytes())
            .map_err(|error| SignError::Malformed(format!("it is no PEM: {error}")))?;
        Self::from_der(&der)
    }

    /// Reads a request in DER.
    ///
    /// # Errors
    /// As [`Request::from_pem`].
    pub fn from_der(der: &[u8]) -> Result<Self, SignError> {
        if der.len() > MAX_BYTES {
            return Err(too_long());
        }
        let (rest, request) = X509CertificationRequest::from_der(der)
            .map_err(|error| SignError::Malformed(error.to_string()))?;
        if !rest.is_empty() {
            return Err(SignError::Malformed("bytes follow it".into()));
        }
        let info = &request.certification_request_info;
        let key = SubjectPublicKeyInfo::from_der(info.subject_pki.raw)
            .ok()
            .filter(|key| key.algorithm() == &PKCS_ECDSA_P256_SHA256)
            .ok_or(SignError::KeyType)?;
        request
            .verify_signature()
            .map_err(|_| SignError::Signature)?;
        let mut names = Vec::new();
        for attribute in info.iter_attributes() {
            match attribute.parsed_attribute() {
                ParsedCriAttribute::ExtensionRequest(wishes) => {
                    for wish in &wishes.extensions {
                        names.extend(names_of(wish.parsed_extension())?);
                    }
                }
                ParsedCriAttribute::ChallengePassword(_)
                | ParsedCriAttribute::UnsupportedAttribute => {}
            }
        }
        Ok(Self { key, names })
    }

    /// Checks that it asks for nobody else.
    ///
    /// # Errors
    /// It has names, and not exactly this one.
    pub fn check_name(&self, id: &SpiffeId) -> Result<(), SignError> {
        if self.names.is_empty() || self.names == [id.as_str()] {
            return Ok(());
        }
        Err(SignError::OtherName {
            asked: self.names.join(", ").chars().take(MAX_TOLD).collect(),
            id: id.to_string(),
        })
    }
}

fn names_of(extension: &ParsedExtension<'_>) -> Result<Vec<String>, SignError> {
    match extension {
        ParsedExtension::SubjectAlternativeName(names) => Ok(names
            .general_names
            .iter()
            .map(|name| match name {
                GeneralName::URI(uri) => (*uri).to_owned(),
                other => other.to_string(),
            })
            .collect()),
        ParsedExtension::ParseError { .. } => Err(SignError::Malformed(
            "an extension that it asks for is malformed".into(),
        )),
        _ => Ok(Vec::new()),
    }
}

fn too_long() -> SignError {
    SignError::Malformed(format!("it is longer than {MAX_BYTES} bytes"))
}

#[cfg(test)]
mod tests;
