//! End-to-end tests: real meshes on a real kernel, driven through the `heddle` command as a user drives it.
//!
//! One module per topic; what they share is in [`harness`]. The programs that run inside workloads are in
//! `programs/`. Build the command first: `cargo build --release --bin heddle` (as `make test` does).
#![allow(clippy::unwrap_used)] // A failed test is what a panic is for.

mod connections;
mod containment;
mod datagrams;
mod distribution;
mod enemies;
mod fail_closed;
mod handover;
mod harness;
mod identities;
mod input;
mod late;
mod life;
mod names;
mod nodes;
mod outside;
mod policy;
mod publish;
mod restarts;
mod services;
mod splice;
mod starts;
mod stress;
mod tunnel;
mod workloads;
