//! Who a workload is, and how it proves it: SPIFFE ids, keys and certificates, and the authority that signs them.
//!
//! - [`authority`]: the certificate authority; `control` serves it
//! - [`ca_api`]: what agents say to it
//! - [`certificate`]: certificates read, written and verified
//! - [`keeper`]: the agent's certificates, fetched and renewed
//! - [`spiffe`]: the names
//! - [`svid`]: certificates with their keys, trust bundles, and where they come from

pub mod authority;
pub mod ca_api;
pub mod certificate;
mod files;
pub mod keeper;
pub mod spiffe;
pub mod svid;

pub use keeper::{Keeper, KeeperConfig};
pub use spiffe::SpiffeId;
pub use svid::{IdentitySource, JwtError, Svid, TrustBundle};
