//! qcow2 images changed by several threads at once, and on media that fail.
//!
//! More than a million operations in all, each test tells how many so far; `FLEECEFS_FULL=1` takes twenty times as
//! many, and lets every single call fail.

#![cfg(not(any(feature = "shuttle", loom)))]

#[path = "qcow2_concurrency/cells.rs"]
mod cells;
#[path = "qcow2_crash/driver.rs"]
mod driver;
#[path = "qcow2_concurrency/faults.rs"]
mod faults;
#[path = "qcow2_concurrency/gate.rs"]
mod gate;
// The crash tests ask for more of it.
#[allow(dead_code)]
#[path = "qcow2_crash/images.rs"]
mod images;
#[path = "qcow2_concurrency/stalls.rs"]
mod stalls;
#[path = "qcow2_concurrency/stress.rs"]
mod stress;
mod tools;
