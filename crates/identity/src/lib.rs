//! Who a workload is, and how it proves it: SPIFFE ids, keys and certificates, and the authority that signs them.
//!
//! - [`attest`]: which workload a connection comes from
//! - [`authority`]: the certificate authority; `control` serves it
//! - [`ca_api`]: what agents say to it
//! - [`certificate`]: certificates read, written and verified
//! - [`jwt_validation`]: whether a JWT-SVID holds
//! - [`keeper`]: the agent's certificates, fetched and renewed
//! - [`sds`]: what Envoy asks for on the socket
//! - [`socket`]: the socket that hands identities out to workloads
//! - [`spiffe`]: the names
//! - [`svid`]: certificates with their keys, trust bundles, and where they come from
//! - [`workload_api`]: what any SPIFFE client asks for on the socket

pub mod attest;
pub mod authority;
pub mod ca_api;
pub mod certificate;
mod files;
pub mod jwt_validation;
pub mod keeper;
pub mod sds;
pub mod socket;
pub mod spiffe;
pub mod svid;
mod watch;
pub mod workload_api;

pub use keeper::{Keeper, KeeperConfig};
pub use spiffe::SpiffeId;
pub use svid::{IdentitySource, JwtError, Svid, TrustBundle};
