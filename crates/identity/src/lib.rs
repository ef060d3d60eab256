//! Who a workload is, and how it proves it: SPIFFE ids, keys and certificates, and the authority that signs them.
//!
//! - [`spiffe`]: the names
//! - [`svid`]: certificates with their keys, trust bundles, and where they come from

pub mod spiffe;
pub mod svid;

pub use spiffe::SpiffeId;
pub use svid::{IdentitySource, JwtError, Svid, TrustBundle};
