//! The certificate authority over real TLS on loopback: who gets what, who is refused and told why, and keepers that live
//! through renewals, rotations and restarts.

#![allow(clippy::unwrap_used)] // A test fails by panicking.

mod keeper;
mod refusals;
mod world;
