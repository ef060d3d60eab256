//! What agents and the certificate authority say to each other, generated from `proto/` by `build.rs`.
//!
//! Only names and limits live here; `control` serves it, [`crate::keeper`] asks.

#![allow(missing_docs)] // Generated code; the comments are in the .proto files.
#![allow(unused_qualifications, clippy::all, clippy::use_self)] // Generated code.

/// Istio's service that signs certificates.
pub mod istio {
    tonic::include_proto!("istio.v1.auth");
}

/// Heddle's own: trust bundles and JWT-SVIDs.
pub mod heddle {
    tonic::include_proto!("heddle.identity.v1");
}

/// Port of the authority (istiod's).
pub const CA_PORT: u16 = 15012;
/// DNS name in the authority's server certificate.
pub const SERVER_NAME: &str = "heddle-control.heddle-system.svc";
/// Namespace and service account of the control plane.
pub const SERVER_ACCOUNT: (&str, &str) = ("heddle-system", "heddle-control");
/// Largest message of either side, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 64 * 1024;
/// The field of a request's metadata that says whose certificate is wanted (Istio's name for it).
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";
/// Response metadata of `RESOURCE_EXHAUSTED`: milliseconds after which another try makes sense.
pub const RETRY_AFTER: &str = "retry-after-ms";
