//! The kernel side of Heddle: eBPF programs (`bpf/`), their loader, typed maps and flow events.
//!
//! This is the only crate that knows BPF. What the maps *mean* is decided in crate `node`, which fills
//! them from policy; here they are just tables with room or without. A life of a connection through the
//! programs is told in ARCHITECTURE.md.

mod attach;
mod btf;
mod counters;
mod datagrams;
mod error;
mod events;
mod loader;
mod maps;
mod migrate;
mod pinned;
pub mod ports;
mod probe;
mod raw;
mod reason;
mod steer;
mod sys;
mod table;
mod types;
mod usage;
mod view;

/// Room in the maps.
pub use api::map_sizes::MapSizes;
pub use attach::AttachedProgram;
/// What may be a key or a value of a [`Table`].
pub use aya::Pod;
pub use datagrams::Datagrams;
pub use error::KernelError;
pub use events::FlowReader;
pub use loader::{Kernel, KernelConfig, Tables};
pub use pinned::{MapMemory, PinnedMaps};
pub use ports::{DELIVERY_MARK, DELIVERY_MASK, delivery_mark};
pub use probe::missing_features;
pub use reason::Reason;
pub use table::Table;
pub use types::{
    Action, Address, AddressEntry, CaptureKey, CaptureKind, CgroupEntry, DatagramFlow, DeviceEntry,
    EndpointEntry, FlowEvent, FlowKind, Grant, ServiceEntry, ServiceKey, SlotEntry, SlotKey,
    SocketClass, SocketState, SpliceConnection, SplicePair, SpliceState, Tuple, VerdictEntry,
    VerdictKey, WorkloadEntry,
};
pub use usage::MapUse;
pub use view::{KernelView, ServiceTargets, Targets};

/// Identity id of peers that nobody vouches for (traffic from outside the mesh).
pub const SOURCE_ANONYMOUS: u32 = 0;
