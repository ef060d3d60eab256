//! One metric registry with bounded series, shared by every process of the mesh.
//!
//! - [`registry`]: where metrics are registered, encoded for a scrape, and evicted.
//! - [`family`]: one metric with all its label sets, bounded.
//! - [`labels`]: what a label set is.
//! - [`tcp`]: the metrics of TCP connections, under the names that Istio's users know.
//!
//! Counting is done on handles that are resolved once; nothing on a hot path looks a label set up.
//! Access logs and flow records are not metrics and do not live here.

pub mod family;
pub mod labels;
pub mod registry;
pub mod tcp;

pub use family::Family;
pub use labels::{Labels, Series};
pub use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};
pub use registry::{CONTENT_TYPE, Registry, TelemetryError};
