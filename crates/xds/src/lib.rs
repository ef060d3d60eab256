//! Delta xDS: the seam between the control plane and the data planes.
//!
//! - [`proto`]: the messages of the workload API (`istio.workload`, `istio.security`) and Heddle's additions.
//! - [`cache`]: what the server serves, versioned by content.
//! - [`server`]: delta ADS to any number of subscribers, with their acknowledgements on record.
//! - [`client`]: a delta ADS subscriber that reconnects and never forgets what it holds.
//!
//! Which resources exist and what they mean is decided elsewhere: by the `control` crate that fills the
//! cache and by the `node` crate that reads the client's updates. The ADS messages themselves are
//! Envoy's, from the `envoy-types` crate, so that a real ztunnel or Envoy can take the client's place.

pub mod cache;
pub mod client;
pub mod proto;
pub mod server;

/// Largest ADS message that is sent or accepted, in bytes: ztunnel's own bound. A first answer holds a
/// whole type (10,000 workloads are about 4 MiB).
pub const MAX_MESSAGE_BYTES: usize = 200 * 1024 * 1024;
