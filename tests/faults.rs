//! Every call that can fail fails once, at every place of a fixed scenario: in the image, the state directory and the
//! store directory, of each kind, with EIO and with ENOSPC. And a store that hangs.
//!
//! `FLEECEFS_FULL=1` runs every combination; without it every place is visited, with alternating errors and policies.

#![cfg(not(feature = "shuttle"))]

#[path = "core/rig.rs"]
mod rig;

#[path = "faults/hang.rs"]
mod hang;
#[path = "faults/nth.rs"]
mod nth;
#[path = "faults/scenario.rs"]
mod scenario;
#[path = "faults/words.rs"]
mod words;
