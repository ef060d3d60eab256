//! The control plane: from the objects that users write to what every node must know.
//!
//! ```text
//! files -> source -> store ----> compile -> xDS cache -> nodes
//!                      |            ^
//!                      v            | reports
//!                   expand -> pods -> runtime
//! ```
//!
//! - `source`: reads the folder and watches it.
//! - `store`: the objects in effect, each in its last version without errors.
//! - `expand`, `placement`: workloads to replicas on nodes.
//! - `vip`, `publish`: virtual addresses; ports on the host.
//! - `compile`: objects and reports to xDS resources.
//! - `engine`: all of these as one state; `plane`: the tasks around it and the handle, [`ControlPlane`].
//! - `status`: what operators see of it.
//! - [`ca`]: the certificate authority that nodes ask.
//!
//! Running replicas is the `runtime` crate's, enforcing policy the `node` crate's.

pub mod ca;
mod check;
mod compile;
mod engine;
mod expand;
mod placement;
mod plane;
mod publish;
mod selector;
mod source;
mod status;
mod store;
mod vip;

pub use self::{
    ca::{CaConfig, CaStatus, CertificateAuthority, JoinTokenError, OperatorCa, Placements},
    check::{CheckReport, check},
    plane::{ControlConfig, ControlError, ControlPlane},
    publish::PublishedPort,
    status::{ControlStatus, NodeSync, ObjectState, ObjectStatus},
};
