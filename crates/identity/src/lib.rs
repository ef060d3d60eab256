//! Who a workload is, and how it proves it: SPIFFE ids, keys and certificates, and the authority that signs them.
//!
//! - [`spiffe`]: the names

pub mod spiffe;

pub use spiffe::SpiffeId;
